"""Triton kernels of norm_rotary: tiles of [ROWS, BLOCK_H] pairs and what is not rotated, q and k in one launch.

Rows, angles and sizes are as in rotary_triton.
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
from fastft.kernels.core.tiles import config_for, load_tile, multiprocessors, rounded, store_at
from fastft.kernels.rotary_triton import (
    CONFIGS,
    SIGNATURE,
    blocks,
    load_pairs,
    rotated_by_angles,
    rows_of,
    starts,
    store_pairs,
)


@triton.jit
def scaled(x, rstd, weight, offset, x_ptr, ROUND_FIRST: tl.constexpr):
    """Return x * rstd * (offset + weight); ROUND_FIRST: x * rstd is rounded to x's dtype."""
    unit = x * rstd[:, None]
    if ROUND_FIRST:
        unit = rounded(unit, x_ptr)
    return unit * (offset + weight)


@triton.jit
def forward_rows(
    operand, more, tile, D, half, eps, offset,
    ROUND_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, PER_PAIR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate the rows of one tile of q or k."""
    y_ptr, x_ptr, _, _, n_rows, n1, n2, x_strides, _, _ = operand
    weight_ptr, rstd_ptr, rstd_strides = more
    row = tile * ROWS + tl.arange(0, ROWS)
    rows, always, origin = row < n_rows, tl.full([1], 1, tl.int1), tl.full([1], 0, tl.int64)
    start, y_start = starts(row, n1, n2, x_strides), tl.cast(row, tl.int64) * D
    a, b = load_pairs(x_ptr, start, half, rows, INTERLEAVED, ROWS, BLOCK_H)
    squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
    if BLOCK_P > 0:
        d = 2 * half + tl.arange(0, BLOCK_P)
        mask = rows[:, None] & (d < D)[None, :]
        p = load_tile(x_ptr, start, d, mask)
        squares += tl.sum(p * p, 1)
    rstd = tl.rsqrt(squares / D + eps)  # [ROWS]
    tl.store(rstd_ptr + starts(row, n1, n2, rstd_strides), rstd, mask=rows)
    weight_a, weight_b = load_pairs(weight_ptr, origin, half, always, INTERLEAVED, 1, BLOCK_H)  # [1, BLOCK_H]
    a = scaled(a, rstd, weight_a, offset, x_ptr, ROUND_FIRST)
    b = scaled(b, rstd, weight_b, offset, x_ptr, ROUND_FIRST)
    a, b = rotated_by_angles(a, b, operand, row, half, False, INTERLEAVED, PER_PAIR, ROWS, BLOCK_H)
    store_pairs(y_ptr, y_start, half, rows, a, b, INTERLEAVED, ROWS, BLOCK_H)
    if BLOCK_P > 0:
        weight = load_tile(weight_ptr, origin, d, (d < D)[None, :])
        store_at(y_ptr, y_start, d, scaled(p, rstd, weight, offset, x_ptr, ROUND_FIRST), mask)


@triton.jit
def forward_kernel(
    q, k, q_more, k_more, D, half, q_tiles, eps: tl.float32, offset: tl.float32,
    ROUND_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, PER_PAIR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Run forward_rows: the first q_tiles programs take the rows of q, the others those of k."""
    tile = tl.program_id(0)
    if tile < q_tiles:
        forward_rows(q, q_more, tile, D, half, eps, offset, ROUND_FIRST, INTERLEAVED, PER_PAIR, ROWS, BLOCK_H, BLOCK_P)
    else:
        forward_rows(
            k, k_more, tile - q_tiles, D, half, eps, offset,
            ROUND_FIRST, INTERLEAVED, PER_PAIR, ROWS, BLOCK_H, BLOCK_P,
        )  # fmt: skip


@triton.jit
def backward_rows(
    operand, more, program, n_programs, D, half, offset,
    WEIGHT: tl.constexpr, ROUND_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, PER_PAIR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compute dx of every n_programs-th tile, and the partial sum of dweight over them."""
    dx_ptr, dy_ptr, _, _, n_rows, n1, n2, dy_strides, _, _ = operand
    x_ptr, weight_ptr, rstd_ptr, partial_ptr, x_strides, rstd_strides = more
    always, origin = tl.full([1], 1, tl.int1), tl.full([1], 0, tl.int64)
    d = 2 * half + tl.arange(0, BLOCK_P if BLOCK_P > 0 else 1)
    weight_a, weight_b = load_pairs(weight_ptr, origin, half, always, INTERLEAVED, 1, BLOCK_H)  # [1, BLOCK_H]
    weight_p = load_tile(weight_ptr, origin, d, (d < D)[None, :])
    sum_a, sum_b = tl.zeros([ROWS, BLOCK_H], tl.float32), tl.zeros([ROWS, BLOCK_H], tl.float32)
    sum_p = tl.zeros([ROWS, d.shape[0]], tl.float32)
    for first in range(program * ROWS, n_rows, n_programs * ROWS):
        row = first + tl.arange(0, ROWS)
        rows = row < n_rows
        start, dx_start = starts(row, n1, n2, x_strides), tl.cast(row, tl.int64) * D
        dy_start = starts(row, n1, n2, dy_strides)
        a, b = load_pairs(dy_ptr, dy_start, half, rows, INTERLEAVED, ROWS, BLOCK_H)
        # The gradient of what was rotated.
        a, b = rotated_by_angles(a, b, operand, row, half, True, INTERLEAVED, PER_PAIR, ROWS, BLOCK_H)
        rstd = tl.load(rstd_ptr + starts(row, n1, n2, rstd_strides), mask=rows, other=0.0)[:, None]
        unit_a, unit_b = load_pairs(x_ptr, start, half, rows, INTERLEAVED, ROWS, BLOCK_H)
        unit_a, unit_b = unit_a * rstd, unit_b * rstd
        dunit_a, dunit_b = a * (offset + weight_a), b * (offset + weight_b)
        projection = tl.sum(dunit_a * unit_a, 1) + tl.sum(dunit_b * unit_b, 1)
        mask = rows[:, None] & (d < D)[None, :]
        if BLOCK_P > 0:
            p = load_tile(dy_ptr, dy_start, d, mask)
            unit_p = load_tile(x_ptr, start, d, mask) * rstd
            dunit_p = p * (offset + weight_p)
            projection += tl.sum(dunit_p * unit_p, 1)
        projection = (projection / D)[:, None]
        dx_a, dx_b = (dunit_a - unit_a * projection) * rstd, (dunit_b - unit_b * projection) * rstd
        store_pairs(dx_ptr, dx_start, half, rows, dx_a, dx_b, INTERLEAVED, ROWS, BLOCK_H)
        if BLOCK_P > 0:
            store_at(dx_ptr, dx_start, d, (dunit_p - unit_p * projection) * rstd, mask)
        if WEIGHT:
            sum_a += a * (rounded(unit_a, x_ptr) if ROUND_FIRST else unit_a)
            sum_b += b * (rounded(unit_b, x_ptr) if ROUND_FIRST else unit_b)
            if BLOCK_P > 0:
                sum_p += p * (rounded(unit_p, x_ptr) if ROUND_FIRST else unit_p)
    if WEIGHT:
        partial = origin + tl.cast(program, tl.int64) * D
        a, b = tl.sum(sum_a, 0)[None, :], tl.sum(sum_b, 0)[None, :]
        store_pairs(partial_ptr, partial, half, always, a, b, INTERLEAVED, 1, BLOCK_H)
        if BLOCK_P > 0:
            store_at(partial_ptr, partial, d, tl.sum(sum_p, 0)[None, :], (d < D)[None, :])


@triton.jit
def backward_kernel(
    q, k, q_more, k_more, D, half, q_programs, k_programs, offset: tl.float32,
    WEIGHT: tl.constexpr, ROUND_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, PER_PAIR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Run backward_rows: the first q_programs programs take the rows of q, the others those of k."""
    program = tl.program_id(0)
    if program < q_programs:
        backward_rows(
            q, q_more, program, q_programs, D, half, offset,
            WEIGHT, ROUND_FIRST, INTERLEAVED, PER_PAIR, ROWS, BLOCK_H, BLOCK_P,
        )  # fmt: skip
    else:
        backward_rows(
            k, k_more, program - q_programs, k_programs, D, half, offset,
            WEIGHT, ROUND_FIRST, INTERLEAVED, PER_PAIR, ROWS, BLOCK_H, BLOCK_P,
        )  # fmt: skip


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    strides = ("i32",) * 3
    forward_more, backward_more = ("*row", "*fp32", strides), ("*row", "*row", "*fp32", "*fp32", strides, strides)
    for config in CONFIGS:
        for interleaved in (False, True):
            half = config.block_d // (4 if interleaved else 2)
            meta = {
                "q": SIGNATURE, "k": SIGNATURE, "ROUND_FIRST": interleaved, "INTERLEAVED": interleaved,
                "PER_PAIR": False, "ROWS": config.rows, "num_warps": config.warps, **blocks(config.block_d, half),
            }  # fmt: skip
            yield forward_kernel, {"q_more": forward_more, "k_more": forward_more, **meta}
            for weight in (False, True):
                yield backward_kernel, {"q_more": backward_more, "k_more": backward_more, "WEIGHT": weight, **meta}


def forward(
    outputs: Sequence[Tensor], q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, offset: float, round_first: bool, interleaved: bool, per_pair: bool, contiguous: bool,
) -> None:  # fmt: skip
    """Compute q', k', q_rstd and k_rstd into outputs."""
    new_q, new_k, q_rstd, k_rstd = outputs
    D, half = q.shape[-1], cos.shape[-1] // (1 if per_pair else 2)
    config = config_for(CONFIGS, D)
    given_q, rstd_of_q = rows_of(new_q, q, cos, sin, q_rstd)
    given_k, rstd_of_k = rows_of(new_k, k, cos, sin, k_rstd)
    q_tiles, k_tiles = (cdiv(rstd.numel(), config.rows) for rstd in (q_rstd, k_rstd))
    on_grid(forward_kernel, (q_tiles + k_tiles,))(
        given_q, given_k, (q_weight.contiguous(), *rstd_of_q), (k_weight.contiguous(), *rstd_of_k), D, half, q_tiles,
        eps, offset, ROUND_FIRST=round_first, INTERLEAVED=interleaved, PER_PAIR=per_pair, ROWS=config.rows,
        num_warps=config.warps, **blocks(D, half),
    )  # fmt: skip


def backward(
    outputs: Sequence[Tensor], dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor,
    q_rstd: Tensor, k_rstd: Tensor, cos: Tensor, sin: Tensor, offset: float, round_first: bool, interleaved: bool,
    per_pair: bool,
) -> None:  # fmt: skip
    """Compute dq and dk; and dq_weight and dk_weight if there are outputs for them, from float32 sums over programs."""
    new_q, new_k, *weight_gradients = outputs
    D, half = q.shape[-1], cos.shape[-1] // (1 if per_pair else 2)
    config, trained = config_for(CONFIGS, D), bool(weight_gradients)
    programs = [cdiv(row_rstd.numel(), config.rows) for row_rstd in (q_rstd, k_rstd)]
    if trained:
        programs = [min(count, multiprocessors(q.device) * config.programs) for count in programs]
    partials = [torch.empty(count if trained else 0, D, dtype=torch.float32, device=q.device) for count in programs]
    operands, more = [], []
    for new, grad, x, weight, rstd, partial in zip(
        (new_q, new_k), (dq, dk), (q, k), (q_weight, k_weight), (q_rstd, k_rstd), partials, strict=True
    ):
        rows, (x, x_strides), (rstd, rstd_strides) = rows_of(new, grad, cos, sin, x, rstd)
        operands.append(rows)
        more.append((x, weight.contiguous(), rstd, partial, x_strides, rstd_strides))
    on_grid(backward_kernel, (sum(programs),))(
        *operands, *more, D, half, *programs, offset, WEIGHT=trained, ROUND_FIRST=round_first, INTERLEAVED=interleaved,
        PER_PAIR=per_pair, ROWS=config.rows, num_warps=config.warps, **blocks(D, half),
    )  # fmt: skip
    for gradient, partial in zip(weight_gradients, partials, strict=False):
        gradient.copy_(partial.sum(0))


backward_weight = backward
