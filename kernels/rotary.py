"""Rotary position embedding: pairs (a, b) of a head's elements become (a cos - b sin, b cos + a sin).

Su et al., RoFormer, 2021, arXiv:2104.09864, equation 34.  x [..., D]: heads and positions are among the leading axes,
in any order and with any strides; cos and sin [..., R] broadcast over them, R <= D, and elements from R on stay as they
are.
interleaved: the pairs are (x[2i], x[2i+1]) as in GPT-J, otherwise (x[i], x[R/2 + i]) as in Llama.
per_pair: cos and sin have one number a pair, R/2 in all, otherwise one an element, which need not be equal in a pair.
deinterleaved: whether y has the first elements of interleaved pairs before the second ones, as if they had been half a
head apart; the angles are laid out as x is.
contiguous: whether y is contiguous; otherwise it has the memory order of x.  Its dtype is that x and cos promote to.
The backward is the rotation back.  Neither cos nor sin gets a gradient.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.kernels.core.registry import Case, Choice, define, require

LONGEST_HEAD = 1024  # that the Triton kernels take


def pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the first and the second elements of the pairs."""
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :])


def joined(a: Tensor, b: Tensor, interleaved: bool) -> Tensor:
    """Join the elements of the pairs to one tensor again."""
    return torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool = False, *,
    back: bool = False,
) -> Tensor:  # fmt: skip
    """Rotate x, or rotate it back, in plain PyTorch."""
    rotated = cos.shape[-1] * (2 if per_pair else 1)
    source, target = interleaved and not (back and deinterleaved), interleaved and (back or not deinterleaved)
    a, b = pairs(x[..., :rotated], source)
    (cos_a, cos_b), (sin_a, sin_b) = (
        (angles, angles) if per_pair else pairs(angles, interleaved) for angles in (cos, sin)
    )
    if back:
        a, b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    y = joined(a, b, target)
    return torch.cat((y, x[..., rotated:].to(y.dtype)), -1)


def reference(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool, contiguous: bool
) -> Tensor:
    """Rotate one tensor in plain PyTorch."""
    return rotate(x, cos, sin, interleaved, per_pair, deinterleaved)


def reference_backward(
    grad_output: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool
) -> Tensor:
    """Compute the gradient of x, in the dtype of grad_output."""
    return rotate(grad_output, cos, sin, interleaved, per_pair, deinterleaved, back=True).to(grad_output.dtype)


def reference_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool,
    contiguous: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotate queries and keys by the same angles."""
    angles = (cos, sin, interleaved, per_pair, deinterleaved)
    return rotate(q, *angles), rotate(k, *angles)


def reference_qk_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of queries and keys."""
    angles = (cos, sin, interleaved, per_pair, deinterleaved)
    return reference_backward(grad_q, *angles), reference_backward(grad_k, *angles)


def check(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool = False) -> None:
    """Raise for shapes and dtypes that the op does not define."""
    rotated = cos.shape[-1] * (2 if per_pair else 1)
    require(cos.shape == sin.shape, lambda: f"cos {tuple(cos.shape)}, but sin {tuple(sin.shape)}")
    require(1 <= cos.dim() <= x.dim(), lambda: f"x {tuple(x.shape)}, but cos {tuple(cos.shape)}")
    require(rotated <= x.shape[-1], lambda: f"x {tuple(x.shape)}, but {rotated} elements to rotate")
    require(rotated % 2 == 0, lambda: f"{rotated} elements to rotate are no pairs")
    require(interleaved or not deinterleaved, lambda: "what is not interleaved cannot be deinterleaved")
    floating = x.is_floating_point() and cos.is_floating_point() and sin.is_floating_point()
    require(floating, lambda: f"x {x.dtype}, cos {cos.dtype}, sin {sin.dtype}")
    cos[..., 0].expand(x.shape[:-1])  # raises where it does not broadcast


