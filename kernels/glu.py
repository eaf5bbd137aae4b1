"""y = act(gate) * up:  Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202.

gate and up [..., I] of any strides; glu_packed takes both as the halves of gate_up [..., 2 * I], as one projection
gives them, and writes both gradients side by side.  Computed in float32 and rounded once, to the dtype that gate and up
promote to.  Only the inputs are kept for backward, which computes act(gate) again.

activation: "silu", "gelu" (by the error function), "gelu_tanh" (its approximation), "relu2" (relu squared; So et al.,
Primer, 2021, arXiv:2109.08668).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels.core.registry import cases, define, require, wide

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
CUBIC, SLOPE = 0.044715, math.sqrt(2.0 / math.pi)  # of gelu_tanh


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute y in plain PyTorch, as models write it: the activation is rounded before it scales."""
    return ACTIVATIONS[activation](gate) * up


def reference_packed(gate_up: Tensor, activation: str) -> Tensor:
    """Compute y in plain PyTorch from the halves of gate_up."""
    gate, up = gate_up.chunk(2, -1)
    return reference(gate, up, activation)


def derivative(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Compute act(x) and its derivative."""
    if activation == "silu":
        s = torch.sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))
    if activation == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    if activation == "gelu_tanh":
        t = torch.tanh(SLOPE * (x + CUBIC * x * x * x))
        inner = SLOPE * (1.0 + 3.0 * CUBIC * x * x)
        return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    positive = F.relu(x)
    return positive * positive, 2.0 * positive


def reference_backward(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Compute dgate and dup in plain PyTorch."""
    dtype = wide(gate.dtype, up.dtype)
    act, slope = derivative(gate.to(dtype), activation)
    dy = grad_output.to(dtype)
    return (dy * up.to(dtype) * slope).to(gate.dtype), (dy * act).to(up.dtype)


def reference_packed_backward(grad_output: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """Compute the gradient of gate_up in plain PyTorch."""
    gate, up = gate_up.chunk(2, -1)
    return torch.cat(reference_backward(grad_output, gate, up, activation), -1)


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    require(gate.shape == up.shape and gate.dim() > 0, lambda: f"gate {tuple(gate.shape)}, up {tuple(up.shape)}")
    require(gate.is_floating_point() and up.is_floating_point(), lambda: f"gate {gate.dtype}, up {up.dtype}")
    require(activation in ACTIVATIONS, lambda: f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")


def _check_gradient(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    _check(gate, up, activation)
    require(grad_output.shape == gate.shape, lambda: f"gradient {tuple(grad_output.shape)} of {tuple(gate.shape)}")


def new_output(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Allocate an empty y in the memory order of gate."""
    _check(gate, up, activation)
    return torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, up.dtype))


def new_packed_output(gate_up: Tensor, activation: str) -> Tensor:
    """Allocate an empty y [..., I]; raise where gate_up has no two halves."""
    require(gate_up.dim() > 0 and gate_up.shape[-1] % 2 == 0, lambda: f"no two halves in {tuple(gate_up.shape)}")
    gate, up = gate_up.chunk(2, -1)
    return new_output(gate, up, activation)


def new_gradients(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Allocate empty dgate and dup."""
    _check_gradient(grad_output, gate, up, activation)
    return torch.empty_like(gate), torch.empty_like(up)


def new_packed_gradient(grad_output: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """Allocate an empty gradient of gate_up."""
    gate, up = gate_up.chunk(2, -1)
    _check_gradient(grad_output, gate, up, activation)
    return torch.empty_like(gate_up)


_CHOICES = [{"activation": name} for name in ACTIVATIONS]
_SEPARATE, _PACKED = {"gate": "... I", "up": "... I"}, {"gate_up": "... 2*I"}
glu = define(
    "glu", reference, new_output, "glu_triton.forward",
    cases=cases([_SEPARATE], _CHOICES), gradients=("gate", "up"), flops=6, longest_row=None,
)  # fmt: skip
glu_backward = define(
    "glu_backward", reference_backward, new_gradients, "glu_triton.backward",
    cases=cases([{"grad_output": "... I", **_SEPARATE}], _CHOICES), flops=12, longest_row=None,
)  # fmt: skip
glu_packed = define(
    "glu_packed", reference_packed, new_packed_output, "glu_triton.packed_forward",
    cases=cases([_PACKED], _CHOICES), gradients=("gate_up",), flops=3, longest_row=None,
)  # fmt: skip
glu_packed_backward = define(
    "glu_packed_backward", reference_packed_backward, new_packed_gradient, "glu_triton.packed_backward",
    cases=cases([{"grad_output": "... I", **_PACKED}], _CHOICES), flops=12, longest_row=None,
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    dgate, dup = glu_backward(grad_y, *ctx.saved_tensors, ctx.activation)
    return dgate if ctx.needs_input_grad[0] else None, dup if ctx.needs_input_grad[1] else None, None


def _packed_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return glu_packed_backward(grad_y, *ctx.saved_tensors, ctx.activation), None


glu.register_autograd(_backward, setup_context=_setup_context)
glu_packed.register_autograd(_packed_backward, setup_context=_setup_context)
