"""What a LoRA layer adds to a linear layer -> fastft::lora_add, which rewriter/projections/ merges with it to one op.

The references differ in how the two factors are multiplied, in the scale and in a cast.  Source: Hu et al., LoRA,
arXiv:2106.09685.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.reasons import Reason
from fastft.rewriter.matching.rule import Rule


def scaled(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """PEFT: two linear layers, scaled."""
    return result + F.linear(F.linear(x, a), b) * scale


def scaled_and_cast(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """PEFT on quantised layers: cast to the layer's dtype before it is added."""
    return result + (F.linear(F.linear(x, a), b) * scale).to(result.dtype)


def cast_and_scaled(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """PEFT on layers of AWQ: cast before it is scaled."""
    return result + F.linear(F.linear(x, a), b).to(result.dtype) * scale


def scaled_between(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Written by hand: scaled between the two."""
    return result + F.linear(F.linear(x, a) * scale, b)


def unscaled(result: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Written by hand: two linear layers."""
    return result + F.linear(F.linear(x, a), b)


def multiplied(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Written by hand: x @ A @ B, of factors that are not transposed."""
    return result + x @ a @ b * scale


def multiplied_unscaled(result: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same without a scale."""
    return result + x @ a @ b


def biased(result: Tensor, x: Tensor, a: Tensor, b: Tensor, bias: Tensor, scale: float) -> Tensor:
    """PEFT with lora_bias."""
    return result + F.linear(F.linear(x, a), b, bias) * scale


def biased_and_cast(result: Tensor, x: Tensor, a: Tensor, b: Tensor, bias: Tensor, scale: float) -> Tensor:
    """PEFT with lora_bias on quantised layers."""
    return result + (F.linear(F.linear(x, a), b, bias) * scale).to(result.dtype)


def apart(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Two linear layers, scaled, and then used otherwise, by variants of LoRA."""
    return F.linear(F.linear(x, a), b) * scale


def lora_add(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """fastft::lora_add"""
    return torch.ops.fastft.lora_add(result, x, a, b, scale)


def lora_add_cast(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """fastft::lora_add, cast"""
    return torch.ops.fastft.lora_add(result, x, a, b, scale).to(result.dtype)


def lora_add_biased(result: Tensor, x: Tensor, a: Tensor, b: Tensor, bias: Tensor, scale: float) -> Tensor:
    """fastft::lora_add, and a row"""
    added = torch.ops.fastft.lora_add(result, x, a, b, scale)
    return added + (bias * scale).to(added.dtype)


def lora_add_biased_cast(result: Tensor, x: Tensor, a: Tensor, b: Tensor, bias: Tensor, scale: float) -> Tensor:
    """fastft::lora_add, and a row, cast"""
    return (torch.ops.fastft.lora_add(result, x, a, b, scale) + bias * scale).to(result.dtype)


def lora_add_unscaled(result: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """fastft::lora_add by a scale of 1"""
    return torch.ops.fastft.lora_add(result, x, a, b, 1.0)


def lora_add_transposed(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """fastft::lora_add of the factors' transposes"""
    return torch.ops.fastft.lora_add(result, x, a.t(), b.t(), scale)


def lora_add_transposed_unscaled(result: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """fastft::lora_add of the factors' transposes, by a scale of 1"""
    return torch.ops.fastft.lora_add(result, x, a.t(), b.t(), 1.0)


def decline_full_rank(a: Tensor, b: Tensor, **_: object) -> str | None:
    """Decline factors of full rank: two layers of an MLP without an activation are no adapter."""
    (rank, inner), outer = a.shape, b.shape[0]
    return None if rank < min(inner, outer) else f"a rank of {rank} between {inner} and {outer} is not low"


def decline_full_rank_transposed(a: Tensor, b: Tensor, **_: object) -> str | None:
    """Decline full rank as decline_full_rank does, of factors that are not transposed."""
    return decline_full_rank(a.t(), b.t())


_FACTORS = {"x": "... K", "a": "R K", "b": "N R"}
_ADDED = {"result": "... N", **_FACTORS}
_TRANSPOSED = {**_ADDED, "a": "K R", "b": "R N"}
_BIASED = {**_ADDED, "bias": "N"}
_NOT_ADDED = Reason("it is not added to a layer's result as LoRA is", "lora.variant")
rule = partial(Rule, anchor=F.linear, shapes=_ADDED, report_misses=False, decline_if=decline_full_rank)
transposed = partial(rule, anchor=torch.matmul, shapes=_TRANSPOSED, decline_if=decline_full_rank_transposed)
RULES = (
    rule(scaled, lora_add),
    rule(scaled_and_cast, lora_add_cast, dtype_from=("result", "a"), same_dtype_as={"x": "a", "b": "a"}),
    rule(cast_and_scaled, lora_add_cast, dtype_from=("result", "a"), same_dtype_as={"x": "a", "b": "a"}),
    rule(scaled_between, lora_add),
    rule(unscaled, lora_add_unscaled),
    transposed(multiplied, lora_add_transposed),
    transposed(multiplied_unscaled, lora_add_transposed_unscaled),
    rule(biased, lora_add_biased, shapes=_BIASED),
    rule(
        biased_and_cast,
        lora_add_biased_cast,
        shapes=_BIASED,
        dtype_from=("result", "a"),
        same_dtype_as={"x": "a", "b": "a", "bias": "a"},
    ),
    rule(apart, None, shapes=_FACTORS, decline_reason=_NOT_ADDED),
)
