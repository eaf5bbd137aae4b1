"""Triton kernel that sums the gradients of copies of keys or values: a program for some rows of a head."""
# mypy: allow-untyped-defs

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.core.tiles import padded

ROWS = 16


@triton.jit
def sum_kernel(
    target_ptr, gradient_ptr, order_ptr, begin_ptr, S, G, target_sb, target_sh, target_si, gradient_sb, gradient_sh,
    gradient_sj, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum for each of ROWS rows what stands in order from its begin to that of the next."""
    tiles = tl.cdiv(S, ROWS)
    head = tl.program_id(0) // tiles
    b, g = tl.cast(head // G, tl.int64), tl.cast(head % G, tl.int64)
    row, d = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    first = tl.load(begin_ptr + row, mask=row < S, other=0)
    last = tl.load(begin_ptr + row + 1, mask=row < S, other=0)
    gradient_ptr += b * gradient_sb + g * gradient_sh
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in range(tl.max(last - first, 0)):
        there = first + step < last
        copy = tl.cast(tl.load(order_ptr + first + step, mask=there, other=0), tl.int64)
        address = gradient_ptr + copy[:, None] * gradient_sj + d[None, :]
        total += tl.cast(tl.load(address, mask=there[:, None] & (d < D)[None, :], other=0.0), tl.float32)
    address = target_ptr + b * target_sb + g * target_sh + tl.cast(row, tl.int64)[:, None] * target_si + d[None, :]
    tl.store(address, tl.cast(total, target_ptr.dtype.element_ty), mask=(row < S)[:, None] & (d < D)[None, :])


def sum_copies(target: Tensor, gradient: Tensor, copies: Tensor) -> None:
    """Sum the gradients of copies [B, G, N, D] into target [B, G, S, D], both of unit stride in D.

    They are summed in the order in which they stand: two runs give the same bits, as sums by atomics would not.
    """
    B, G, S, D = target.shape
    of, order = torch.sort(copies, stable=True)
    begin = torch.searchsorted(of, torch.arange(S + 1, device=of.device, dtype=of.dtype), out_int32=True)
    on_grid(sum_kernel, (cdiv(S, ROWS) * B * G,))(
        target, gradient, order, begin, S, G, *target.stride()[:3], *gradient.stride()[:3], D=D, ROWS=ROWS,
        BLOCK_D=padded(D), num_warps=4,
    )  # fmt: skip


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    types = {"order_ptr": "*i64", "begin_ptr": "*i32"}
    for D in (64, 96, 128, 256):
        yield sum_kernel, {**types, "D": D, "ROWS": ROWS, "BLOCK_D": padded(D), "num_warps": 4}
