"""The gradient of a residual stream is added by the norm's backward, where it may be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_close_to_truth
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fastft.kernels import REGISTRY
from fastft.rewriter.fx import residual_gradients

ops = torch.ops
assert "fastft::rms_norm" in REGISTRY


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.fastft.rms_norm(x, weight, 1e-6, 0.0, False)[0]


def joint(forward: Callable[..., Tensor], needed: str = "x") -> Callable[..., Any]:
    def run(x: Tensor, weight: Tensor, tangent: Tensor) -> Any:
        given = {"x": x, "weight": weight}
        return torch.autograd.grad(forward(x, weight), [given[name] for name in needed.split()], tangent)

    return run


def traced(
    function: Callable[..., Any], dtype: torch.dtype, mode: str = "symbolic", *, trained: bool = False
) -> tuple[GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 8, dtype=dtype), torch.randn(8, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype)]
    inputs[0].requires_grad_()
    inputs[1].requires_grad_(trained)
    return make_fx(function, tracing_mode=mode)(*inputs), inputs


def count(gm: GraphModule, target: Any) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("mode", ["symbolic", "fake"])
def test_an_addition_behind_a_norms_backward_is_the_norms(mode: str, swapped: bool) -> None:
    forward = lambda x, w: norm(x, w) * 3 + x if swapped else x + norm(x, w) * 3  # noqa: E731
    gm, inputs = traced(joint(forward), torch.bfloat16, mode)
    (before,) = gm(*inputs)
    additions = count(gm, ops.aten.add.Tensor)
    residual_gradients.fold(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert count(gm, ops.aten.add.Tensor) == additions - 1
    assert count(gm, ops.fastft.rms_norm_backward.default) == 1
    exact = [one.detach().double().requires_grad_() for one in inputs]
    (truth,) = joint(forward)(*exact)
    assert_close_to_truth(gm(*inputs)[0], before, truth, 1.0)
    residual_gradients.fold(gm.graph)
    assert count(gm, ops.fastft.rms_norm_backward.default) == 1


def backward(x: Tensor, weight: Tensor, grad: Tensor, *addend: Tensor) -> Tensor:
    rstd = ops.fastft.rms_norm(x, weight, 1e-6, 0.0, False)[1]
    return ops.fastft.rms_norm_backward(grad, x, weight, rstd, 0.0, False, *addend)


def twice(x: Tensor, weight: Tensor, grad: Tensor) -> Any:
    """The norm's gradient is also a result of its own."""
    dx = backward(x, weight, grad)
    return dx + grad, dx


def has_one(x: Tensor, weight: Tensor, grad: Tensor) -> Any:
    return backward(x, weight, grad, grad * 2) + grad


def widened(x: Tensor, weight: Tensor, grad: Tensor) -> Any:
    return backward(x, weight, grad) + grad.float()


def broadcast(x: Tensor, weight: Tensor, grad: Tensor) -> Any:
    return backward(x, weight, grad) + grad[:1]


def scaled(x: Tensor, weight: Tensor, grad: Tensor) -> Any:
    return torch.add(backward(x, weight, grad), grad, alpha=2)


def doubled(x: Tensor, weight: Tensor, grad: Tensor) -> Any:
    dx = backward(x, weight, grad)
    return dx + dx


@pytest.mark.parametrize("function", [twice, has_one, widened, broadcast, scaled, doubled])
def test_other_additions_stay(function: Callable[..., Any]) -> None:
    gm, inputs = traced(function, torch.bfloat16)
    before, code = gm(*inputs), gm.code
    residual_gradients.fold(gm.graph)
    gm.recompile()
    assert gm.code == code
    torch.testing.assert_close(gm(*inputs), before, rtol=0, atol=0)


def test_a_trained_norm_keeps_its_own_backward() -> None:
    gm, _ = traced(joint(lambda x, w: x + norm(x, w), "x weight"), torch.float32, trained=True)
    code = gm.code
    residual_gradients.fold(gm.graph)
    gm.recompile()
    assert gm.code == code
