"""y = (x - mean) * rstd * weight + bias,  rstd = (var + eps) ** -0.5,  mean and variance over the last axis.

Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450.  x [..., D]; weight and bias [D], either may be None;
mean and rstd [...] are kept for backward, float32 (float64 for a float64 x).  All is float32 and y is rounded once, to
x's dtype, as torch.nn.functional.layer_norm does.
contiguous: whether y and dx are contiguous, as torch.nn.functional.layer_norm's are; otherwise they have the memory
order of x, as an expression has.
"""

from typing import Any

import torch
from torch import Tensor

from fastft.kernels.core import dispatch
from fastft.kernels.core.registry import cases, define, require, wide


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, contiguous: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, mean and rstd in plain PyTorch."""
    h = x.to(wide(x.dtype))
    mean = h.mean(-1, keepdim=True)
    centred = h - mean
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * weight.to(h.dtype)
    if bias is not None:
        y = y + bias.to(h.dtype)
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def _unit(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.to(wide(x.dtype)) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def reference_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, contiguous: bool
) -> Tensor:
    """Compute dx: the gradient of unit = (x - mean) * rstd less its mean and its projection on unit, times rstd."""
    unit = _unit(x, mean, rstd)
    dunit = grad_output.to(unit.dtype)
    if weight is not None:
        dunit = dunit * weight.to(unit.dtype)
    projected = dunit.mean(-1, keepdim=True) + unit * (dunit * unit).mean(-1, keepdim=True)
    return ((dunit - projected) * rstd.unsqueeze(-1)).to(x.dtype)


def reference_backward_weight(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, contiguous: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dx, and dweight and dbias in float32."""
    unit = _unit(x, mean, rstd)
    dy = grad_output.to(unit.dtype)
    dweight, dbias = (value.reshape(-1, x.shape[-1]).sum(0) for value in (dy * unit, dy))
    return reference_backward(grad_output, x, weight, mean, rstd, contiguous), dweight, dbias


def _require_columns(name: str, value: Tensor | None, columns: int) -> None:
    fits = value is None or (value.dim() == 1 and value.shape[0] == columns and value.is_floating_point())
    require(fits, lambda: f"{name} is not one floating-point number for each of {columns} columns")


def _new(x: Tensor, contiguous: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format if contiguous else torch.preserve_format)


def new_outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, contiguous: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate empty y, mean and rstd."""
    require(x.dim() > 0 and x.shape[-1] > 0, lambda: f"no rows in x {tuple(x.shape)}")
    require(x.is_floating_point(), lambda: f"x is {x.dtype}")
    _require_columns("weight", weight, x.shape[-1])
    _require_columns("bias", bias, x.shape[-1])
    y = _new(x, contiguous)
    mean, rstd = (torch.empty_like(y[..., 0], dtype=wide(x.dtype)) for _ in range(2))
    return y, mean, rstd


def new_gradients(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, contiguous: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate empty dx, dweight and dbias."""
    dx = new_dx(grad_output, x, weight, mean, rstd, contiguous)
    dweight, dbias = (torch.empty(x.shape[-1:], dtype=wide(x.dtype), device=x.device) for _ in range(2))
    return dx, dweight, dbias


def new_dx(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, contiguous: bool
) -> Tensor:
    """Allocate an empty dx alone."""
    require(grad_output.shape == x.shape, lambda: f"gradient {tuple(grad_output.shape)} of y {tuple(x.shape)}")
    require(mean.shape == rstd.shape == x.shape[:-1], lambda: f"mean {tuple(mean.shape)}, x {tuple(x.shape)}")
    return _new(x, contiguous)


_FORWARD = [
    {"x": "... D", "weight": "D", "bias": "D"},
    {"x": "... D", "weight": "D"},
    {"x": "... D", "bias": "D"},
    {"x": "... D"},
]
_BACKWARD = [
    {"grad_output": "... D", "x": "... D", "weight": "D", "mean": "...", "rstd": "..."},
    {"grad_output": "... D", "x": "... D", "mean": "...", "rstd": "..."},
]
_LAYOUTS = [{"contiguous": False}, {"contiguous": True}]
layer_norm = define(
    "layer_norm", reference, new_outputs, "layer_norm_triton.forward",
    cases=cases(_FORWARD, [{"eps": 1e-5, **layout} for layout in _LAYOUTS]), gradients=("x", "weight", "bias"), flops=8,
)  # fmt: skip
layer_norm_backward = define(
    "layer_norm_backward", reference_backward, new_dx, "layer_norm_triton.backward",
    cases=cases(_BACKWARD, _LAYOUTS), statistics=("mean", "rstd"), flops=10,
)  # fmt: skip
layer_norm_backward_weight = define(
    "layer_norm_backward_weight", reference_backward_weight, new_gradients, "layer_norm_triton.backward_weight",
    cases=cases(_BACKWARD, _LAYOUTS), statistics=("mean", "rstd"), flops=13, longest_row=dispatch.MAX_ROW_WITH_SUMS,
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.contiguous = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.dtypes = [None if value is None else value.dtype for value in (weight, bias)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 5
    if not any(ctx.needs_input_grad[1:3]):
        return layer_norm_backward(grad_y, *ctx.saved_tensors, ctx.contiguous), *(None,) * 4
    dx, *gradients = layer_norm_backward_weight(grad_y, *ctx.saved_tensors, ctx.contiguous)
    needed = zip(gradients, ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
    parameters = [value.to(dtype) if needs else None for value, dtype, needs in needed]
    return dx if ctx.needs_input_grad[0] else None, *parameters, None, None


layer_norm.register_autograd(_backward, setup_context=_setup_context)
