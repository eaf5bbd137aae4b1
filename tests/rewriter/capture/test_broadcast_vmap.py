"""vmap over pointwise code becomes code on tensors that broadcast; any other stays, and what lies outside is lifted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_metadata
from lifting import Capture, calls, compiled, normal, ops, rules
from torch import Tensor
from transformers import masking_utils as hf

from fastft.compat.fake_tensors import value_of

FLAGS = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
IDS = torch.tensor([[0, 0, 1, 1, 2], [3, 3, 3, 0, 0], [1, 2, 3, 4, 5]])
NUMBERS = torch.tensor([0.5, 1.5, -2.0, 4.0])


def mapped(function: Callable, flags: Tensor) -> Tensor:
    """A function of batch, head, query and key, over all of them, as transformers maps it."""
    axes = [torch.arange(size) for size in (flags.shape[0], 1, flags.shape[1], flags.shape[1])]
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        function = torch.vmap(function, in_dims=dims, out_dims=0)
    with hf.TransformGetItemToIndex():
        return function(*axes)


def over_masks(rule: Callable[[Tensor], Callable]) -> Callable:
    return lambda flags, ids: mapped(rule((flags, ids)), flags)


POINTWISE: dict[str, Callable] = {
    "causal": over_masks(lambda _: hf.causal_mask_function),
    "window and padding": over_masks(
        lambda given: hf.and_masks(hf.sliding_window_causal_mask_function(2), hf.padding_mask_function(given[0]))
    ),
    "images": over_masks(lambda given: hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(given[1]))),
    "of no query": over_masks(lambda given: hf.padding_mask_function(given[0])),
    "a constant": over_masks(lambda _: lambda b, h, q, k: torch.tensor(True)),
    "of one axis": lambda flags, ids: torch.vmap(lambda one: (one * 2 - 1).ge(3))(ids[0]),
    "two results": lambda flags, ids: torch.cat(torch.vmap(lambda one: (one + 1, one * 2))(ids[0])),
}


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_pointwise_code_is_broadcast(name: str, dynamic: bool) -> None:
    captures: list[Capture] = []
    torch._dynamo.reset()
    backend = compiled(POINTWISE[name], captures)
    for flags, ids in ((FLAGS, IDS), (FLAGS[:2, :4], IDS[:2, :4])):
        expected = POINTWISE[name](flags, ids)
        actual = backend(flags, ids)
        assert torch.equal(actual, expected)
        assert_same_metadata(actual, expected)
    assert all("batch_dim" not in call and "nesting" not in call for gm, _ in captures for call in calls(gm))


def test_numbers_keep_their_gradient() -> None:
    """The graph's own record of it, too: a part of the graph that is compiled by itself goes by that."""

    def function(x: Tensor) -> Tensor:
        return torch.vmap(lambda one: torch.vmap(lambda other: one * other)(x))(x)

    captures: list[Capture] = []
    x = NUMBERS.clone().requires_grad_()
    (actual,), (expected,) = (torch.autograd.grad(run(x).square().sum(), x)
                              for run in (compiled(function, captures), function))  # fmt: skip
    torch.testing.assert_close(actual, expected)
    ((gm, _),) = captures
    assert all(value_of(node).requires_grad for node in gm.graph.output_node().all_input_nodes)
    assert not any("batch_dim" in call for call in calls(gm))


OTHERS: dict[str, Callable] = {
    "a sum": lambda x, ids: torch.vmap(torch.sum)(x),
    "a product of matrices": lambda x, ids: torch.vmap(lambda one: one @ x.mT)(x),
    "rows": lambda x, ids: torch.vmap(lambda one: one * 2)(x),
    "another axis": lambda x, ids: torch.vmap(lambda one: one * 2, in_dims=1, out_dims=1)(x),
    "results along the second axis": lambda x, ids: torch.vmap(
        lambda a: torch.vmap(lambda b: a * b, out_dims=0)(ids[0]), out_dims=1
    )(ids[0]),
    "random numbers": lambda x, ids: torch.vmap(lambda one: F.dropout(one), randomness="different")(x[0] * 0),
}


def accumulated(one: Tensor) -> Tensor:
    """In place, where what is written to depends on no level outside of a vmap."""
    total = one.new_zeros(())
    total.add_(one)
    return total


def of_a_number(x: Tensor, ids: Tensor) -> Tensor:
    number = x[0, 1] * 2
    return torch.vmap(lambda _: number)(ids[0])


def of_a_wider_number(x: Tensor, ids: Tensor) -> Tensor:
    number = x.double()[0, 1]
    return torch.vmap(lambda one: one * number)(x[0])


def of_a_row(x: Tensor, ids: Tensor) -> Tensor:
    row = ids[0]
    return torch.vmap(lambda one: one * row)(ids[1])


OTHERS["types promoted otherwise"] = of_a_wider_number
OTHERS["a tensor as a whole"] = of_a_row
OTHERS["in place"] = lambda x, ids: torch.vmap(accumulated)(ids[0])
OTHERS["a number from outside"] = of_a_number
OTHERS["a tensor from outside"] = lambda x, ids: torch.vmap(lambda _: x)(ids[0])


def gated(x: Tensor, up: Tensor) -> Tensor:
    return F.silu(x) * up


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_stays_and_what_is_around_it_is_lifted(name: str) -> None:
    """One match before it, one behind it, and one whose calls are on both sides."""

    def function(x: Tensor, up: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before, halfway = gated(x, up), F.silu(up)
        other = OTHERS[name](before, ids)
        return gated(before, up), halfway * x, other

    captures: list[Capture] = []
    values = normal(3, 4), normal(3, 4, seed=1), IDS[:, :4]
    for actual, expected in zip(compiled(function, captures)(*values), function(*values), strict=True):
        torch.testing.assert_close(actual, expected)
    ((gm, report),) = captures
    assert ops(gm).count("glu") == 3, report.near_misses
    assert any("batch_dim" in call for call in calls(gm))


def test_nothing_under_a_transform_is_lifted() -> None:
    def function(x: Tensor, up: Tensor) -> Tensor:
        slopes = torch.func.grad(lambda one: gated(one, up).sum())(x)
        return gated(slopes, up) + torch.vmap(lambda one: gated(one, up[0]))(x)

    captures: list[Capture] = []
    values: Any = normal(3, 4), normal(3, 4, seed=1)
    torch.testing.assert_close(compiled(function, captures)(*values), function(*values))
    ((gm, report),) = captures
    assert ops(gm) == ["glu"]
    assert rules(report)[0] == ["glu.silu"]
    assert [miss.reason for miss in report.near_misses if "torch.func" in miss.reason]
