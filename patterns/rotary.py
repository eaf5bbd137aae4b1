"""Rotary position embedding -> fastft::rotary, and of queries and keys together -> fastft::rotary_qk.

The references differ in which elements are a pair, in what is rotated of a head, in what cos and sin hold and in where
they round.  Source: Su et al., RoFormer, arXiv:2104.09864.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastft.patterns.rms_norm import decline_float64
from fastft.rewriter.matching.rule import Rule


def rotate_half(x: Tensor) -> Tensor:
    """Return (-b, a) of halves a and b."""
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def rotate_every_two(x: Tensor) -> Tensor:
    """Return (-b, a) of every two elements a and b."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama and most others: pairs half a head apart."""
    return x * cos + rotate_half(x) * sin


def half_of_a_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-NeoX, Phi, StableLM: the first part of each head."""
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((rotated * cos + rotate_half(rotated) * sin, passed), -1)


def half_by_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-OSS: the halves by themselves, one angle a pair."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def half_widened(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs half a head apart, in float32."""
    h = x.float()
    return (h * cos + rotate_half(h) * sin).to(x.dtype)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Helium, GPT-J with all of a head: pairs of neighbours."""
    return x * cos + rotate_every_two(x) * sin


def interleaved_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J, CodeGen, GLM: the first part of each head."""
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((rotated * cos + rotate_every_two(rotated) * sin, passed), -1)


def interleaved_widened(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Cohere: pairs of neighbours, in float32."""
    h = x.float()
    return (h * cos + rotate_every_two(h) * sin).to(x.dtype)


def interleaved_widened_late(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """ERNIE 4.5: pairs of neighbours, turned before they are cast to float32."""
    return (x.float() * cos + rotate_every_two(x).float() * sin).to(x.dtype)


def interleaved_to_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """DeepSeek V3: pairs of neighbours, which become pairs half a head apart."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def half_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """nanochat: pairs half a head apart, turned the other way."""
    turned = torch.cat((x[..., x.shape[-1] // 2 :], -x[..., : x.shape[-1] // 2]), -1)
    return x * cos + turned * sin


def complex_product(x: Tensor, angles: Tensor) -> Tensor:
    """DeepSeek V2, Llama's own code: pairs of neighbours as complex numbers."""
    pairs = torch.view_as_complex(x.float().reshape(x.shape[0], x.shape[1], x.shape[2], -1, 2))
    return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)


def complex_product_positions_first(x: Tensor, angles: Tensor) -> Tensor:
    """Llama 4: the same, of positions before heads."""
    pairs = torch.view_as_complex(x.float().reshape(x.shape[0], x.shape[1], x.shape[2], -1, 2))
    return torch.view_as_real(pairs * angles[:, :, None, :]).flatten(-2).to(x.dtype)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool, contiguous: bool
) -> Tensor:
    """fastft::rotary"""
    return torch.ops.fastft.rotary(x, cos, sin, interleaved, per_pair, deinterleaved, contiguous)


def widened(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """fastft::rotary in float32, rounded at the end"""
    return torch.ops.fastft.rotary(x, cos, sin, interleaved, False, False, False).to(x.dtype)


def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """fastft::rotary by the negative sine"""
    return torch.ops.fastft.rotary(x, cos, torch.neg(sin), False, False, False, False)


def of_complex(x: Tensor, angles: Tensor) -> Tensor:
    """fastft::rotary by the parts of complex numbers, rounded at the end"""
    parts = torch.movedim(torch.view_as_real(angles), -1, 0).contiguous()  # rows of their own: read as they are
    return torch.ops.fastft.rotary(x, parts[0], parts[1], True, True, False, False).to(x.dtype)


def of_complex_positions_first(x: Tensor, angles: Tensor) -> Tensor:
    """fastft::rotary by the parts of complex numbers, rounded at the end"""
    parts = torch.movedim(torch.view_as_real(angles), -1, 0).contiguous().unsqueeze(-2)
    return torch.ops.fastft.rotary(x, parts[0], parts[1], True, True, False, False).to(x.dtype)


def decline_real(x: Tensor, angles: Tensor) -> str | None:
    """Decline angles that are not complex64, one a pair, and what wide_rule declines."""
    if angles.dtype != torch.complex64:
        return f"the angles are {angles.dtype} and not complex64"
    return decline_float64(x=x) or one_angle_a_pair(x, angles)


def one_angle_a_pair(x: Tensor, cos: Tensor, **_: object) -> str | None:
    """Decline angles that are not one a pair: a single angle would broadcast over all pairs."""
    whole = 2 * cos.shape[-1] == x.shape[-1]
    return None if whole else f"cos has {cos.shape[-1]} angles for {x.shape[-1]} elements and not one a pair"


WHOLE = {"x": "... D", "cos": "* D", "sin": "* D"}
PART = {"x": "... D", "cos": "* R", "sin": "* R"}


def rule(reference: Callable, interleaved: bool, shapes: dict[str, str] = WHOLE, **more: Any) -> Rule:
    """Build a rule; joined halves and parts are contiguous, as torch.cat is, other results are laid out as x."""
    replacement = partial(
        rotary, interleaved=interleaved, per_pair=reference in (half_by_parts, interleaved_to_halves),
        deinterleaved=reference is interleaved_to_halves, contiguous=shapes is PART,
    )  # fmt: skip
    settings: dict[str, Any] = {"anchor": torch.neg, "shapes": shapes, **more}
    return Rule(reference, replacement, **settings)


def wide_rule(reference: Callable, interleaved: bool) -> Rule:
    """Build a rule for a reference that rotates in float32 and rounds at the end."""
    return Rule(
        reference,
        partial(widened, interleaved=interleaved),
        torch.neg,
        WHOLE,
        dtype_from=("x",),
        decline_if=decline_float64,
    )


complex_rule = partial(Rule, anchor=torch.view_as_complex, dtype_from=("x",), decline_if=decline_real)
by_parts = partial(rule, shapes=PART, anchor=torch.sub, report_misses=False, decline_if=one_angle_a_pair)
RULES = (
    rule(half, False),
    rule(half_of_a_part, False, PART),
    by_parts(half_by_parts, False),
    by_parts(interleaved_to_halves, True),
    rule(interleaved, True),
    rule(interleaved_part, True, PART),
    wide_rule(half_widened, False),
    wide_rule(interleaved_widened, True),
    wide_rule(interleaved_widened_late, True),
    Rule(half_backwards, backwards, torch.neg, WHOLE, report_misses=False),
    complex_rule(complex_product, of_complex, shapes={"x": "B H S D", "angles": "* R"}),
    complex_rule(
        complex_product_positions_first, of_complex_positions_first, shapes={"x": "B S H D", "angles": "* S R"}
    ),
)


def queries_and_keys(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool,
    contiguous: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Two tensors rotated by the same angles."""
    angles = (cos, sin, interleaved, per_pair, deinterleaved, contiguous)
    return torch.ops.fastft.rotary(q, *angles), torch.ops.fastft.rotary(k, *angles)


def rotary_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, deinterleaved: bool,
    contiguous: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fastft::rotary_qk"""
    results = torch.ops.fastft.rotary_qk(q, k, cos, sin, interleaved, per_pair, deinterleaved, contiguous)
    return results[0], results[1]


FUSE = (
    Rule(
        queries_and_keys,
        rotary_qk,
        torch.ops.fastft.rotary,
        {"q": "... D", "k": "... D", "cos": "* R", "sin": "* R"},
    ),
)
