"""One contender at one batch and length, measured in this process: the inside of step.py's workers."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from contenders import CONTENDERS
from occupancy import occupancy
from peers import import_first
from presets import PRESETS
from torch import Tensor
from turns import Turns

Row = dict[str, Any]
GIB = 2**30
IGNORED, DOCUMENT = -100, 512  # a label without a loss; tokens in a packed document
SPREAD = 0.8  # of the logarithms of lengths about their median
PACKAGES = (
    "torch", "triton", "transformers", "peft", "trl", "accelerate", "lightning", "bitsandbytes", "torchao", "datasets",
    "liger-kernel", "unsloth", "fastft",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a worker is asked to do; all of it goes into the row.

    options: of the contender, where it takes any, over its own.
    as_trainer: as transformers' Trainer with bf16 and a paged 8-bit optimizer steps, which reads each loss.
    lengths: the shortest and the longest row, where each row has a length of its own.  median: theirs, if they are
        log-normal as those of instructions are, with SPREAD; else they are uniform.  max_length: whether batches are
        padded up to the longest row that there may be, and not to their own.
    """

    contender: str
    batch: int
    length: int
    model: str
    layers: int | None
    nf4: bool
    dtype: str
    device: str | None
    mask: str
    loss: str
    steps: int
    warmup: int
    seed: int
    lower: str
    options: Row = field(default_factory=dict)
    as_trainer: bool = False
    lengths: tuple[int, int] | None = None
    median: int | None = None
    max_length: bool = False

    @classmethod
    def of(cls, asked: Row) -> Run:
        """From what was asked, which may have more in it for the task at hand."""
        return cls(**{one.name: asked[one.name] for one in fields(cls) if one.name in asked})


@dataclass(frozen=True)
class Training:
    """A contender's model, ready to take steps."""

    model: Any
    optimizer: torch.optim.Optimizer
    trained: list[torch.nn.Parameter]
    clock: Clock
    build_s: float
    loss: str
    as_trainer: bool = False

    def step(self, batch: dict[str, Tensor], note: Callable[[], None] = lambda: None) -> Tensor:
        """The loss.  A copy of it, made at once: a CUDA graph that is replayed overwrites its outputs.

        note: called after forward, after backward and after the optimizer's step.
        """
        self.optimizer.zero_grad()  # first, so that the last step's gradients can be looked at
        with torch.autocast(self.trained[0].device.type, torch.bfloat16, enabled=self.as_trainer):
            loss = self.model(**batch).loss if self.loss == "inside" else self._loss_outside(batch)
        note()
        loss.backward()
        note()
        self.optimizer.step()
        note()
        made = loss.detach().clone()
        if self.as_trainer:
            made.item()  # for a progress bar, which waits for the step
        return made

    def _loss_outside(self, batch: dict[str, Tensor]) -> Tensor:
        """As a loop that computes its own writes it."""
        labels = batch["labels"][:, 1:]
        logits = self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1))


def machine(device: str) -> Row:
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def device_of(asked: str | None) -> str:
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def prepare(run: Run) -> Training:
    device = device_of(run.device)
    import_first(run.contender)
    clock, dtype = Clock(device), getattr(torch, run.dtype)
    import models  # seconds of imports, which a device that does not exist need not wait for

    began = clock.now()
    model = CONTENDERS[run.contender](
        lambda: models.build(run.model, layers=run.layers, nf4=run.nf4, dtype=dtype, device=device, seed=run.seed),
        run.lower,
        **run.options,
    )
    build_s = clock.now() - began
    trained = [p for p in model.parameters() if p.requires_grad]
    return Training(model, _optimizer(run, trained), trained, clock, build_s, run.loss, run.as_trainer)


