"""What a DoRA layer adds to a linear layer -> fastft::lora_add, scaled by the columns' magnitudes over their norms.

y = g (W x + s B A x) + bias, with g = magnitude / norm.  Its norms are found in rewriter/projections/weight_norm.py.
Source: Liu et al., DoRA, 2024, arXiv:2402.09353.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.patterns.lora import decline_full_rank
from fastft.reasons import Reason
from fastft.rewriter.matching.rule import Rule


def scaled(result: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float) -> Tensor:
    """PEFT: what the layer is short of g times its result, and g times the adapter's."""
    return result + ((g - 1) * result + g * F.linear(F.linear(x, a), b) * scale)


def scaled_biased(
    result: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor, bias: Tensor, scale: float
) -> Tensor:  # fmt: skip
    """PEFT on a layer with a bias, which is not scaled."""
    return result + ((g - 1) * (result - bias) + g * F.linear(F.linear(x, a), b) * scale)


def recomputed(result: Tensor, base: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float) -> Tensor:
    """PEFT with dropout: the layer once more, of what the adapter reads."""
    return result + ((g - 1) * base + g * F.linear(F.linear(x, a), b) * scale)


def dora(result: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float) -> Tensor:
    """fastft::lora_add, scaled by columns"""
    return torch.ops.fastft.lora_add(result, x, a, b, scale) * g


def dora_biased(
    result: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor, bias: Tensor, scale: float
) -> Tensor:  # fmt: skip
    """fastft::lora_add, scaled by columns, but for the bias"""
    return torch.ops.fastft.lora_add(result, x, a, b, scale) * g + (bias - bias * g)


_SHAPES = {"result": "... N", "x": "... K", "a": "R K", "b": "N R", "g": "1 N"}
_RECOMPUTED = Reason("with dropout the layer is computed once more, of another input", "dora.dropout")
rule = partial(Rule, anchor=F.linear, shapes=_SHAPES, report_misses=False, decline_if=decline_full_rank)
RULES = (
    rule(scaled, dora),
    rule(scaled_biased, dora_biased, shapes={**_SHAPES, "bias": "N"}),
    rule(recomputed, None, shapes={**_SHAPES, "base": "... N"}, decline_reason=_RECOMPUTED),
)
