"""Triton kernels of lora_linear: the products with a matrix of few columns, which are as fast as memory.

Adapters may be float32 beside 16-bit activations.  A bfloat16 operand goes into a tensor core as it is, so the float32
one is cut into three bfloat16 terms, which hold its 24 bits; other pairs are multiplied as float32, in three terms of
TF32 each.  Sums that are split among programs are added up in one order.  What changes with the length of a batch is
not specialised on: a new one compiles nothing.
"""
# mypy: allow-untyped-defs

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.core.arith import at_least_one, cdiv
from fastft.kernels.core.dispatch import SHARED_OPERANDS, has_shared_operands
from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.core.tiles import multiprocessors, padded
from fastft.kernels.lora_products import Matrix, Piece, Sum

TERMS = 3  # of a float32 number in bfloat16
ELEMENTS = 512  # of a program that goes element by element


@triton.jit
def term_of(value, number: tl.constexpr, dtype: tl.constexpr):
    """Return the first, the second or the third term of float32 values in dtype (bfloat16)."""
    for _ in tl.static_range(number):
        value -= tl.cast(tl.cast(value, dtype), tl.float32)
    return tl.cast(value, dtype)


@triton.jit
def add_product(left, right, total):
    """Return total + left right, by tensor cores' 16-bit products if both operands have one 16-bit dtype."""
    if left.dtype == right.dtype and left.dtype != tl.float32:
        return tl.dot(left, right, total)
    else:
        return tl.dot(tl.cast(left, tl.float32), tl.cast(right, tl.float32), total, input_precision="tf32x3")


