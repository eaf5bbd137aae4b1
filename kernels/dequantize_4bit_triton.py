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

from fastft.kernels.dequantize_4bit import code_of

UNIT = 64  # elements that one absmax scales, or a part of them
UNITS, WARPS = 32, 2  # 2,048 elements a program: 16 to 128 units by 2 to 8 warps are slower or equal on an H100
ELEMENTS = 256  # of a program that goes element by element


@triton.jit
def scale_of(block, mask, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr, NESTED: tl.constexpr):
    """The absmax of these blocks."""
    if NESTED:
        index = tl.cast(tl.load(absmax_8bit_ptr + block, mask=mask, other=0), tl.int32)
        outer = tl.load(absmax_ptr + block // 256, mask=mask, other=0.0)
        return tl.load(absmax_code_ptr + index) * outer + tl.load(absmax_offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def blocks_kernel(
    weights, out_ptr, code_ptr, row_units, out_stride, units_a_block, COUNT: tl.constexpr, NESTED: tl.constexpr,
    UNITS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    for number in tl.static_range(COUNT):
        if tl.program_id(1) == number:
            packed_ptr, statistics, n_units, first_row = weights[number]
            absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr = statistics
            unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)  # of UNIT elements, in one row and of one absmax
            mask = unit < n_units
            absmax = scale_of(
                unit // units_a_block, mask, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr, NESTED
            )
            start = tl.cast(unit, tl.int64) * (UNIT // 2)
            byte = tl.load(packed_ptr + start[:, None] + tl.arange(0, UNIT // 2)[None, :], mask=mask[:, None], other=0)
            byte = tl.cast(byte, tl.int32)  # [UNITS, UNIT / 2]
            first = tl.load(code_ptr + (byte >> 4)) * absmax[:, None]
            second = tl.load(code_ptr + (byte & 15)) * absmax[:, None]
            value = tl.interleave(first, second)  # [UNITS, UNIT]
            at = tl.cast(first_row + unit // row_units, tl.int64) * out_stride + unit % row_units * UNIT
            address = out_ptr + at[:, None] + tl.arange(0, UNIT)[None, :]
            tl.store(address, tl.cast(value, out_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def elements_kernel(
    out_ptr, packed_ptr, code_ptr, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr,
    n_elements, columns, out_stride, blocksize, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    """Every kernel as it can be launched, for the tests that compile them ahead of time."""
    types = ("*fp32", "*u8", "*fp32", "*fp32")
    named = dict(zip(("absmax_ptr", "absmax_8bit_ptr", "absmax_code_ptr", "absmax_offset_ptr"), types, strict=True))
    for nested in (False, True):
        flat = {"NESTED": nested, "num_warps": WARPS, "enable_fp_fusion": False, "code_ptr": "*fp32"}
        for count in (1, 3):
            weights = (("*u8", types, "i32", "i32"),) * count
            yield blocks_kernel, {"weights": weights, "COUNT": count, "UNITS": UNITS, "UNIT": UNIT, **flat}
        yield elements_kernel, {"BLOCK": ELEMENTS, "packed_ptr": "*u8", **named, **flat}


def together(
    out: Tensor, weights: Sequence[tuple[Tensor, Sequence[Tensor]]], features: Sequence[int], blocksize: int,
    quant_type: str,
) -> None:  # fmt: skip
    """Weights with their statistics, one below the other in out [sum of features, columns]."""
    columns, first, pieces = out.shape[1], 0, []
    for (weight, statistics), size in zip(weights, features, strict=True):
        flat = [one.contiguous() for one in statistics]
        four = tuple(flat) if len(flat) == 4 else tuple(flat * 4)
        pieces.append((weight.contiguous().view(-1).view(torch.uint8), four, size * columns, first))
        first += size
    settings = {"NESTED": len(weights[0][1]) == 4, "num_warps": WARPS, "enable_fp_fusion": False}
    code = code_of(quant_type, out.device)
    if columns % UNIT == 0 and blocksize % UNIT == 0:
        given = tuple((weight, four, n_elements // UNIT, row) for weight, four, n_elements, row in pieces)
        blocks_kernel[(triton.cdiv(max(features) * columns // UNIT, UNITS), len(given))](
            given, out, code, columns // UNIT, out.stride(0), blocksize // UNIT, COUNT=len(given), UNITS=UNITS,
            UNIT=UNIT, **settings,
        )  # fmt: skip
        return
    for weight, four, n_elements, row in pieces:
        elements_kernel[(triton.cdiv(n_elements, ELEMENTS),)](
            out[row:], weight, code, *four, n_elements, columns, out.stride(0), blocksize, BLOCK=ELEMENTS, **settings
        )
