"""Triton kernels of rms_norm and of the ops that add a residual stream to it.

Rows are addressed as layout.rows describes; y, total and dx are dense, row r at r * D.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.core import layout
from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.dispatch import MAX_ROW_WITH_SUMS
from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.core.tiles import (
    CONFIGS,
    config_for,
    load_tile,
    load_vector,
    multiprocessors,
    rounded,
    row_start,
    store_tile,
)


@triton.jit
def load_weight(ptr, d, D, HAS_WEIGHT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the weight [BLOCK_D]; 0 where there is none."""
    if HAS_WEIGHT:
        weight = load_vector(ptr, d, d < D)
    else:
        weight = tl.zeros([BLOCK_D], tl.float32)
    return weight


@triton.jit
def normalized(x, weight, D, eps, offset, x_ptr, ROUND_FIRST: tl.constexpr):
    """Compute y and rstd of rows x [ROWS, BLOCK_D]; x_ptr has the dtype to round to first."""
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)  # [ROWS]
    unit = x * rstd[:, None]
    if ROUND_FIRST:
        unit = rounded(unit, x_ptr)
    return unit * (offset + weight)[None, :], rstd


@triton.jit
def input_gradient(dy, unit, scale, rstd, D):
    """Compute dx: the gradient of unit = x * rstd, projected off unit, times rstd."""
    dunit = dy * scale[None, :]
    return (dunit - unit * (tl.sum(dunit * unit, 1) / D)[:, None]) * rstd[:, None]


