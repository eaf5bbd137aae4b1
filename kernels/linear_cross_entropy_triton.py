"""Triton kernel of linear_cross_entropy: one row of logits a program, read twice, the gradient written over it.

The second read is served by the cache where a row and those of the programs beside it fit there.
"""
# mypy: allow-untyped-defs

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.core.tiles import tanh
from fastft.kernels.linear_cross_entropy import Arguments


@dataclass(frozen=True)
class Config:
    """A launch configuration for rows of at most ``longest`` logits."""

    longest: int
    block: int
    warps: int


CONFIGS = (Config(1024, block=1024, warps=4), Config(2**31, block=4096, warps=8))


@triton.jit
def shaped(logits_ptr, bias_ptr, column, mask, scale, softcap, BIASED: tl.constexpr, CAPPED: tl.constexpr):
    """Load a block of products and return what the softmax is of: with its bias, scaled and capped."""
    z = tl.cast(tl.load(logits_ptr + column, mask=mask, other=0.0), tl.float32)
    if BIASED:
        z += tl.cast(tl.load(bias_ptr + column, mask=mask, other=0.0), tl.float32)
    y = z * scale
    if CAPPED:
        y = softcap * tanh(y / softcap, True)
    return y


@triton.jit
def rows_kernel(
    logits_ptr, bias_ptr, labels_ptr, upstream_ptr, loss_ptr, columns, logits_stride, labels_stride, upstream_stride,
    ignore_index, smoothing: tl.float32, z_loss: tl.float32, scale: tl.float32, softcap: tl.float32, gain: tl.float32,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the loss of one row and, if GRADIENT, write gain times its gradient over the logits."""
    smoothing, z_loss, gain = tl.cast(smoothing, tl.float32), tl.cast(z_loss, tl.float32), tl.cast(gain, tl.float32)
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    row = tl.cast(tl.program_id(0), tl.int64)  # rows * columns may exceed 2**31
    logits_ptr += row * logits_stride
    label = tl.load(labels_ptr + row * labels_stride)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(logits_ptr + column, tl.zeros([BLOCK], logits_ptr.dtype.element_ty), mask=column < columns)
        return
    largest, total, summed = -3.4e38, 0.0, 0.0  # a whole block may be minus infinity
    label_y = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = shaped(logits_ptr, bias_ptr, column, column < columns, scale, softcap, BIASED, CAPPED)  # [BLOCK]
        if SMOOTHED:
            summed += tl.sum(tl.where(column < columns, y, 0.0))
        label_y = tl.where(column == label, y, label_y)  # not loaded by itself: that may be rounded in another way
        y = tl.where(column < columns, y, -float("inf"))
        larger = tl.maximum(largest, tl.max(y))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(y - larger))
        largest = larger
    log_total = tl.log(total)
    lse = largest + log_total
    target = tl.sum(label_y)
    loss = log_total + (largest - target)  # near 0 not the difference of two large numbers
    if SMOOTHED:
        loss += smoothing * (target - summed / columns)
    tl.store(loss_ptr + row, loss + z_loss * lse * lse)
    if GRADIENT:
        upstream = gain * tl.cast(tl.load(upstream_ptr + row * upstream_stride), tl.float32)
        everywhere, here = smoothing / columns, 1.0 - smoothing
        pull = (1.0 + 2.0 * z_loss * lse) / total
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            y = shaped(logits_ptr, bias_ptr, column, column < columns, scale, softcap, BIASED, CAPPED)
            dy = tl.exp(y - largest) * pull - everywhere - tl.where(column == label, here, 0.0)
            if CAPPED:
                dy *= 1.0 - (y / softcap) * (y / softcap)
            dz = tl.cast(dy * scale * upstream, logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + column, dz, mask=column < columns)


def rows(
    logits: Tensor, labels: Tensor, upstream: Tensor, loss: Tensor, call: Arguments, gain: float, gradient: bool
) -> None:
    """Launch rows_kernel; logits [rows, V] have rows of unit stride."""
    n_rows, columns = logits.shape
    bias = call.bias
    config = next(candidate for candidate in CONFIGS if columns <= candidate.longest)
    on_grid(rows_kernel, (n_rows,))(
        logits, logits if bias is None else bias.contiguous(), labels, upstream, loss, columns, logits.stride(0),
        labels.stride(0), upstream.stride(0), call.ignore_index, call.label_smoothing, call.z_loss, call.scale,
        call.softcap, gain, BIASED=bias is not None, CAPPED=call.softcap != 0.0, SMOOTHED=call.label_smoothing != 0.0,
        GRADIENT=gradient, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with every choice of its constants, for ahead-of-time compilation."""
    flags = ("BIASED", "CAPPED", "SMOOTHED", "GRADIENT")
    types = {"labels_ptr": "*i64", "loss_ptr": "*fp32", "upstream_ptr": "*fp32", "ignore_index": "i32"}
    types |= dict.fromkeys(("smoothing", "z_loss", "scale", "softcap", "gain"), "fp32")
    for config in CONFIGS:
        for chosen in itertools.product((False, True), repeat=len(flags)):
            constants = dict(zip(flags, chosen, strict=True))
            yield rows_kernel, {**types, **constants, "BLOCK": config.block, "num_warps": config.warps}
