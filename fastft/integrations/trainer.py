"""transformers' Trainer, and the trainers that are made from it: a callback that compiles the model."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.training_args import ParallelMode, TrainingArguments

from fastft.compat.dynamo import is_compiled
from fastft.errors import UserError
from fastft.rewriter.options import Options
from fastft.rewriter.report.history import compilations
from fastft.units import GIB

log = logging.getLogger("fastft")


@dataclass(frozen=True)
class _Begin:
    """When the steps began that are logged next: seconds on a clock, steps and tokens until then."""

    seconds: float
    steps: int
    tokens: int


class TrainerCallback(transformers.TrainerCallback):
    """Compile the model of a Trainer in place when training begins.

    By then adapters are on it, ``model_init`` has made it, and accelerate has sharded it or put DDP around it.  A model
    that is compiled already stays as it is.

    options: the backend's, as for ``torch.compile``; OptionsError for one that it does not have.  log_to: the Trainer
    that is told, whenever it logs a loss, how fast and in how much memory the steps since then ran.
    """

    def __init__(
        self, options: Mapping[str, Any] | Options | None = None, log_to: transformers.Trainer | None = None
    ) -> None:
        Options.parse(options)
        self.options = options
        self.log_to = log_to
        self.begin: _Begin | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Compile the model, or raise UserError where the Trainer runs it in a way that compilation is not right for.

        transformers calls this before its first step, and again when it begins anew with smaller batches.
        """
        self.begin = None
        if model is None:
            raise UserError("The Trainer has no model to compile.")
        if is_compiled(model):
            log.info("fastft: the model is compiled already, and stays as it is")
            return
        refuse(args, model)
        model.compile(backend="fastft", options=self.options)

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Note when the first of the steps begins that are logged next."""
        if self.begin is None:
            self.begin = _Begin(time.perf_counter(), state.global_step, state.num_input_tokens_seen)

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Log figures beside a loss of training."""
        if self.log_to is None or self.begin is None or "loss" not in (logs or {}):
            return
        figures = figures_of(self.begin, state)
        self.begin = None
        # Trainers have logs of their own that add what they collect since the last one, and here there is nothing new.
        transformers.Trainer.log(self.log_to, figures)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Leave an evaluation out of the time that is logged next."""
        self.begin = None

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Leave a checkpoint out of the time that is logged next."""
        self.begin = None


def refuse(args: TrainingArguments, model: nn.Module) -> None:
    """Raise UserError, one sentence, for what would run the model otherwise than it was compiled."""
    if args.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError(
            "The Trainer compiles the model too: leave out torch_compile, torch_compile_backend and accelerate's "
            "dynamo_backend, or fastft's callback."
        )
    if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
        raise UserError(
            f"The Trainer would copy the model to {args.n_gpu} GPUs in each step, which compiled models do not stand: "
            f"start it with `torchrun --nproc-per-node {args.n_gpu}`, or show it one GPU by CUDA_VISIBLE_DEVICES."
        )
    if args.deepspeed_plugin is not None:
        raise UserError("fastft is not tested with DeepSpeed: use DDP, or FSDP2 by `fsdp_config`.")
    if _is_of_fsdp1(model):
        raise UserError("fastft takes models that are sharded by FSDP2: set `version` in `fsdp_config` to 2.")


def _is_of_fsdp1(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(model, FullyShardedDataParallel)


def figures_of(begin: _Begin, state: Any) -> dict[str, float]:
    """Return what is logged of the steps since then, names beginning with ``fastft/``.

    Tokens are known where the Trainer counts them (``include_num_input_tokens_seen``), memory on CUDA devices, and a
    planned peak where a graph has a plan.
    """
    report = compilations()
    seconds = max(time.perf_counter() - begin.seconds, 1e-9)
    found = {
        "seconds_per_step": seconds / max(1, state.global_step - begin.steps),
        "compile_seconds": sum(graph.seconds for graph in report.graphs),
        "graphs": len(report.graphs),
    }
    if state.num_input_tokens_seen > begin.tokens:
        found["tokens_per_second"] = (state.num_input_tokens_seen - begin.tokens) / seconds
    if torch.cuda.is_available():
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    plans = [graph.plan for graph in report.graphs if graph.plan is not None]
    if plans:
        found["planned_peak_gib"] = max(plan.peak_bytes for plan in plans) / GIB
        found["planned_host_gib"] = max(plan.host_bytes for plan in plans) / GIB
    return {f"fastft/{name}": float(value) for name, value in found.items()}
