"""One contender at one batch and length, measured in this process: the inside of step.py's workers."""

from __future__ import annotations

import resource
import time
import traceback
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from contenders import CONTENDERS
from presets import PRESETS
from torch import Tensor

Row = dict[str, Any]
GIB = 2**30
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "fastft")


@dataclass(frozen=True)
class Run:
    """What a worker is asked to do; all of it goes into the row."""

    contender: str
    batch: int
    length: int
    model: str
    layers: int | None
    nf4: bool
    dtype: str
    device: str | None
    mask: str
    steps: int
    warmup: int
    seed: int
    lower: str


def machine(run: Run) -> Row:
    device = device_of(run)
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def measure(run: Run) -> Row:
    """What is measured, or the exception that came instead."""
    try:
        return {"status": "ok", **_train(run, device_of(run))}
    except Exception as error:
        return _failure(error)


def device_of(run: Run) -> str:
    return run.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _train(run: Run, device: str) -> Row:
    clock, dtype = Clock(device), getattr(torch, run.dtype)
    import models  # seconds of imports, which a device that does not exist need not wait for

    began = clock.now()
    model = CONTENDERS[run.contender](
        lambda: models.build(run.model, layers=run.layers, nf4=run.nf4, dtype=dtype, device=device, seed=run.seed),
        run.lower,
    )
    row: Row = {"build_s": clock.now() - began, "model_gib": clock.allocated_gib()}

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batches = make_batches(run, device)
    clock.reset_peak()
    began = clock.now()
    losses = [train_step(model, optimizer, batches[0])]
    row["first_step_s"] = clock.now() - began
    losses += [train_step(model, optimizer, batch) for batch in batches[1 : run.warmup]]
    row["peak_warmup_gib"] = clock.peak_gib()
    clock.reset_peak()
    clock.mark()
    for batch in batches[run.warmup :]:
        losses.append(train_step(model, optimizer, batch))
        clock.mark()
    seconds = clock.intervals()
    p20, p50, p80 = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    row |= {"seconds": seconds, "seconds_p20": p20, "seconds_p50": p50, "seconds_p80": p80}
    row["tokens_per_s"] = run.batch * run.length / p50
    row["peak_steps_gib"] = clock.peak_gib()
    row["peak_gib"] = max(row["peak_steps_gib"], row["peak_warmup_gib"])
    row |= {"loss_first": losses[0].item(), "loss_last": losses[-1].item()}
    row["grad_norm_last"] = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).item()
    row["trained_parameters"] = sum(p.numel() for p in trained)
    stats = torch._dynamo.utils.counters
    row |= {"graphs": stats["stats"]["unique_graphs"], "graph_breaks": sum(stats["graph_break"].values())}
    return row


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Tensor:
    optimizer.zero_grad()  # first, so that the last step's gradients can be looked at
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def make_batches(run: Run, device: str) -> list[dict[str, Tensor]]:
    """Fresh random tokens for every step, the same for every contender; labels are the ids."""
    generator = torch.Generator().manual_seed(run.seed)
    vocabulary, shape = PRESETS[run.model]["vocab_size"], (run.batch, run.length)
    batches = []
    for _ in range(run.warmup + run.steps):
        ids = torch.randint(vocabulary, shape, generator=generator).to(device)
        batch = {"input_ids": ids, "labels": ids}
        if run.mask == "ones":
            batch["attention_mask"] = torch.ones_like(ids)
        batches.append(batch)
    return batches


class Clock:
    """Time and memory on a device.  Steps are timed between CUDA events, the host free to run ahead as in training."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.marks: list[Any] = []

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between the marks."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Allocated by tensors on CUDA; on a CPU the process's peak resident size, compiler and all."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

    def allocated_gib(self) -> float:
        return torch.cuda.memory_allocated() / GIB if self.cuda else self.peak_gib()


def first_line(text: str) -> str:
    """The first line that says something; a line that ends in a colon only announces the next."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _failure(error: Exception) -> Row:
    memory = "out of memory" in str(error).lower()  # a compiler may have wrapped the exception
    detail = "".join(traceback.format_exception(error))[-6000:]
    reason = first_line(f"{type(error).__name__}: {error}")
    return {"status": "out of memory" if memory else "error", "error": reason, "detail": detail}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