@triton.jit
def place_kernel(matrices, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """Write BLOCK elements of a matrix of scaled pieces and zeros, each as up to TERMS terms."""
    for which in tl.static_range(len(matrices)):
        if tl.program_id(1) == which:
            out_ptr, n_elements, columns, out_stride, term_stride, terms, pieces = matrices[which]
            element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            row, column, mask = element // columns, element % columns, element < n_elements
            value = tl.zeros([BLOCK], tl.float32)
            for number in tl.static_range(len(pieces)):
                source_ptr, n_rows, n_columns, stride, first_row, first_column, scale = pieces[number]
                r, c = row - first_row, column - first_column
                inside = mask & (r >= 0) & (r < n_rows) & (c >= 0) & (c < n_columns)
                source = tl.load(source_ptr + tl.cast(r, tl.int64) * stride + c, mask=inside, other=0.0)
                value += tl.cast(source, tl.float32) * tl.cast(scale, tl.float32)  # pieces do not overlap
            address = out_ptr + tl.cast(row, tl.int64) * out_stride + column
            for number in tl.static_range(TERMS):
                if number < terms:
                    term = term_of(value, number, out_ptr.dtype.element_ty)
                    tl.store(address + tl.cast(number, tl.int64) * term_stride, term, mask=mask)


@triton.jit(do_not_specialize=["splits", "other_splits"])
def collect_kernel(pieces, splits, other_splits, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Sum BLOCK elements of a piece over its splits, and store them scaled; from piece FIRST on it has others."""
    for which in tl.static_range(len(pieces)):
        if tl.program_id(1) == which:
            partial_ptr, split_stride, partial_stride, target = pieces[which]
            target_ptr, n_elements, columns, stride, first_row, first_column, scale = target
            element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            mask = element < n_elements
            row = tl.cast(first_row + element // columns, tl.int64)
            address = partial_ptr + row * partial_stride + first_column + element % columns
            total = tl.zeros([BLOCK], tl.float32)
            for split in range(splits if which < FIRST else other_splits):
                total += tl.load(address + tl.cast(split, tl.int64) * split_stride, mask=mask, other=0.0)
            total *= tl.cast(scale, tl.float32)
            store = target_ptr + tl.cast(element // columns, tl.int64) * stride + element % columns
            tl.store(store, tl.cast(total, target_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def project_kernel(
    x_ptr, terms_ptr, s_ptr, copy_ptr, M, K, R, columns, x_stride, term_stride, terms_stride_k, terms_stride_r,
    s_stride, split_stride, copy_stride, COPY: tl.constexpr, TERMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute a tile of s = x p over a split of K, and copy x if COPY."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    long_row = tl.cast(row, tl.int64)
    first = tl.program_id(1) * columns
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(first, min(first + columns, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (row < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + (long_row * x_stride)[:, None] + k[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if COPY:
            tl.store(copy_ptr + (long_row * copy_stride)[:, None] + k[None, :], x, mask=mask)
        address = terms_ptr + (tl.cast(k, tl.int64) * terms_stride_k)[:, None] + (r * terms_stride_r)[None, :]
        for number in tl.static_range(TERMS):
            offset = tl.cast(TERMS - 1 - number, tl.int64) * term_stride  # the smallest first
            term = tl.load(address + offset, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0)
            total = add_product(x, term, total)
    mask = (row < M)[:, None] & (r < R)[None, :]
    split = tl.cast(tl.program_id(1), tl.int64) * split_stride
    tl.store(s_ptr + split + (long_row * s_stride)[:, None] + r[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["M", "splits"])
def finish_kernel(
    partial_ptr, s_ptr, spare_ptr, M, R, width, splits, split_stride, s_stride, spare_stride,
    SPARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum s over the splits and, if SPARE, write spare = [s | 0]."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, r = tl.cast(element // width, tl.int64), element % width  # of spare, which is wider than s
    mask = (row < M) & (r < R)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        address = partial_ptr + tl.cast(split, tl.int64) * split_stride + row * R + r
        total += tl.load(address, mask=mask, other=0.0)
    tl.store(s_ptr + row * s_stride + r, total, mask=mask)
    if SPARE:
        spare = tl.cast(total, spare_ptr.dtype.element_ty)
        tl.store(spare_ptr + row * spare_stride + r, spare, mask=row < M)


@triton.jit(do_not_specialize=["M"])
def outer_kernel(
    x_ptr, s_ptr, partial_ptr, M, K, R, rows, x_stride, s_stride, split_stride, partial_stride_k, partial_stride_r,
    TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute a tile of x^T s over a split of the rows; TERMS: of s in x's dtype, 0 for a product in float32."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * rows
    last = min(first + rows, M)
    total = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        long_row = tl.cast(row, tl.int64)
        x_mask = (row < last)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + (long_row * x_stride)[:, None] + k[None, :], mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        s_mask = (row < last)[:, None] & (r < R)[None, :]
        s = tl.load(s_ptr + (long_row * s_stride)[:, None] + r[None, :], mask=s_mask, other=0.0)
        if TERMS == 0:
            total = add_product(tl.trans(x), s, total)
        else:
            for number in tl.static_range(TERMS):
                total = add_product(tl.trans(x), term_of(s, TERMS - 1 - number, x.dtype), total)
    address = partial_ptr + tl.cast(tl.program_id(1), tl.int64) * split_stride
    address = address + (tl.cast(k, tl.int64) * partial_stride_k)[:, None] + (r * partial_stride_r)[None, :]
    tl.store(address, total, mask=(k < K)[:, None] & (r < R)[None, :])


def tile(rank: int, wide: bool, outer: bool = False, low: bool = False) -> dict[str, int]:
    """Return the tile of x, and columns for these ranks; smaller for float32.

    low: an outer product's tile has fewer rows.  Of three terms it spills otherwise, where tensor cores want operands
    in registers (see dispatch.has_shared_operands).

    Measured on an H100 in bfloat16, ranks 16 to 48, 32 and 64 rows, 64 and 128 columns, 4 and 8 warps: these were the
    fastest or within 10% of it, at 72 to 100% of a copy's bandwidth; the rows were not kept (docs/performance.md).
    """
    block_m, block_k = (32, 32) if wide else (32 if low else 64, 128) if outer else (64, 64)
    return {"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_R": padded(rank), "num_warps": 4, "num_stages": 3}


PAIRS = (  # of x and p: dtypes, and p's terms
    ("*bf16", "*bf16", 1),
    ("*bf16", "*bf16", TERMS),
    ("*fp32", "*fp32", 1),
    ("*fp32", "*bf16", 1),
    ("*fp16", "*fp32", 1),
)
RANKS = (16, 32, 64)
ON_TENSOR_CORES = (8, 9, 10, 12)  # generations, by the first number of their capability


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the kernels for ranks of a model, for the tests that compile them ahead of time.

    majors: the generations that a variant is for; such variants are compiled for each of them.
    """
    types = {"s_ptr": "*fp32", "partial_ptr": "*fp32", "scale": "fp32"}
    flat = {"BLOCK": ELEMENTS, "num_warps": 4}
    for count in (1, 3):
        source, target = (((pointer, *["i32"] * 5, "fp32"),) * count for pointer in ("*fp32", "*row"))
        sums = tuple(("*fp32", "i32", "i32", one) for one in target)
        for sums_, first in ((sums, count), ((*sums, *sums), count)):
            yield collect_kernel, {"pieces": sums_, "FIRST": first, **flat}
        for terms, matrices in itertools.product((1, TERMS), (1, 2)):
            matrix = ("*bf16" if terms == TERMS else "*row", *["i32"] * 5, source)
            yield place_kernel, {"matrices": (matrix,) * matrices, "TERMS": terms, **flat}
    for (x, p, terms), rank in itertools.product(PAIRS, RANKS):
        constants = {"x_ptr": x, "terms_ptr": p, "copy_ptr": x, **types, **tile(rank, x != p or x == "*fp32")}
        for copy, dense in ((True, "terms_stride_k"), (False, "terms_stride_r")):
            yield project_kernel, {"COPY": copy, dense: 1, "TERMS": terms, "majors": ON_TENSOR_CORES, **constants}
    for (x, terms), rank in itertools.product((("*bf16", 1), ("*bf16", TERMS), ("*fp32", 0), ("*fp16", 0)), RANKS):
        for low in (False, True) if terms == TERMS else (False,):
            majors = [major for major in ON_TENSOR_CORES if terms != TERMS or (major not in SHARED_OPERANDS) == low]
            meta = tile(rank, terms == 0, True, low)
            yield outer_kernel, {"x_ptr": x, "TERMS": terms, "majors": tuple(majors), **types, **meta}
    for spare in (False, True):
        yield finish_kernel, {"SPARE": spare, **types, **flat}


def place(matrices: Sequence[Matrix]) -> None:
    """Write scale * piece where each belongs in its matrix, which is zero elsewhere."""
    described = []
    for out, pieces in matrices:
        dense = [source if source.stride(1) == 1 else source.contiguous() for source, *_ in pieces]
        inside = tuple(
            (source, *source.shape, source.stride(0), *more) for source, (_, *more) in zip(dense, pieces, strict=True)
        )
        described.append((out, out[0].numel(), out.shape[2], out.stride(1), out.stride(0), out.shape[0], inside))
    blocks = cdiv(max(out[0].numel() for out, _ in matrices), ELEMENTS)
    terms = max(out.shape[0] for out, _ in matrices)
    on_grid(place_kernel, (blocks, len(matrices)))(tuple(described), TERMS=terms, BLOCK=ELEMENTS, num_warps=4)


def collect(sums: Sequence[Sum]) -> None:
    """Write scale * the sum over the splits into the pieces, whose last axis is dense; of one sum or of two."""
    whole = lambda piece: (piece[0], piece[0].numel(), piece[0].shape[1], piece[0].stride(0), *piece[1:])  # noqa: E731
    described = [(of, of.stride(0), of.stride(1), whole(piece)) for of, pieces in sums for piece in pieces]
    largest = max(target.numel() for _, pieces in sums for target, *_ in pieces)
    on_grid(collect_kernel, (cdiv(largest, ELEMENTS), len(described)))(
        tuple(described), sums[0][0].shape[0], sums[-1][0].shape[0], FIRST=len(sums[0][1]), BLOCK=ELEMENTS, num_warps=4
    )  # fmt: skip


def split(length: int, parts: int, block: int) -> tuple[int, int]:
    """Divide length into about so many parts of whole blocks; return how many there are, and how long each is."""
    size = cdiv(cdiv(length, parts), block) * block
    return cdiv(length, size), size


def project(x: Tensor, terms: Tensor, s: Tensor, copy: Tensor | None, spare: Tensor | None) -> None:
    """Write s = x p; copy = x; spare = [s | 0].  terms [1 or 3, K, R] of p, of any strides."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (M, K), R = x.shape, s.shape[1]
    meta = tile(R, terms.dtype != x.dtype or x.dtype == torch.float32)
    blocks = cdiv(M, meta["BLOCK_M"])
    splits = at_least_one(cdiv(2 * multiprocessors(x.device), blocks), K // 512)
    splits, columns = split(K, splits, meta["BLOCK_K"])
    at_once = splits == 1 and spare is None
    partial, whole = (s[None] if at_once else s.new_empty(splits, M, R)), (x if copy is None else copy)
    on_grid(project_kernel, (blocks, splits))(
        x, terms, partial, whole, M, K, R, columns, x.stride(0), *terms.stride(), partial.stride(1), partial.stride(0),
        whole.stride(0), COPY=copy is not None, TERMS=terms.shape[0], **meta,
    )  # fmt: skip
    if not at_once:
        beside = s if spare is None else spare
        on_grid(finish_kernel, (cdiv(beside.numel(), ELEMENTS),))(
            partial, s, beside, M, R, beside.shape[1], splits, partial.stride(0), s.stride(0),
            beside.stride(0), SPARE=spare is not None, BLOCK=ELEMENTS, num_warps=4,
        )  # fmt: skip


def outer(x: Tensor, s: Tensor, pieces: Sequence[Piece], sums: list[Sum], rounded: bool, transposed: bool) -> None:
    """Add to sums:  parts of x^T s [K, R], or of s^T x [R, K].  rounded: s counts as rounded to x's dtype."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (M, K), R = x.shape, s.shape[1]
    terms = 0 if x.dtype == torch.float32 else 1 if rounded else TERMS if x.dtype == torch.bfloat16 else 0
    meta = tile(R, terms == 0, True, terms == TERMS and not has_shared_operands(x.device))
    blocks = cdiv(K, meta["BLOCK_K"])
    splits = at_least_one(cdiv(2 * multiprocessors(x.device), blocks), M // (4 * meta["BLOCK_M"]))
    splits, n_rows = split(M, splits, meta["BLOCK_M"])
    partial = s.new_empty((splits, R, K) if transposed else (splits, K, R))
    by_k, by_r = (1, K) if transposed else (R, 1)
    on_grid(outer_kernel, (blocks, splits))(
        x, s, partial, M, K, R, n_rows, x.stride(0), s.stride(0), partial.stride(0), by_k, by_r, TERMS=terms, **meta
    )
    sums.append((partial, pieces))
