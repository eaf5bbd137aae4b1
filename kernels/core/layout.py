"""Address the rows of strided tensors in place; copy a tensor only where three strides cannot reach its rows.

A row is the last axis.  The leading axes, in the memory order of one dense tensor, are merged to at most three,
so that row r = (i0 * n1 + i1) * n2 + i2 of a tensor starts at i0 * s0 + i1 * s1 + i2 * s2.  Four axes always fit:
a slice of a fused projection, a transposed view of heads and a gradient expanded along rows need no copy.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

MAX_AXES = 3
Strides = tuple[int, ...]


class Rows(NamedTuple):
    """n1 and n2 are the sizes of the two inner row axes; n0 follows from the number of rows."""

    n1: int
    n2: int
    tensors: list[Tensor]
    strides: list[Strides]


def has_unit_rows(tensor: Tensor) -> bool:
    """Return whether the elements of each row are adjacent in memory (stride 1)."""
    return tensor.shape[-1] == 1 or tensor.stride(-1) == 1


def merge(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Merge axes to the fewest that address the same elements, in order, in every tensor (one stride list each)."""
    merged_sizes: list[int] = []
    merged_strides: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        pairs = list(zip(merged_strides, strides, strict=True))
        if merged_sizes and all(kept[-1] == stride[axis] * size for kept, stride in pairs):
            merged_sizes[-1] *= size
            for kept, stride in pairs:
                kept[-1] = stride[axis]
        else:
            merged_sizes.append(size)
            for kept, stride in pairs:
                kept.append(stride[axis])
    return merged_sizes, merged_strides


def rows(dense: Tensor, *tensors: Tensor) -> Rows:
    """Compute the addresses of the rows of tensors, numbered in the memory order of dense.

    Each tensor has the leading axes of dense, and either its last axis too or, with one value a row, none.
    """
    lead = dense.dim() - 1
    dense_strides = dense.stride()
    order = sorted(range(lead), key=lambda axis: -dense_strides[axis])
    views = [tensor.permute([*order, *range(lead, tensor.dim())]) for tensor in tensors]
    views = [view if view.dim() == lead or has_unit_rows(view) else view.contiguous() for view in views]
    sizes = [dense.shape[axis] for axis in order]
    merged, strides = merge(sizes, [view.stride() for view in views])
    if len(merged) > MAX_AXES:
        views = [view if len(merge(sizes, [view.stride()])[0]) <= 1 else view.contiguous() for view in views]
        merged, strides = merge(sizes, [view.stride() for view in views])
    axes = len(merged)
    padded = [(*stride, 0, 0, 0)[:MAX_AXES] for stride in strides]
    return Rows(merged[1] if axes > 1 else 1, merged[2] if axes > 2 else 1, views, padded)
