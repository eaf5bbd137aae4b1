"""Loops that a run may consist of, and what is in memory after their third and their tenth step: the same.

Python's collector of cycles is off meanwhile.  What only it would free is as good as lost: a cycle that runs through
autograd's nodes it cannot see, and one that it can waits for it, with all the memory of a step.  It runs where
exceptions or whole models are dropped, which are cycles of Python's and torch's own.

    python -m training.leaks cuda      (in tests/) a table of bytes and objects, for each loop and each set of options
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastft.compat import eager

LAYERS, VOCABULARY, WIDTH = 3, 128, 64
FIRST, LAST = 3, 10  # the steps that are compared
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"cuda_graphs": False},  # on a CPU without a plan
    "least": {"memory_budget": "min"},
    "graphs": {"cuda_graphs": True},
}
_UNCOUNTED = (
    "fastft.rewriter.report.", "fastft.reasons.",  # text, of the last 256 graphs
    "fastft.rewriter.planner.",  # a few numbers of each plan, which a measurement replaces
    "torch.fx.experimental.", "torch._subclasses.",  # torch keeps some of every compilation, by other backends too
)  # fmt: skip


class FailedError(Exception):
    """What a layer raises when it is told to."""


_failing: set[str] = set()  # "layer", "end" of forward, and the same of "backward"


@torch.library.custom_op("fastft_tests::may_fail", mutates_args=())
def _may_fail(x: Tensor, place: str) -> Tensor:
    if place in _failing:
        raise FailedError
    return x.clone()


_may_fail.register_fake(lambda x, place: torch.empty_like(x))
_may_fail.register_autograd(
    lambda ctx, grad: (torch.ops.fastft_tests.may_fail(grad, f"{ctx.place} backward"), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "place", inputs[1]),
)


class MayFail(nn.Module):
    """A module that raises where it is told to."""

    def __init__(self, inner: nn.Module, place: str) -> None:
        super().__init__()
        self.inner, self.place = inner, place

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fastft_tests.may_fail(self.inner(x), self.place)


class Output(NamedTuple):
    loss: Tensor
    logits: Tensor


class Model(nn.Module):
    """Three layers between an embedding and a head, one of which may fail, and so may what is behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        blocks = [nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(LAYERS)]
        blocks[1] = nn.Sequential(*blocks[1], MayFail(nn.Identity(), "layer"))
        self.layers, self.norm = nn.ModuleList(blocks), MayFail(nn.RMSNorm(WIDTH), "end")

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        logits = self.head(self.norm(x))
        return Output(nn.functional.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1)), logits)


@contextmanager
def failing(where: str) -> Iterator[None]:
    _failing.add(where)
    try:
        yield
    except FailedError:
        pass
    else:
        raise AssertionError(f"nothing failed in {where}")
    finally:
        _failing.clear()


@dataclass
class Run:
    """Compiled models on a device, and what a loop leaves in its own hands.

    options: what fastft is told.
    """

    device: str
    options: dict[str, Any]
    held: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.compiler.reset()
        gc.collect()
        gc.freeze()  # what is there, millions of objects of libraries, is not looked at, here and by the collector
        self.one, self.two = self.model(), self.model()

    def model(self) -> Any:
        model = Model().to(self.device)
        return torch.compile(model, backend="fastft", options={"lower": "eager", "strict": True, **self.options})

    def batch(self, step: int, length: int = 24) -> dict[str, Tensor]:
        ids = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(step)).to(self.device)
        return {"input_ids": ids, "labels": ids}


def plain(run: Run, step: int) -> None:
    """Forward, backward."""
    run.one(**run.batch(step)).loss.backward()


def reads_logits(run: Run, step: int) -> None:
    """Accuracy beside the loss: the logits are read while gradients are on."""
    out = run.one(**run.batch(step))
    out.logits.argmax(-1)
    out.loss.backward()


