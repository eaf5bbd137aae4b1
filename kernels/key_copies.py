"""Keys and values of attention that stand in several places: rows are taken by number, and their gradients summed.

Sequences that begin alike have the same keys there: these are computed once, and each sequence reads copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastft.kernels.core.registry import require, wide


def given(copies: Tensor | None) -> bool:
    """Return whether there are copies: none, and an empty tensor, say that keys are as they are given."""
    return copies is not None and copies.shape[0] > 0


def check(copies: Tensor | None, mask: Tensor | None, ranges: Sequence[Tensor | None]) -> None:
    """Raise where copies are no vector of integers, or stand beside a mask, or no ranges say what is read of them."""
    if copies is not None:
        whole = copies.dim() == 1 and copies.dtype in (torch.int32, torch.int64)
        require(whole, lambda: f"copies {copies.dtype} {tuple(copies.shape)}")
        alone = mask is None and all(one is not None for one in ranges)
        require(alone, lambda: "copies of keys are read by start and end, without a mask")


def taken(tensor: Tensor, copies: Tensor | None) -> Tensor:
    """Return rows [B, G, N, D] of a tensor [B, G, S, D]."""
    assert copies is not None
    return tensor.index_select(2, copies)


def summed_reference(gradient: Tensor, copies: Tensor | None, rows: int) -> Tensor:
    """Sum the gradients of copies [B, G, N, D] into those of so many rows, in plain PyTorch."""
    assert copies is not None
    B, G, _, D = gradient.shape
    total = torch.zeros(B, G, rows, D, dtype=wide(gradient.dtype), device=gradient.device)
    return total.index_add(2, copies, gradient.to(total.dtype))


def bytes_of(tensors: Sequence[Tensor], copies: Tensor | None) -> int:
    """Count the bytes of copies of rows of tensors [B, G, S, D]."""
    if copies is None:
        return 0
    return sum(one.shape[0] * one.shape[1] * copies.shape[0] * one.shape[3] * one.element_size() for one in tensors)
