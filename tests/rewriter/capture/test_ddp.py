"""Graphs that torch cuts at the buckets of DistributedDataParallel; with two processes in tests/training/devices.py."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastft
from fastft.compat import ddp as compat_ddp
from fastft.rewriter import backend

LAYERS, WIDTH, FULL = 9, 16, 4  # so many layers fill a bucket, but for the last layer, whose bucket is full at once
CAP = FULL * WIDTH * WIDTH * 4 / 2**20
EAGER = {"lower": "eager", "strict": True}
WAYS: dict[str, dict[str, Any]] = {
    "default": {}, "unused": {"find_unused_parameters": True}, "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process is a group, too."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    monkeypatch.setattr(backend, "_warned", set())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    torch._dynamo.reset()
    yield
    dist.destroy_process_group()


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every time that Dynamo is made to trace again."""
    seen: list[int] = []

    class Counted(compat_ddp.TraceAgain):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            seen.append(1)

    monkeypatch.setattr(compat_ddp, "TraceAgain", Counted)
    return seen


class Stack(nn.Module):
    """Layers that repeat; one that is never used, and a break in the middle, if asked for."""

    def __init__(self, *, broken: bool = False, spare: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH).requires_grad_(False) for _ in range(LAYERS))
        self.spare = nn.Linear(WIDTH, WIDTH) if spare else None
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(x, range(LAYERS // 2))
        if self.broken:
            torch._dynamo.graph_break()
        return self.run(x, range(LAYERS // 2, LAYERS))

    def run(self, x: Tensor, numbers: range) -> Tensor:
        for number in numbers:
            x = x + torch.tanh(self.layers[number](self.norms[number](x)))
        return x


def step(model: nn.Module, called: Any, length: int, *, parts: int = 1) -> list[Tensor]:
    """The loss and every gradient; all parts but the last under no_sync."""
    model.zero_grad()
    for part in range(parts):
        x = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length + part))
        waiting = getattr(called, "no_sync", contextlib.nullcontext) if part < parts - 1 else contextlib.nullcontext
        with waiting():
            loss = called(x).square().mean()
            loss.backward()
    return [loss.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)]


def wrapped(model: nn.Module, how: str = "around", options: Any = EAGER, **more: Any) -> Any:
    """DDP, compiled around, in place within or not at all."""
    if how == "within":
        model.compile(backend="fastft", options=options)
    ddp = DistributedDataParallel(model, bucket_cap_mb=CAP, **more)
    return torch.compile(ddp, backend="fastft", options=options) if how == "around" else ddp


def compiled_by(call: Any) -> list[Any]:
    """The graphs that fastft compiles in this call."""
    before = {id(graph) for graph in fastft.compilations().graphs}
    call()
    return [graph for graph in fastft.compilations().graphs if id(graph) not in before]


@pytest.mark.parametrize("how", ["around", "within"])
@pytest.mark.parametrize("way", WAYS)
def test_the_graph_is_whole(how: str, way: str, traces: list[int]) -> None:
    """And it serves any length."""
    plain, model = Stack(spare=way == "unused"), Stack(spare=way == "unused")
    compiled = wrapped(model, how, **WAYS[way])

    def train() -> None:
        for length in (5, 5, 7, 9):
            torch.testing.assert_close(step(model, compiled, length), step(plain, plain, length))

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        (graph,) = compiled_by(train)
    assert max(region.calls for region in graph.regions) >= LAYERS - 1
    assert graph.dynamic
    assert not traces, "it is whole from the start"


def test_it_is_the_graph_that_there_is_without_optimize_ddp() -> None:
    seen: list[list[Tensor]] = []
    regions = []

    def run() -> None:
        model = Stack()
        seen.append(step(model, wrapped(model), 5))

    for optimized in (True, False):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(optimize_ddp=optimized):
            (graph,) = compiled_by(run)
        regions.append([str(region) for region in graph.regions])
    assert regions[0] == regions[1]
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize("budget", ["max-speed", "min"])
def test_memory_is_planned_over_all_layers(budget: str) -> None:
    plain, model = Stack(), Stack()
    compiled = wrapped(model, options={**EAGER, "memory_budget": budget})
    (graph,) = compiled_by(lambda: torch.testing.assert_close(step(model, compiled, 5), step(plain, plain, 5)))
    assert graph.plan is not None


def test_gradients_may_be_accumulated() -> None:
    plain, model = Stack(), Stack()
    compiled = wrapped(model, "within")
    torch.testing.assert_close(step(model, compiled, 5, parts=3), step(plain, plain, 5, parts=3))


def test_each_part_around_a_break_is_whole(traces: list[int]) -> None:
    plain, model = Stack(broken=True), Stack(broken=True)
    compiled = wrapped(model)
    graphs = compiled_by(lambda: torch.testing.assert_close(step(model, compiled, 5), step(plain, plain, 5)))
    assert [bool(graph.failure) for graph in graphs] == [False, False]
    assert not traces


def test_other_backends_get_what_torch_cuts() -> None:
    sizes = []

    def other(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        sizes.append(len(gm.graph.nodes))
        return gm.forward

    mine, theirs = Stack(), Stack()
    step(mine, wrapped(mine), 5)
    ddp = wrapped(theirs, "not at all")
    step(theirs, torch.compile(ddp, backend=other), 5)
    assert len(sizes) == 1 + (LAYERS - 1) // FULL


def test_explain_shows_the_whole() -> None:
    (graph,) = fastft.explain(wrapped(Stack(), "not at all"), torch.randn(2, 5, WIDTH)).graphs
    assert len(graph.lifted) == LAYERS


def test_a_piece_is_right_where_torch_does_not_give_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat_ddp, "keep_whole", lambda: False)
    plain, model = Stack(), Stack()
    compiled = wrapped(model, options={"lower": "eager", "memory_budget": "max-speed"})

    def train() -> None:
        for length in (5, 7):
            torch.testing.assert_close(step(model, compiled, length), step(plain, plain, length))

    with pytest.warns(RuntimeWarning, match="torch cut it at the buckets") as told:
        graphs = compiled_by(train)
    assert len(graphs) > 2
    assert len(told) == 1


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_through_inductor(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code must not be run on the fakes by which torch follows pieces, nor compiled where torch looks in vain."""
    if not whole:
        monkeypatch.setattr(compat_ddp, "keep_whole", lambda: False)
    plain, model = Stack(), Stack()
    compiled = wrapped(model, options={})
    graphs = compiled_by(lambda: torch.testing.assert_close(step(model, compiled, 5), step(plain, plain, 5)))
    assert [bool(graph.failure) for graph in graphs] == ([False] if whole else [True] * (1 + (LAYERS - 1) // FULL))


def test_torch_is_not_asked_twice(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that cuts however large a bucket may be."""
    size_of = torch._dynamo.backends.distributed.Bucket

    def heavy() -> Any:
        return size_of(size=float("inf"))

    monkeypatch.setattr(torch._dynamo.backends.distributed, "Bucket", heavy)
    plain, model = Stack(), Stack()
    compiled = wrapped(model, options={"lower": "eager"})
    with pytest.warns(RuntimeWarning, match="torch cut it at the buckets"):
        torch.testing.assert_close(step(model, compiled, 5), step(plain, plain, 5))
    assert not traces