def learns_from_logits(run: Run, step: int) -> None:
    """A z-loss by hand: the gradient goes through logits that were read."""
    out = run.one(**run.batch(step))
    (out.loss + 1e-4 * out.logits.logsumexp(-1).square().mean()).backward()


def learns_twice_from_logits(run: Run, step: int) -> None:
    """The same by views of the logits, and backward twice."""
    out = run.one(**run.batch(step))
    loss = out.logits[:, :-1].float().exp().mean() + out.logits.view(-1, out.logits.shape[-1]).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def keeps_losses(run: Run, step: int) -> None:
    """Losses are kept for a mean, with their graphs, which backward has emptied."""
    out = run.one(**run.batch(step))
    loss = out.loss + out.logits.square().mean()
    loss.backward()
    run.held.append(loss)


def skips_backward(run: Run, step: int) -> None:
    """A forward whose backward never comes, its logits read."""
    run.one(**run.batch(step)).logits.argmax(-1)


def skips_backward_unread(run: Run, step: int) -> None:
    run.one(**run.batch(step))


def evaluates(run: Run, step: int) -> None:
    """Without gradients, between steps."""
    plain(run, step)
    with torch.no_grad():
        run.one(**run.batch(step)).logits.argmax(-1)


def fails_in_forward(run: Run, step: int) -> None:
    """A forward that raises halfway, then a step."""
    with failing("layer"):
        run.one(**run.batch(step))
    reads_logits(run, step)


def fails_behind_the_layers(run: Run, step: int) -> None:
    """A forward that raises when all layers have run, as CUDA graphs too, then a step."""
    with failing("end"):
        run.one(**run.batch(step))
    reads_logits(run, step)


def fails_in_backward(run: Run, step: int) -> None:
    """A backward that raises halfway, then a step."""
    with failing("layer backward"):
        reads_logits(run, step)
    reads_logits(run, step)


def fails_before_the_layers(run: Run, step: int) -> None:
    """A backward that raises before it comes to the layers, then a step."""
    with failing("end backward"):
        reads_logits(run, step)
    reads_logits(run, step)


def interleaves(run: Run, step: int) -> None:
    """Two models whose activations are in memory together, one loss, backward in the other order."""
    one, two = run.one(**run.batch(step)), run.two(**run.batch(step))
    two.logits.argmax(-1)
    one.loss.backward()
    two.loss.backward()


