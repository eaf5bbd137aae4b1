"""What is proven to keep rows apart gives the same rows among others, and what mixes them is declined."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lifting import normal
from torch import Tensor
from torch.fx import GraphModule

import fastft  # noqa: F401  (the ops)
from fastft.compat import symbolic
from fastft.compat.fake_tensors import value_of
from fastft.kernels import REGISTRY
from fastft.reasons import Declined
from fastft.rewriter.rows import proof
from fastft.rewriter.rows.proof import RowSizes

B, S, H = 3, 7, 8
WEIGHT, SQUARE, VECTOR = normal(12, H, seed=1), normal(H, H, seed=2), normal(H, seed=3)
TABLE = normal(9, H, seed=4)
ROWS = torch.tensor([20, 3, 4, 11, 9])  # of B * S, taken out of order
op = torch.ops.fastft

APART: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, WEIGHT),
    "linear with a bias": lambda x: F.linear(x, SQUARE, VECTOR) + x,
    "matmul": lambda x: x @ SQUARE,
    "flattened": lambda x: (x.reshape(-1, H) @ SQUARE).view(x.shape),
    "softmax": lambda x: x.softmax(-1),
    "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * VECTOR,
    "rms_norm": lambda x: op.rms_norm(x, VECTOR, 1e-6, 0.0, True)[0],
    "layer_norm": lambda x: op.layer_norm(x, VECTOR, None, 1e-6, True)[0],
    "norm without a weight": lambda x: op.rms_norm(x, None, 1e-6, 1.0, False)[0],
    "parts of complex numbers": lambda x: torch.view_as_real(x * (1 + 2j)).movedim(-1, 0)[1] * 1,
    "glu": lambda x: op.glu(x, x * 2, "silu"),
    "heads": lambda x: x.view(*x.shape[:2], 2, -1).transpose(1, 2).transpose(1, 2).reshape(*x.shape[:2], H),
    "split": lambda x: torch.cat(tuple(reversed(x.chunk(2, -1))), -1),
    "stacked": lambda x: torch.stack((x, -x), 2).sum(2),
    "halves": lambda x: torch.cat((-x[..., H // 2 :], x[..., : H // 2]), -1),
    "whole slices": lambda x: x[:, :, :4][:, 0:],
    "some features": lambda x: x[:, :, [3, 0]],
    "of a table": lambda x: F.embedding((x[..., 0] > 0).long(), TABLE),
    "top": lambda x: x.topk(2, -1).values,
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "expanded": lambda x: x[:, :, None].expand(-1, -1, 3, -1).reshape(*x.shape[:2], 3 * H),
    "a constant of each row": lambda x: x + x.new_ones(x.shape[0], x.shape[1], 1),
}
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "shifted": lambda x: torch.cat((x[:, 1:], x[:, :1]), 1),
    "cumsum": lambda x: x.cumsum(1),
    "softmax over tokens": lambda x: x.softmax(1),
    "mean over tokens": lambda x: x - x.mean(1, keepdim=True),
    "mean over all": lambda x: x - x.mean(),
    "norm over the batch": lambda x: x / x.norm(dim=0, keepdim=True),
    "pooled": lambda x: x + x[:, -1:],
    "scores": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "products of rows": lambda x: (x.flatten(0, 1) @ x.flatten(0, 1).T @ x.flatten(0, 1)).view(x.shape),
    "products of tokens": lambda x: x @ (x.mT @ x),
    "scrambled": lambda x: x.reshape(x.shape[1], x.shape[0], H).transpose(0, 1) * 1,
    "features of many rows": lambda x: x.transpose(1, 2).reshape(x.shape[0], x.shape[1], H) * 1,
    "positions": lambda x: x + torch.arange(x.shape[1])[:, None],
    "the number of tokens": lambda x: x * x.shape[1],
    "a root of the number of tokens": lambda x: x * x.shape[1] ** 0.5,
    "as many times as there are tokens": lambda x: torch.add(x, x, alpha=x.shape[1]),
    "a factor by the number of tokens": lambda x: x * (VECTOR / x.shape[1]),
    "the number of tokens as a tensor": lambda x: x * torch.full((1,), x.shape[1]),
    "places of a table": lambda x: x + TABLE.gather(1, (x[0] > 0).long()),
    "the number of rows": lambda x: x / (x.shape[0] * x.shape[1]),
    "convolution": lambda x: F.conv1d(x.transpose(1, 2), SQUARE[..., None].expand(-1, -1, 3), padding=1).transpose(
        1, 2
    ),
    "sorted": lambda x: x.sort(1).values,
    "largest of a sequence": lambda x: x + x.amax((1, 2), keepdim=True),
    "layer_norm over tokens": lambda x: op.layer_norm(x.mT.contiguous(), None, None, 1e-6, True)[0].mT * 1,
    "rows as complex numbers": lambda x: torch.view_as_real(x.mT.contiguous() * 1j)[..., 1, :] * 1,
    "a token by its number": lambda x: x + x[:, torch.tensor([1])],
    "some tokens": lambda x: x[:, torch.arange(x.shape[1]) - 1] * 1,
    "gathered": lambda x: x.gather(1, (x > 0).long()),
    "triangle": lambda x: x * torch.ones(x.shape[1], x.shape[1]).tril()[:, :1] + x.tril(),
}


def captured(function: Callable[[Tensor], Tensor]) -> tuple[GraphModule, RowSizes]:
    """The graph of a function for any batch and length."""
    graphs: list[tuple[GraphModule, RowSizes]] = []

    def backend(gm: GraphModule, _: Any) -> Callable:
        values = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
        (x,) = (value for value in values if isinstance(value, Tensor) and value.dim() == 3)
        graphs.append((gm, RowSizes(*map(symbolic.expression, x.shape[:2]))))
        return gm.forward

    torch._dynamo.reset()
    x = normal(B, S, H)
    for axis in (0, 1):
        torch._dynamo.mark_dynamic(x, axis)
    torch.compile(function, backend=backend)(x)
    return graphs[-1]


def among_others(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Some rows of what a function returns, and what it returns for these rows alone."""
    x = normal(B, S, H)
    return function(x).flatten(0, 1)[ROWS], function(x.flatten(0, 1)[ROWS][None])[0]


