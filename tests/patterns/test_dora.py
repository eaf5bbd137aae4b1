"""Which expressions are DoRA's, and become one product with the layer's own, and which are left."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lifting import assert_right, frozen, lifted, normal, ops, reasons, rules
from torch import Tensor

from fastft.patterns import dora as patterns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, S, IN, OUT, RANK = 2, 5, 24, 16, 3


def operands(dtype: torch.dtype, adapter: torch.dtype | None = None) -> list[Tensor]:
    """x, the layer's weight and bias, A, B and g."""
    other = adapter or dtype
    g = torch.linspace(-0.5, 2.5, OUT).to(other)[None].requires_grad_()
    return [
        normal(B, S, IN, dtype=dtype), frozen(OUT, IN, dtype=dtype, seed=3), frozen(OUT, dtype=dtype, seed=4),
        normal(RANK, IN, dtype=other, seed=1), normal(OUT, RANK, dtype=other, seed=2), g,
    ]  # fmt: skip


def plain(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return patterns.scaled(F.linear(x, w), x, a, b, g, 0.5)


def biased(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return patterns.scaled_biased(F.linear(x, w, bias), x, a, b, g, bias, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("function", "rule"), [(plain, "dora.scaled"), (biased, "dora.scaled_biased")])
def test_one_product_with_the_layer(function: Callable, rule: str, dtype: torch.dtype) -> None:
    values = operands(dtype)
    gm, report = lifted(function, *values)
    assert rules(report) == ([rule], ["lora_linear.group"])
    assert (ops(gm), reasons(report)) == (["lora_linear"], [])
    assert_right(gm, function, values)


@pytest.mark.parametrize("base", DTYPES[1:], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_factors_in_float32(base: torch.dtype, has_bias: bool) -> None:
    """As PEFT casts: x to the factors' dtype, and the sum to the layer's."""

    def function(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        result = F.linear(x, w, bias) if has_bias else F.linear(x, w)
        if has_bias:
            return patterns.scaled_biased(result, x.to(a.dtype), a, b, g, bias, 0.5).to(result.dtype)
        return patterns.scaled(result, x.to(a.dtype), a, b, g, 0.5).to(result.dtype)

    values = operands(base, torch.float32)
    gm, report = lifted(function, *values)
    assert (ops(gm), rules(report)[1], reasons(report)) == (["lora_linear"], ["lora_linear.group"], [])
    assert_right(gm, function, values)


def test_a_bias_that_is_trained_gets_its_gradient() -> None:
    values = operands(torch.float32)
    values[2].requires_grad_()
    gm, report = lifted(biased, *values)
    assert rules(report) == (["dora.scaled_biased"], ["lora_linear.group"])
    assert_right(gm, biased, values)


def with_dropout(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    other = x * 2
    return F.linear(x, w) + ((g - 1) * F.linear(other, w) + g * F.linear(F.linear(other, a), b) * 0.5)


def one_added(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    result = F.linear(x, w)
    return result + ((g + 1) * result + g * F.linear(F.linear(x, a), b) * 0.5)


def two_magnitudes(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    result = F.linear(x, w)
    return result + ((g - 1) * result + g.exp() * F.linear(F.linear(x, a), b) * 0.5)


def another_bias(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    result = F.linear(x, w, bias.exp())
    return result + ((g - 1) * (result - bias) + g * F.linear(F.linear(x, a), b) * 0.5)


def by_rows(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    result, rows = F.linear(x, w), g[:, :S, None]
    return result + ((rows - 1) * result + rows * F.linear(F.linear(x, a), b) * 0.5)


@pytest.mark.parametrize("function", [with_dropout, one_added, two_magnitudes, by_rows], ids=lambda one: one.__name__)
def test_what_is_not_it_is_left_alone(function: Callable) -> None:
    values = operands(torch.float32)
    gm, report = lifted(function, *values)
    assert (ops(gm), rules(report)) == ([], ([], []))
    assert_right(gm, function, values)
    if function is with_dropout:
        assert reasons(report) == ["with dropout the layer is computed once more, of another input"]


def test_any_row_may_be_subtracted() -> None:
    """The rule does not say that it is the layer's own bias, and need not."""
    values = operands(torch.float32)
    gm, report = lifted(another_bias, *values)
    assert rules(report)[0] == ["dora.scaled_biased"]
    assert_right(gm, another_bias, values)
