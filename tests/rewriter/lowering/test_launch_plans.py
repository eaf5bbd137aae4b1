"""Inductor's code calls launch plans where it would call ops: the same results at any length, by one function each."""

import re
from pathlib import Path

import pytest
import torch
from small_stack import Stack
from torch import Tensor

from fastft.kernels.core import launch_plan

LENGTHS = (5, 9, 14)


def step(model: Stack, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), [x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]  # type: ignore


@pytest.mark.slow
def test_one_plan_each_serves_all_lengths(planned_here: dict[str, launch_plan.Plan], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stack()
    compiled = torch.compile(model, backend="fastft", dynamic=True)
    for length in LENGTHS:
        x = torch.randn(2, length, 16)
        y, gradients = step(compiled, x)
        expected, wanted = step(model, x)
        torch.testing.assert_close(y, expected)
        for gradient, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, want)
    names = {plan.name for plan in planned_here.values()}
    assert {"fastft::rms_norm", "fastft::glu", "fastft::glu_backward"} <= names
    for plan in planned_here.values():
        assert len(plan.variants) == 1, plan.name
        assert not plan.unrecorded, plan.name
    written = "\n".join(path.read_text() for path in tmp_path.rglob("*.py"))
    called = re.findall(r"= (plan_of_\w+)\(", written)
    assert len(called) >= len(planned_here)
    assert not re.findall(r"torch\.ops\.fastft\.(?:rms_norm|glu)\w*\.default\(", written)


@pytest.mark.slow
def test_what_cannot_be_recorded_runs_as_the_op(
    planned_here: dict[str, launch_plan.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("nothing is recorded")

    monkeypatch.setattr(launch_plan.Recorder, "text", fails)
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(2, 7, 16)
    y, gradients = step(torch.compile(model, backend="fastft"), x)
    expected, wanted = step(model, x)
    torch.testing.assert_close(y, expected)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)
    assert planned_here
    assert all(plan.unrecorded == ["nothing is recorded"] for plan in planned_here.values())
