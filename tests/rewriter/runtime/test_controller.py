"""When a plan's peak is compared with the measured one, and with which; steps are told, so that no device is needed."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastft.rewriter.memory.simulate import OUTSIDE_CUDA_GRAPHS, POOL, Moment, Plan
from fastft.rewriter.report.plan import ERROR
from fastft.rewriter.runtime import controller
from fastft.rewriter.runtime.controller import CHECK_AFTER_STEPS, MemoryController

LAYERS, HEAD, POOLED = 800, 300, 900  # bytes a token: at most without graphs, beside them, and in them, as planned
LARGE = 4  # times as many tokens


def plan_of(times: int, *, graphed: bool, layers: int = LAYERS) -> Plan:
    beside = Moment(OUTSIDE_CUDA_GRAPHS, times * (HEAD + POOLED), {POOL: times * POOLED, ERROR: 0})
    return Plan((), (Moment("layers", times * layers, {}), *[beside] * graphed), 0, graphed)


@dataclass
class Graphed:
    """What a controller asks of layers that may run as CUDA graphs."""

    pool_bytes: int = 0
    is_awaited: bool = True


@dataclass(eq=False)
class Graph:
    """What a controller asks of a graph."""

    graphed: list[Graphed]
    sizes: dict[Any, int] = field(default_factory=lambda: {"tokens": 1})
    report: Any = field(default_factory=SimpleNamespace)

    def waiting(self) -> int:
        return 0


class Told(MemoryController):
    """A controller of one graph, in whose steps so many bytes are allocated; what it corrects by is noted."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, graphed: bool = True, stacks: int = 1, layers: int = LAYERS
    ) -> None:
        self.graph: Any = Graph([Graphed() for _ in range(stacks)])
        self.references, self.device = [lambda: self.graph], torch.device("cuda", 0)
        self.plans = {(times,): plan_of(times, graphed=graphed, layers=layers) for times in (1, LARGE)}
        self.plan, self.limit_bytes, self.sizes = None, None, {}
        self.seen, self.corrections, self.peak_before, self.peak = 0, 0, 0, 0
        self.measured, self.captured, self.errors = [], False, list[int]()
        self.allocated = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "allocated", 0))
        monkeypatch.setattr(controller, "_count_of_ooms", lambda device: 0)
        monkeypatch.setattr(controller, "ooms", {})

    def replan(self, *, strict: bool = True) -> None:
        self.plan = self.plans[tuple(self.sizes.values())]

    def _follow(self, member: Any, before: int) -> None:
        pass

    def _correct(self, error_bytes: int) -> None:
        self.errors.append(error_bytes)

    def step(self, allocated: int, pool: int = 0, times: int = 1, size: int = 1, stack: int = 0) -> None:
        self.graph.sizes["tokens"] = size
        for _ in range(times):
            self.begin(self.graph)
            self.allocated = max(self.allocated, allocated)
            if pool:
                self.graph.graphed[stack] = Graphed(pool, is_awaited=False)


@pytest.mark.parametrize("graphed", [True, False], ids=["graphs planned", "no graphs"])
@pytest.mark.parametrize("error", [0, 100, -100])
def test_layers_that_are_not_captured_yet_are_compared_as_such(
    monkeypatch: pytest.MonkeyPatch, graphed: bool, error: int
) -> None:
    told = Told(monkeypatch, graphed=graphed)
    told.step(LAYERS + error, times=CHECK_AFTER_STEPS)
    assert not told.errors
    told.step(LAYERS + error, times=9)
    assert told.errors == [error][: bool(error)]
    assert told.graph.report.measured_bytes == LAYERS + error


@pytest.mark.parametrize("more", [0, 400, -200])
@pytest.mark.parametrize("at", [2, CHECK_AFTER_STEPS + 2])
def test_what_graphs_hold_is_compared_once_they_are_captured(
    monkeypatch: pytest.MonkeyPatch, at: int, more: int
) -> None:
    told = Told(monkeypatch)
    told.step(LAYERS, times=at - 1)
    told.step(LAYERS, POOLED + more, times=9)
    assert told.errors[:1] == [more][: bool(more)]
    assert told.graph.report.measured_bytes == HEAD + POOLED + more


def test_layers_that_need_more_before_they_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2 * (HEAD + POOLED)
    told = Told(monkeypatch, layers=most)
    told.step(most, times=CHECK_AFTER_STEPS + 1)
    told.step(most, POOLED, times=9)
    assert not told.errors
    assert told.graph.report.measured_bytes == most


def test_it_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    checks: list[int] = []
    compare = told._compare
    monkeypatch.setattr(told, "_compare", lambda *given: (checks.append(told.seen), compare(*given)))
    told.step(LAYERS, times=CHECK_AFTER_STEPS + 1)
    told.step(LAYERS, POOLED, times=9)
    assert len(checks) == 2


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(
    "sizes", [[1, 1, 1, 1, LARGE], [LARGE, 1, 1, 1, 1, 1, 1], [1, LARGE, 1, LARGE, 1, 1, 1, 1, LARGE]]
)
def test_a_plan_that_is_right_is_left_alone_where_sizes_change(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], graphs: bool
) -> None:
    """Graphs are captured in the fourth step in a row of one size."""
    told, in_a_row = Told(monkeypatch), 0
    for size, before in zip(sizes, [0, *sizes], strict=False):
        in_a_row = in_a_row + 1 if size == before else 1
        told.step(size * LAYERS, size * POOLED if graphs and in_a_row == 4 else 0, size=size)
    told.step(LAYERS)
    assert not told.errors


def test_graphs_for_one_of_the_first_sizes_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    told.step(LAYERS)
    told.step(LAYERS, POOLED)
    told.step(LARGE * LAYERS, size=LARGE, times=9)
    assert not told.errors


def test_several_stacks_are_compared_when_all_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, stacks=2)
    told.step(LAYERS, times=CHECK_AFTER_STEPS + 1)
    told.step(LAYERS, POOLED // 2, stack=0, times=2)
    told.step(LAYERS, POOLED // 2, stack=1, times=9)
    assert not told.errors
    assert told.graph.report.measured_bytes == HEAD + POOLED
