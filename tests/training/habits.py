"""What transformers' Trainer does at its users' wish; the model is compiled by `fastft.TrainerCallback`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import fastft
from training.setting import Setting, batch
from training.trainer_setting import STEPS, Rows, arguments, run, tokenizer

SEEN = ("loss", "grad_norm", "eval_loss", "eval_right", "eval_mass")


def made(
    setting: Setting, model: Any = None, *, callbacks: Sequence[Any] = (), kind: Any = Trainer, **more: Any
) -> Trainer:
    """A Trainer of all of a small model, if none is given.  more: for it, or for its arguments."""
    own = {name: more.pop(name) for name in list(more) if name in NOT_SETTINGS}
    if "model_init" not in own:
        own["model"] = setting.model(lora=None) if model is None else model
    compiles = [fastft.TrainerCallback(setting.options)] if setting.compiled else []
    settings = TrainingArguments(**arguments(setting, **more))
    return kind(args=settings, callbacks=[*callbacks, *compiles], **{"train_dataset": Rows(), **own})


NOT_SETTINGS = (
    "model_init", "data_collator", "train_dataset", "eval_dataset", "compute_metrics", "preprocess_logits_for_metrics"
)  # fmt: skip


def logged(trainer: Trainer) -> list[float]:
    """What it logged, of SEEN."""
    return [float(row[name]) for row in trainer.state.log_history for name in SEEN if name in row]


def made_anew(setting: Setting) -> list[float]:
    """`fastft.TrainerCallback`, a model that `model_init` makes, LoRA"""
    return run(made(setting, model_init=lambda: setting.model()))


def paged(setting: Setting) -> list[float]:
    """`Trainer(optim="paged_adamw_8bit", torch_empty_cache_steps=1)`"""
    return run(made(setting, optim="paged_adamw_8bit", torch_empty_cache_steps=1))


def checkpointed_reentrant(setting: Setting) -> list[float]:
    """`Trainer(gradient_checkpointing=True)` with `use_reentrant`"""
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    return run(made(setting, **more))


def grouped_by_length(setting: Setting) -> list[float]:
    """`Trainer(train_sampling_strategy="group_by_length")`, each batch padded to its longest row"""
    lengths = torch.randint(5, 20, (8 * STEPS,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [batch(number, 2, length)["input_ids"][1].tolist() for number, length in enumerate(lengths)]
    rows = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids]
    collator = DataCollatorForSeq2Seq(tokenizer())
    return run(made(setting, train_dataset=rows, data_collator=collator, train_sampling_strategy="group_by_length"))


def smaller_batches(setting: Setting) -> list[float]:
    """`Trainer(auto_find_batch_size=True)` whose memory runs out in the second backward"""
    model = setting.model(lora=None)
    backwards = 0

    def run_out(gradient: Tensor) -> None:
        nonlocal backwards
        backwards += 1
        if backwards == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.model.norm.weight.register_hook(run_out)
    gc.freeze()  # before each attempt accelerate collects several times, and what lives by then is much
    trainer = made(setting, model, auto_find_batch_size=True, per_device_train_batch_size=4)
    seen = run(trainer)
    assert backwards == 2 + STEPS
    return [*seen, float(trainer._train_batch_size)]


def noisy(setting: Setting) -> list[float]:
    """`Trainer(neftune_noise_alpha=5)`: the same noise from the same seed"""
    return run(made(setting, neftune_noise_alpha=5))


def smoothed(setting: Setting) -> list[float]:
    """`Trainer(label_smoothing_factor=0.1)`, a loss outside the model that reads the logits"""
    return run(made(setting, label_smoothing_factor=0.1))


def stopped_early(setting: Setting) -> list[float]:
    """`compute_metrics`, `preprocess_logits_for_metrics`, `EarlyStoppingCallback` and `load_best_model_at_end`"""

    def chosen(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.argmax(-1), logits.float().logsumexp(-1)

    def metrics(outcome: EvalPrediction) -> dict[str, float]:
        (best, mass), labels = outcome.predictions, outcome.label_ids
        read = labels[:, 1:] != -100
        return {"right": (best[:, :-1] == labels[:, 1:])[read].mean(), "mass": mass[:, :-1][read].mean()}

    others = [Rows()[number] for number in range(4)]
    trainer = made(
        setting, train_dataset=[Rows()[number] for number in range(8, 12)], eval_dataset=others, eval_strategy="steps",
        eval_steps=1, compute_metrics=metrics, preprocess_logits_for_metrics=chosen, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", max_steps=20,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    last = trainer.state.log_history[-1]["eval_loss"]
    losses = [row["eval_loss"] for row in trainer.state.log_history[:-1] if "eval_loss" in row]
    assert min(losses) < losses[-1], "the last step is not the best"
    assert abs(last - min(losses)) < 1e-4 * last
    return [*logged(trainer), float(trainer.state.global_step)]


def writing(setting: Setting) -> list[float]:
    """`generate` in a callback, between steps"""

    tokens: list[float] = []

    class Writer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.eval()
            prompt = batch(8, device=setting.device)["input_ids"][:, :6]
            text = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
            tokens.extend(text[:, 6:].float().flatten().tolist())
            model.train()

    model = setting.model(lora=None, layers=1)  # four graphs
    return [*run(made(setting, model, callbacks=[Writer()])), *tokens]


class ShardedTrainer(Trainer):
    """A Trainer whose accelerate heeds its plugin on CPUs too, as it does where there are GPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.accelerator.state.fsdp_plugin = plugin
        self.accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def launched(setting: Setting) -> list[float]:
    """`Trainer` in two processes, DDP, LoRA"""
    return run(made(setting, setting.model(), **_of_each_process()))


def launched_sharded(setting: Setting) -> list[float]:
    """`Trainer(fsdp="full_shard")` in two processes, FSDP2, all weights"""
    if not torch.distributed.is_initialized():
        return run(made(setting, **_of_each_process()))
    sharded = {"fsdp": "full_shard", "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    return run(made(setting, kind=ShardedTrainer, **sharded, **_of_each_process()))


def _of_each_process() -> dict[str, Any]:
    """Batches of four in a row, which processes share."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {"per_device_train_batch_size": 4 // world, "train_sampling_strategy": "sequential"}


LAUNCHED = (launched, launched_sharded)
HABITS: Sequence[Callable[[Setting], list[float]]] = (
    made_anew, paged, checkpointed_reentrant, grouped_by_length, smaller_batches, noisy, smoothed, stopped_early,
    writing,
)  # fmt: skip
