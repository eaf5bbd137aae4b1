"""Triton kernels of lora_linear's backward: x p and x^T s in one pass over x, here the gradient of y.

Each block of x's columns goes with the ranks of its own sibling alone: p is [K, BLOCK_R], and zero beside them.  What
a program adds to x p is written apart for each block of columns, and added up in one order.

The terms of p and of s stand side by side, [p1 | p2 | p3 | p4], so that a step has two products and not eight, which
take fewer instructions and registers.  (With six products, what CUDA 12.8's assembler made of valid PTX, which Triton
3.6 comes with, read shared memory out of bounds on sm_90; see docs/decisions.md.)
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.core.arith import at_least_one, cdiv
from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.core.tiles import multiprocessors
from fastft.kernels.lora_linear_triton import ON_TENSOR_CORES, split
from fastft.kernels.lora_products import ONE_PASS_RANK, ONE_PASS_TERMS, Piece, Sum

# Columns are many, as there is a part of x p for each block of them: written and read, it has a quarter of x's bytes
# for 16 ranks, and half of them for 32, where no gain is left.  No generation spills.  For other tiles see
# docs/performance.md.
TILE = {"BLOCK_M": 64, "BLOCK_K": 256, "BLOCK_R": ONE_PASS_RANK, "num_warps": 8, "num_stages": 3}
# A program that adds up the parts of x p loads SPLITS of them at once.
SUM_TILE = {"SPLITS": 8, "BLOCK_M": 16, "BLOCK_R": ONE_PASS_RANK, "num_warps": 4}


Share = tuple[int, int, int, int, int, int]  # first and end of its blocks of columns, of its columns, and of its ranks


@triton.jit
def share_of(block, shares, COUNT: tl.constexpr):
    """Return the share that a block of columns is in, without its end."""
    first_block, _, column, end_column, rank, end_rank = shares[0]
    for number in tl.static_range(1, COUNT):
        reached = block >= shares[number][0]
        first_block = tl.where(reached, shares[number][0], first_block)
        column = tl.where(reached, shares[number][2], column)
        end_column = tl.where(reached, shares[number][3], end_column)
        rank = tl.where(reached, shares[number][4], rank)
        end_rank = tl.where(reached, shares[number][5], end_rank)
    return first_block, column, end_column, rank, end_rank


@triton.jit
def side_by_side(value, dtype: tl.constexpr, TERMS: tl.constexpr):
    """Split float32 values [rows, ranks] into terms of dtype, beside each other: [rows, TERMS ranks]."""
    if TERMS == 1:
        return tl.cast(value, dtype)
    shape: tl.constexpr = [value.shape[0], TERMS, value.shape[1]]
    left = tl.broadcast_to(value[:, None, :], shape)
    place = tl.arange(0, TERMS)[None, :, None]
    result = tl.cast(left, dtype)
    term = result
    for number in tl.static_range(1, TERMS):
        left -= tl.cast(term, tl.float32)
        term = tl.cast(left, dtype)
        result = tl.where(place == number, term, result)
    return tl.reshape(result, [value.shape[0], TERMS * value.shape[1]])


@triton.jit
def sum_of_terms(value, TERMS: tl.constexpr):
    """Add up terms that stand side by side: [rows, TERMS ranks] to [rows, ranks]."""
    if TERMS == 1:
        return value
    return tl.sum(tl.reshape(value, [value.shape[0], TERMS, value.shape[1] // TERMS]), 1)


@triton.jit(do_not_specialize=["M"])
def both_kernel(
    shares, x_ptr, p_ptr, s_ptr, product_ptr, partial_ptr, copy_ptr, M, rows, x_stride, s_stride, product_stride,
    split_stride, copy_stride, COUNT: tl.constexpr, COPY: tl.constexpr, TERMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute a block's part of x p and of x^T s over a split of the rows, and copy x if COPY."""
    block, split = tl.program_id(0), tl.program_id(1)
    first_block, column, end_column, rank, end_rank = share_of(block, shares, COUNT)
    k = column + (block - first_block) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    long_k, k_mask = tl.cast(k, tl.int64)[:, None], (k < end_column)[:, None]
    terms = tl.arange(0, TERMS * BLOCK_R)[None, :]
    p = tl.load(p_ptr + long_k * (TERMS * BLOCK_R) + terms, mask=k_mask, other=0.0)  # [BLOCK_K, TERMS BLOCK_R]
    end = min((split + 1) * rows, M)
    total = tl.zeros([BLOCK_K, TERMS * BLOCK_R], tl.float32)
    for start in range(split * rows, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        long_row = tl.cast(row, tl.int64)
        x_mask = (row < end)[:, None] & (k < end_column)[None, :]
        x = tl.load(x_ptr + (long_row * x_stride)[:, None] + k[None, :], mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if COPY:
            tl.store(copy_ptr + (long_row * copy_stride)[:, None] + k[None, :], x, mask=x_mask)
        s_mask = (row < end)[:, None] & (rank + r < end_rank)[None, :]
        s = tl.load(s_ptr + (long_row * s_stride)[:, None] + (rank + r)[None, :], mask=s_mask, other=0.0)
        product = sum_of_terms(tl.dot(x, p), TERMS)
        total = tl.dot(tl.trans(x), side_by_side(s, x.dtype, TERMS), total)
        address = product_ptr + tl.cast(block, tl.int64) * product_stride + (long_row * BLOCK_R)[:, None] + r[None, :]
        tl.store(address, product, mask=(row < end)[:, None])
    address = partial_ptr + tl.cast(split, tl.int64) * split_stride + long_k * BLOCK_R + r[None, :]
    tl.store(address, sum_of_terms(total, TERMS), mask=k_mask)


@triton.jit(do_not_specialize=["M"])
def sum_kernel(
    shares, product_ptr, s_ptr, spare_ptr, M, ranks, width, product_stride, s_stride, spare_stride,
    COUNT: tl.constexpr, SPARE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add up the blocks' parts of x p and, if SPARE, write spare = [product | 0]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    long_row = tl.cast(row, tl.int64)[:, None]
    for number in tl.static_range(COUNT):
        if tl.program_id(1) == number:
            first, end, _, _, rank, end_rank = shares[number]
            mask = (row < M)[:, None] & (rank + r < end_rank)[None, :]
            total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for start in range(first, end, SPLITS):
                block = start + tl.arange(0, SPLITS)
                address = product_ptr + (tl.cast(block, tl.int64) * product_stride)[:, None, None]
                part_mask = (block < end)[:, None, None] & mask[None]
                part = tl.load(address + (long_row * BLOCK_R + r[None, :])[None], mask=part_mask, other=0.0)
                total += tl.sum(part, 0)  # [BLOCK_M, BLOCK_R]
            tl.store(s_ptr + long_row * s_stride + rank + r[None, :], total, mask=mask)
            if SPARE:
                address = spare_ptr + long_row * spare_stride + rank + r[None, :]
                tl.store(address, tl.cast(total, spare_ptr.dtype.element_ty), mask=mask)
    if SPARE:
        zero = tl.zeros([BLOCK_M, BLOCK_R], spare_ptr.dtype.element_ty)
        for column in range(ranks + tl.program_id(1) * BLOCK_R, width, COUNT * BLOCK_R):
            address = spare_ptr + long_row * spare_stride + column + r[None, :]
            tl.store(address, zero, mask=(row < M)[:, None] & (column + r < width)[None, :])


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the kernels for one sibling and for three, for the tests that compile them ahead of time."""
    types = {"s_ptr": "*fp32", "product_ptr": "*fp32", "majors": ON_TENSOR_CORES}
    for count in (1, 3):
        constants = {"shares": (("i32",) * 6,) * count, "COUNT": count, **types}
        for copy in (False, True):
            for x, terms in (("*fp16", 1), ("*bf16", 1), ("*bf16", ONE_PASS_TERMS)):
                pointers = {"x_ptr": x, "p_ptr": x, "copy_ptr": x}
                yield both_kernel, {"COPY": copy, "TERMS": terms, **pointers, **TILE, **constants}
            yield sum_kernel, {"SPARE": copy, **SUM_TILE, **constants}


def shares_of(columns: Sequence[slice], ranks: Sequence[slice]) -> tuple[Share, ...]:
    """Pair columns with their ranks, and number blocks of columns from one share to the next."""
    shares: list[Share] = []
    for part, own in zip(columns, ranks, strict=True):
        first = shares[-1][1] if shares else 0
        end = first + cdiv(part.stop - part.start, TILE["BLOCK_K"])
        shares.append((first, end, part.start, part.stop, own.start, own.stop))
    return tuple(shares)


def both(
    x: Tensor, s: Tensor, p: Tensor, product: Tensor, pieces: Sequence[Piece], columns: Sequence[slice],
    ranks: Sequence[slice], copy: Tensor | None, spare: Tensor | None, sums: list[Sum],
) -> None:  # fmt: skip
    """Write product = x p, copy = x, spare = [product | 0]; add x^T s to sums.  columns[i] of x go with ranks[i].

    p [K, 1 or ONE_PASS_TERMS, ONE_PASS_RANK], the terms of each row: the rows of a share's columns have its ranks from
    column 0 on, and zeros beside them.  x^T s [K, ONE_PASS_RANK] has them there too.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    M, K = x.shape
    shares = shares_of(columns, ranks)
    blocks, block_m = shares[-1][1], TILE["BLOCK_M"]
    splits = at_least_one(2 * multiprocessors(x.device) // blocks, M // (4 * block_m))
    splits, n_rows = split(M, splits, block_m)
    parts, partial = s.new_empty(blocks, M, ONE_PASS_RANK), s.new_empty(splits, K, ONE_PASS_RANK)
    target = x if copy is None else copy
    on_grid(both_kernel, (blocks, splits))(
        shares, x, p, s, parts, partial, target, M, n_rows, x.stride(0), s.stride(0), parts.stride(0),
        partial.stride(0), target.stride(0), COUNT=len(shares), COPY=copy is not None, TERMS=p.shape[1], **TILE,
    )  # fmt: skip
    beside = product if spare is None else spare
    on_grid(sum_kernel, (cdiv(M, SUM_TILE["BLOCK_M"]), len(shares)))(
        shares, parts, product, beside, M, product.shape[1], beside.shape[1], parts.stride(0), product.stride(0),
        beside.stride(0), COUNT=len(shares), SPARE=spare is not None, **SUM_TILE,
    )  # fmt: skip
    sums.append((partial, pieces))
