"""Norms of a weight with its adapter in the forms that PEFT writes, and what only looks like one."""

from collections.abc import Callable
from typing import Any

import bitsandbytes  # noqa: F401  (registers its ops)
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from lifting import Capture, calls, compiled, normal, ops, reasons, rules
from torch import Tensor

RULE = "dora.weight_norm"
IN, OUT, RANK = 64, 16, 3
DTYPES = [torch.float32, torch.bfloat16]


def product(a: Tensor, b: Tensor) -> Tensor:
    """B A, as PEFT multiplies them."""
    return F.linear(F.linear(torch.eye(a.shape[1], dtype=a.dtype, device=a.device), a), b).T


def values(dtype: torch.dtype = torch.float32, adapter: torch.dtype = torch.float32) -> list[Tensor]:
    """Weight, A, B and magnitudes, the last three trained."""
    return [
        normal(OUT, IN, dtype=dtype).detach(), normal(RANK, IN, dtype=adapter, seed=1),
        normal(OUT, RANK, dtype=adapter, seed=2), normal(OUT, seed=3),
    ]  # fmt: skip


def run(function: Callable, given: list[Tensor]) -> Capture:
    """Its value, and the gradient of everything, as without fastft; the capture."""
    captures: list[Capture] = []
    found = []
    for each in (function, compiled(function, captures)):
        result = each(*given)
        trained = [value for value in given if value.requires_grad]
        gradients = torch.autograd.grad(result.sum(), trained, allow_unused=True)
        found.append([result.detach(), *gradients])
    for mine, other in zip(found[1], found[0], strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.dtype == other.dtype
            tolerance = 2e-2 if min(value.dtype.itemsize for value in given) < 4 else 1e-5
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    return captures[0]


def peft(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    total = weight + 0.5 * product(a, b).to(weight.dtype).detach()
    return magnitude / torch.linalg.norm(total, dim=1).to(total.dtype).detach()


def on_wider(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    """The weight is cast to x's dtype, and nothing else is."""
    total = weight.to(torch.float32) + product(a, b).to(torch.float32).detach() * 0.5
    return magnitude / torch.linalg.norm(total, dim=1).detach()


def added_the_other_way(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    return magnitude / torch.linalg.norm(0.5 * product(a, b).to(weight.dtype) + weight, dim=1).detach()


def transposed(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    """fan_in_fan_out."""
    return peft(weight.reshape(IN, OUT).T, a, b, magnitude)


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [peft, on_wider, added_the_other_way, transposed], ids=lambda one: one.__name__)
def test_lifted(function: Callable, dtype: torch.dtype, adapter: torch.dtype) -> None:
    gm, report = run(function, values(dtype, adapter))
    assert (rules(report)[0], reasons(report)) == ([RULE], [])
    assert ops(gm) == ["dora_weight_norm"]
    assert not {"eye", "linear", "linalg_norm"}.intersection(calls(gm))


def test_a_weight_that_is_trained_gets_no_gradient_of_the_norm() -> None:
    given = values()
    given[0].requires_grad_()
    gm, _ = run(peft, given)
    assert ops(gm) == ["dora_weight_norm"]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_of_four_bits(quant_type: str, nested: bool, storage: torch.dtype) -> None:
    weight, *others = values()
    packed, state = quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested, quant_storage=storage)

    def function(packed: Tensor, *others: Tensor) -> Tensor:
        return peft(dequantize_4bit(packed, state), *others)

    gm, report = run(function, [packed, *others])
    assert (rules(report)[0], reasons(report)) == ([RULE], [])
    assert ops(gm) == ["dora_weight_norm"]
    assert not [name for name in calls(gm) if name.startswith("bitsandbytes") and "dequantize" in name]


def with_a_gradient(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    return magnitude / torch.linalg.norm(weight + 0.5 * product(a, b), dim=1)


def by_columns(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    return torch.linalg.norm(weight + 0.5 * product(a, b), dim=0).detach().sum() * magnitude


def of_another_kind(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    return magnitude / torch.linalg.norm(weight + 0.5 * product(a, b), ord=1, dim=1).detach()


def written_before(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    h = weight * 1.0
    total = h + 0.5 * product(a, b)
    h.exp_()
    return magnitude / torch.linalg.norm(total, dim=1).detach()


def biased(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    delta = F.linear(F.linear(torch.eye(IN), a), b, magnitude).T
    return magnitude / torch.linalg.norm(weight + 0.5 * delta, dim=1).detach()


def no_identity(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    delta = F.linear(F.linear(torch.ones(IN, IN), a), b).T
    return magnitude / torch.linalg.norm(weight + 0.5 * delta, dim=1).detach()


def of_a_weight_alone(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    return magnitude * a.sum() * b.sum() / torch.linalg.norm(weight + weight, dim=1).detach()


LEFT: list[tuple[Callable, Any]] = [
    (with_a_gradient, "it has a gradient, where the norm is a constant"),
    (by_columns, "a norm of another kind"),
    (of_another_kind, "a norm of another kind"),
    (written_before, "is written to in place"),
    (biased, None),
    (no_identity, None),
    (of_a_weight_alone, None),
]


@pytest.mark.parametrize(("function", "reason"), LEFT, ids=lambda one: getattr(one, "__name__", ""))
def test_left_alone(function: Callable, reason: str | None) -> None:
    gm, report = run(function, values())
    assert not ops(gm)
    told = [one for one in report.near_misses if one.rule == RULE]
    assert [reason in one.reason for one in told] == [True] if reason else not told
