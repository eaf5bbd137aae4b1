"""Triton kernels of dequantize_4bit: in blocks that lie within a row, or element by element.

Launched without fused multiply-add: bitsandbytes rounds the product before it adds the offset, and so do these.
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
from fastft.kernels.dequantize_4bit import code_of

UNIT = 64  # elements that one absmax scales, or a part of them
UNITS = 32  # 2,048 elements a program
# One warp, so that the look-up among 16 values is a shuffle: 8 instructions an element on sm_90, where look-ups by
# loads and a division for each unit took 15; 91% of a copy on an H100.  16 and 64 units are within 1.5%.
WARPS = 1
ELEMENTS, ELEMENT_WARPS = 256, 2  # of a program that goes element by element


@triton.jit
def scale_of(block, mask, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr, NESTED: tl.constexpr):
    """Load the absmax of these blocks, dequantized if NESTED."""
    if NESTED:
        index = tl.cast(tl.load(absmax_8bit_ptr + block, mask=mask, other=0), tl.int32)
        outer = tl.load(absmax_ptr + block // 256, mask=mask, other=0.0)
        return tl.load(absmax_code_ptr + index) * outer + tl.load(absmax_offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def blocks_kernel(
    weights, out_ptr, code_ptr, row_units, chunks, out_stride, units_a_block, COUNT: tl.constexpr,
    NESTED: tl.constexpr, UNITS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Dequantize UNITS units of a row of out; weights: of each its bytes, statistics, first row and end."""
    row = tl.program_id(0) // chunks  # of out
    first = tl.program_id(0) % chunks * UNITS
    unit = first + tl.arange(0, UNITS)  # of UNIT elements and of one absmax
    mask = unit < row_units
    code = tl.load(code_ptr + tl.arange(0, 16))
    for number in tl.static_range(COUNT):
        packed_ptr, statistics, first_row, end_row = weights[number]
        if (row >= first_row) & (row < end_row):
            absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr = statistics
            before = (row - first_row) * row_units
            block = (before + unit) // units_a_block
            absmax = scale_of(block, mask, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr, NESTED)
            source = packed_ptr + tl.cast(before + first, tl.int64) * (UNIT // 2)
            source = source + tl.arange(0, UNITS)[:, None] * (UNIT // 2) + tl.arange(0, UNIT // 2)[None, :]
            byte = tl.cast(tl.load(source, mask=mask[:, None], other=0), tl.int32)  # [UNITS, UNIT / 2]
            flat = tl.reshape(byte, [UNITS * UNIT // 2])
            upper = tl.reshape(tl.gather(code, flat >> 4, 0), [UNITS, UNIT // 2])
            lower = tl.reshape(tl.gather(code, flat & 15, 0), [UNITS, UNIT // 2])
            value = tl.interleave(upper * absmax[:, None], lower * absmax[:, None])  # [UNITS, UNIT]
            target = out_ptr + tl.cast(row, tl.int64) * out_stride + first * UNIT
            target = target + tl.arange(0, UNITS)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
            tl.store(target, tl.cast(value, out_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def elements_kernel(
    out_ptr, packed_ptr, code_ptr, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr,
    n_elements, columns, out_stride, blocksize, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dequantize BLOCK elements one by one, for any number of columns and any blocksize."""
    element = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < n_elements
    absmax = scale_of(
        element // blocksize, mask, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr, NESTED
    )
    byte = tl.cast(tl.load(packed_ptr + element // 2, mask=mask, other=0), tl.int32)
    nibble = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    value = tl.load(code_ptr + nibble) * absmax
    address = out_ptr + element // columns * out_stride + element % columns
    tl.store(address, tl.cast(value, out_ptr.dtype.element_ty), mask=mask)


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    types = ("*fp32", "*u8", "*fp32", "*fp32")
    named = dict(zip(("absmax_ptr", "absmax_8bit_ptr", "absmax_code_ptr", "absmax_offset_ptr"), types, strict=True))
    for nested in (False, True):
        flat = {"NESTED": nested, "enable_fp_fusion": False, "code_ptr": "*fp32"}
        for count in (1, 3):
            weights = (("*u8", types, "i32", "i32"),) * count
            meta = {"COUNT": count, "UNITS": UNITS, "UNIT": UNIT, "num_warps": WARPS}
            yield blocks_kernel, {"weights": weights, **meta, **flat}
        meta = {"BLOCK": ELEMENTS, "num_warps": ELEMENT_WARPS}
        yield elements_kernel, {"packed_ptr": "*u8", **named, **meta, **flat}


def together(
    out: Tensor, weights: Sequence[tuple[Tensor, Sequence[Tensor]]], features: Sequence[int], blocksize: int,
    quant_type: str,
) -> None:  # fmt: skip
    """Dequantize weights, one below the other, into out [sum of features, columns]."""
    columns, end, pieces = out.shape[1], 0, []
    for (weight, statistics), size in zip(weights, features, strict=True):
        flat = [tensor.contiguous() for tensor in statistics]
        four = tuple(flat) if len(flat) == 4 else tuple(flat * 4)
        pieces.append((weight.contiguous().view(-1).view(torch.uint8), four, end, end + size))
        end += size
    settings = {"NESTED": len(weights[0][1]) == 4, "enable_fp_fusion": False}
    code = code_of(quant_type, out.device)
    if columns % UNIT == 0 and blocksize % UNIT == 0:
        chunks = cdiv(columns // UNIT, UNITS)
        on_grid(blocks_kernel, (end * chunks,))(
            tuple(pieces), out, code, columns // UNIT, chunks, out.stride(0), blocksize // UNIT, COUNT=len(pieces),
            UNITS=UNITS, UNIT=UNIT, num_warps=WARPS, **settings,
        )  # fmt: skip
        return
    for weight, four, first, after in pieces:
        n_elements = (after - first) * columns
        on_grid(elements_kernel, (cdiv(n_elements, ELEMENTS),))(
            out[first:], weight, code, *four, n_elements, columns, out.stride(0), blocksize, BLOCK=ELEMENTS,
            num_warps=ELEMENT_WARPS, **settings,
        )  # fmt: skip