@pytest.mark.parametrize("name", APART)
def test_rows_that_are_kept_apart(name: str) -> None:
    gm, sizes = captured(APART[name])
    proof.check(gm, gm.graph.nodes, sizes)
    torch.testing.assert_close(*among_others(APART[name]))


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_are_mixed(name: str) -> None:
    gm, sizes = captured(MIXED[name])
    with pytest.raises(Declined):
        proof.check(gm, gm.graph.nodes, sizes)
    with pytest.raises((AssertionError, RuntimeError)):  # so it has to be
        torch.testing.assert_close(*among_others(MIXED[name]))


def test_writes() -> None:
    """To all rows alike, or to some; what Dynamo saw of a tensor stays."""

    def function(x: Tensor, place: Any) -> Tensor:
        y = x * 2
        y += 1
        y[place] *= 3
        return y

    gm, sizes = captured(lambda x: function(x, (..., slice(2))))
    before = [value_of(node)._version for node in gm.graph.nodes if isinstance(value_of(node), Tensor)]
    proof.check(gm, gm.graph.nodes, sizes)
    assert before == [value_of(node)._version for node in gm.graph.nodes if isinstance(value_of(node), Tensor)]
    gm, sizes = captured(lambda x: function(x, (slice(None), slice(2))))
    with pytest.raises(Declined, match="slice"):
        proof.check(gm, gm.graph.nodes, sizes)


def test_dropout_that_has_to_draw_as_eager_does() -> None:
    gm, sizes = captured(lambda x: F.dropout(x, 0.5))
    proof.check(gm, gm.graph.nodes, sizes)
    with torch._inductor.config.patch(fallback_random=True), pytest.raises(Declined, match="what eager code draws"):
        proof.check(gm, gm.graph.nodes, sizes)


@pytest.mark.parametrize("axes", [(0, 2), (1, 2), (2,)])
def test_draws_that_rows_share(axes: tuple[int, ...]) -> None:
    """A path that is dropped for a sequence, or for a place in all of them."""

    def function(x: Tensor) -> Tensor:
        return x * F.dropout(x.new_ones([x.shape[axis] if axis in axes else 1 for axis in range(3)]), 0.5)

    gm, sizes = captured(function)
    if axes == (2,):
        proof.check(gm, gm.graph.nodes, sizes)  # the same features of all rows
        return
    with pytest.raises(Declined, match="drawn"):
        proof.check(gm, gm.graph.nodes, sizes)


@pytest.mark.quick
def test_every_op_is_known_or_looked_at_apart() -> None:
    """An op that is added is to be looked at: whether its rows are kept apart."""
    forward = {name for name in REGISTRY if "backward" not in name}
    of_weights = {"fastft::dequantize_4bit", "fastft::dora_weight_norm"}  # of no row
    apart = {"fastft::attention", proof.LOSS, "fastft::linear_kl_div", *of_weights}
    assert forward == proof.ROW_WISE | apart
