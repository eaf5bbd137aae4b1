"""An addition to the residual stream and the RMSNorms around it -> one op, which writes the sum and the norm.

These rules merge what patterns/rms_norm.py lifted.
"""

from functools import partial

import torch
from torch import Tensor

from fastft.rewriter.matching.rule import Rule


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """Return y of fastft::rms_norm alone."""
    return torch.ops.fastft.rms_norm(x, weight, eps, offset, round_first)[0]


def before_a_block(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """An addition, and the norm of the sum: Llama."""
    total = x + residual
    return norm(total, weight, eps, offset, round_first), total


def after_a_block(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """A norm that is added to the residual stream: OLMo 2."""
    return norm(x, weight, eps, offset, round_first) + residual


def around_an_addition(
    x: Tensor, residual: Tensor, inner_weight: Tensor, weight: Tensor, inner_eps: float, eps: float, offset: float,
    round_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A norm that is added, and the norm of the sum: Gemma 2 and 3, GLM 4."""
    total = norm(x, inner_weight, inner_eps, offset, round_first) + residual
    return norm(total, weight, eps, offset, round_first), total


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """fastft::add_rms_norm"""
    results = torch.ops.fastft.add_rms_norm(x, residual, weight, eps, offset, round_first)
    return results[0], results[1]


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """fastft::rms_norm_add"""
    return torch.ops.fastft.rms_norm_add(x, residual, weight, eps, offset, round_first)[0]


def rms_norm_add_rms_norm(
    x: Tensor, residual: Tensor, inner_weight: Tensor, weight: Tensor, inner_eps: float, eps: float, offset: float,
    round_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fastft::rms_norm_add_rms_norm"""
    results = torch.ops.fastft.rms_norm_add_rms_norm(
        x, residual, inner_weight, weight, inner_eps, eps, offset, round_first
    )
    return results[0], results[1]


_ROWS = {"x": "... D", "residual": "... D", "weight": "D"}
rule = partial(Rule, anchor=torch.ops.fastft.rms_norm)
FUSE = (
    rule(around_an_addition, rms_norm_add_rms_norm, shapes={**_ROWS, "inner_weight": "D"}),
    rule(after_a_block, rms_norm_add, shapes=_ROWS),  # first: LoRA's addition may come before such a norm
    rule(before_a_block, add_rms_norm, shapes=_ROWS),
)
