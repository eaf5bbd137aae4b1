"""Rotary embedding by products of complex numbers: what becomes fastft::rotary, and what does not."""

from collections.abc import Callable

import pytest
import torch
from lifting import assert_right, calls, compiled, frozen, lifted, normal, ops, reasons, rules
from torch import Tensor, nn

from fastft.patterns import rotary as patterns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, H, S, D = 2, 3, 5, 16


def turns(*shape: int) -> Tensor:
    """A complex number of size one for each pair."""
    angle = frozen(*shape, D // 2, seed=2)
    return torch.complex(angle.cos(), angle.sin())


def complex_as_written(x: Tensor, angles: Tensor) -> Tensor:
    """With angles for one batch, in Llama 4's words."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles[:, :, None, :]).flatten(3).type_as(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_and_keys_as_complex_numbers_are_turned_together(dtype: torch.dtype) -> None:
    """What is computed of the angles is computed once for both."""

    def function(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return complex_as_written(q, angles), complex_as_written(k, angles)

    captures: list = []
    angle = turns(1, S)
    values = [normal(B, S, H, D, dtype=dtype), normal(B, S, 1, D, dtype=dtype, seed=1), angle]
    assert_right(compiled(function, captures), function, values)
    ((gm, report),) = captures
    assert (ops(gm), rules(report)[1]) == (["rotary_qk"], ["rotary.queries_and_keys"]), reasons(report)
    assert calls(gm).count("view_as_real") == 1


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return complex_as_written(q, angles), complex_as_written(k, angles)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            q, k = layer(q, k, angles)
        return q, k


def test_each_layer_computes_what_it_needs() -> None:
    """Otherwise the first would be another kind of layer than the others."""
    captures: list = []
    values = [normal(B, S, H, D), normal(B, S, 1, D, seed=1), turns(1, S)]
    assert_right(compiled(Layers(), captures), Layers(), values)
    ((gm, _),) = captures
    assert ops(gm) == ["rotary_qk"] * 2
    assert calls(gm).count("view_as_real") == 2


COMPLEX_UNFIT = {  # angles that are no rotation of each pair, and the reason
    "trained": (lambda c: c.requires_grad_(), "gives angles no gradient of its own"),
    "real": (lambda c: c.real, "the angles are torch.float32 and not complex64"),
    "wide": (lambda c: c.to(torch.complex128), "the angles are torch.complex128 and not complex64"),
    "one for all": (lambda c: c[..., :1], "cos has 1 angles for 16 elements and not one a pair"),
}


@pytest.mark.parametrize("name", COMPLEX_UNFIT)
def test_complex_numbers_that_the_op_cannot_turn_by(name: str) -> None:
    change, reason = COMPLEX_UNFIT[name]
    values = [normal(B, H, S, D), change(turns(B, 1, S))]
    gm, report = lifted(patterns.complex_product, *values)
    assert (ops(gm), report.lifted) == ([], [])
    assert [reason in one for one in reasons(report)] == [True], reasons(report)


def conjugated(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(B, H, S, -1, 2))
    return torch.view_as_real(pairs * angles.conj()).flatten(-2)


def pairs_conjugated(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(B, H, S, -1, 2))
    return torch.view_as_real((pairs.conj() * angles).resolve_conj()).flatten(-2)


def divided(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(B, H, S, -1, 2))
    return torch.view_as_real(pairs / angles).flatten(-2)


@pytest.mark.parametrize("function", [conjugated, pairs_conjugated, divided])
def test_other_products_of_complex_numbers_run_as_they_are(function: Callable) -> None:
    values = [normal(B, H, S, D), turns(B, 1, S)]
    gm, _ = lifted(function, *values)
    assert ops(gm) == []
    assert_right(gm, function, values)
