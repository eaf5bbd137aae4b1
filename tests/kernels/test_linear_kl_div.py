"""fastft::linear_kl_div against F.kl_div of log-probabilities that a teacher left, forward and backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import FORWARD, GRADIENT, assert_close_to_truth
from op_calls import nearby
from strategies import DEVICES, DTYPES, Spec
from torch import Tensor

V, H, ROWS = 203, 24, (3, 7)
on_devices = pytest.mark.parametrize("device", DEVICES)


def problem(dtype: torch.dtype, device: str, scale: float) -> tuple[dict[str, Tensor], Tensor]:
    """hidden, weight and bias, and what a teacher near to them says."""
    given = {
        "hidden": Spec((*ROWS, H), dtype, seed=0).build(device),
        "weight": Spec((V, H), dtype, seed=1, scale=0.3).build(device),
        "bias": Spec((V,), dtype, seed=2).build(device),
    }
    teacher = logits(given, scale).float() + Spec((*ROWS, V), torch.float32, seed=3).build(device)
    return given, teacher.log_softmax(-1).to(dtype)


def logits(given: dict[str, Tensor], scale: float) -> Tensor:
    return F.linear(given["hidden"], given["weight"], given["bias"]) * scale


def eager(given: dict[str, Tensor], target: Tensor, scale: float) -> Tensor:
    """As written with log_target=True, and summed."""
    wide = torch.promote_types(target.dtype, torch.float32)
    return F.kl_div(logits(given, scale).to(wide).log_softmax(-1), target.to(wide), reduction="sum", log_target=True)


def fused(given: dict[str, Tensor], target: Tensor, scale: float, chunk_bytes: int, ahead: bool = True) -> Tensor:
    marks = [ahead, ahead, ahead, False, False]
    hidden, weight, bias = given.values()
    return torch.ops.fastft.linear_kl_div(
        hidden, weight, target, bias, None, None, scale, 0.0, chunk_bytes, True, marks
    )[0]


def evaluate(function: Any, given: dict[str, Tensor], *more: Any) -> list[Tensor]:
    leaves = {name: one.detach().requires_grad_() for name, one in given.items()}
    loss = function(leaves, *more)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_as_kl_div(device: str, dtype: torch.dtype, temperature: float) -> None:
    scale = 1.0 / temperature
    given, target = problem(dtype, device, scale)

    def measured(seed: int) -> list[tuple[Tensor, Tensor]]:
        values = {name: nearby(one, seed) if seed else one for name, one in given.items()}
        exact = {name: one.double() for name, one in values.items()}
        low, right = evaluate(eager, values, target, scale), evaluate(eager, exact, target.double(), scale)
        return list(zip(low, right, strict=True))

    here, *around = (measured(seed) for seed in range(8))
    for chunk_bytes in (1, 2**13, 2**28):
        for at, mine in enumerate(evaluate(fused, given, target, scale, chunk_bytes)):
            others = [one[at] for one in around]
            assert_close_to_truth(mine, *here[at], GRADIENT if at else FORWARD, magnitude=1.0, others=others)


@on_devices
def test_the_student_itself(device: str) -> None:
    """A teacher that says what the student says teaches nothing."""
    given, _ = problem(torch.float32, device, 1.0)
    target = logits(given, 1.0).log_softmax(-1)
    loss, *gradients = evaluate(fused, given, target, 1.0, 2**13)
    assert loss.abs() < 1e-4
    assert all(one.abs().max() < 1e-4 for one in gradients)


@on_devices
def test_what_the_teacher_rules_out_adds_nothing(device: str) -> None:
    given, target = problem(torch.float32, device, 1.0)
    target[..., ::3] = -float("inf")
    finite = target.masked_fill(target.isinf(), -200.0)  # exp is 0 in float32, too
    for mine, other in zip(
        evaluate(fused, given, target, 1.0, 2**13), evaluate(eager, given, finite, 1.0), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@on_devices
def test_ahead_or_again(device: str) -> None:
    """Gradients that were not computed ahead are the same."""
    given, target = problem(torch.float32, device, 0.5)
    for mine, other in zip(
        evaluate(fused, given, target, 0.5, 2**13), evaluate(fused, given, target, 0.5, 2**13, False), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
