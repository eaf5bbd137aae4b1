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
ELEMENTS = 2048  # of a program that goes element by element


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
    out_ptr, packed_ptr, code_ptr, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr,
    n_units, row_units, out_stride, units_a_block, NESTED: tl.constexpr, UNITS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
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
    at = tl.cast(unit // row_units, tl.int64) * out_stride + unit % row_units * UNIT
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


_STATISTICS = {
    "packed_ptr": "*u8", "code_ptr": "*fp32", "absmax_ptr": "*fp32", "absmax_8bit_ptr": "*u8",
    "absmax_code_ptr": "*fp32", "absmax_offset_ptr": "*fp32",
}  # fmt: skip


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every kernel as it can be launched, for the tests that compile them ahead of time."""
    for nested in (False, True):
        flat = {"NESTED": nested, "num_warps": WARPS, "enable_fp_fusion": False, **_STATISTICS}
        yield blocks_kernel, {"UNITS": UNITS, "UNIT": UNIT, **flat}
        yield elements_kernel, {"BLOCK": ELEMENTS, **flat}


def forward(
    outputs: Sequence[Tensor], packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
    absmax_offset: Tensor | None, rows: int, columns: int, blocksize: int, quant_type: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    (out,) = outputs
    packed = packed.contiguous().view(-1).view(torch.uint8)
    nested = absmax_8bit is not None
    given = [absmax, absmax_8bit, absmax_code, absmax_offset] if nested else [absmax] * 4
    statistics = [value.contiguous() for value in given if value is not None]
    tensors = (out, packed, code_of(quant_type, out.device), *statistics)
    settings = {"NESTED": nested, "num_warps": WARPS, "enable_fp_fusion": False}
    if columns % UNIT == 0 and blocksize % UNIT == 0:
        n_units = rows * columns // UNIT
        blocks_kernel[(triton.cdiv(n_units, UNITS),)](
            *tensors, n_units, columns // UNIT, out.stride(0), blocksize // UNIT, UNITS=UNITS, UNIT=UNIT, **settings
        )
    else:
        n_elements = rows * columns
        elements_kernel[(triton.cdiv(n_elements, ELEMENTS),)](
            *tensors, n_elements, columns, out.stride(0), blocksize, BLOCK=ELEMENTS, **settings
        )