def new_output(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool, contiguous: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Allocate an empty y; dtype is that of what is rotated, if it is not x itself."""
    check(x, cos, sin, interleaved, per_pair, deinterleaved)
    dtype = torch.promote_types(torch.promote_types(dtype or x.dtype, cos.dtype), sin.dtype)
    layout = torch.contiguous_format if contiguous else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout)


def new_gradient(
    grad_output: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool
) -> Tensor:
    """Allocate an empty gradient of x."""
    check(grad_output, cos, sin, interleaved, per_pair, deinterleaved)
    return torch.empty_like(grad_output)


def new_outputs_qk(q: Tensor, k: Tensor, *angles: Any) -> tuple[Tensor, Tensor]:
    """Allocate empty rotated queries and keys."""
    require(q.dim() == k.dim(), lambda: f"q {tuple(q.shape)}, but k {tuple(k.shape)}")
    require(q.shape[-1] == k.shape[-1], lambda: f"q {tuple(q.shape)}, but k {tuple(k.shape)}")
    return new_output(q, *angles), new_output(k, *angles)


def new_gradients_qk(grad_q: Tensor, grad_k: Tensor, *angles: Any) -> tuple[Tensor, Tensor]:
    """Allocate empty gradients of queries and keys."""
    return new_gradient(grad_q, *angles), new_gradient(grad_k, *angles)


_WAYS = (("B H S", "B 1 S"), ("B S H", "B S 1"), ("B S H", "1 S 1"), ("B H S", "S"))  # axes of tensors and of angles


def angle_cases(*heads: str, choices: Sequence[Choice] = ({},)) -> list[Case]:
    """Build cases that rotate all of each head or a part of it, in every way; heads names the tensors."""
    cases: list[Case] = []
    for size, interleaved, per_pair in itertools.product(("2*R", "2*R+P"), (False, True), (False, True)):
        for _ in range(2):
            axes, angles = _WAYS[len(cases) // 2 % len(_WAYS)]
            shapes = {name: f"{axes.replace('H', 'H' + str(index))} {size}" for index, name in enumerate(heads)}
            shapes |= dict.fromkeys(("cos", "sin"), f"{angles} {'R' if per_pair else '2*R'}")
            choice = choices[len(cases) % len(choices)]
            cases.append((shapes, {"interleaved": interleaved, "per_pair": per_pair, **choice}))
    return cases


def apart_cases(cases: Sequence[Case]) -> list[Case]:
    """Add the cases that are deinterleaved to those that are not."""
    apart = [(shapes, {**choice, "deinterleaved": True}) for shapes, choice in cases if choice["interleaved"]]
    return [*((shapes, {**choice, "deinterleaved": False}) for shapes, choice in cases), *apart]


_LAYOUTS = [{"contiguous": False}, {"contiguous": True}]
rotary = define(
    "rotary", reference, new_output, "rotary_triton.forward",
    cases=apart_cases(angle_cases("x", choices=_LAYOUTS)), gradients=("x",), flops=3, longest_row=LONGEST_HEAD,
)  # fmt: skip
rotary_backward = define(
    "rotary_backward", reference_backward, new_gradient, "rotary_triton.backward",
    cases=apart_cases(angle_cases("grad_output")), flops=3, longest_row=LONGEST_HEAD,
)  # fmt: skip
rotary_qk = define(
    "rotary_qk", reference_qk, new_outputs_qk, "rotary_triton.forward_qk",
    cases=apart_cases(angle_cases("q", "k", choices=_LAYOUTS)), gradients=("q", "k"), flops=3, longest_row=LONGEST_HEAD,
)  # fmt: skip
rotary_qk_backward = define(
    "rotary_qk_backward", reference_qk_backward, new_gradients_qk, "rotary_triton.backward_qk",
    cases=apart_cases(angle_cases("grad_q", "grad_k")), flops=3, longest_row=LONGEST_HEAD,
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, *ctx.angles, _ = inputs
    ctx.save_for_backward(cos, sin)
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return rotary_backward(grad_y, *ctx.saved_tensors, *ctx.angles).to(ctx.dtype), *(None,) * 6


def _setup_context_qk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, *ctx.angles, _ = inputs
    ctx.save_for_backward(cos, sin)
    ctx.dtypes = q.dtype, k.dtype


def _backward_qk(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    gradients = rotary_qk_backward(grad_q, grad_k, *ctx.saved_tensors, *ctx.angles)
    needed = zip(gradients, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    return *(value.to(dtype) if needs else None for value, dtype, needs in needed), *(None,) * 6


rotary.register_autograd(_backward, setup_context=_setup_context)
rotary_qk.register_autograd(_backward_qk, setup_context=_setup_context_qk)
