"""When a plan's peak is compared with the measured one, and with which; steps are told, so that no device is needed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastft.rewriter.memory.simulate import OUTSIDE_CUDA_GRAPHS, POOL, Moment, Plan
from fastft.rewriter.report.plan import ERROR
from fastft.rewriter.runtime import controller
from fastft.rewriter.runtime.controller import CHECK_AFTER_STEPS, MemoryController

LAYERS, HEAD, POOLED = 800, 300, 900  # bytes: at most without graphs, beside them, and in them, as planned
BESIDE = Moment(OUTSIDE_CUDA_GRAPHS, HEAD + POOLED, {POOL: POOLED, ERROR: 0})
PLANS = {
    True: Plan((), (Moment("layers", LAYERS, {}), BESIDE), 0, graphed=True),
    False: Plan((), (Moment("layers", LAYERS, {}),), 0),
}


class Graph:
    """What a controller asks of a graph."""

    def __init__(self) -> None:
        self.graphed: Any = [SimpleNamespace(pool_bytes=0)]
        self.sizes: dict[Any, int] = {}
        self.report: Any = SimpleNamespace()

    def waiting(self) -> int:
        return 0


class Told(MemoryController):
    """A controller of one graph, in whose steps so many bytes are allocated; what it corrects by is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, graphed: bool) -> None:
        self.graph: Any = Graph()
        self.references, self.device = [lambda: self.graph], torch.device("cuda", 0)
        self.plan, self.limit_bytes, self.sizes = PLANS[graphed], None, {}
        self.seen, self.corrections, self.peak_before, self.peak = 0, 0, 0, 0
        self.knows_pool, self.errors = False, list[int]()
        self.allocated = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "allocated", 0))
        monkeypatch.setattr(controller, "_count_of_ooms", lambda device: 0)
        monkeypatch.setattr(controller, "ooms", {})

    def _follow(self, member: Any, before: int) -> None:
        pass

    def _correct(self, error_bytes: int) -> None:
        self.errors.append(error_bytes)

    def step(self, allocated: int, pool: int = 0, times: int = 1) -> None:
        for _ in range(times):
            self.begin(self.graph)
            self.allocated = max(self.allocated, allocated)
            self.graph.graphed[0].pool_bytes = pool


@pytest.fixture(params=[True, False], ids=["graphs planned", "no graphs"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch, graphed=request.param)


@pytest.mark.parametrize("error", [0, 100, -100])
def test_layers_that_are_not_captured_yet_are_compared_as_such(told: Told, error: int) -> None:
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
    told = Told(monkeypatch, graphed=True)
    told.step(LAYERS, times=at - 1)
    told.step(LAYERS, POOLED + more, times=9)
    assert told.errors[:1] == [more][: bool(more)]
    assert told.graph.report.measured_bytes == HEAD + POOLED + more


def test_it_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, graphed=True)
    checks: list[int] = []
    check = told._check
    monkeypatch.setattr(told, "_check", lambda: (checks.append(told.seen), check()))
    told.step(LAYERS, times=CHECK_AFTER_STEPS + 1)
    told.step(LAYERS, POOLED, times=9)
    assert len(checks) == 2
