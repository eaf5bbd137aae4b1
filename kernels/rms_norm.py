"""y = x * rstd * (offset + weight),  rstd = (mean(x * x) + eps) ** -0.5,  the mean over the last axis.

Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, equation 4; the backward is its
derivative.  x [..., D], weight [D]; rstd [...] is kept for backward, float32 (float64 for a float64 x).
weight may be None, which counts as 0: offset is then all of the scale.

round_first: x * rstd is rounded to x's dtype before scaling, and y has the dtype x and weight promote to (Llama).
Otherwise all is float32 and y is rounded once, to x's dtype (Gemma with offset 1, GPT-OSS and F.rms_norm with 0).
y, rstd and dx have the memory order of x, as an expression in eager PyTorch has.
"""

from typing import Any

import torch
from torch import Tensor

from fastft.kernels.core import dispatch
from fastft.kernels.core.registry import cases, define, require, wide

SPELLINGS = (  # offset and round_first: Llama, GPT-OSS, Gemma
    {"eps": 1e-6, "offset": 0.0, "round_first": True},
    {"eps": 1e-5, "offset": 0.0, "round_first": False},
    {"eps": 1e-6, "offset": 1.0, "round_first": False},
)


def scale_of(weight: Tensor | None, offset: float, dtype: torch.dtype) -> Any:
    """Return offset + weight in a dtype, or the number offset without a weight."""
    return offset if weight is None else offset + weight.to(dtype)


def reference(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """Compute y and rstd in plain PyTorch: the specification, and the implementation where Triton does not run."""
    h = x.to(wide(x.dtype))
    rstd = torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)
    unit = h * rstd
    if round_first and weight is not None:
        y = unit.to(x.dtype) * weight
    else:
        y = (unit * scale_of(weight, offset, h.dtype)).to(x.dtype)
    return y, rstd.squeeze(-1)


def reference_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, round_first: bool,
    addend: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute dx in plain PyTorch: the gradient of unit = x * rstd, projected off unit, times rstd.

    addend: another gradient of x to be added, that of the residual stream that goes on past the norm.
    """
    dtype = wide(x.dtype)
    unit = x.to(dtype) * rstd.unsqueeze(-1)
    dunit = grad_output.to(dtype) * scale_of(weight, offset, dtype)
    dx = (dunit - unit * (dunit * unit).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return (dx if addend is None else dx + addend.to(dtype)).to(x.dtype)


def reference_backward_weight(
    grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, round_first: bool,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute dx and dweight in plain PyTorch, for a trainable weight."""
    dtype = wide(x.dtype)
    unit = x.to(dtype) * rstd.unsqueeze(-1)
    scaled = unit.to(x.dtype).to(dtype) if round_first else unit  # what weight was multiplied by
    dweight = (grad_output.to(dtype) * scaled).reshape(-1, x.shape[-1]).sum(0)
    dx = reference_backward(grad_output, x, weight, rstd, offset, round_first, addend)
    return dx, dweight.to(weight.dtype)


def check(x: Tensor, weight: Tensor | None, offset: float, round_first: bool) -> None:
    """Raise for shapes, dtypes and settings that the op does not define."""
    require(x.dim() > 0 and x.is_floating_point(), lambda: f"x {tuple(x.shape)}, {x.dtype}")
    require(x.shape[-1] > 0, lambda: "the mean of an empty row")
    require(not round_first or offset == 0.0, lambda: "round_first scales by weight alone: offset must be 0")
    if weight is None:
        require(not round_first, lambda: "round_first scales by weight: there is none")
        return
    require(weight.dim() == 1, lambda: f"weight {tuple(weight.shape)}")
    require(x.shape[-1] == weight.shape[0], lambda: f"x {tuple(x.shape)}, but weight {tuple(weight.shape)}")
    require(weight.is_floating_point(), lambda: f"weight is {weight.dtype}")


def result_dtype(x: Tensor, weight: Tensor | None, round_first: bool) -> torch.dtype:
    """Return y's dtype."""
    return torch.promote_types(x.dtype, weight.dtype) if round_first and weight is not None else x.dtype


def new_outputs(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """Allocate empty y and rstd: the fake implementation, and what the real one writes into."""
    check(x, weight, offset, round_first)
    y = torch.empty_like(x, dtype=result_dtype(x, weight, round_first))
    return y, new_rstd(y, x)


def new_rstd(y: Tensor, x: Tensor) -> Tensor:
    """Allocate an empty rstd: one number for each row of y."""
    return torch.empty_like(y[..., 0], dtype=wide(x.dtype))


def new_gradients(
    grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, round_first: bool,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Allocate empty dx and dweight."""
    dx = new_dx(grad_output, x, weight, rstd, offset, round_first, addend)
    return dx, torch.empty_like(weight, memory_format=torch.contiguous_format)


def new_dx(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, round_first: bool,
    addend: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Allocate an empty dx alone."""
    require(grad_output.shape == x.shape, lambda: f"gradient {tuple(grad_output.shape)} of y {tuple(x.shape)}")
    require(rstd.shape == x.shape[:-1], lambda: f"rstd {tuple(rstd.shape)}, but x {tuple(x.shape)}")
    require(addend is None or addend.shape == x.shape, lambda: "addend has not the shape of x")
    return torch.empty_like(x)


ROWS = {"x": "... D", "weight": "D"}
BACKWARD_SPELLINGS = [{name: value for name, value in spelling.items() if name != "eps"} for spelling in SPELLINGS]
_GRADIENT = {"grad_output": "... D", **ROWS, "rstd": "..."}
_BACKWARD = cases([_GRADIENT, {**_GRADIENT, "addend": "... D"}], BACKWARD_SPELLINGS)
_UNSCALED = [{"grad_output": "... D", "x": "... D", "rstd": "...", **more} for more in ({}, {"addend": "... D"})]
_ALONE = {"offset": 1.0, "round_first": False}  # without a weight
rms_norm = define(
    "rms_norm", reference, new_outputs, "rms_norm_triton.forward",
    cases=(*cases([ROWS], SPELLINGS), *cases([{"x": "... D"}], [{"eps": 1e-6, **_ALONE}])),
    gradients=("x", "weight"), flops=4,
)  # fmt: skip
rms_norm_backward = define(
    "rms_norm_backward", reference_backward, new_dx, "rms_norm_triton.backward",
    cases=(*_BACKWARD, *cases(_UNSCALED, [_ALONE])), statistics=("rstd",), flops=7,
)  # fmt: skip
rms_norm_backward_weight = define(
    "rms_norm_backward_weight", reference_backward_weight, new_gradients, "rms_norm_triton.backward_weight",
    cases=_BACKWARD, statistics=("rstd",), flops=9, longest_row=dispatch.MAX_ROW_WITH_SUMS,
)  # fmt: skip


def gradients(
    needs_weight: bool, grad_y: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float,
    round_first: bool, addend: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute dx and, if it is needed, dweight, by the op for either."""
    if grad_y is None:
        return addend, None
    if needs_weight:
        return rms_norm_backward_weight(grad_y, x, weight, rstd, offset, round_first, addend)
    return rms_norm_backward(grad_y, x, weight, rstd, offset, round_first, addend), None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset, ctx.round_first = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = gradients(ctx.needs_input_grad[1], grad_y, x, weight, rstd, ctx.offset, ctx.round_first)
    return dx if ctx.needs_input_grad[0] else None, dweight, None, None, None


rms_norm.register_autograd(_backward, setup_context=_setup_context)
