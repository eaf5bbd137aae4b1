"""Ranges by module in profiles: once a layer and step, in order and apart; and a step is the same with and without."""

import gc
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
import recorded_graphs
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastft.rewriter.outline import stitch
from fastft.rewriter.outline.partition import Piece
from fastft.rewriter.runtime import cuda_graphs, profiling
from fastft.rewriter.runtime.part import Part

LAYERS, WIDTH = 3, 16
EAGER = {"lower": "eager"}
PLANNED = {"lower": "eager", "memory_budget": "min"}
OTHERS = "(before the layers)", "(the rest)"
FORWARD = [f"{name} forward" for name in (OTHERS[0], *(f"layers.{at}" for at in range(LAYERS)), OTHERS[1])]
BACKWARD = [name.replace("forward", "backward") for name in reversed(FORWARD)]


class Layer(nn.Module):
    """Reads a value that all layers share, as positions are; a frozen and two trained weights."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.a, self.b = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.frozen(x) + self.a(x))) * shared


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.shared, self.head = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        shared = torch.sigmoid(self.shared(x))
        for layer in self.layers:
            x = layer(x, shared)
        return self.head(x)


IDS = torch.arange(10).view(2, 5)


@pytest.fixture(scope="module")
def eager() -> tuple[Model, Callable]:
    return build(EAGER)


def build(options: dict[str, Any]) -> tuple[Model, Callable]:
    """A model and its compiled forward, which has run once."""
    torch.manual_seed(0)
    model = Model()
    compiled = torch.compile(model, backend="fastft", options={"strict": True, **options})
    step(model, compiled)
    return model, compiled


def step(model: Model, compiled: Callable) -> list[Tensor]:
    model.zero_grad()
    compiled(IDS).square().mean().backward()
    return [value.grad for value in model.parameters() if value.grad is not None]


@contextmanager
def profiled() -> Iterator[list[Any]]:
    """Gives the events on the CPU, in order, when it ends."""
    events: list[Any] = []
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        yield events
    events += sorted(profiler.events(), key=lambda event: event.time_range.start)


def ranges(events: list[Any]) -> list[Any]:
    """Ours, with a check that they do not overlap."""
    found = [event for event in events if event.name.endswith((" forward", " backward"))]
    for one, following in pairwise(found):
        assert one.time_range.end <= following.time_range.start, (one.name, following.name)
    return found


def names(events: list[Any]) -> list[str]:
    return [event.name for event in ranges(events)]


def inside(events: list[Any], outer: Any, name: str) -> int:
    """How many events of that name a range contains."""
    begin, end = outer.time_range.start, outer.time_range.end
    return sum(e.name == name and begin <= e.time_range.start and e.time_range.end <= end for e in events)


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        pytest.param(EAGER, "aten::tanh", "TanhBackward0", id="eager"),
        pytest.param(PLANNED, "aten::tanh", "aten::tanh_backward", id="planned"),
        pytest.param({}, "CompiledFunction", "CompiledFunctionBackward", id="inductor", marks=pytest.mark.slow),
    ],
)
def test_every_layer_is_a_range_forward_and_backward(options: dict[str, Any], forward: str, backward: str) -> None:
    model, compiled = build(options)
    with profiled() as events:
        step(model, compiled)
        step(model, compiled)
    assert names(events) == [*FORWARD, *BACKWARD] * 2
    for one in ranges(events):
        name = forward if one.name.endswith("forward") else backward
        assert inside(events, one, name) == one.name.startswith("layers.") or "Compiled" in name, one.name
        if options != EAGER and name == backward:  # of one node, whose event has all of it: none of the engine's is cut
            assert one.cpu_parent.name.endswith("CompiledFunctionBackward")


class Stacks(nn.Module):
    """Two stacks, the one with something between its layers, the other a list of functions' layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Layer() for _ in range(3))
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(3))})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.encoder:
            x = layer(x * 2, y).float()
        x = x.cumsum(-1)
        for layer in self.decoder["layers"]:
            x = layer(x, y)
        return x


