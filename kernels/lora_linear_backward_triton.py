"""Triton kernels of lora_linear's backward: x p and x^T s in one pass over x, which is the gradient of y.

Each block of x's columns goes with the ranks of its own sibling alone: p is [K, R], with no zeros beside it.  What a
program adds to x p is written apart for each block of columns, and added up in one order.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.lora_linear_triton import ON_TENSOR_CORES, TERMS, Piece, add_product, collect, term_of
from fastft.kernels.lora_products import ONE_PASS_RANK
from fastft.kernels.tiles import multiprocessors

# Predicted, not measured yet.  Columns are many, as there is a part of x p for each block of them: written and read, it
# has a quarter of x's bytes for 16 ranks, and half of them for 32, where no gain is left.  No generation spills.
TILE = {"BLOCK_M": 64, "BLOCK_K": 256, "BLOCK_R": ONE_PASS_RANK, "num_warps": 8, "num_stages": 3}
SPLITS = 8  # parts of x p that are loaded at once
SUM_ELEMENTS = 256  # of a program that adds them up: with 512, Triton 3.6 runs out of registers


Share = tuple[int, int, int, int, int, int]  # first and end of its blocks of columns, of its columns, and of its ranks


@triton.jit
def share_of(block, shares, COUNT: tl.constexpr):
    """The share that a block of columns is in, without its end."""
    first_block, _, column, end_column, rank, end_rank = shares[0]
    for number in tl.static_range(1, COUNT):
        reached = block >= shares[number][0]
        first_block = tl.where(reached, shares[number][0], first_block)
        column = tl.where(reached, shares[number][2], column)
        end_column = tl.where(reached, shares[number][3], end_column)
        rank = tl.where(reached, shares[number][4], rank)
        end_rank = tl.where(reached, shares[number][5], end_rank)
    return first_block, column, end_column, rank, end_rank


@triton.jit(do_not_specialize=["M"])
def both_kernel(
    shares, x_ptr, terms_ptr, s_ptr, product_ptr, partial_ptr, copy_ptr, M, R, rows, x_stride, term_stride, s_stride,
    product_stride, split_stride, copy_stride, COUNT: tl.constexpr, COPY: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    first_block, column, end_column, rank, end_rank = share_of(block, shares, COUNT)
    k = column + (block - first_block) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    end = min((split + 1) * rows, M)
    p_at = (tl.cast(k, tl.int64) * R)[:, None] + r[None, :]
    p_mask = (k < end_column)[:, None] & (rank + r < end_rank)[None, :]
    total = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for start in range(split * rows, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        long_row = tl.cast(row, tl.int64)
        x_mask = (row < end)[:, None] & (k < end_column)[None, :]
        x = tl.load(x_ptr + (long_row * x_stride)[:, None] + k[None, :], mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if COPY:
            tl.store(copy_ptr + (long_row * copy_stride)[:, None] + k[None, :], x, mask=x_mask)
        s_mask = (row < end)[:, None] & (rank + r < end_rank)[None, :]
        s = tl.load(s_ptr + (long_row * s_stride)[:, None] + (rank + r)[None, :], mask=s_mask, other=0.0)
        product = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for number in tl.static_range(TERMS):  # the smallest first
            offset = tl.cast(TERMS - 1 - number, tl.int64) * term_stride
            p = tl.load(terms_ptr + offset + p_at, mask=p_mask, other=0.0)
            product = add_product(x, p, product)
            total = add_product(tl.trans(x), term_of(s, TERMS - 1 - number, x.dtype), total)
        address = product_ptr + tl.cast(block, tl.int64) * product_stride + (long_row * R)[:, None] + r[None, :]
        tl.store(address, product, mask=s_mask)
    tl.store(partial_ptr + tl.cast(split, tl.int64) * split_stride + p_at, total, mask=p_mask)


@triton.jit(do_not_specialize=["M"])
def sum_kernel(
    shares, product_ptr, s_ptr, spare_ptr, M, R, width, blocks, product_stride, s_stride, spare_stride,
    COUNT: tl.constexpr, SPARE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, rank = tl.cast(at // width, tl.int64), at % width  # of spare, which is wider than s
    first, end, r = tl.zeros_like(rank), tl.zeros_like(rank), tl.zeros_like(rank)
    for number in tl.static_range(COUNT):
        first_block, end_block, _, _, first_rank, end_rank = shares[number]
        inside = (rank >= first_rank) & (rank < end_rank)
        first, end = tl.where(inside, first_block, first), tl.where(inside, end_block, end)
        r = tl.where(inside, rank - first_rank, r)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, blocks, SPLITS):
        block = first[None, :] + start + tl.arange(0, SPLITS)[:, None]  # [SPLITS, BLOCK]
        address = product_ptr + tl.cast(block, tl.int64) * product_stride + (row * R + r)[None, :]
        total += tl.sum(tl.load(address, mask=(block < end[None, :]) & (row < M)[None, :], other=0.0), 0)
    tl.store(s_ptr + row * s_stride + rank, total, mask=(row < M) & (end > 0))
    if SPARE:
        spare = tl.cast(total, spare_ptr.dtype.element_ty)
        tl.store(spare_ptr + row * spare_stride + rank, spare, mask=row < M)


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """The kernels for one sibling and for three, for the tests that compile them ahead of time."""
    types = {"s_ptr": "*fp32", "product_ptr": "*fp32", "majors": ON_TENSOR_CORES}
    for count in (1, 3):
        given = {"shares": (("i32",) * 6,) * count, "COUNT": count, **types}
        for copy in (False, True):
            for x, terms in (("*fp16", 1), ("*bf16", 1), ("*bf16", TERMS)):
                pointers = {"x_ptr": x, "terms_ptr": x, "copy_ptr": x}
                yield both_kernel, {"COPY": copy, "TERMS": terms, **pointers, **TILE, **given}
            yield sum_kernel, {"SPARE": copy, "SPLITS": SPLITS, "BLOCK": SUM_ELEMENTS, "num_warps": 4, **given}


def shares_of(columns: Sequence[slice], ranks: Sequence[slice]) -> tuple[Share, ...]:
    """Columns with their ranks, and blocks of columns numbered from one share to the next."""
    shares: list[Share] = []
    for part, own in zip(columns, ranks, strict=True):
        first = shares[-1][1] if shares else 0
        end = first + triton.cdiv(part.stop - part.start, TILE["BLOCK_K"])
        shares.append((first, end, part.start, part.stop, own.start, own.stop))
    return tuple(shares)


def both(
    x: Tensor, s: Tensor, terms: Tensor, product: Tensor, pieces: Sequence[Piece], columns: Sequence[slice],
    ranks: Sequence[slice], copy: Tensor | None, spare: Tensor | None,
) -> None:  # fmt: skip
    """product = x p, copy = x, spare = [product | 0], and x^T s [K, R] into pieces; columns[i] of x go with ranks[i].

    terms [1 or 3, K, R] of p: the rows of a share's columns have its ranks from column 0 on.  x^T s has them there too.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    (M, K), R = x.shape, terms.shape[2]
    shares = shares_of(columns, ranks)
    blocks, longest, block_m = shares[-1][1], max(end - first for first, end, *_ in shares), TILE["BLOCK_M"]
    splits = max(1, min(2 * multiprocessors(x.device) // blocks, M // (4 * block_m)))
    n_rows = triton.cdiv(triton.cdiv(M, splits), block_m) * block_m
    splits = triton.cdiv(M, n_rows)
    parts, partial = s.new_empty(blocks, M, R), s.new_empty(splits, K, R)
    target = x if copy is None else copy
    both_kernel[(blocks, splits)](
        shares, x, terms, s, parts, partial, target, M, R, n_rows, x.stride(0), terms.stride(0), s.stride(0),
        parts.stride(0), partial.stride(0), target.stride(0), COUNT=len(shares), COPY=copy is not None,
        TERMS=terms.shape[0], **TILE,
    )  # fmt: skip
    beside = product if spare is None else spare
    sum_kernel[(triton.cdiv(beside.numel(), SUM_ELEMENTS),)](
        shares, parts, product, beside, M, R, beside.shape[1], longest, parts.stride(0), product.stride(0),
        beside.stride(0), COUNT=len(shares), SPARE=spare is not None, SPLITS=SPLITS, BLOCK=SUM_ELEMENTS, num_warps=4,
    )  # fmt: skip
    collect(partial, pieces)
