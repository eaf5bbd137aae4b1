"""Changing sizes: one graph for the first batch's, one for any; and nobody else is affected."""

import copy
import pickle
import random
import warnings
from collections import deque
from collections.abc import Callable, Sequence

import pytest
import torch
from models.families import FAMILIES, build
from torch import Tensor, nn

import fastft
from fastft.compat import dynamo
from fastft.rewriter.capture import dynamic_shapes
from fastft.rewriter.report import history
from fastft.rewriter.report.data import GraphReport

OPTIONS = {"lower": "eager", "strict": True}
Size = tuple[int, int]
CHANGING = [(4, 16), (4, 24), (4, 8), (3, 8), (2, 2), (5, 5), (16, 16), (8, 256), (2, 255), (24, 16)]


class Decoder(nn.Module):
    """Ids, a mask and positions become logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.positions = nn.Embedding(512, 8)
        self.out = nn.Linear(8, 32)
        self.register_buffer("scale", torch.full((16,), 2.0))  # as long as the first batch

    def forward(self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        x = self.embedding(ids) * self.scale.mean()
        x = x if positions is None else x + self.positions(positions)
        x = x if mask is None else x * mask[..., None]
        return self.out(torch.nn.functional.dropout(x.cumsum(1), 0.0, self.training))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(history, "_graphs", deque(maxlen=history.LIMIT))


def ids(size: Size) -> Tensor:
    return torch.randint(1, 32, size)


def graphs_of(model: nn.Module, calls: Sequence[Callable[[Callable], Tensor]], **more: object) -> list[GraphReport]:
    """What is compiled for these calls of the model, each of which gives what the model itself gives."""
    compiled = torch.compile(model, backend="fastft", options=OPTIONS, **more)
    for call in calls:
        state = torch.get_rng_state()
        actual = call(compiled)
        torch.set_rng_state(state)
        torch.testing.assert_close(actual, call(model))
    return fastft.compilations().graphs


def with_ids(size: Size) -> Callable:
    return lambda model: model(ids(size))


def with_mask(size: Size) -> Callable:
    return lambda model: model(ids(size), mask=torch.ones(size, dtype=torch.long))


def with_positions(size: Size) -> Callable:
    return lambda model: model(ids(size), positions=torch.arange(size[1])[None])


def test_without_this_it_would_be_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests rest on: lengths that change first, then batch sizes."""
    monkeypatch.setattr(dynamic_shapes, "watch", lambda gm: None)
    assert len(graphs_of(Decoder(), [with_ids(size) for size in CHANGING])) == 3


@pytest.mark.parametrize("call", [with_ids, with_mask, with_positions])
@pytest.mark.parametrize("seed", range(3))
def test_two_whatever_comes(call: Callable, seed: int) -> None:
    draw = random.Random(seed)
    sizes = CHANGING if seed == 0 else [(draw.randint(2, 8), draw.randint(2, 300)) for _ in range(10)]
    static, dynamic = graphs_of(Decoder(), [call(size) for size in sizes])
    assert (static.reason, static.dynamic) == ("", [])
    assert {"ids.size(0)", "ids.size(1)"} <= set(dynamic.dynamic)
    assert "size mismatch" in dynamic.reason


def test_a_tensor_that_did_not_change_is_opened_with_the_others() -> None:
    """Positions [1, length] are the same when only the batch size changes; as a fixed size they would fix the ids'."""
    sizes = [(4, 16), (3, 16), (3, 24), (5, 8)]
    assert len(graphs_of(Decoder(), [with_positions(size) for size in sizes])) == 2


def test_equal_sizes_stay_two_sizes() -> None:
    assert len(graphs_of(Decoder(), [with_mask(size) for size in [(4, 4), (8, 8), (3, 9), (9, 3)]])) == 2


def test_one_row_is_a_graph_of_its_own() -> None:
    """Dynamo's rule for 0 and 1: after it, all sizes are open."""
    graphs = graphs_of(Decoder(), [with_ids(size) for size in [(4, 16), (1, 8), (3, 9), (8, 3), (1, 5), (7, 7)]])
    assert [graph.dynamic for graph in graphs] == [[], ["ids.size(1)"], ["ids.size(0)", "ids.size(1)"]]


def test_other_modes_stay_static_while_sizes_do() -> None:
    model = Decoder()
    inputs = ids((4, 16))

    def without_gradients(called: nn.Module) -> Tensor:
        with torch.no_grad():
            return called(inputs)

    def evaluated(called: nn.Module) -> Tensor:
        called.eval()
        return without_gradients(called)

    graphs = graphs_of(model, [lambda called: called(inputs), without_gradients, evaluated])
    assert [graph.dynamic for graph in graphs] == [[], [], []]
    assert [bool(graph.reason) for graph in graphs] == [False, True, True]


def test_features_stay_as_they_are() -> None:
    """Of a floating-point tensor, only batch and length are opened."""
    model = nn.Dropout(0.0)
    graphs = graphs_of(model, [lambda called, size=size: called(torch.ones(*size, 8)) for size in CHANGING])
    assert [graph.dynamic for graph in graphs] == [[], ["args[0].size(0)", "args[0].size(1)"]]


