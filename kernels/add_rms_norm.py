"""RMSNorm with the residual stream that it reads or writes, in one pass.

add_rms_norm:  total = x + residual;  y = norm(total)                     (before a block: Llama)
rms_norm_add:  total = norm(x) + residual                                 (after a block: OLMo 2)
rms_norm_add_rms_norm:  total = inner_norm(x) + residual;  y = norm(total)  (both: Gemma 2, a sandwich)

norm is fastft::rms_norm, with the parameters described there; both norms of a sandwich round alike.  total has the
dtype that the sum promotes to, and norm(total) is that of the rounded total.  total and y have the memory order of x.
The backward is rms_norm's, which adds the gradient of total that comes past the norm.
"""

from typing import Any

import torch
from torch import Tensor

from fastft.kernels import rms_norm
from fastft.kernels.core.registry import cases, define, require
from fastft.kernels.rms_norm import ROWS, SPELLINGS, check, gradients, new_rstd, result_dtype


def reference_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, total and rstd in plain PyTorch."""
    total = x + residual
    y, rstd = rms_norm.reference(total, weight, eps, offset, round_first)
    return y, total, rstd


def reference_rms_norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """Compute total and rstd in plain PyTorch."""
    y, rstd = rms_norm.reference(x, weight, eps, offset, round_first)
    return y + residual, rstd


def reference_rms_norm_add_rms_norm(
    x: Tensor, residual: Tensor, inner_weight: Tensor, weight: Tensor, inner_eps: float, eps: float, offset: float,
    round_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute y, total, inner_rstd and rstd in plain PyTorch."""
    total, inner_rstd = reference_rms_norm_add(x, residual, inner_weight, inner_eps, offset, round_first)
    y, rstd = rms_norm.reference(total, weight, eps, offset, round_first)
    return y, total, inner_rstd, rstd


def _new_total(x: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    require(x.shape == residual.shape, lambda: f"x {tuple(x.shape)}, but residual {tuple(residual.shape)}")
    require(residual.is_floating_point(), lambda: f"residual is {residual.dtype}")
    return torch.empty_like(x, dtype=torch.promote_types(dtype, residual.dtype))


def new_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate empty y, total and rstd."""
    total = _new_total(x, residual, x.dtype)
    y, rstd = rms_norm.new_outputs(total, weight, eps, offset, round_first)
    return y, total, rstd


def new_rms_norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """Allocate empty total and rstd."""
    check(x, weight, offset, round_first)
    total = _new_total(x, residual, result_dtype(x, weight, round_first))
    return total, new_rstd(total, x)


def new_rms_norm_add_rms_norm(
    x: Tensor, residual: Tensor, inner_weight: Tensor, weight: Tensor, inner_eps: float, eps: float, offset: float,
    round_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate empty y, total, inner_rstd and rstd."""
    total, inner_rstd = new_rms_norm_add(x, residual, inner_weight, inner_eps, offset, round_first)
    y, rstd = rms_norm.new_outputs(total, weight, eps, offset, round_first)
    return y, total, inner_rstd, rstd


_SHAPES = {"x": "... D", "residual": "... D"}
add_rms_norm = define(
    "add_rms_norm", reference_add_rms_norm, new_add_rms_norm, "add_rms_norm_triton.add_rms_norm",
    cases=cases([{**ROWS, **_SHAPES}], SPELLINGS), gradients=("x", "residual", "weight"), flops=5,
)  # fmt: skip
rms_norm_add = define(
    "rms_norm_add", reference_rms_norm_add, new_rms_norm_add, "add_rms_norm_triton.rms_norm_add",
    cases=cases([{**ROWS, **_SHAPES}], SPELLINGS), gradients=("x", "residual", "weight"), flops=5,
)  # fmt: skip
rms_norm_add_rms_norm = define(
    "rms_norm_add_rms_norm", reference_rms_norm_add_rms_norm, new_rms_norm_add_rms_norm,
    "add_rms_norm_triton.rms_norm_add_rms_norm",
    cases=cases(
        [{**ROWS, **_SHAPES, "inner_weight": "D"}], [{**spelling, "inner_eps": 1e-5} for spelling in SPELLINGS]
    ),
    gradients=("x", "residual", "inner_weight", "weight"), flops=9,
)  # fmt: skip


def _cast(gradient: Tensor | None, dtype: torch.dtype, needed: bool) -> Tensor | None:
    return gradient.to(dtype) if gradient is not None and needed else None


def _setup_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, *ctx.spelling = inputs
    _, total, rstd = output
    ctx.save_for_backward(total, weight, rstd)
    ctx.dtypes = x.dtype, residual.dtype
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward_add_rms_norm(
    ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    offset, round_first = ctx.spelling
    trained = ctx.needs_input_grad[2]
    dtotal, dweight = gradients(trained, grad_y, total, weight, rstd, offset, round_first, grad_total)
    dx, dresidual = (_cast(dtotal, *target) for target in zip(ctx.dtypes, ctx.needs_input_grad[:2], strict=True))
    return dx, dresidual, dweight, None, None, None


def _setup_rms_norm_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, _, *ctx.spelling = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.dtype = residual.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_rms_norm_add(ctx: Any, grad_total: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    needs_x, needs_residual, needs_weight, *_ = ctx.needs_input_grad
    dx = dweight = None
    if needs_x or needs_weight:
        dx, dweight = gradients(needs_weight, grad_total, x, weight, rstd, *ctx.spelling)
    return dx if needs_x else None, _cast(grad_total, ctx.dtype, needs_residual), dweight, None, None, None


def _setup_sandwich(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, inner_weight, weight, _, _, *ctx.spelling = inputs
    _, total, inner_rstd, rstd = output
    ctx.save_for_backward(x, inner_weight, inner_rstd, total, weight, rstd)
    ctx.dtype = residual.dtype
    ctx.mark_non_differentiable(inner_rstd, rstd)
    ctx.set_materialize_grads(False)


def _backward_sandwich(
    ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, inner_weight, inner_rstd, total, weight, rstd = ctx.saved_tensors
    needs_x, needs_residual, needs_inner_weight, needs_weight, *_ = ctx.needs_input_grad
    offset, round_first = ctx.spelling
    dtotal, dweight = gradients(needs_weight, grad_y, total, weight, rstd, offset, round_first, grad_total)
    dx = dinner_weight = None
    if needs_x or needs_inner_weight:
        dx, dinner_weight = gradients(needs_inner_weight, dtotal, x, inner_weight, inner_rstd, *ctx.spelling)
    dresidual = _cast(dtotal, ctx.dtype, needs_residual)
    return dx if needs_x else None, dresidual, dinner_weight, dweight, None, None, None, None


add_rms_norm.register_autograd(_backward_add_rms_norm, setup_context=_setup_add_rms_norm)
rms_norm_add.register_autograd(_backward_rms_norm_add, setup_context=_setup_rms_norm_add)
rms_norm_add_rms_norm.register_autograd(_backward_sandwich, setup_context=_setup_sandwich)
