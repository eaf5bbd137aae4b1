"""The backward of a stack as several graphs: gradients as of one, each part's before the next part goes backward."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import recorded_graphs
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from fastft.rewriter.lowering import cuda_graph_policy
from fastft.rewriter.outline import stitch
from fastft.rewriter.outline.partition import Piece
from fastft.rewriter.runtime import cuda_graphs

SIZE, WEIGHTS = 3, 4
Stack = tuple[list[Piece], dict[Piece, Callable], Piece]


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    """Layers that read results of any before them, and inputs, which several may share."""
    graph = Graph()
    inputs = [graph.placeholder(name) for name in ("hidden", "scale", *(f"weight_{at}" for at in range(WEIGHTS)))]
    known, made = list(inputs), []
    for _ in range(draw(st.integers(1, 6))):
        last = made[-1][1][0] if made else inputs[0]
        others = draw(st.lists(st.sampled_from(known), max_size=2))
        read = list(dict.fromkeys([last, *others, draw(st.sampled_from(inputs))]))
        results = [graph.call_function(len, tuple(read)) for _ in range(draw(st.integers(1, 2)))]
        made.append((read, results))
        known += results
    wanted = draw(st.lists(st.sampled_from([node for _, results in made for node in results]), max_size=2))
    graph.output(tuple(dict.fromkeys([*wanted, made[-1][1][0]])))
    pieces, calls = [], {}
    for read, results in made:
        used = [node for node in results if node.users]
        piece = Piece(results, layer=True, inputs=read, outputs=used)
        calls[piece] = _layer(len(used))
        pieces.append(piece)
    return pieces, calls, stitch.join(pieces)


def _layer(results: int) -> Callable:
    def layer(*values: Tensor) -> tuple[Tensor, ...]:
        total = sum((torch.sin(value) for value in values[1:]), values[0])
        return tuple(total * (at + 1) for at in range(results))

    return layer


def run(call: Callable, inputs: list[Tensor], seed: int) -> list[Any]:
    """Return the results, and the gradients of the inputs for a weighted sum of them."""
    leaves = [value.detach().requires_grad_(value.requires_grad) for value in inputs]
    results = call(*leaves)
    generator = torch.Generator().manual_seed(seed)
    loss = sum((torch.randn(SIZE, generator=generator, dtype=torch.float64) * value).sum() for value in results)
    assert isinstance(loss, Tensor)
    if loss.requires_grad:
        loss.backward()
    return [value.detach() for value in results] + [leaf.grad for leaf in leaves]


@given(
    stack=stacks(), most=st.integers(1, 6), trained=st.lists(st.booleans(), min_size=2 + WEIGHTS, max_size=2 + WEIGHTS)
)
def test_gradients(stack: Stack, most: int, trained: list[bool]) -> None:
    pieces, calls, whole = stack
    call = stitch.chain(pieces, calls, whole.inputs, tuple(whole.outputs))
    parts = cuda_graph_policy.parts_of(pieces, whole.inputs, calls, most)
    assert len(parts) <= most
    names = dict(zip(("hidden", "scale", *(f"weight_{at}" for at in range(WEIGHTS))), trained, strict=True))

    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(SIZE, generator=generator, dtype=torch.float64).requires_grad_(names[node.name])
            for node in whole.inputs
        ]

    with pytest.MonkeyPatch.context() as monkeypatch:
        moving = list(range(len(whole.inputs)))  # all are copied, so that the next ones may be others
        capture = recorded_graphs.capture(parts, whole.outputs, moving, inputs(0), monkeypatch)

        def replay(*values: Tensor) -> tuple:
            return cuda_graphs._replay(capture, cuda_graphs.ReplayToken(), *values)

        for seed in (1, 2):
            expected, actual = run(call, inputs(seed), seed), run(replay, inputs(seed), seed)
            assert [value is None for value in actual] == [value is None for value in expected]
            for one, other in zip(actual, expected, strict=True):
                if one is not None:
                    torch.testing.assert_close(one, other)


def chained(layers: int) -> tuple[list[Piece], dict[Piece, Callable], Piece]:
    """Layers, each with a weight of its own."""
    graph = Graph()
    weights: list[Node] = [graph.placeholder(f"weight_{at}") for at in range(layers)]
    last, pieces = graph.placeholder("hidden"), []
    for at in range(layers):
        node = graph.call_function(len, (last, weights[at]))
        pieces.append(Piece([node], layer=True, inputs=[last, weights[at]], outputs=[node]))
        last = node
    graph.output((last,))
    call = lambda hidden, weight: (torch.sin(hidden * weight),)  # noqa: E731
    return pieces, dict.fromkeys(pieces, call), stitch.join(pieces)


def test_gradients_are_there_before_the_next_part_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which hooks of parameters see them, as those that send them to other devices do."""
    pieces, calls, whole = chained(6)
    parts = cuda_graph_policy.parts_of(pieces, whole.inputs, calls, 3)
    inputs = [torch.full((SIZE,), 0.5, requires_grad=node.name != "hidden") for node in whole.inputs]
    capture = recorded_graphs.capture(parts, whole.outputs, [], inputs, monkeypatch)
    seen: list[str] = []
    for number, graph in enumerate(capture.backward):
        real = graph.replay
        capture.backward[number] = SimpleNamespace(
            replay=lambda number=number, real=real: (seen.append(f"part {number}"), real())
        )
    for node, value in zip(whole.inputs, inputs, strict=True):
        if value.requires_grad:
            value.register_post_accumulate_grad_hook(lambda _, name=node.name: seen.append(name))
    cuda_graphs._replay(capture, cuda_graphs.ReplayToken(), *inputs)[0].sum().backward()
    assert capture.forward.replays == 1
    groups = [seen[:3], seen[3:6], seen[6:]]
    assert [group[0] for group in groups] == ["part 2", "part 1", "part 0"]
    assert [set(group[1:]) for group in groups] == [
        {"weight_4", "weight_5"}, {"weight_2", "weight_3"}, {"weight_0", "weight_1"}
    ]  # fmt: skip


def test_a_part_goes_backward_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, calls, whole = chained(4)
    parts = cuda_graph_policy.parts_of(pieces, whole.inputs, calls, 2)
    inputs = [torch.ones(SIZE, requires_grad=True) for _ in whole.inputs]
    capture = recorded_graphs.capture(parts, whole.outputs, [], inputs, monkeypatch)
    loss = cuda_graphs._replay(capture, cuda_graphs.ReplayToken(), *inputs)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        loss.backward()


def test_layers_are_divided_evenly() -> None:
    pieces, calls, whole = chained(7)
    for most, sizes in ((1, [7]), (3, [3, 3, 1]), (7, [1] * 7), (20, [1] * 7)):
        parts = cuda_graph_policy.parts_of(pieces, whole.inputs, calls, most)
        assert [sum(isinstance(key, int) for key in part.taken) for part in parts] == [
            size + (number == 0) for number, size in enumerate(sizes)
        ]