def test_what_a_module_holds_keeps_its_sizes() -> None:
    """As the codes and scales of a quantised weight, held by a state that is neither module nor parameter."""

    class State:
        def __init__(self) -> None:
            self.codes, self.scales = torch.ones(8, 8, dtype=torch.int8), torch.ones(8)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = State()

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.state.codes * self.state.scales)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(dynamic_shapes.MANY_LAYERS))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    (graph,) = graphs_of(Model(), [lambda called, size=size: called(torch.ones(*size, 8)) for size in CHANGING[:4]])
    assert graph.dynamic == ["x.size(0)", "x.size(1)"]


def test_dynamic_false_is_obeyed() -> None:
    graphs = graphs_of(Decoder(), [with_mask(size) for size in CHANGING[:4]], dynamic=False)
    assert [graph.dynamic for graph in graphs] == [[]] * 4


def test_dynamic_true_is_obeyed() -> None:
    (graph,) = graphs_of(Decoder(), [with_ids(size) for size in CHANGING], dynamic=True)
    assert graph.dynamic == ["ids.size(0)", "ids.size(1)"]


@pytest.mark.parametrize(
    ("mark", "dims", "expected"),
    [
        (torch._dynamo.mark_dynamic, (0, 1), [["ids.size(0)", "ids.size(1)"]]),
        (torch._dynamo.maybe_mark_dynamic, (0, 1), [["ids.size(0)", "ids.size(1)"]]),
        (torch._dynamo.mark_dynamic, (1,), [["ids.size(1)"], ["ids.size(0)", "ids.size(1)"]]),
        (torch._dynamo.mark_static, (0,), [[], ["ids.size(1)"], ["ids.size(1)"]]),
    ],
)
def test_marks_are_obeyed(mark: Callable, dims: tuple[int, ...], expected: list[list[str]]) -> None:
    def call(size: Size) -> Callable:
        def run(model: nn.Module) -> Tensor:
            inputs = ids(size)
            for dim in dims:
                mark(inputs, dim)
            return model(inputs)

        return run

    graphs = graphs_of(Decoder(), [call(size) for size in [(4, 16), (4, 24), (3, 8), (3, 9)]])
    assert [graph.dynamic for graph in graphs] == expected


def symbols(model: nn.Module, sizes: Sequence[Size]) -> list[int]:
    """For each graph of another backend: how many sizes of the ids are open."""
    found = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:
        nodes = gm.graph.find_nodes(op="placeholder")
        (shape,) = [node.meta["example_value"].shape for node in nodes if node.name == "l_ids_"]
        found.append(sum(not isinstance(size, int) for size in shape))
        return gm.forward

    compiled = torch.compile(model, backend=backend)
    for size in sizes:
        compiled(ids(size))
    return found


def test_other_backends_learn_as_they_always_do() -> None:
    model, sizes = Decoder(), [(4, 16), (4, 24), (3, 24)]
    alone = symbols(model, sizes)
    assert alone == [0, 1, 2]
    torch._dynamo.reset()
    assert len(graphs_of(model, [with_ids((4, 16))])) == 1  # the same code, for which fastft has left what it has to
    assert symbols(model, sizes) == alone


def test_what_is_left_in_dynamo_is_copied_and_stored_as_its_own() -> None:
    known = dynamo.SizeEntry.make_tensor((4, 16), (16, 1))
    entry = dynamic_shapes.Batch(known, 2, ["L['ids']"], None)
    for copied in (copy.copy(entry), pickle.loads(pickle.dumps(entry))):
        assert type(copied) is dynamo.SizeEntry
        assert copied == known


def test_another_torch_goes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> dict:
        raise AttributeError("no such part")

    monkeypatch.setattr(dynamo, "remembered_sizes", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert len(graphs_of(Decoder(), [with_ids(size) for size in CHANGING])) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("masked", [False, True])
def test_families(name: str, masked: bool) -> None:
    model = build(next(one for one in FAMILIES if one.name == name), nf4=False, checkpoint=False, train_norms=False)

    def call(size: Size) -> Callable:
        def run(called: nn.Module) -> Tensor:
            inputs = ids(size)
            mask = {"attention_mask": (torch.rand(size) > 0.2).long()} if masked else {}
            loss = called(input_ids=inputs, labels=inputs.clone(), **mask).loss
            model.zero_grad()
            loss.backward()
            norms = [one.grad.norm() for one in model.parameters() if one.grad is not None]
            return torch.stack([loss.detach(), *norms])

        return run

    sizes = [(4, 16), (4, 24), (4, 8), (3, 8), (3, 32), (2, 2), (5, 5), (16, 16), (8, 48)]
    graphs = graphs_of(model, [call(size) for size in sizes])
    assert [len(graph.dynamic) > 0 for graph in graphs] == [False, True]


@pytest.mark.slow
def test_through_inductor() -> None:
    """Lengths at which kernels may be chosen otherwise: multiples of 8, 256, and none of these."""
    model = Decoder()
    compiled = torch.compile(model, backend="fastft", options={"strict": True})
    for size in [(4, 16), (4, 24), (3, 256), (2, 255), (8, 8), (16, 64), (2, 512), (5, 7)]:
        inputs = ids(size)
        torch.testing.assert_close(compiled(inputs), model(inputs))
    assert len(fastft.compilations().graphs) == 2
