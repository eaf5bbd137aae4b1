"""Triton kernels of expert_linear that compute nothing but by rows: sums of a token's, copies of tokens, dots."""
# mypy: allow-untyped-defs

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.expert_linear_triton import scaled

BLOCK = 1024  # elements of a row of a program


@triton.jit
def row_and_columns(columns, BLOCK: tl.constexpr):
    """Return the row that this program is of, and BLOCK of its columns."""
    across = tl.cdiv(columns, BLOCK)
    return tl.program_id(0) // across, tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def combine_kernel(
    out_ptr, rows_ptr, weights_ptr, place_ptr, columns, top_k, out_stride, rows_stride, WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum BLOCK elements of a token's rows, each times its weight if WEIGHTED."""
    token, n = row_and_columns(columns, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(token * top_k, token * top_k + top_k):
        row = tl.cast(tl.load(place_ptr + slot), tl.int64)
        values = tl.cast(tl.load(rows_ptr + row * rows_stride + n, mask=n < columns, other=0.0), tl.float32)
        if WEIGHTED:
            values *= tl.cast(tl.load(weights_ptr + slot), tl.float32)
        total += values
    address = out_ptr + tl.cast(token, tl.int64) * out_stride + n
    tl.store(address, tl.cast(total, out_ptr.dtype.element_ty), mask=n < columns)


@triton.jit
def spread_kernel(
    rows_ptr, tokens_ptr, weights_ptr, order_ptr, columns, top_k, rows_stride, tokens_stride, WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy BLOCK elements of the token that a row is of, times the slot's weight if WEIGHTED."""
    row, n = row_and_columns(columns, BLOCK)
    i = tl.cast(row, tl.int64)
    slot = tl.load(order_ptr + i)
    token = tl.cast(slot // top_k, tl.int64)
    values = tl.load(tokens_ptr + token * tokens_stride + n, mask=n < columns, other=0.0)
    if WEIGHTED:
        values = scaled(values, tl.cast(tl.load(weights_ptr + slot), tl.float32))
    tl.store(rows_ptr + i * rows_stride + n, values, mask=n < columns)


@triton.jit
def weigh_kernel(
    rows_ptr, beside_ptr, bias_dots_ptr, dots_ptr, weights_ptr, order_ptr, columns, top_k, rows_stride, beside_stride,
    GATHER: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a row's dot with the row beside it, for its slot, and multiply the row by the slot's weight."""
    i = tl.cast(tl.program_id(0), tl.int64)
    slot = tl.load(order_ptr + i)
    source = tl.cast(slot // top_k if GATHER else i, tl.int64)
    weight = tl.cast(tl.load(weights_ptr + slot), tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        n = first + tl.arange(0, BLOCK)
        row = tl.cast(tl.load(rows_ptr + i * rows_stride + n, mask=n < columns, other=0.0), tl.float32)
        beside = tl.load(beside_ptr + source * beside_stride + n, mask=n < columns, other=0.0)
        dot += row * tl.cast(beside, tl.float32)
        tl.store(rows_ptr + i * rows_stride + n, tl.cast(row * weight, rows_ptr.dtype.element_ty), mask=n < columns)
    total = tl.sum(dot, 0)
    if BIAS:
        total += tl.load(bias_dots_ptr + i)
    tl.store(dots_ptr + slot, tl.cast(total, dots_ptr.dtype.element_ty))


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    for weighted in (False, True):
        constants = {"WEIGHTED": weighted, "BLOCK": BLOCK, "num_warps": 4}
        yield combine_kernel, {"place_ptr": "*i32", **constants}
        yield spread_kernel, {"order_ptr": "*i32", **constants}
        pointers = {"order_ptr": "*i32", "bias_dots_ptr": "*fp32"}
        yield weigh_kernel, {**pointers, "GATHER": weighted, "BIAS": weighted, "BLOCK": BLOCK, "num_warps": 4}


def combine(out: Tensor, rows: Tensor, row_weights: Tensor | None, place: Tensor, top_k: int) -> None:
    """Write out [T, N], the sums of each token's rows [S, N], each times its slot's weight if there are weights."""
    tokens, N = out.shape
    on_grid(combine_kernel, (tokens * cdiv(N, BLOCK),))(
        out, rows, rows if row_weights is None else row_weights, place, N, top_k, out.stride(0), rows.stride(0),
        WEIGHTED=row_weights is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def spread(rows: Tensor, tokens: Tensor, row_weights: Tensor | None, order: Tensor, top_k: int) -> None:
    """Write rows [S, N] of tokens [T, N], each times its slot's weight if there are weights."""
    S, N = rows.shape
    on_grid(spread_kernel, (S * cdiv(N, BLOCK),))(
        rows, tokens, tokens if row_weights is None else row_weights, order, N, top_k, rows.stride(0),
        tokens.stride(0), WEIGHTED=row_weights is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def weigh(
    rows: Tensor, dots: Tensor, beside: Tensor, row_weights: Tensor, order: Tensor, top_k: int, gathers: bool,
    bias_dots: Tensor | None,
) -> None:  # fmt: skip
    """Write dots [slots] of rows [S, N] with those beside them, and multiply the rows by their slots' weights.

    beside: [S, N], or tokens if it gathers.  bias_dots [S], float32, is added to the dots.
    """
    on_grid(weigh_kernel, (rows.shape[0],))(
        rows, beside, dots if bias_dots is None else bias_dots, dots, row_weights, order, rows.shape[1], top_k,
        rows.stride(0), beside.stride(0), GATHER=gathers, BIAS=bias_dots is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