class Weights(nn.Module):
    """Layers that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight) * y + x
        return x.cumsum(-1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Stacks, ["(before the layers)", *(f"encoder.{at}" for at in range(3)), "(between the layers)",
                  *(f"decoder.layers.{at}" for at in range(3))]),
        (Weights, [*(f"(layer {at})" for at in range(4)), "(the rest)"]),
    ],
)  # fmt: skip
def test_names(kind: type[nn.Module], expected: list[str]) -> None:
    compiled = torch.compile(kind(), backend="fastft", options={"strict": True, **EAGER})
    x = torch.ones(2, WIDTH)
    with torch.no_grad():
        compiled(x, x)
        with profiled() as events:
            compiled(x, x)
    assert names(events) == [f"{name} forward" for name in expected]


@pytest.mark.parametrize("options", [EAGER, PLANNED], ids=["eager", "planned"])
def test_a_step_is_the_same_with_and_without(options: dict[str, Any]) -> None:
    model, compiled = build(options)
    found = []
    for context in (nullcontext, profiled, nullcontext):
        saved: list[tuple[torch.Size, int]] = []
        pack = lambda tensor, saved=saved: saved.append((tensor.shape, tensor.data_ptr() % 64)) or tensor  # noqa: E731
        with context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            grads = [grad.clone() for grad in step(model, compiled)]
        found.append((grads, [shape for shape, _ in saved]))
    for grads, saved_shapes in found[1:]:
        assert saved_shapes == found[0][1]
        assert all(torch.equal(one, two) for one, two in zip(grads, found[0][0], strict=True))


def test_nothing_is_made_or_attached_where_no_profiler_runs(
    eager: tuple[Model, Callable], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("no profiler runs")

    with profiled():
        out = eager[1](IDS)
    monkeypatch.setattr(torch.profiler, "record_function", refuse)
    monkeypatch.setattr(profiling._Backward, "watch", refuse)
    out.sum().backward()  # the hooks that the profiled forward has left do nothing
    step(*eager)
    assert profiling._ranges.stack == []


def test_without_gradients_there_is_no_backward(eager: tuple[Model, Callable]) -> None:
    with torch.no_grad():
        eager[1](IDS)
    with profiled() as events, torch.no_grad():
        eager[1](IDS)
    assert names(events) == FORWARD


def test_a_graph_may_go_backward_twice_or_in_part(eager: tuple[Model, Callable]) -> None:
    model, compiled = eager
    (expected,) = torch.autograd.grad(compiled(IDS).sum(), model.layers[1].a.weight)
    with profiled() as events:
        first, second = compiled(IDS), compiled(IDS)
        loss = first.sum()
        loss.backward(retain_graph=True)
        loss.backward()
        (part,) = torch.autograd.grad(second.sum(), model.layers[1].a.weight)
    assert torch.equal(part, expected)
    assert names(events) == [*FORWARD * 2, *BACKWARD * 2, *BACKWARD[:LAYERS]]
    assert profiling._ranges.stack == []


def test_what_was_made_is_freed_at_once(eager: tuple[Model, Callable]) -> None:
    living: list[weakref.ref[Any]] = []

    class Saved:
        """What a node saves in place of a tensor: it lives as long as the node needs it."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()
            living.append(weakref.ref(self))

    gc.collect()
    gc.disable()
    try:
        with profiled():
            with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
                unused, used = eager[1](IDS), eager[1](IDS)
            loss = used.sum()
            assert sum(one() is not None for one in living) > 4 * LAYERS
            living += [weakref.ref(unused), weakref.ref(used)]
            loss.backward()
            del unused, used, loss
            assert all(one() is None for one in living)
    finally:
        gc.enable()


def test_a_backward_that_fails_leaves_no_range_open(eager: tuple[Model, Callable]) -> None:
    def fail(_: Tensor) -> None:
        raise ValueError("on the way")

    handle = eager[0].layers[1].b.weight.register_hook(fail)
    with profiled() as events:
        with pytest.raises(ValueError, match="on the way"):
            step(*eager)
        handle.remove()
        step(*eager)
    cut = BACKWARD.index("layers.1 backward") + 1
    assert names(events) == [*FORWARD, *BACKWARD[:cut], *FORWARD, *BACKWARD]
    assert profiling._ranges.stack == []


def test_nodes_that_nobody_asks_for_are_not_waited_for() -> None:
    weight = torch.ones(3, requires_grad=True)
    calls = [profiling.in_range(f"l.{at}", lambda x: (x * weight, (x + weight).exp())) for at in range(3)]
    with profiled() as events:
        x = torch.ones(3, requires_grad=True) * 1
        for call in calls:
            x, _ = call(x)
        x.sum().backward()
    assert names(events)[3:] == ["l.2 backward", "l.1 backward", "l.0 backward"]
    assert profiling._ranges.stack == []


def test_a_backward_within_a_backward_is_a_range_within_the_other() -> None:
    x = torch.ones(3, requires_grad=True)
    inner = profiling.in_range("inner", lambda x: (x.exp().exp(),))

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            with torch.enable_grad():
                again = ctx.saved_tensors[0].detach().requires_grad_()
                inner(again)[0].sum().backward()
            return grad

    outer = profiling.in_range("outer", lambda x: (Outer.apply(x) * 1,))
    with profiled() as events:
        outer(x)[0].sum().backward()
    found = {event.name: event for event in events if event.name.endswith((" forward", " backward"))}
    for name in ("inner forward", "inner backward"):
        assert inside(events, found["outer backward"], name) == 1
    assert inside(events, found["inner backward"], "ExpBackward0") == 2
    assert profiling._ranges.stack == []


