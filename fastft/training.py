"""The plain PyTorch loop: loss, backward, clip, step."""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fastft.compat.dynamo import maybe_mark_dynamic

MAX_GRADIENT_NORM = 1.0
CONTENDERS = ("fastft", "inductor", "eager")


@dataclass(frozen=True)
class Step:
    """One step of training: the loss before its update, its wall time and the tokens it read."""

    number: int
    loss: float
    seconds: float
    tokens: int


@dataclass
class Run:
    """What one contender did."""

    name: str
    steps: list[Step] = field(default_factory=list)
    peak_bytes: int = 0
    interrupted: bool = False

    @property
    def first_seconds(self) -> float:
        """The first step, compilation included."""
        return self.steps[0].seconds

    @property
    def median_seconds(self) -> float:
        """The median of the other steps; of the first if there is no other."""
        return statistics.median(step.seconds for step in self.steps[1:] or self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Throughput once compiled."""
        return statistics.median(step.tokens / step.seconds for step in self.steps[1:] or self.steps)

    def loss_difference(self, other: Run) -> float:
        """Return the largest relative difference between the losses of one step."""
        pairs = zip(self.steps, other.steps, strict=False)
        return max(abs(mine.loss - theirs.loss) / max(abs(theirs.loss), 1e-12) for mine, theirs in pairs)


def compiled(model: Any, contender: str, lower: str) -> Any:
    """Compile the model as a contender runs it."""
    if contender == "fastft":
        return torch.compile(model, backend="fastft", options={"lower": lower})
    return torch.compile(model) if contender == "inductor" else model


def train(
    model: Any,
    batches: Iterator[dict[str, torch.Tensor]],
    run: Run,
    *,
    steps: int,
    lr: float,
    lower: str = "inductor",
    fixed_shape: bool = True,
    on_step: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Train the parameters that require a gradient; Ctrl-C ends the run after the step that it falls into."""
    forward = compiled(model.train(), run.name, lower)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    device = parameters[0].device
    reset_peak(device)
    at_once, interrupt = Interrupted(), Deferred("Ctrl-C: finishing this step, then saving.")
    try:
        for number in range(1, steps + 1):
            # Before the first step has ended there is nothing to save, so there Ctrl-C acts at once.
            with interrupt if run.steps else at_once:
                batch = place(next(batches), device, fixed_shape)
                run.steps.append(step(forward, batch, parameters, optimizer, number))
                run.peak_bytes = peak_bytes(device)
                on_step(run)
            if at_once.requested:
                run.steps.clear()
            if at_once.requested or interrupt.requested:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not run.steps:
            raise
        run.interrupted = True
    return run


def step(
    forward: Any,
    batch: dict[str, torch.Tensor],
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    number: int,
) -> Step:
    """Make one update; return its loss, wall time and tokens."""
    started = time.perf_counter()
    loss = forward(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)
    return Step(number, value, time.perf_counter() - started, int(batch["attention_mask"].sum()))


def place(batch: dict[str, torch.Tensor], device: torch.device, fixed_shape: bool) -> dict[str, torch.Tensor]:
    """Move a batch to its device; mark rows of varying length as dynamic, which spares a second compilation."""
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    if not fixed_shape:
        for tensor in moved.values():
            maybe_mark_dynamic(tensor, 1)
    return moved


class Interrupted:
    """While entered, Ctrl-C raises KeyboardInterrupt as usual, and sets ``requested``.

    Python drops an exception that is raised inside a finaliser or a callback, of which compiling has many.  Where
    another handler is set, it stays.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupted:
        self.previous = signal.getsignal(signal.SIGINT)
        if self.replaces(self.previous):
            signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.replaces(self.previous):
            signal.signal(signal.SIGINT, self.previous)

    def replaces(self, handler: Any) -> bool:
        """Return whether this handler is installed in place of that one."""
        return handler is signal.default_int_handler

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT."""
        self.requested = True
        raise KeyboardInterrupt


class Deferred(Interrupted):
    """While entered, Ctrl-C waits: it sets ``requested`` and prints ``message``; a second one ends the program."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def replaces(self, handler: Any) -> bool:
        """Return True: any handler is replaced."""
        return True

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Print the message at the first SIGINT; end the program at the second."""
        if self.requested:
            raise SystemExit(130)
        self.requested = True
        print(f"\n{self.message}", file=sys.stderr, flush=True)


def reset_peak(device: torch.device) -> None:
    """Restart the count of the GPU's peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the GPU's peak of allocated memory, or this process's peak resident set, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss it does not inherit the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
