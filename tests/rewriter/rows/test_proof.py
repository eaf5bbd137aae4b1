"""What is proven to keep rows apart gives the same rows among others, and what mixes them is declined."""

import functools
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
from fastft.rewriter.fx.bodies import bodies
from fastft.rewriter.fx.metadata import name_of
from fastft.rewriter.rows import division, proof
from fastft.rewriter.rows.proof import RowSizes

B, S, H, E = 3, 7, 8, 5
WEIGHT, SQUARE, VECTOR = normal(12, H, seed=1), normal(H, H, seed=2), normal(H, seed=3)
TABLE = normal(9, H, seed=4)
ROUTER, UP, DOWN = normal(H, E, seed=5), normal(E, 2 * H, H, seed=6) / 3, normal(E, H, H, seed=7) / 3
FACTORS = normal(E, 3, H, seed=8), normal(E, 2 * H, 3, seed=9)
ROWS = torch.tensor([20, 3, 4, 11, 9])  # of B * S, taken out of order
op = torch.ops.fastft


class Experts:
    """A mixture of experts by hand: where the tokens of x go, and the two products."""

    def __init__(self, x: Tensor, top_k: int = 2, flips: bool = False) -> None:
        self.x, self.top_k, self.tokens = x, top_k, x.reshape(-1, H)
        self.weights, self.index = (self.tokens @ (ROUTER.flip(1) if flips else ROUTER)).softmax(-1).topk(top_k, -1)
        self.order = op.expert_order(self.index, E)

    def up(self, order: Any = None, bias: Tensor | None = None, factors: Any = (None, None)) -> Tensor:
        """2 H features of each sorted row."""
        order, sizes = order or self.order, (2 * H, 0.5, self.top_k, False, True, 0, "")
        return op.expert_linear(self.tokens, UP, [], bias, *factors, None, *order, *sizes)[0]

    def down(self, rows: Tensor, weights: Tensor | None = None, order: Any = None) -> Tensor:
        """The sums of each token's rows of H features."""
        order, sizes = order or self.order, (H, 1.0, self.top_k, False, False, 0, "")
        weights = self.weights if weights is None else weights
        return op.expert_linear(rows, DOWN, [], None, None, None, weights, *order, *sizes)[0].view(self.x.shape)


def experts(x: Tensor, gate: Callable[[Experts, Tensor], Tensor], **more: Any) -> Tensor:
    own = Experts(x, **more)
    return x + own.down(gate(own, own.up()))


