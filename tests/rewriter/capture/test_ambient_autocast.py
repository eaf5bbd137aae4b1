"""Autocast that is around all of a model's forward, as trainers put it, is the caller's: layers are compiled once."""

import copy
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models.families import build
from models.padded_models import LAYERS, UNDERSTOOD, Compiled, batch
from torch import Tensor, nn


def prepared(model: nn.Module) -> nn.Module:
    """As accelerate does it for trainers: the forward runs in autocast, and its results are cast to float32."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_layers_of_a_model_in_autocast_are_compiled_once() -> None:
    model = build(UNDERSTOOD[0], nf4=False, checkpoint=False, train_norms=True, layers=LAYERS)
    eager = prepared(copy.deepcopy(model))
    exact = copy.deepcopy(model)
    compiled = Compiled(prepared(model))
    losses = [one(**batch("right")).loss for one in (compiled.model, eager, exact)]
    for loss in losses:
        loss.backward()
    assert len(compiled.reports[-1].regions) > 1
    assert not compiled.rows.reason
    assert compiled.rows.live < compiled.rows.rows
    mine, others, true = (loss.item() for loss in losses)
    assert abs(mine - true) <= 2 * abs(others - true) + 1e-3
    for (name, one), other, truth in zip(model.named_parameters(), eager.parameters(), exact.parameters(), strict=True):
        if truth.grad is not None and truth.grad.norm() > 0:
            errors = [(found.grad - truth.grad).norm() / truth.grad.norm() for found in (one, other)]
            assert errors[0] <= 2 * errors[1] + 2e-2, name


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ weight).relu()


def twice(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.float16):
        return x @ weight


def off_inside(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ weight
        with torch.autocast("cpu", enabled=False):
            return y.float() @ weight


def cast_behind(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ weight
    return y.float()


def product_behind(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ weight
    return y.float() @ weight


def product_before(x: Tensor, weight: Tensor) -> Tensor:
    y = x @ weight
    with torch.autocast("cpu", torch.bfloat16):
        return y @ weight


@pytest.mark.parametrize("outer", [False, True], ids=["", "in another"])
@pytest.mark.parametrize("function", [scaled, twice, off_inside, cast_behind, product_behind, product_before])
def test_results_are_those_of_the_same_mode(function: Callable[..., Tensor], outer: bool) -> None:
    torch._dynamo.reset()
    x, weight = (torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    compiled = torch.compile(function, backend="fastft", options={"lower": "eager", "strict": True})
    results = []
    for one in (compiled, function):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=outer):
            found = one(leaf, weight)
            inside = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        found.float().square().sum().backward()
        results.append((found, leaf.grad, inside))
    assert results[0][0].dtype == results[1][0].dtype
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    assert torch.is_autocast_enabled("cpu") is False


def off_in_the_middle(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """As a router or a head in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ first
        with torch.autocast("cpu", enabled=False):
            z = y.float() @ second
        return z


@pytest.mark.slow
def test_backward_is_in_the_mode_in_which_it_is_called() -> None:
    """By AOTAutograd, which traces it: products in float32 have a backward in float32."""
    torch._dynamo.reset()
    compiled = torch.compile(off_in_the_middle, backend="fastft", options={"strict": True})
    tensors = [torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = []
    for one in (compiled, off_in_the_middle):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        one(*leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-5)
