"""Triton kernel of linear_token_statistics: a row of logits a program, read once, and once more for a gradient.

The second read is served by the cache where a row and those of the programs beside it fit there.  Sums are kept by
column of a block and added up once in the end: only the largest logit is asked of a whole block.
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
from fastft.kernels.linear_token_statistics import Arguments

FAR = tl.constexpr(-1e4)  # below the largest logit so far: exp is 0, and an empty sum is not multiplied by infinity


@triton.jit
def rows_kernel(
    logits_ptr, bias_ptr, labels_ptr, upstream_ptr, found_ptr, columns, logits_stride, labels_stride, upstream_stride,
    found_stride, ignore_index, scale: tl.float32, softcap: tl.float32, gain: tl.float32,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the six results of one row and, if GRADIENT, write gain times its gradient over the logits."""
    scale, softcap, gain = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32), tl.cast(gain, tl.float32)
    row = tl.cast(tl.program_id(0), tl.int64)  # rows * columns may exceed 2**31
    logits_ptr += row * logits_stride
    found_ptr += row
    label = tl.load(labels_ptr + row * labels_stride)
    if label == ignore_index:
        for number in tl.static_range(6):
            tl.store(found_ptr + number * found_stride, 0.0)
        if GRADIENT:
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(logits_ptr + column, tl.zeros([BLOCK], logits_ptr.dtype.element_ty), mask=column < columns)
        return
    largest = -3.4e38  # a whole block may be minus infinity
    total, away, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    summed, label_y = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    before = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = shaped(logits_ptr, bias_ptr, column, column < columns, scale, softcap, BIASED, CAPPED)  # [BLOCK]
        summed += tl.where(column < columns, y, 0.0)
        label_y = tl.where(column == label, y, label_y)  # not loaded by itself: that may be rounded in another way
        before = tl.maximum(before, tl.where(column < label, y, -float("inf")))
        y = tl.where(column < columns, y, -float("inf"))
        larger = tl.maximum(largest, tl.max(y))
        fallen = tl.maximum(largest - larger, FAR)
        shrunk, share = tl.exp(fallen), tl.exp(y - larger)
        away = (away - fallen * total) * shrunk  # of exp(y - larger) (larger - y)
        away -= tl.where(share != 0.0, share * (y - larger), 0.0)
        total = total * shrunk + share
        squares = squares * (shrunk * shrunk) + share * share
        largest = larger
    all_of = tl.sum(total)
    log_total, target = tl.log(all_of), tl.sum(label_y)
    entropy = log_total + tl.sum(away) / all_of  # near 0 not the difference of two large numbers
    tl.store(found_ptr, (target - largest) - log_total)
    tl.store(found_ptr + found_stride, entropy)
    tl.store(found_ptr + 2 * found_stride, largest + log_total)
    tl.store(found_ptr + 3 * found_stride, tl.sum(summed) / columns)
    tl.store(found_ptr + 4 * found_stride, tl.log(tl.sum(squares)) - 2.0 * log_total)
    first = (target >= largest) & (tl.max(before) < target)
    tl.store(found_ptr + 5 * found_stride, tl.where(first, 1.0, 0.0))
    if GRADIENT:
        upstream_ptr += row
        of_label = tl.load(upstream_ptr)
        of_entropy, of_lse = tl.load(upstream_ptr + upstream_stride), tl.load(upstream_ptr + 2 * upstream_stride)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            y = shaped(logits_ptr, bias_ptr, column, column < columns, scale, softcap, BIASED, CAPPED)
            log_p = y - largest - log_total
            p = tl.exp(log_p)
            dy = p * (of_lse - of_label - of_entropy * tl.where(p != 0.0, log_p + entropy, 0.0))
            dy += tl.where(column == label, of_label, 0.0)
            if CAPPED:
                dy *= 1.0 - (y / softcap) * (y / softcap)
            dz = tl.cast(dy * scale * gain, logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + column, dz, mask=column < columns)


def rows(
    logits: Tensor, labels: Tensor, upstream: Tensor, found: Tensor, call: Arguments, gain: float, gradient: bool
) -> None:
    """Launch rows_kernel; logits [rows, V], upstream [3, rows] and found [6, rows] have rows of unit stride."""
    n_rows, columns = logits.shape
    bias = call.bias
    config = next(candidate for candidate in CONFIGS if columns <= candidate.longest)
    on_grid(rows_kernel, (n_rows,))(
        logits, logits if bias is None else bias.contiguous(), labels, upstream, found, columns, logits.stride(0),
        labels.stride(0), upstream.stride(0), found.stride(0), call.ignore_index, call.scale, call.softcap, gain,
        BIASED=bias is not None, CAPPED=call.softcap != 0.0, GRADIENT=gradient, BLOCK=config.block,
        num_warps=config.warps,
    )  # fmt: skip


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with every choice of its constants, for ahead-of-time compilation."""
    flags = ("BIASED", "CAPPED", "GRADIENT")
    types = {"labels_ptr": "*i64", "found_ptr": "*fp32", "upstream_ptr": "*fp32", "ignore_index": "i32"}
    types |= dict.fromkeys(("scale", "softcap", "gain"), "fp32")
    for config in CONFIGS:
        for chosen in itertools.product((False, True), repeat=len(flags)):
            constants = dict(zip(flags, chosen, strict=True))
            yield rows_kernel, {**types, **constants, "BLOCK": config.block, "num_warps": config.warps}