def halves(own: Experts, rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return F.silu(gate) * up


def by_groups(x: Tensor) -> Tensor:
    """DeepSeek's choice of groups first."""
    scores = (x.reshape(-1, H) @ SQUARE).sigmoid()
    groups = scores.view(-1, 4, 2).sum(-1)
    mask = torch.zeros_like(groups).scatter_(1, groups.topk(2, -1).indices, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, H)
    return scores.masked_fill(~mask.bool(), float("-inf")).topk(2, -1).values.view(*x.shape[:2], 2)


def adapted(x: Tensor) -> Tensor:
    own = Experts(x)
    return own.down(halves(own, own.up(bias=UP[:, :, 0], factors=FACTORS)))


def statistics(x: Tensor, weight: Tensor = WEIGHT) -> list[Tensor]:
    """Of tokens, some of which have no label."""
    labels = torch.where(x[..., 0] > 0, (x[..., 1] > 0).long(), -100)
    return op.linear_token_statistics(x, weight, labels, None, None, None, -100, 1.0, 0.0, 2**10, [False] * 5)


def without_some(x: Tensor) -> Tensor:
    """Choices of no expert."""
    own = Experts(x)
    own.order = op.expert_order(torch.where(own.weights > 0.3, own.index, -1), E)
    return own.down(halves(own, own.up()))


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
    "statistics of tokens": lambda x: torch.stack(statistics(x)[:5], -1),
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
    "scattered": lambda x: x.scatter(-1, x.topk(2, -1).indices, x.topk(2, -1).values * 3),
    "groups of experts": by_groups,
    "experts": lambda x: experts(x, halves),
    "one expert a token": lambda x: experts(x, halves, top_k=1),
    "all experts": lambda x: experts(x, halves, top_k=E),
    "experts' packed gate": lambda x: experts(x, lambda own, rows: op.glu_packed(rows, "silu")),
    "experts' interleaved gate": lambda x: experts(x, lambda own, rows: rows[..., ::2].clamp(max=1) * rows[..., 1::2]),
    "experts' softmax": lambda x: experts(x, lambda own, rows: rows.view(-1, 2, H).softmax(-1).sum(1)),
    "experts with adapters": adapted,
    "choices of no expert": without_some,
    "experts of experts": lambda x: experts(experts(x, halves), halves, flips=True),
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
    "a head made of tokens": lambda x: statistics(x, x[0] * 1)[0].unsqueeze(-1),
    "a token by its number": lambda x: x + x[:, torch.tensor([1])],
    "some tokens": lambda x: x[:, torch.arange(x.shape[1]) - 1] * 1,
    "gathered": lambda x: x.gather(1, (x > 0).long()),
    "scattered along tokens": lambda x: x.scatter(1, (x > 0).long(), 1.0),
    "scattered in the first sequence": lambda x: x.scatter(-1, torch.ones(1, x.shape[1], 1).long(), 1.0),
    "scattered from other rows": lambda x: x.scatter(
        -1, x[..., :1].long() * 0, x.flatten(0, 1)[None].expand(x.shape[0], -1, -1)
    ),
    "tokens that experts chose": lambda x: experts(
        x, lambda own, rows: halves(own, rows) + (own.tokens @ ROUTER).topk(2, 0).values.sum()
    ),
    "a loss of the load": lambda x: experts(x, halves) + Experts(x).weights.mean(0).square().sum(),
    "the load of experts": lambda x: experts(x, lambda own, rows: halves(own, rows) * own.order[2].float().mean()),
    "numbers of rows": lambda x: experts(x, lambda own, rows: halves(own, rows) * own.order[0][:, None]),
    "places of slots": lambda x: experts(x, halves) * Experts(x).order[1].float().mean(),
    "mean over experts' rows": lambda x: experts(x, lambda own, rows: halves(own, rows - rows.mean(0))),
    "sum over experts' rows": lambda x: experts(x, lambda own, rows: halves(own, rows) + rows.sum()),
    "experts' rows as those of tokens": lambda x: experts(
        x, lambda own, rows: halves(own, rows.view(-1, 2, 2 * H).softmax(1).view(rows.shape))
    ),
    "experts' rows beside those of slots": lambda x: experts(
        x, lambda own, rows: halves(own, rows) + own.tokens[:, None].expand(-1, 2, -1).reshape(-1, H)
    ),
    "experts' rows beside tokens": lambda x: experts(x, lambda own, rows: halves(own, rows) + own.tokens, top_k=1),
    "experts' rows as the batch": lambda x: x + halves(own := Experts(x, 1), own.up()).view(x.shape),
    "experts' rows by slots": lambda x: experts(x, lambda own, rows: halves(own, rows)[own.order[1].long()]),
    "experts' rows turned over": lambda x: experts(x, lambda own, rows: halves(own, rows).flip(0)),
    "experts' rows for all": lambda x: experts(x, lambda own, rows: halves(own, rows)[-1:] + rows[:, :H]),
    "products of experts' rows": lambda x: experts(x, lambda own, rows: (rows @ rows.T) @ halves(own, rows)),
    "the number of experts' rows": lambda x: experts(x, lambda own, rows: halves(own, rows) * rows.shape[0]),
    "rows in two orders": lambda x: experts(
        x, lambda own, rows: halves(own, rows + own.up(op.expert_order((own.index + 1) % E, E)))
    ),
    "rows of another order": lambda x: experts(
        x, lambda own, rows: halves(own, own.up(op.expert_order((own.index + 1) % E, E)))
    ),
    "rows put where others were": lambda x: (own := Experts(x)).down(
        halves(own, own.up()), order=op.expert_order((own.index + 1) % E, E)
    ),
    "order for place": lambda x: (own := Experts(x)).down(
        halves(own, own.up()), order=(own.order[1], own.order[0], own.order[2])
    ),
    "weights of sorted rows": lambda x: (own := Experts(x, 1)).down(halves(own, own.up()), own.up()[:, :1]),
    "tokens for rows": lambda x: (own := Experts(x, 1)).down(own.tokens),
    "tokens one sequence beside another": lambda x: (own := Experts(x)).down(
        halves(own, own.up(order := op.expert_order(own.index.view(*x.shape[:2], 2).transpose(0, 1), E))), order=order
    ),
    "rows for tokens": lambda x: x + Experts(halves(own := Experts(x, 1), own.up())[None]).up().mean(),
    "triangle": lambda x: x * torch.ones(x.shape[1], x.shape[1]).tril()[:, :1] + x.tril(),
}


