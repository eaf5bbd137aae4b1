"""RMSNorm of each head of queries and keys, then rotary embedding -> fastft::norm_rotary.

These rules merge what patterns/rms_norm.py and patterns/rotary.py lifted.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastft.patterns.add_rms_norm import norm
from fastft.patterns.rotary import queries_and_keys
from fastft.rewriter.matching.rule import Rule


def normed(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float,
    round_first: bool, interleaved: bool, per_pair: bool, contiguous: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gemma 3: norms of transposed heads."""
    new_q, new_k = norm(q, q_weight, eps, offset, round_first), norm(k, k_weight, eps, offset, round_first)
    return queries_and_keys(new_q, new_k, cos, sin, interleaved, per_pair, False, contiguous)


def normed_then_transposed(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float,
    round_first: bool, interleaved: bool, per_pair: bool, contiguous: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Qwen 3: norms before heads and positions are transposed."""
    new_q = norm(q, q_weight, eps, offset, round_first).transpose(-3, -2)
    new_k = norm(k, k_weight, eps, offset, round_first).transpose(-3, -2)
    return queries_and_keys(new_q, new_k, cos, sin, interleaved, per_pair, False, contiguous)


def norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float,
    round_first: bool, interleaved: bool, per_pair: bool, contiguous: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fastft::norm_rotary"""
    results = torch.ops.fastft.norm_rotary(
        q, k, q_weight, k_weight, cos, sin, eps, offset, round_first, interleaved, per_pair, contiguous
    )
    return results[0], results[1]


def norm_rotary_of_transposed(q: Tensor, k: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """fastft::norm_rotary"""
    return norm_rotary(torch.transpose(q, -3, -2), torch.transpose(k, -3, -2), *others, **named)


_VECTORS = {"q_weight": "D", "k_weight": "D", "cos": "* R", "sin": "* R"}
rule = partial(Rule, anchor=torch.ops.fastft.rotary)
FUSE = (
    rule(normed, norm_rotary, shapes={"q": "... D", "k": "... D", **_VECTORS}),
    rule(normed_then_transposed, norm_rotary_of_transposed, shapes={"q": "... S H D", "k": "... S G D", **_VECTORS}),
)
