"""LayerNorm -> fastft::layer_norm:  y = (x - mean) / sqrt(variance + eps) * weight + bias,  over the last axis.

Source: Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.patterns.rms_norm import decline_float64
from fastft.rewriter.matching.rule import Rule


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch.nn.LayerNorm and torch.nn.functional.layer_norm."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def without_bias(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch.nn.LayerNorm(bias=False)."""
    return F.layer_norm(x, (x.shape[-1],), weight, None, eps)


def without_weight(x: Tensor, eps: float) -> Tensor:
    """torch.nn.LayerNorm(elementwise_affine=False), as in OLMo."""
    return F.layer_norm(x, (x.shape[-1],), None, None, eps)


def cohere(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Cohere: written out, without a bias, rounded after it is scaled."""
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    return (weight.float() * ((h - mean) * torch.rsqrt(variance + eps))).to(x.dtype)


def rounded_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Written out as an RMSNorm of what is left without the mean, rounded before it is scaled."""
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, contiguous: bool
) -> Tensor:
    """fastft::layer_norm"""
    return torch.ops.fastft.layer_norm(x, weight, bias, eps, contiguous)[0]


def rounds_first(x: Tensor, **_: object) -> str | None:
    """Decline what rounds before it scales: the op rounds once, at the end."""
    early = None if x.dtype == torch.float32 else "it rounds before it scales, which a LayerNorm does not"
    return decline_float64(x=x) or early


rule = partial(Rule, replacement=partial(layer_norm, contiguous=True), anchor=F.layer_norm)
written_out = partial(
    Rule,
    replacement=partial(layer_norm, contiguous=False),  # an expression is laid out as x
    anchor=torch.rsqrt,
    shapes={"x": "... D", "weight": "D"},
    dtype_from=("x", "weight"),
)
RULES = (
    rule(torch_layer_norm, shapes={"x": "... D", "weight": "D", "bias": "D"}),
    rule(without_bias, shapes={"x": "... D", "weight": "D"}),
    rule(without_weight, shapes={"x": "... D"}),
    written_out(cohere, decline_if=decline_float64),
    written_out(rounded_first, decline_if=rounds_first),
)