@triton.jit
def forward_kernel(
    y_ptr, rstd_ptr, x_ptr, weight_ptr, n_rows, D, n1, n2,
    x_s0, x_s1, x_s2, rstd_s0, rstd_s1, rstd_s2,
    eps: tl.float32, offset: tl.float32,
    HAS_WEIGHT: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute y and rstd of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (row < n_rows)[:, None] & (d < D)[None, :]
    x = load_tile(x_ptr, row_start(row, n1, n2, x_s0, x_s1, x_s2), d, mask)
    weight = load_weight(weight_ptr, d, D, HAS_WEIGHT, BLOCK_D)
    y, rstd = normalized(x, weight, D, eps, offset, x_ptr, ROUND_FIRST)
    store_tile(y_ptr, row, d, D, y, mask)
    tl.store(rstd_ptr + row_start(row, n1, n2, rstd_s0, rstd_s1, rstd_s2), rstd, mask=row < n_rows)


@triton.jit
def backward_kernel(
    dx_ptr, dy_ptr, x_ptr, addend_ptr, weight_ptr, rstd_ptr, n_rows, D, n1, n2,
    dy_s0, dy_s1, dy_s2, x_s0, x_s1, x_s2, addend_s0, addend_s1, addend_s2, rstd_s0, rstd_s1, rstd_s2,
    offset: tl.float32,
    HAS_WEIGHT: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dx of ROWS rows, plus addend if ADD."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (row < n_rows)[:, None] & (d < D)[None, :]
    dy = load_tile(dy_ptr, row_start(row, n1, n2, dy_s0, dy_s1, dy_s2), d, mask)
    x = load_tile(x_ptr, row_start(row, n1, n2, x_s0, x_s1, x_s2), d, mask)
    rstd = tl.load(rstd_ptr + row_start(row, n1, n2, rstd_s0, rstd_s1, rstd_s2), mask=row < n_rows, other=0.0)
    scale = offset + load_weight(weight_ptr, d, D, HAS_WEIGHT, BLOCK_D)
    dx = input_gradient(dy, x * rstd[:, None], scale, rstd, D)
    if ADD:
        dx += load_tile(addend_ptr, row_start(row, n1, n2, addend_s0, addend_s1, addend_s2), d, mask)
    store_tile(dx_ptr, row, d, D, dx, mask)


@triton.jit
def backward_weight_kernel(
    dx_ptr, partial_ptr, dy_ptr, x_ptr, addend_ptr, weight_ptr, rstd_ptr, n_rows, D, n1, n2,
    dy_s0, dy_s1, dy_s2, x_s0, x_s1, x_s2, addend_s0, addend_s1, addend_s2, rstd_s0, rstd_s1, rstd_s2,
    offset: tl.float32,
    ADD: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dx, plus addend if ADD, and partial [programs, D]: sums for dweight."""
    d = tl.arange(0, BLOCK_D)
    scale = offset + load_vector(weight_ptr, d, d < D)
    dweight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & (d < D)[None, :]
        dy = load_tile(dy_ptr, row_start(row, n1, n2, dy_s0, dy_s1, dy_s2), d, mask)
        x = load_tile(x_ptr, row_start(row, n1, n2, x_s0, x_s1, x_s2), d, mask)
        rstd = tl.load(rstd_ptr + row_start(row, n1, n2, rstd_s0, rstd_s1, rstd_s2), mask=row < n_rows, other=0.0)
        unit = x * rstd[:, None]
        dx = input_gradient(dy, unit, scale, rstd, D)
        if ADD:
            dx += load_tile(addend_ptr, row_start(row, n1, n2, addend_s0, addend_s1, addend_s2), d, mask)
        store_tile(dx_ptr, row, d, D, dx, mask)
        if ROUND_FIRST:
            unit = rounded(unit, x_ptr)
        dweight += dy * unit
    partial = partial_ptr + tl.cast(tl.program_id(0), tl.int64) * D + d
    tl.store(partial, tl.sum(dweight, 0), mask=d < D)


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    for config in CONFIGS:
        meta = config.meta(config.block_d)
        for add in (False, True):
            for has_weight in (False, True):
                yield backward_kernel, {"HAS_WEIGHT": has_weight, "ADD": add, **meta}
            for round_first in (False, True) if config.block_d <= MAX_ROW_WITH_SUMS else ():
                yield backward_weight_kernel, {"ADD": add, "ROUND_FIRST": round_first, **meta}
        for has_weight, round_first in ((False, False), (True, False), (True, True)):
            yield forward_kernel, {"HAS_WEIGHT": has_weight, "ROUND_FIRST": round_first, **meta}


def vector(weight: Tensor | None, x: Tensor) -> Tensor:
    """Return the weight with unit stride; x in the place of a missing one, which is not read."""
    return x if weight is None else weight.contiguous()


def forward(
    outputs: tuple[Tensor, Tensor], x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool
) -> None:
    """Compute y and rstd into outputs."""
    y, rstd = outputs
    n_rows, D = rstd.numel(), y.shape[-1]
    config = config_for(CONFIGS, D)
    n1, n2, (x, rstd), (x_strides, rstd_strides) = layout.rows(y, x, rstd)
    on_grid(forward_kernel, (cdiv(n_rows, config.rows),))(
        y, rstd, x, vector(weight, x), n_rows, D, n1, n2, *x_strides, *rstd_strides, eps, offset,
        HAS_WEIGHT=weight is not None, ROUND_FIRST=round_first, **config.meta(D),
    )  # fmt: skip


def backward(
    outputs: tuple[Tensor], dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float,
    round_first: bool, addend: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute dx, plus addend if there is one, into outputs."""
    (dx,) = outputs
    n_rows, D = rstd.numel(), dx.shape[-1]
    config = config_for(CONFIGS, D)
    n1, n2, (dy, x, other, rstd), strides = layout.rows(dx, dy, x, dy if addend is None else addend, rstd)
    on_grid(backward_kernel, (cdiv(n_rows, config.rows),))(
        dx, dy, x, other, vector(weight, x), rstd, n_rows, D, n1, n2, *strides[0], *strides[1], *strides[2],
        *strides[3], offset, HAS_WEIGHT=weight is not None, ADD=addend is not None, **config.meta(D),
    )  # fmt: skip


def backward_weight(
    outputs: tuple[Tensor, Tensor], dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float,
    round_first: bool, addend: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute dx and dweight into outputs, dweight from float32 sums over programs."""
    dx, dweight = outputs
    n_rows, D = rstd.numel(), dx.shape[-1]
    config = config_for(CONFIGS, D)
    n_programs = min(cdiv(n_rows, config.rows), multiprocessors(dx.device) * config.programs)
    partial = torch.empty(n_programs, D, dtype=torch.float32, device=dx.device)
    n1, n2, (dy, x, other, rstd), strides = layout.rows(dx, dy, x, dy if addend is None else addend, rstd)
    on_grid(backward_weight_kernel, (n_programs,))(
        dx, partial, dy, x, other, weight.contiguous(), rstd, n_rows, D, n1, n2, *strides[0], *strides[1],
        *strides[2], *strides[3], offset, ADD=addend is not None, ROUND_FIRST=round_first, **config.meta(D),
    )  # fmt: skip
    dweight.copy_(partial.sum(0))
