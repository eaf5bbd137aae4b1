"""The canonical spelling: equal spellings become equal graphs, and every rule keeps the bits, forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph

from fastft.rewriter.capture.normalize import normalize
from fastft.rewriter.fx.metadata import name_of
from fastft.rewriter.matching.pattern import capture


def spell(graph: Graph) -> list[str]:
    """The graph as text, node by node."""
    numbers: dict[object, str] = {}
    lines = []
    for node in graph.nodes:
        numbers[node] = f"%{len(numbers)}"
        args = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda argument: numbers[argument])
        lines.append(f"{node.op} {name_of(node.target) if node.op != 'placeholder' else ''} {args}")
    return lines


X16, X, W, W16 = (
    torch.randn(2, 3, 8).bfloat16(),
    torch.randn(2, 3, 8),
    torch.randn(8),
    torch.randn(8).bfloat16(),
)

SAME = {  # spellings of one computation, on the inputs they are tried with
    "cast": (
        [
            lambda x: x.float() + 1,
            lambda x: x.to(torch.float32) + 1,
            lambda x: x.to(dtype=torch.float32) + 1,
            lambda x: x.type(torch.float32) + 1,
            lambda x: x.to("cpu", torch.float32) + 1,
        ],
        (X16,),
    ),
    "cast as another": (
        [lambda x, w: x.type_as(w) + 1, lambda x, w: x.to(w) + 1, lambda x, w: x.float() + 1],
        (X16, W),
    ),
    "cast of nothing": ([lambda x: x + 1, lambda x: x.float() + 1, lambda x: x.to(x.dtype) + 1], (X,)),
    "square": (
        [
            lambda x: x.pow(2),
            lambda x: x**2,
            lambda x: x * x,
            lambda x: x.square(),
            lambda x: torch.pow(x, 2.0),
            lambda x: torch.square(x),
            lambda x: torch.mul(x, x),
        ],
        (X,),
    ),
    "mean": (
        [
            lambda x: x.mean(-1, keepdim=True),
            lambda x: x.mean(2, True),
            lambda x: torch.mean(x, dim=-1, keepdim=True),
            lambda x: x.mean((-1,), keepdim=True),
            lambda x: x.mean(axis=-1, keepdims=True),
        ],
        (X,),
    ),
    "sum": (
        [lambda x: x.sum(-1, keepdim=True), lambda x: torch.sum(x, dim=2, keepdim=True), lambda x: x.sum([-1], True)],
        (X,),
    ),
    "number first": ([lambda x: 1.5 + x, lambda x: x + 1.5, lambda x: torch.add(x, 1.5), lambda x: x.add(1.5)], (X,)),
    "product": (
        [lambda x, w: x * w, lambda x, w: torch.mul(x, w), lambda x, w: x.mul(w), lambda x, w: x.multiply(w)],
        (X, W),
    ),
    "quotient": ([lambda x, w: x / w, lambda x, w: torch.div(x, w), lambda x, w: x.true_divide(w)], (X, W)),
    "rsqrt": ([lambda x: x.pow(2).rsqrt(), lambda x: torch.rsqrt(x.pow(2))], (X,)),
    "default eps": (
        [
            lambda x, w: F.rms_norm(x, (8,), w),
            lambda x, w: torch.rms_norm(x, (8,), w, torch.finfo(torch.float32).eps),
            lambda x, w: F.rms_norm(x, (8,), weight=w, eps=None),
        ],
        (X, W),
    ),
    "default eps in low precision": (
        [lambda x: F.rms_norm(x, (8,)), lambda x: F.rms_norm(x, (8,), eps=torch.finfo(torch.float32).eps)],
        (X16,),
    ),
    "negative": ([lambda x: -x, lambda x: x.neg(), lambda x: torch.neg(x), lambda x: torch.negative(x)], (X,)),
    "sigmoid": ([lambda x: torch.sigmoid(x), lambda x: x.sigmoid(), lambda x: F.sigmoid(x)], (X,)),
    "tanh": ([lambda x: torch.tanh(x), lambda x: x.tanh(), lambda x: F.tanh(x)], (X,)),
    "relu": (
        [lambda x: torch.relu(x), lambda x: x.relu(), lambda x: F.relu(x), lambda x: F.relu(x, inplace=False)],
        (X,),
    ),
    "silu": ([lambda x: F.silu(x), lambda x: F.silu(input=x), lambda x: F.silu(x, inplace=False)], (X,)),
    "gelu": ([lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="none"), lambda x: F.gelu(input=x)], (X,)),
    "dropout of nothing": (
        [
            lambda x: x + 1,
            lambda x: F.dropout(x, 0.0) + 1,
            lambda x: F.dropout(x, p=0.0, training=True) + 1,
            lambda x: F.dropout(x, 0.5, False) + 1,
            lambda x: F.dropout(x, training=False) + 1,
        ],
        (X,),
    ),
    "transpose": (
        [
            lambda x: x.transpose(1, 2),
            lambda x: x.transpose(-1, -2),
            lambda x: torch.transpose(x, dim0=2, dim1=1),
            lambda x: x.swapaxes(1, 2),
            lambda x: torch.swapdims(x, 1, 2),
        ],
        (X,),
    ),
    "flatten": (
        [
            lambda x: x.flatten(-2),
            lambda x: x.flatten(1),
            lambda x: torch.flatten(x, 1, -1),
            lambda x: x.flatten(start_dim=1, end_dim=2),
        ],
        (X,),
    ),
    "the second half": (
        [
            lambda x: x[..., 4:],
            lambda x: x[:, :, 4:],
            lambda x: x[:, :, 4::1],
            lambda x: x[..., x.shape[-1] // 2 :],
        ],
        (X,),
    ),
    "the first half": ([lambda x: x[..., :4], lambda x: x[..., 0:4], lambda x: x[:, :, :4]], (X,)),
    "every second": ([lambda x: x[..., ::2], lambda x: x[:, :, 0::2]], (X,)),
    "default eps of layer_norm": (
        [
            lambda x, w: F.layer_norm(x, (8,), w),
            lambda x, w: F.layer_norm(x, (8,), w, None, 1e-5),
            lambda x, w: F.layer_norm(x, normalized_shape=(8,), weight=w, bias=None),
        ],
        (X, W),
    ),
}
CASES = [(name, spelling, inputs) for name, (spellings, inputs) in SAME.items() for spelling in spellings]


def gradients(function: Callable, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    result = function(*leaves)
    grad_output = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result.dtype)
    return [result, *torch.autograd.grad(result, leaves, grad_output, allow_unused=True)]


@pytest.mark.parametrize(("name", "spelling", "inputs"), CASES, ids=[case[0] for case in CASES])
def test_spellings_become_one_and_keep_the_bits(name: str, spelling: Callable, inputs: tuple) -> None:
    first, gm = capture(SAME[name][0][0], *inputs), capture(spelling, *inputs)
    for graph in (first.graph, gm.graph):
        normalize(graph)
        graph.lint()
    assert spell(gm.graph) == spell(first.graph)
    gm.recompile()
    for actual, expected in zip(gradients(gm, inputs), gradients(spelling, inputs), strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or (actual.dtype == expected.dtype and torch.equal(actual, expected))


COMPARED = {  # forms that are compared alone: they no longer run
    "cat": [
        lambda x: torch.cat((x, x + 1), -1),
        lambda x: torch.cat([x, x + 1], dim=-1),
        lambda x: torch.concat((x, x + 1), 2),
        lambda x: torch.cat(tensors=(x, x + 1), dim=2),
        lambda x: torch.concatenate((x, x + 1), axis=-1),
    ],
    "stack": [lambda x: torch.stack((x, x + 1), -1), lambda x: torch.stack([x, x + 1], dim=3)],
    "halves": [
        lambda x: (x[..., :4], x[..., 4:]),
        lambda x: tuple(x.chunk(2, -1)[index] for index in (0, 1)),
        lambda x: tuple(x.chunk(2, dim=2)[index] for index in (0, 1)),
        lambda x: tuple(torch.chunk(x, 2, dim=-1)[index] for index in (0, 1)),
        lambda x: tuple(x.split(4, -1)[index] for index in (0, 1)),
        lambda x: tuple(torch.split(x, 4, dim=2)[index] for index in (0, 1)),
    ],
}


@pytest.mark.parametrize("name", COMPARED)
def test_spellings_of_what_joins_and_splits_become_one(name: str) -> None:
    graphs = [capture(function, X).graph for function in COMPARED[name]]
    for graph in graphs:
        normalize(graph)
        graph.eliminate_dead_code()  # chunks whose parts became slices
    assert [spell(graph) for graph in graphs] == [spell(graphs[0])] * len(graphs)


DIFFERENT = {
    "the order of a quotient": (lambda x, w: x / w, lambda x, w: w / x),
    "a number taken away": (lambda x, w: x - 1, lambda x, w: 1 - x),
    "another axis": (lambda x, w: x.mean(-1), lambda x, w: x.mean(0)),
    "a kept axis": (lambda x, w: x.mean(-1), lambda x, w: x.mean(-1, keepdim=True)),
    "a factor": (lambda x, w: torch.add(x, w), lambda x, w: torch.add(x, w, alpha=2)),
    "rounding": (lambda x, w: torch.div(x, w), lambda x, w: torch.div(x, w, rounding_mode="floor")),
    "a copy": (lambda x, w: x.to(torch.float32), lambda x, w: x.to(torch.float32, copy=True)),
    "in place": (lambda x, w: (x + 0).mul(w), lambda x, w: (x + 0).mul_(w)),
    "another function": (lambda x, w: F.relu(x), lambda x, w: F.silu(x)),
    "an approximation": (lambda x, w: F.gelu(x), lambda x, w: F.gelu(x, approximate="tanh")),
    "a function in place": (lambda x, w: F.silu(x + 0), lambda x, w: F.silu(x + 0, inplace=True)),
    "something dropped": (lambda x, w: F.dropout(x, 0.5), lambda x, w: F.dropout(x, 0.5, training=False)),
    "a dropout in place": (lambda x, w: F.dropout(x + 0, 0.0), lambda x, w: F.dropout(x + 0, 0.0, True, True)),
    "the order of a join": (lambda x, w: torch.cat((x, x + 1), -1), lambda x, w: torch.cat((x + 1, x), -1)),
    "the axis of a join": (lambda x, w: torch.cat((x, x), -1), lambda x, w: torch.cat((x, x), 1)),
    "the place of a stack": (lambda x, w: torch.stack((x, x), -1), lambda x, w: torch.stack((x, x), -2)),
    "other axes": (lambda x, w: x.transpose(1, 2), lambda x, w: x.transpose(0, 1)),
    "the other half": (lambda x, w: x.chunk(2, -1)[0], lambda x, w: x.chunk(2, -1)[1]),
    "halves of another axis": (lambda x, w: x.chunk(2, -1)[0], lambda x, w: x.chunk(2, 1)[0]),
    "a part of another size": (lambda x, w: x.split(4, -1)[0], lambda x, w: x.split(2, -1)[0]),
    "another step": (lambda x, w: x[..., ::2], lambda x, w: x[..., ::4]),
    "a slice of all": (lambda x, w: x[..., :4], lambda x, w: x[:1, :, :4]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_stays_different(name: str) -> None:
    one, other = (capture(function, X, W) for function in DIFFERENT[name])
    for gm in (one, other):
        normalize(gm.graph)
    assert spell(one.graph) != spell(other.graph)


def test_a_cast_with_two_users_is_kept() -> None:
    """Its backward adds the two gradients in float32 and rounds once; without it each would be rounded alone."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return h * w + h * (w + 1)

    gm = capture(function, X16, W)
    normalize(gm.graph)
    gm.recompile()
    assert any(node.target == "to" for node in gm.graph.nodes)
    for actual, expected in zip(gradients(gm, (X16, W)), gradients(function, (X16, W)), strict=True):
        assert torch.equal(actual, expected)


def test_numbers_and_sizes_are_left_alone() -> None:
    gm = capture(lambda x: x.view(x.shape[0] * x.shape[1], -1), X)
    before = spell(gm.graph)
    normalize(gm.graph)
    assert spell(gm.graph) == before


def test_normalising_twice_changes_nothing_more() -> None:
    gm = capture(
        lambda x, w: w.float() * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-6)).to(x.dtype), X16, W
    )
    normalize(gm.graph)
    once = spell(gm.graph)
    normalize(gm.graph)
    assert spell(gm.graph) == once
