"""Norms of the rows of a weight with its adapter, without that sum:  norm_i = ||W_i + s (B A)_i||.

Source: Liu et al., DoRA, 2024, arXiv:2402.09353, equation 5; its section 4.3 takes the norm for a constant, so it has
no gradient.

weight: [N, K], floating point; or, with a quant_type, packed as dequantize_4bit takes it, with absmax and, if nested,
absmax_8bit, absmax_code and absmax_offset.  lora_a: A [r, K]; lora_b: B [N, r]; each of any floating-point dtype.
The result [N] is float32 (float64 beside float64), and nothing is rounded before.  The weight is read once, in tiles to
which the adapter's are added; W, 4-bit or not, and B A are never in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastft.kernels import dequantize_4bit
from fastft.kernels.core import dispatch
from fastft.kernels.core.registry import Case, define, load, require, wide

UNIT = 64  # columns that share an absmax, at the least, where the kernel takes 4-bit weights as they are


def reference(
    weight: Tensor, absmax: Tensor | None, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
    absmax_offset: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float, blocksize: int, quant_type: str,
) -> Tensor:  # fmt: skip
    """Compute the norms in plain PyTorch, by the sum itself."""
    dtype = dtype_of(weight, absmax, lora_a, lora_b)
    if quant_type:
        assert absmax is not None
        sizes = (lora_b.shape[0], lora_a.shape[1], blocksize, quant_type)
        weight = dequantize_4bit.reference(weight, absmax, absmax_8bit, absmax_code, absmax_offset, *sizes, dtype)
    return torch.linalg.vector_norm(weight.to(dtype) + scale * (lora_b.to(dtype) @ lora_a.to(dtype)), dim=1)


def dtype_of(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of the result."""
    return wide(*(tensor.dtype for tensor in tensors if tensor is not None and tensor.is_floating_point()))


def new_output(
    weight: Tensor, absmax: Tensor | None, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
    absmax_offset: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float, blocksize: int, quant_type: str,
) -> Tensor:  # fmt: skip
    """Allocate an empty [N]; raise where shapes do not fit."""
    (rank, columns), rows = lora_a.shape, lora_b.shape[0]
    require(lora_b.shape == (rows, rank), lambda: f"A {tuple(lora_a.shape)} and B {tuple(lora_b.shape)}")
    if quant_type:
        require(absmax is not None, lambda: "a weight of 4 bits without absmax")
        assert absmax is not None
        sizes = (rows, columns, blocksize, quant_type)
        dequantize_4bit.check(weight, absmax, absmax_8bit, absmax_code, absmax_offset, *sizes)
    else:
        fits = weight.shape == (rows, columns) and weight.is_floating_point()
        require(fits, lambda: f"a weight {weight.dtype} {tuple(weight.shape)} for {rows} rows of {columns}")
    dtype = dtype_of(None if quant_type else weight, absmax, lora_a, lora_b)
    return torch.empty(rows, dtype=dtype, device=weight.device)


def fill(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    """Write the op's result into its one target (Entry.fill)."""
    weight, *statistics, lora_a, lora_b, scale, blocksize, quant_type = arguments
    present = [tensor for tensor in statistics if tensor is not None]
    tensors = [targets[0], *([] if quant_type else [weight]), *present, lora_a, lora_b]
    if _on_triton(tensors):
        if quant_type and (lora_a.shape[1] % UNIT or blocksize % UNIT):
            weight, present, quant_type = _dequantized(weight, present, lora_a, lora_b, blocksize, quant_type), [], ""
        launch = load("dora_weight_norm_triton.norms")
        arguments_ = (targets[0], weight, present, lora_a, lora_b, scale, blocksize, quant_type)
        if dispatch.launched(launch, tensors, *arguments_):
            return
    targets[0].copy_(reference(*arguments))


def _on_triton(tensors: Sequence[Tensor]) -> bool:
    present = all(tensor.numel() > 0 for tensor in tensors)
    return present and dispatch.takes(0, None, tensors) and dispatch.has_tensor_cores(tensors[0].device)


def _dequantized(
    weight: Tensor, statistics: Sequence[Tensor], lora_a: Tensor, lora_b: Tensor, blocksize: int, quant_type: str
) -> Tensor:
    out = torch.empty(lora_b.shape[0], lora_a.shape[1], dtype=torch.float32, device=weight.device)
    dequantize_4bit.dequantize_into(out, [(weight, statistics)], [out.shape[0]], blocksize, quant_type)
    return out


def flops(weight: torch.Size, *arguments: Any) -> int:
    """Count the product's FLOPs, and three for each element: added, squared and summed up."""
    lora_a, lora_b = arguments[4:6]
    return 2 * prod(lora_b) * lora_a[1] + 3 * lora_b[0] * lora_a[1]


def scratch_bytes(weight: Tensor, *arguments: Any) -> int:
    """Count the bytes of a 4-bit weight in float32, where its blocks are none that the kernel takes as they are."""
    *_, lora_a, lora_b, _, blocksize, quant_type = arguments
    taken = not quant_type or (lora_a.shape[1] % UNIT == 0 and blocksize % UNIT == 0)
    return 0 if taken else 4 * lora_b.shape[0] * lora_a.shape[1]


def _four_bit(rows: int, columns: int, rank: int, blocksize: int, quant_type: str, nested: bool) -> Case:
    choice = {"rows": rows, "columns": columns, "blocksize": blocksize, "quant_type": quant_type}
    shapes, _ = dequantize_4bit.case(choice, nested)
    shapes = {"weight": shapes.pop("packed"), **shapes}
    shapes |= {"lora_a": f"{rank} {columns}", "lora_b": f"{rows} {rank}"}
    return shapes, {"scale": 0.5, "blocksize": blocksize, "quant_type": quant_type}


_PLAIN: dict[str, Any] = {"blocksize": 0, "quant_type": ""}
dora_weight_norm = define(
    "dora_weight_norm", reference, new_output, fill, flops=flops, scratch=scratch_bytes,
    cases=[
        ({"weight": "M K", "lora_a": "Q K", "lora_b": "M Q"}, {"scale": 2.0, **_PLAIN}),
        _four_bit(24, 64, 4, 64, "nf4", nested=True),
        _four_bit(7, 192, 3, 128, "fp4", nested=False),
        _four_bit(18, 128, 70, 64, "nf4", nested=False),
        _four_bit(5, 52, 3, 64, "nf4", nested=True),
        ({"weight": "20 K", "lora_a": "17 K", "lora_b": "20 17"}, {"scale": -0.25, **_PLAIN}),
    ],
    statistics=("absmax", "absmax_code", "absmax_offset"),
)  # fmt: skip
