"""Dequantize weights of 4 bits an element, as bitsandbytes packs them: Dettmers et al., QLoRA, 2023, arXiv:2305.14314.

value = code[nibble] * absmax of its block of blocksize elements, in float32, then rounded once; the first of two
elements is in a byte's upper half.  Where the absmax are themselves quantised (nested, or double, quantisation)
absmax = absmax_code[absmax_8bit] * absmax of its block of 256 blocks + absmax_offset.  The result is bit for bit
that of bitsandbytes, for NF4 and FP4.

packed: any shape and dtype of (rows * columns + 1) // 2 bytes.  absmax float32 [blocks]; nested: absmax float32
[blocks / 256], absmax_8bit uint8 [blocks], absmax_code float32 [256], absmax_offset float32 [].
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.compat import symbolic_sizes
from fastft.kernels.core import dispatch
from fastft.kernels.core.launch_recorder import constant
from fastft.kernels.core.registry import define, load, require

NESTED_BLOCK = 256  # absmax values that share one of their own
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODES = {
    # The quantiles of a normal distribution, QLoRA's appendix E; bitsandbytes' rounding of them.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # A sign, two bits of exponent and one of mantissa, divided by the largest.
    "fp4": tuple(
        sign * value / 12.0 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}  # fmt: skip


@functools.cache
def code_of(quant_type: str, device: torch.device) -> Tensor:
    """Return the 16 values of a quantised type, float32, on a device."""
    with symbolic_sizes.without_modes():
        return constant(torch.tensor(CODES[quant_type], dtype=torch.float32, device=device))


def reference(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
    absmax_offset: Tensor | None, rows: int, columns: int, blocksize: int, quant_type: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Dequantize to [rows, columns] of dtype, in plain PyTorch."""
    absmax = flat_absmax(absmax, absmax_8bit, absmax_code, absmax_offset)
    code = torch.tensor(CODES[quant_type], dtype=torch.float32, device=packed.device)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), -1)  # of each byte
    values = pairs[packed.reshape(-1).view(torch.uint8).int()].view(-1)
    count = rows * columns
    whole = count // blocksize * blocksize
    scaled = [values[:whole].view(-1, blocksize) * absmax[: whole // blocksize, None]]
    if whole < count:
        scaled.append(values[whole:count] * absmax[-1])
    return torch.cat([part.reshape(-1) for part in scaled]).view(rows, columns).to(dtype)


def flat_absmax(
    absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None, absmax_offset: Tensor | None
) -> Tensor:
    """Return the float32 absmax of each block, whether they are quantised or not."""
    if absmax_8bit is None or absmax_code is None or absmax_offset is None:
        return absmax
    outer = absmax.repeat_interleave(NESTED_BLOCK)[: absmax_8bit.numel()]
    return absmax_code[absmax_8bit.int()] * outer + absmax_offset


def check(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
    absmax_offset: Tensor | None, rows: int, columns: int, blocksize: int, quant_type: str,
) -> None:  # fmt: skip
    """Raise where the numbers of bytes or blocks do not fit [rows, columns], or bitsandbytes has no such setting."""
    count = rows * columns
    size_bytes = packed.numel() * packed.element_size()
    require(size_bytes == -(-count // 2), lambda: f"{size_bytes} bytes for {rows} x {columns} elements of 4 bits")
    require(quant_type in CODES, lambda: f"quant_type {quant_type!r} is none of {', '.join(CODES)}")
    require(blocksize in BLOCKSIZES, lambda: f"blocksize {blocksize} is none of {BLOCKSIZES}")
    nested = [absmax_8bit, absmax_code, absmax_offset]
    require(len({tensor is None for tensor in nested}) == 1, lambda: "nested statistics come all three or not at all")
    blocks = -(-count // blocksize)
    if absmax_8bit is not None:
        require(absmax_8bit.numel() == blocks, lambda: f"{absmax_8bit.numel()} absmax for {blocks} blocks")
        blocks = -(-blocks // NESTED_BLOCK)
    require(absmax.numel() == blocks, lambda: f"{absmax.numel()} absmax for {blocks} blocks")


def new_output(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
    absmax_offset: Tensor | None, rows: int, columns: int, blocksize: int, quant_type: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Allocate an empty [rows, columns] of dtype."""
    check(packed, absmax, absmax_8bit, absmax_code, absmax_offset, rows, columns, blocksize, quant_type)
    return torch.empty(rows, columns, dtype=dtype, device=packed.device)


def padded(statistics: Sequence[Tensor]) -> list[Any]:
    """Pad a weight's statistics with None to the op's four; weights that are not nested have the first alone."""
    return [*statistics, None, None, None][:4]


def dequantize_into(
    out: Tensor, weights: Sequence[tuple[Tensor, Sequence[Tensor]]], features: Sequence[int], blocksize: int,
    quant_type: str,
) -> None:  # fmt: skip
    """Dequantize weights into out [sum of features, columns], one below the other; out's rows may lie apart.

    weights: for each its bytes and its statistics: absmax, or absmax, absmax_8bit, absmax_code and absmax_offset.
    """
    tensors = [out, *(tensor for packed, statistics in weights for tensor in (packed, statistics[0]))]
    if _on_triton(*tensors):
        together = load("dequantize_4bit_triton.together")
        if dispatch.launched(together, tensors, out, weights, features, blocksize, quant_type):
            return
    for part, (packed, statistics) in zip(out.split(list(features)), weights, strict=True):
        sizes: Any = (*part.shape, blocksize, quant_type, out.dtype)
        part.copy_(_on_cpu(packed, *padded(statistics), *sizes))


def _on_cpu(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
    absmax_offset: Tensor | None, rows: int, columns: int, blocksize: int, quant_type: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Dequantize by bitsandbytes, ten times as fast as PyTorch here, where whoever made the weight has imported it.

    Not for blocks that are longer than a row: bitsandbytes 0.50.2 takes the wrong absmax for them on a CPU.
    """
    known = hasattr(torch.ops.bitsandbytes, "dequantize_4bit") and packed.device.type == "cpu"
    if not known or columns % blocksize or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        statistics = (absmax, absmax_8bit, absmax_code, absmax_offset)
        return reference(packed, *statistics, rows, columns, blocksize, quant_type, dtype)
    absmax = flat_absmax(absmax, absmax_8bit, absmax_code, absmax_offset)
    packed = packed.contiguous().view(torch.uint8).view(-1, 1)
    return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, blocksize, quant_type, [rows, columns], dtype)


def _on_triton(out: Tensor, *others: Tensor) -> bool:
    supported = out.dtype in dispatch.triton_dtypes(out.device) and all(
        tensor.device == out.device for tensor in others
    )
    return supported and out.numel() > 0 and out.stride(-1) == 1


def fill(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    """Write the op's result into its one target (Entry.fill)."""
    packed, *statistics, rows, _, blocksize, quant_type, _ = arguments
    present = [tensor for tensor in statistics if tensor is not None]
    dequantize_into(targets[0], [(packed, present)], [rows], blocksize, quant_type)


_CHOICES = [
    {"rows": 6, "columns": 64, "blocksize": 64, "quant_type": "nf4", "dtype": torch.float32},
    {"rows": 3, "columns": 128, "blocksize": 128, "quant_type": "fp4", "dtype": torch.float16},
    {"rows": 5, "columns": 52, "blocksize": 64, "quant_type": "nf4", "dtype": torch.float16},
    {"rows": 3, "columns": 37, "blocksize": 32, "quant_type": "fp4", "dtype": torch.float32},
    {"rows": 70, "columns": 320, "blocksize": 64, "quant_type": "nf4", "dtype": torch.float32},
]


def case(choice: dict[str, Any], nested: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Build a case: the shapes follow from the choice's numbers."""
    count = choice["rows"] * choice["columns"]
    blocks = -(-count // choice["blocksize"])
    shapes = {"packed": f"bytes {-(-count // 2)}", "absmax": f"{-(-blocks // NESTED_BLOCK) if nested else blocks}"}
    if nested:
        shapes |= {"absmax_8bit": f"bytes {blocks}", "absmax_code": "256", "absmax_offset": ""}
    return shapes, choice


dequantize_4bit = define(
    "dequantize_4bit", reference, new_output, fill,
    cases=[case(choice, nested) for choice in _CHOICES for nested in (False, True)],
    statistics=("absmax", "absmax_code", "absmax_offset"), flops=4,
)  # fmt: skip
