"""y = x * rstd * (offset + weight),  rstd = (mean(x * x) + eps) ** -0.5,  the mean over the last axis.

Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, equation 4; the backward is its
derivative.  x [..., D], weight [D]; rstd [...] is kept for backward, float32 (float64 for a float64 x).

round_first: x * rstd is rounded to x's dtype before scaling, and y has the dtype x and weight promote to (Llama).
Otherwise all is float32 and y is rounded once, to x's dtype (Gemma with offset 1, GPT-OSS and F.rms_norm with 0).
y, rstd and dx have the memory order of x, as an expression in eager PyTorch has.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastft.kernels import dispatch, registry


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def reference(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """The forward in plain PyTorch: the specification, and the implementation where Triton does not run."""
    h = x.to(wide(x.dtype))
    rstd = torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)
    unit = h * rstd
    if round_first:
        y = unit.to(x.dtype) * weight
    else:
        y = (unit * (offset + weight.to(h.dtype))).to(x.dtype)
    return y, rstd.squeeze(-1)


def reference_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, round_first: bool
) -> Tensor:
    """dx in plain PyTorch: with unit = x * rstd, the gradient of unit is projected off unit, then scaled by rstd."""
    dtype = wide(x.dtype)
    unit = x.to(dtype) * rstd.unsqueeze(-1)
    dunit = grad_output.to(dtype) * (offset + weight.to(dtype))
    dx = (dunit - unit * (dunit * unit).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return dx.to(x.dtype)


def reference_backward_weight(
    grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """dx and dweight, for a trainable weight."""
    dtype = wide(x.dtype)
    unit = x.to(dtype) * rstd.unsqueeze(-1)
    scaled = unit.to(x.dtype).to(dtype) if round_first else unit  # what weight was multiplied by
    dweight = (grad_output.to(dtype) * scaled).reshape(-1, x.shape[-1]).sum(0)
    return reference_backward(grad_output, x, weight, rstd, offset, round_first), dweight.to(weight.dtype)


def new_outputs(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """Empty y and rstd: the fake implementation, and where the real one writes."""
    torch._check(x.dim() > 0 and weight.dim() == 1, lambda: f"x {tuple(x.shape)} or weight {tuple(weight.shape)}")
    torch._check(x.shape[-1] > 0, lambda: "the mean of an empty row")
    torch._check(x.shape[-1] == weight.shape[0], lambda: f"x {tuple(x.shape)}, but weight {tuple(weight.shape)}")
    torch._check(x.is_floating_point() and weight.is_floating_point(), lambda: f"{x.dtype}, {weight.dtype}")
    torch._check(not round_first or offset == 0.0, lambda: "round_first scales by weight alone: offset must be 0")
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype)
    return y, torch.empty_like(y[..., 0], dtype=wide(x.dtype))


def new_gradients(
    grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """Empty dx and dweight."""
    torch._check(grad_output.shape == x.shape, lambda: f"gradient {tuple(grad_output.shape)} of y {tuple(x.shape)}")
    torch._check(rstd.shape == x.shape[:-1], lambda: f"rstd {tuple(rstd.shape)}, but x {tuple(x.shape)}")
    return torch.empty_like(x), torch.empty_like(weight, memory_format=torch.contiguous_format)


def _triton(name: str) -> Callable[[], Callable]:
    def launcher() -> Callable:
        from fastft.kernels import rms_norm_triton

        return getattr(rms_norm_triton, name)

    return launcher


@torch.library.custom_op("fastft::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    outputs = new_outputs(x, weight, eps, offset, round_first)
    dispatch.fill(outputs, (x, weight, eps, offset, round_first), _triton("forward"), reference)
    return outputs


@torch.library.custom_op("fastft::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, round_first: bool
) -> Tensor:
    arguments = (grad_output, x, weight, rstd, offset, round_first)
    dx = new_gradients(*arguments)[0]
    dispatch.fill((dx,), arguments, _triton("backward"), reference_backward)
    return dx


@torch.library.custom_op("fastft::rms_norm_backward_weight", mutates_args=())
def rms_norm_backward_weight(
    grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    arguments = (grad_output, x, weight, rstd, offset, round_first)
    outputs = new_gradients(*arguments)
    dispatch.fill(outputs, arguments, _triton("backward_weight"), reference_backward_weight)
    return outputs


rms_norm.register_fake(new_outputs)
rms_norm_backward.register_fake(lambda *arguments: new_gradients(*arguments)[0])
rms_norm_backward_weight.register_fake(new_gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset, ctx.round_first = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx = dweight = None
    if grad_y is not None and ctx.needs_input_grad[1]:
        dx, dweight = rms_norm_backward_weight(grad_y, x, weight, rstd, ctx.offset, ctx.round_first)
    elif grad_y is not None:
        dx = rms_norm_backward(grad_y, x, weight, rstd, ctx.offset, ctx.round_first)
    return dx if ctx.needs_input_grad[0] else None, dweight, None, None, None


rms_norm.register_autograd(_backward, setup_context=_setup_context)


# Floating-point operations an element: additions and multiplications of the reference, casts not counted.
@register_flop_formula(torch.ops.fastft.rms_norm)
def _forward_flops(x_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * prod(x_shape)


@register_flop_formula(torch.ops.fastft.rms_norm_backward)
def _backward_flops(grad_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 7 * prod(grad_shape)


@register_flop_formula(torch.ops.fastft.rms_norm_backward_weight)
def _backward_weight_flops(grad_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 9 * prod(grad_shape)


def _examples(dtype: torch.dtype, device: torch.device) -> Iterator[registry.Arguments]:
    generator = torch.Generator().manual_seed(0)
    for shape, offset, round_first in (((3, 5, 48), 0.0, True), ((2, 2, 3, 64), 1.0, False), ((7,), 0.0, False)):
        x, weight = (torch.randn(size, generator=generator).to(device, dtype) for size in (shape, shape[-1:]))
        yield x.transpose(0, -2) if x.dim() > 1 else x, weight, 1e-6, offset, round_first


def _backward_examples(dtype: torch.dtype, device: torch.device) -> Iterator[registry.Arguments]:
    for x, weight, eps, offset, round_first in _examples(dtype, device):
        y, rstd = reference(x, weight, eps, offset, round_first)
        yield y.flip(0), x, weight, rstd, offset, round_first


registry.register(torch.ops.fastft.rms_norm.default, reference, _examples)
registry.register(torch.ops.fastft.rms_norm_backward.default, reference_backward, _backward_examples)
registry.register(torch.ops.fastft.rms_norm_backward_weight.default, reference_backward_weight, _backward_examples)
