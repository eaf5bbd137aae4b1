"""Triton kernel of linear_kl_div: one row a program, logits and target read twice, the gradient written over logits.

The second read is served by the cache where the rows and those of the programs beside it fit there.
"""
# mypy: allow-untyped-defs

import itertools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.linear_cross_entropy_triton import CONFIGS, shaped
from fastft.kernels.linear_kl_div import Arguments


@triton.jit
def rows_kernel(
    logits_ptr, bias_ptr, target_ptr, upstream_ptr, loss_ptr, columns, logits_stride, target_stride, upstream_stride,
    scale: tl.float32, softcap: tl.float32, gain: tl.float32,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the loss of one row and, if GRADIENT, write gain times its gradient over the logits."""
    scale, softcap, gain = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32), tl.cast(gain, tl.float32)
    row = tl.cast(tl.program_id(0), tl.int64)  # rows * columns may exceed 2**31
    logits_ptr += row * logits_stride
    target_ptr += row * target_stride
    largest, total = -3.4e38, 0.0  # a whole block may be minus infinity
    shares, away = 0.0, 0.0  # sums of exp(t) and of exp(t) (t - (y - largest))
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = shaped(logits_ptr, bias_ptr, column, column < columns, scale, softcap, BIASED, CAPPED)  # [BLOCK]
        y = tl.where(column < columns, y, -float("inf"))
        t = tl.cast(tl.load(target_ptr + column, mask=column < columns, other=-float("inf")), tl.float32)
        larger = tl.maximum(largest, tl.max(y))
        share = tl.exp(t)
        away += shares * (larger - largest) + tl.sum(tl.where(share != 0.0, share * (t - (y - larger)), 0.0))
        shares += tl.sum(share)
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(y - larger))
        largest = larger
    tl.store(loss_ptr + row, away + tl.log(total) * shares)  # near 0 not the difference of two large numbers
    if GRADIENT:
        upstream = gain * tl.cast(tl.load(upstream_ptr + row * upstream_stride), tl.float32)
        pull = shares / total
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            y = shaped(logits_ptr, bias_ptr, column, column < columns, scale, softcap, BIASED, CAPPED)
            t = tl.cast(tl.load(target_ptr + column, mask=column < columns, other=0.0), tl.float32)
            dy = tl.exp(y - largest) * pull - tl.exp(t)
            if CAPPED:
                dy *= 1.0 - (y / softcap) * (y / softcap)
            dz = tl.cast(dy * scale * upstream, logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + column, dz, mask=column < columns)


def rows(
    logits: Tensor, target: Tensor, upstream: Tensor, loss: Tensor, call: Arguments, gain: float, gradient: bool
) -> None:
    """Launch rows_kernel; logits and target [rows, V] have rows of unit stride."""
    n_rows, columns = logits.shape
    bias = call.bias
    config = next(candidate for candidate in CONFIGS if columns <= candidate.longest)
    on_grid(rows_kernel, (n_rows,))(
        logits, logits if bias is None else bias.contiguous(), target, upstream, loss, columns, logits.stride(0),
        target.stride(0), upstream.stride(0), call.scale, call.softcap, gain, BIASED=bias is not None,
        CAPPED=call.softcap != 0.0, GRADIENT=gradient, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with every choice of its constants, for ahead-of-time compilation."""
    flags = ("BIASED", "CAPPED", "GRADIENT")
    types = {"loss_ptr": "*fp32", "upstream_ptr": "*fp32", **dict.fromkeys(("scale", "softcap", "gain"), "fp32")}
    for config, target in itertools.product(CONFIGS, ("*row", "*fp32")):
        for chosen in itertools.product((False, True), repeat=len(flags)):
            constants = dict(zip(flags, chosen, strict=True))
            yield (
                rows_kernel,
                {"target_ptr": target, **types, **constants, "BLOCK": config.block, "num_warps": config.warps},
            )