def _optimizer(run: Run, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if run.as_trainer and trained[0].is_cuda:
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(trained, lr=1e-4)
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def measure(asked: Row) -> Row:
    run, turns = Run.of(asked), Turns(asked.get("turns"))
    turns.prepare()
    training = prepare(run)
    clock, trained = training.clock, training.trained
    row: Row = {"build_s": training.build_s, "model_gib": clock.allocated_gib()}
    batches = make_batches(run)
    clock.reset_peak()
    losses, row["warmup_s"], moments = [], [], [clock.now()]
    for batch in batches[: run.warmup]:
        if losses and len(losses) + 1 == run.warmup:
            clock.give_back()
        began = clock.now()
        losses.append(training.step(batch, (lambda: moments.append(clock.now())) if not losses else lambda: None))
        row["warmup_s"].append(clock.now() - began)
        if len(losses) == 1:
            turns.time()
    row["first_step_s"] = row["warmup_s"][0]
    parts = [end - start for start, end in itertools.pairwise(moments)]
    row["first_step_parts_s"] = dict(zip(("forward", "backward", "optimizer"), parts, strict=True))
    row["peak_warmup_gib"] = clock.peak_gib()
    clock.reset_peak()
    clock.mark()
    for batch in batches[run.warmup :]:
        losses.append(training.step(batch))
        clock.mark()
    seconds = clock.intervals()
    p20, p50, p80 = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    row |= {"seconds": seconds, "seconds_p20": p20, "seconds_p50": p50, "seconds_p80": p80}
    row["tokens_per_s"] = run.batch * run.length / p50
    if run.lengths:
        row |= _of_all_tokens(batches[run.warmup :], sum(seconds))
    row["peak_steps_gib"] = clock.peak_gib()
    row["peak_gib"] = max(row["peak_steps_gib"], row["peak_warmup_gib"])
    row["reserved_gib"] = clock.reserved_gib()
    row |= {"loss_first": losses[0].item(), "loss_last": losses[-1].item()}
    row["grad_norm_last"] = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).item()
    row["trained_parameters"] = sum(p.numel() for p in trained)
    stats = torch._dynamo.utils.counters
    row |= {"graphs": stats["stats"]["unique_graphs"], "graph_breaks": sum(stats["graph_break"].values())}
    # last, so that its steps and its profiler change none of the figures above
    return row | occupancy(lambda: training.step(batches[-1]), p50, cuda=clock.cuda)


def _of_all_tokens(batches: list[dict[str, Tensor]], seconds: float) -> Row:
    """Figures of batches of many sizes: of all their tokens, with padding and without, in all seconds."""
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    read = sum(int(batch["attention_mask"].sum()) for batch in batches)
    sizes = [batch["input_ids"].shape[1] for batch in batches]
    return {
        "tokens_per_s": tokens / seconds, "tokens_per_s_without_padding": read / seconds, "padding": 1 - read / tokens,
        "longest_rows": sizes,
    }  # fmt: skip


def make_batches(run: Run) -> list[dict[str, Tensor]]:
    """Fresh random tokens for every step, the same for every contender."""
    generator = torch.Generator().manual_seed(run.seed)
    return [make_batch(run, run.batch, run.length, generator) for _ in range(run.warmup + run.steps)]


def make_batch(run: Run, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tokens; labels are the ids, but for padding and the first token of a packed document."""
    sizes = torch.full((batch,), length)
    if run.lengths:
        sizes = torch.randint(run.lengths[0], run.lengths[1] + 1, (batch,), generator=generator)
        if run.median:
            drawn = run.median * torch.exp(SPREAD * torch.randn(batch, generator=generator))
            sizes = drawn.round().long().clamp(*run.lengths)
        length = length if run.max_length else int(sizes.max())
    ids = torch.randint(PRESETS[run.model]["vocab_size"], (batch, length), generator=generator)
    ids = ids.to(device_of(run.device))
    made = {"input_ids": ids, "labels": ids}
    if run.lengths:  # as a collator pads: on the right, up to the longest row
        read = (torch.arange(length) < sizes[:, None]).to(ids.device)
        return made | {"attention_mask": read.to(ids.dtype), "labels": ids.masked_fill(~read, IGNORED)}
    if run.mask in ("ones", "padded"):
        made["attention_mask"] = torch.ones_like(ids)
    if run.mask == "padded":
        made["attention_mask"][min(1, batch - 1) :, length - length // 4 :] = 0
        made["labels"] = ids.masked_fill(made["attention_mask"] == 0, IGNORED)
    if run.mask == "packed":
        positions = torch.arange(length, device=ids.device) % max(1, min(DOCUMENT, length // 4))
        made["position_ids"] = positions.repeat(batch, 1)
        made["labels"] = ids.masked_fill(positions == 0, IGNORED)
    return made


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

    def give_back(self) -> None:
        """Free what the allocator keeps and nobody holds, such as what compilation needed."""
        if self.cuda:
            torch.cuda.empty_cache()

    def reserved_gib(self) -> float:
        """Taken from the device since the last reset: an idle CUDA graph's memory counts here and not as allocated."""
        return torch.cuda.max_memory_reserved() / GIB if self.cuda else self.peak_gib()

    def peak_gib(self) -> float:
        """Allocated by tensors on CUDA; on a CPU the process's peak resident size, compiler and all."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

    def allocated_gib(self) -> float:
        return torch.cuda.memory_allocated() / GIB if self.cuda else self.peak_gib()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
