"""Triton kernels of dora_weight_norm: some rows a program, whose tiles are read once and summed up with the adapter's.

A tile of B A is a product of few columns, the rank, so that the kernel is as fast as the weight is read.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.core.tiles import padded
from fastft.kernels.dequantize_4bit import code_of
from fastft.kernels.dequantize_4bit_triton import scale_of
from fastft.kernels.dora_weight_norm import UNIT
from fastft.kernels.lora_linear_triton import add_product

ROWS = 16  # of a program, the fewest that tensor cores take
COLUMNS = 64  # of a tile: 16 bytes of 16-bit rows a thread
LARGEST_RANK = 32  # of one product, as registers hold; larger ranks are summed up
ON_TENSOR_CORES = (8, 9, 10, 12)  # generations that the kernels run on
WARPS = 4


@triton.jit
def adapter_tile(
    a_ptr, b_ptr, n, k, N, K, R, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """Compute B A at rows n and columns k; 0 beyond the matrix."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, R, RANKS):
        r = first + tl.arange(0, RANKS)
        b = tl.load(b_ptr + n[:, None] * R + r[None, :], mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
        a = tl.load(a_ptr + r[:, None] * K + k[None, :], mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)
        total = add_product(b, a, total)
    return total


@triton.jit
def plain_kernel(
    out_ptr, weight_ptr, a_ptr, b_ptr, N, K, R, row_stride, column_stride, scale: tl.float32,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Compute the norms of ROWS rows of a weight that is not quantised."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = weight_ptr + (tl.cast(n, tl.int64) * row_stride)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, K, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        mask = (n < N)[:, None] & (k < K)[None, :]
        weight = tl.load(start + (tl.cast(k, tl.int64) * column_stride)[None, :], mask=mask, other=0.0)
        value = adapter_tile(a_ptr, b_ptr, n, k, N, K, R, ROWS, COLUMNS, RANKS) * scale + weight
        total += tl.sum(value * value, 1)
    tl.store(out_ptr + n, tl.sqrt(total), mask=n < N)


@triton.jit
def four_bit_kernel(
    out_ptr, packed_ptr, code_ptr, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr, a_ptr, b_ptr,
    N, units, R, units_a_block, scale: tl.float32,
    NESTED: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Compute the norms of ROWS rows of 4-bit weights, of units of UNIT columns that one absmax scales."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, UNIT // 2)
    code = tl.load(code_ptr + tl.arange(0, 16))
    total = tl.zeros([ROWS], tl.float32)
    for unit in range(units):
        before = n * units + unit
        block = before // units_a_block
        absmax = scale_of(block, n < N, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr, NESTED)
        source = packed_ptr + (tl.cast(before, tl.int64) * (UNIT // 2))[:, None] + pair[None, :]
        byte = tl.cast(tl.load(source, mask=(n < N)[:, None], other=0), tl.int32)
        flat = tl.reshape(byte, [ROWS * UNIT // 2])
        upper = tl.reshape(tl.gather(code, flat >> 4, 0), [ROWS, UNIT // 2])  # the first of two elements
        lower = tl.reshape(tl.gather(code, flat & 15, 0), [ROWS, UNIT // 2])
        weight = tl.interleave(upper, lower) * absmax[:, None]
        k = unit * UNIT + tl.arange(0, UNIT)
        delta = adapter_tile(a_ptr, b_ptr, n, k, N, units * UNIT, R, ROWS, UNIT, RANKS)
        value = delta * scale + weight
        total += tl.sum(value * value, 1)
    tl.store(out_ptr + n, tl.sqrt(total), mask=n < N)


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    shared = {"ROWS": ROWS, "num_warps": WARPS, "out_ptr": "*fp32", "scale": "fp32"}
    shared["majors"] = ON_TENSOR_CORES
    statistics = dict(
        zip(
            ("absmax_ptr", "absmax_8bit_ptr", "absmax_code_ptr", "absmax_offset_ptr"),
            ("*fp32", "*u8", "*fp32", "*fp32"),
            strict=True,
        )
    )
    for factors in ("*row", "*fp32"):
        pointers = {"a_ptr": factors, "b_ptr": factors}
        for rank in (16, LARGEST_RANK):
            yield plain_kernel, {"column_stride": 1, "COLUMNS": COLUMNS, "RANKS": rank, **pointers, **shared}
            for nested in (False, True):
                meta = {"NESTED": nested, "UNIT": UNIT, "RANKS": rank}
                named = {"packed_ptr": "*u8", "code_ptr": "*fp32", **statistics}
                yield four_bit_kernel, {**named, **pointers, **meta, **shared}


def norms(
    out: Tensor, weight: Tensor, statistics: Sequence[Tensor], lora_a: Tensor, lora_b: Tensor, scale: float,
    blocksize: int, quant_type: str,
) -> None:  # fmt: skip
    """Write the norms of a weight's rows into out [N]; 4-bit weights come with their statistics, in whole units."""
    (rank, columns), rows = lora_a.shape, out.shape[0]
    a, b = lora_a.contiguous(), lora_b.contiguous()
    meta = {"ROWS": ROWS, "RANKS": min(padded(rank), LARGEST_RANK), "num_warps": WARPS}
    grid = (cdiv(rows, ROWS),)
    if not quant_type:
        strides = (weight.stride(0), weight.stride(1))
        on_grid(plain_kernel, grid)(out, weight, a, b, rows, columns, rank, *strides, scale, COLUMNS=COLUMNS, **meta)
        return
    flat = [tensor.contiguous() for tensor in statistics]
    four = flat if len(flat) == 4 else flat * 4
    packed = weight.contiguous().view(-1).view(torch.uint8)
    on_grid(four_bit_kernel, grid)(
        out, packed, code_of(quant_type, out.device), *four, a, b, rows, columns // UNIT, rank, blocksize // UNIT,
        scale, NESTED=len(flat) == 4, UNIT=UNIT, **meta,
    )  # fmt: skip