def captured(function: Callable[[Tensor], Tensor]) -> tuple[GraphModule, RowSizes]:
    """The graph of a function for any batch and length."""
    graphs: list[tuple[GraphModule, RowSizes]] = []

    def backend(gm: GraphModule, _: Any) -> Callable:
        values = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
        (x,) = (value for value in values if isinstance(value, Tensor) and isinstance(value.shape[0], torch.SymInt))
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


@pytest.mark.parametrize("top_k", [1, 2])
def test_rows_sorted_by_expert_stay_within_what_is_checked(top_k: int) -> None:
    """They are the batch's nowhere else, even where they are as many."""
    gm, sizes = captured(lambda x: experts(x, halves, top_k=top_k))
    nodes = list(gm.graph.nodes)
    first, last = (
        [node.target for node in nodes].index(target) for target in (op.expert_order, op.expert_linear)
    )  # fmt: skip
    proof.check(gm, nodes[:first], sizes)
    for place in range(first + 1, last + 2):
        for part in (nodes[:place], nodes[place:]):
            with pytest.raises(Declined):
                proof.check(gm, part, sizes)
    gm, sizes = captured(lambda x: Experts(x, top_k).up().unsqueeze(0))
    with pytest.raises(Declined, match="elsewhere"):
        proof.check(gm, gm.graph.nodes, sizes)


@pytest.mark.parametrize("part", ["gate", "up", "both"])
def test_bodies_neither_take_nor_return_rows_sorted_by_expert(part: str) -> None:
    """Of which a body knows nothing, but that they are as many as tokens."""

    def function(x: Tensor) -> Tensor:
        again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        if part == "both":
            return again(lambda x: experts(x, halves, top_k=1), x)
        own = Experts(x, 1)
        if part == "up":
            return again(lambda x: Experts(x, 1).up(), x)[:, :H].view(x.shape) * 2
        return own.down(again(halves, own, own.up()))

    gm, sizes = captured(function)
    graphs = [gm, *(body for body in bodies(gm) if body is not gm)]
    assert len(graphs) == 2
    wrong = {"gate": graphs[0], "up": graphs[1]}.get(part)  # where they are given to a body, or returned
    if wrong is None:
        for one in graphs:
            proof.check(one, one.graph.nodes, sizes)
        return
    with pytest.raises(Declined, match="elsewhere"):
        proof.check(wrong, wrong.graph.nodes, sizes)


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


def read_behind(x: Tensor) -> Tensor:
    """Results that are zero without a label, and mixed afterwards."""
    found = statistics(x * 2)
    return found[0].cumsum(1).exp() + found[1].flip(1)


BEHIND: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "rows": (lambda x: (y := x * 2) + statistics(y)[0].sum() + y.mean(), "is read behind the layers"),
    "what is made of rows": (
        lambda x: (n := (y := x * 2).norm(dim=-1)) + statistics(y)[1] + n.mean(),
        "is read behind",
    ),
    "writes": (lambda x: statistics(x * 2)[0].cumsum(1).exp_(), "is written to behind the layers"),
}


def test_results_that_are_zero_anyway_may_be_read_behind_the_layers() -> None:
    gm, sizes = captured(read_behind)
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    before, rest = division.behind_results(gm, nodes, division.results(nodes), sizes)
    assert before + rest == nodes
    assert [node.target for node in division.losses(before)] == [op.linear_token_statistics]
    assert division.results(before).keys() == division.results(nodes).keys()
    assert [name_of(node.target) for node in rest] == ["cumsum", "exp", "flip", "add"]
    proof.check(gm, before, sizes)


@pytest.mark.parametrize("name", BEHIND)
def test_nothing_else_of_rows_may_be_read_behind_the_layers(name: str) -> None:
    function, reason = BEHIND[name]
    gm, sizes = captured(function)
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    with pytest.raises(Declined, match=reason):
        division.behind_results(gm, nodes, division.results(nodes), sizes)


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
    by_expert = {"fastft::expert_order", "fastft::expert_linear"}
    of_weights = {"fastft::dequantize_4bit", "fastft::dora_weight_norm"}  # of no row
    apart = {"fastft::attention", proof.LOSS, "fastft::linear_kl_div", *by_expert, *of_weights}
    assert forward == proof.ROW_WISE | apart