def test_a_value_that_passes_through_is_nobodys() -> None:
    x = torch.ones(3, requires_grad=True) * 2
    entries, exits = profiling.ends([x, 3], [x, x.exp(), None, 4])
    assert [node.name() for node in entries] == ["ExpBackward0"] == [node.name() for node in exits]
    assert profiling.ends([x], [x]) == ([], [])


def test_layers_that_are_replayed_are_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what stands for a capture: no graph of CUDA's is replayed."""
    x, weight = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    parts = [
        Part(lambda x, w: (x * w,), [0, 1], ["y"]),
        Part(lambda y: (y * 1.0,), ["y"], ["z"]),
    ]
    name = profiling.span("model.layers.0", "model.layers.31")
    graphed = cuda_graphs.Graphed(lambda x, w: (x * w,), ["z"], [], None, name, parts=parts)
    graphed.captures[()] = recorded_graphs.capture(parts, ["z"], [], [x, weight], monkeypatch)
    monkeypatch.setattr(cuda_graphs.Capture, "fits", lambda *_: True)  # asks what torch has for CUDA alone
    with profiled() as events:
        graphed(x, weight)[0].sum().backward()
    assert names(events) == ["model.layers.0 … 31 forward", "model.layers.0 … 31 backward"]
    assert torch.equal(x.grad, weight)


def test_a_traceback_says_which_layer_failed() -> None:
    graph = torch.fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(3):
        nodes.append(graph.call_function(torch.exp, (nodes[-1],)))
    pieces = [
        Piece([node], layer=True, inputs=[before], outputs=[node], name=f"model.layers.{at}")
        for at, (before, node) in enumerate(pairwise(nodes))
    ]

    def once(x: Tensor) -> tuple[Tensor]:
        return (x[1:].view(2),)  # a second layer has one too few for it

    calls = profiling.named(pieces, dict.fromkeys(pieces, once))
    with pytest.raises(RuntimeError, match="shape") as raised:
        stitch.chain(pieces, calls, nodes[:1], (nodes[-1],))(torch.ones(3))
    lines = [line.strip() for line in traceback.format_exception(raised.value)]
    assert any("model_layers_1 = self.region" in line for line in lines)
    assert not any("model_layers_0 = self.region" in line for line in lines)


def test_spans() -> None:
    assert profiling.span("layers.4", "layers.4") == "layers.4"
    assert profiling.span("4", "11") == "4 … 11"
    assert profiling.span("encoder.layers.0", "decoder.layers.3") == "encoder.layers.0 … decoder.layers.3"


def test_nvtx_is_told_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextmanager
    def logged(name: str) -> Iterator[None]:
        told.append(name)
        yield
        told.append(f"end of {name}")

    monkeypatch.setattr(torch.cuda.nvtx, "range", logged)
    monkeypatch.setattr(profiling, "NVTX", True)
    piece = Piece([], layer=True, name="layers.0")
    call = profiling.named([piece], {piece: lambda x: (x.exp() * 2,)})[piece]
    call(torch.ones(3, requires_grad=True))[0].sum().backward()
    one, two = "layers.0 forward", "layers.0 backward"
    assert told == [one, f"end of {one}", two, f"end of {two}"]


def test_nvtx_is_asked_for_by_a_variable_or_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not profiling.wants_nvtx({})
    assert profiling.wants_nvtx({"FASTFT_NVTX": "1"})
    assert profiling.wants_nvtx({"NVTX_INJECTION64_PATH": "/tool.so"})
    assert not profiling.wants_nvtx({"NVTX_INJECTION64_PATH": "/tool.so", "FASTFT_NVTX": "0"})
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not profiling.wants_nvtx({"FASTFT_NVTX": "1"})


def test_ranges_that_cross_the_engines_are_no_stack_in_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under emit_nvtx the engine pushes and pops its own, so that one that ends within another would end that."""
    told: list[Any] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", lambda name: told.append(name) or len(told))
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", told.append)
    monkeypatch.setattr(profiling.eager, "is_emitting_nvtx", lambda: True)
    x = torch.ones(3, requires_grad=True)
    with profiled() as events:
        profiling.in_range("one", lambda x: (x.exp(),))(x)[0].sum().backward()
        profiling.in_range("two", lambda x: (x.exp().exp(),))(x)[0].sum().backward()
    assert names(events) == ["one forward", "one backward", "two forward"]
    assert told == ["two backward", 1]