def distils(run: Run, step: int) -> None:
    """One model's logits teach the other's, by a loss of both."""
    student, teacher = run.one(**run.batch(step)), run.two(**run.batch(step))
    teaching = torch.nn.functional.kl_div(
        student.logits.log_softmax(-1), teacher.logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    (teaching + student.loss).backward()


def changes_lengths(run: Run, step: int) -> None:
    """Batches have three lengths."""
    out = run.one(**run.batch(step, length=20 + step % 3))
    out.logits.argmax(-1)
    out.loss.backward()


def replaces_the_model(run: Run, step: int) -> None:
    """A second model is made, compiled, interleaved with the first, and deleted."""
    run.two = run.model()
    interleaves(run, step)
    run.two = None
    gc.collect()
    torch.compiler.reset()


def deletes_the_model(run: Run, step: int) -> None:
    """A model alone is made, compiled, trained and deleted."""
    run.one = run.two = None
    run.one = run.model()
    reads_logits(run, step)
    run.one = None
    gc.collect()
    torch.compiler.reset()


LOOPS: tuple[Callable[[Run, int], None], ...] = (
    plain, reads_logits, learns_from_logits, learns_twice_from_logits, keeps_losses, skips_backward,
    skips_backward_unread, evaluates, fails_in_forward, fails_behind_the_layers, fails_in_backward,
    fails_before_the_layers, interleaves, distils, changes_lengths, replaces_the_model, deletes_the_model,
)  # fmt: skip
FAILING = (fails_in_forward, fails_behind_the_layers, fails_in_backward, fails_before_the_layers)
COMPILING = (replaces_the_model, deletes_the_model)  # at every step
UNGRAPHED = (fails_in_forward, fails_in_backward, learns_twice_from_logits)  # what CUDA graphs cannot do
LATER = {changes_lengths: 9}  # steps more, until every length was met as often as it takes to record it


@dataclass
class Held:
    """What is in memory: bytes of tensors (growth alone on a CPU, whose allocator does not count), objects by class."""

    allocated: int
    objects: Counter[str]


def measured(run: Run, loop: Callable[[Run, int], None]) -> tuple[Held, Held]:
    """What is in memory after steps FIRST and LAST."""
    later = LATER.get(loop, 0)
    gc.collect()
    gc.disable()
    try:
        for step in range(FIRST + later):
            _step(run, loop, step)
        gc.collect()
        first = Held(_allocated(run), objects())
        with _counted(run) as growth:
            for step in range(FIRST + later, LAST + later):
                _step(run, loop, step)
        last = Held(_allocated(run), objects())
        last.allocated += growth()
        return first, last
    finally:
        gc.enable()


def _step(run: Run, loop: Callable[[Run, int], None], step: int) -> None:
    loop(run, step)
    if loop in FAILING or loop in COMPILING:
        gc.collect()


def _allocated(run: Run) -> int:
    if run.device == "cpu":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@contextmanager
def _counted(run: Run) -> Iterator[Callable[[], int]]:
    """Gives the bytes that a CPU's tensors have grown by: what was allocated meanwhile, less what was freed."""
    if run.device != "cpu":
        yield lambda: 0
        return
    # Without fastft's own ranges: their hooks live as long as a kept loss's graph, and where a piece is many nodes they
    # cross the engine's ranges, whose bytes would then be counted twice.
    unseen = mock.patch.object(eager, "is_profiling", return_value=False)
    with unseen, profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield lambda: sum(event.self_cpu_memory_usage for event in profiler.events())


def objects() -> Counter[str]:
    """Living objects that could hold memory or lead to it: tensors, what is of this package, graphs."""
    found: Counter[str] = Counter()
    for one in gc.get_objects():
        kind = type(one)
        name = f"{kind.__module__}.{kind.__qualname__}"
        ours = issubclass(kind, Tensor) or name.startswith(("fastft.", "torch.fx."))
        if ours and not name.startswith(_UNCOUNTED):
            found[name] += 1
    return found


def growth(first: Held, last: Held) -> str:
    """In words; "" where nothing has grown."""
    more = {kind: last.objects[kind] - first.objects[kind] for kind in last.objects}
    words = [f"{kind} +{count}" for kind, count in sorted(more.items()) if count > 0]
    size = last.allocated - first.allocated
    return ", ".join([f"{size:+,} bytes"] * (size > 0) + words)


def loops(device: str, options: str) -> list[Callable[[Run, int], None]]:
    """Those that these options can do; without a plan, those that say more than with one."""
    if options == "graphs" and device == "cpu":
        return []
    few = {"plain": LOOPS[LOOPS.index(evaluates) :], "least": (deletes_the_model,)} if device == "cpu" else {}
    declined = {"graphs": UNGRAPHED, **few}.get(options, ())
    return [loop for loop in LOOPS if loop not in declined]


def main(device: str, chosen: list[str]) -> None:
    """Print what is in memory after both steps, for all loops under all options, or under those that are named."""
    for options in chosen or OPTIONS:
        run = Run(device, OPTIONS[options])
        for loop in loops(device, options):
            first, last = measured(run, loop)
            count = [sum(one.objects.values()) for one in (first, last)]
            size = f"{first.allocated:>14,}{last.allocated:>14,}"
            words = growth(first, last) or "-"
            print(f"{options:10}{loop.__name__:26}{size}{count[0]:>8}{count[1]:>8}  {words}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
