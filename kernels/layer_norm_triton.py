"""Triton kernels of layer_norm.

Rows are addressed as layout.rows describes; y and dx are dense, row r at r * D.
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
    row_start,
    store_tile,
)


@triton.jit
def input_gradient(dunit, unit, rstd, D):
    """Compute dx: the gradient of unit = (x - mean) * rstd, less its mean, projected off unit, times rstd."""
    projected = (tl.sum(dunit, 1) / D)[:, None] + unit * (tl.sum(dunit * unit, 1) / D)[:, None]
    return (dunit - projected) * rstd[:, None]


@triton.jit
def forward_kernel(
    y_ptr, mean_ptr, rstd_ptr, x_ptr, weight_ptr, bias_ptr, n_rows, D, n1, n2,
    x_s0, x_s1, x_s2, mean_s0, mean_s1, mean_s2, rstd_s0, rstd_s1, rstd_s2,
    eps: tl.float32,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute y, mean and rstd of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (row < n_rows)[:, None] & (d < D)[None, :]
    x = load_tile(x_ptr, row_start(row, n1, n2, x_s0, x_s1, x_s2), d, mask)
    mean = tl.sum(x, 1) / D  # [ROWS]
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= load_vector(weight_ptr, d, d < D)[None, :]
    if HAS_BIAS:
        y += load_vector(bias_ptr, d, d < D)[None, :]
    store_tile(y_ptr, row, d, D, y, mask)
    tl.store(mean_ptr + row_start(row, n1, n2, mean_s0, mean_s1, mean_s2), mean, mask=row < n_rows)
    tl.store(rstd_ptr + row_start(row, n1, n2, rstd_s0, rstd_s1, rstd_s2), rstd, mask=row < n_rows)


@triton.jit
def backward_kernel(
    dx_ptr, dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, n_rows, D, n1, n2,
    dy_s0, dy_s1, dy_s2, x_s0, x_s1, x_s2, mean_s0, mean_s1, mean_s2, rstd_s0, rstd_s1, rstd_s2,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dx of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (row < n_rows)[:, None] & (d < D)[None, :]
    dunit = load_tile(dy_ptr, row_start(row, n1, n2, dy_s0, dy_s1, dy_s2), d, mask)  # 0 outside
    x = load_tile(x_ptr, row_start(row, n1, n2, x_s0, x_s1, x_s2), d, mask)
    mean = tl.load(mean_ptr + row_start(row, n1, n2, mean_s0, mean_s1, mean_s2), mask=row < n_rows, other=0.0)
    rstd = tl.load(rstd_ptr + row_start(row, n1, n2, rstd_s0, rstd_s1, rstd_s2), mask=row < n_rows, other=0.0)
    if HAS_WEIGHT:
        dunit *= load_vector(weight_ptr, d, d < D)[None, :]
    dx = input_gradient(dunit, (x - mean[:, None]) * rstd[:, None], rstd, D)
    store_tile(dx_ptr, row, d, D, dx, mask)


@triton.jit
def backward_weight_kernel(
    dx_ptr, partial_ptr, dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, n_rows, D, n1, n2,
    dy_s0, dy_s1, dy_s2, x_s0, x_s1, x_s2, mean_s0, mean_s1, mean_s2, rstd_s0, rstd_s1, rstd_s2,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dx, and partial [2, programs, D]: sums for dweight, then for dbias."""
    d = tl.arange(0, BLOCK_D)
    dweight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & (d < D)[None, :]
        dy = load_tile(dy_ptr, row_start(row, n1, n2, dy_s0, dy_s1, dy_s2), d, mask)  # 0 outside
        x = load_tile(x_ptr, row_start(row, n1, n2, x_s0, x_s1, x_s2), d, mask)
        mean = tl.load(mean_ptr + row_start(row, n1, n2, mean_s0, mean_s1, mean_s2), mask=row < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + row_start(row, n1, n2, rstd_s0, rstd_s1, rstd_s2), mask=row < n_rows, other=0.0)
        unit = (x - mean[:, None]) * rstd[:, None]
        dweight += dy * unit
        dbias += dy
        if HAS_WEIGHT:
            dy *= load_vector(weight_ptr, d, d < D)[None, :]  # from the cache: registers are needed for the sums
        store_tile(dx_ptr, row, d, D, input_gradient(dy, unit, rstd, D), mask)
    partial = partial_ptr + tl.cast(tl.program_id(0), tl.int64) * D + d
    tl.store(partial, tl.sum(dweight, 0), mask=d < D)
    tl.store(partial + tl.cast(tl.num_programs(0), tl.int64) * D, tl.sum(dbias, 0), mask=d < D)


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    for config in CONFIGS:
        meta = config.meta(config.block_d)
        for weight in (False, True):
            yield backward_kernel, {"HAS_WEIGHT": weight, **meta}
            if config.block_d <= MAX_ROW_WITH_SUMS:
                yield backward_weight_kernel, {"HAS_WEIGHT": weight, **meta}
            for bias in (False, True):
                yield forward_kernel, {"HAS_WEIGHT": weight, "HAS_BIAS": bias, **meta}


def vector(value: Tensor | None, x: Tensor) -> Tensor:
    """Return the parameter with unit stride; x in place of a missing one, which is not read."""
    return x if value is None else value.contiguous()


def forward(
    outputs: tuple[Tensor, Tensor, Tensor], x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    contiguous: bool,
) -> None:  # fmt: skip
    """Compute y, mean and rstd into outputs."""
    y, mean, rstd = outputs
    n_rows, D = rstd.numel(), y.shape[-1]
    config = config_for(CONFIGS, D)
    n1, n2, (x, mean, rstd), strides = layout.rows(y, x, mean, rstd)
    on_grid(forward_kernel, (cdiv(n_rows, config.rows),))(
        y, mean, rstd, x, vector(weight, x), vector(bias, x), n_rows, D, n1, n2, *strides[0], *strides[1], *strides[2],
        eps, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **config.meta(D),
    )  # fmt: skip


def backward(
    outputs: tuple[Tensor], dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, contiguous: bool
) -> None:
    """Compute dx into outputs."""
    (dx,) = outputs
    n_rows, D = rstd.numel(), dx.shape[-1]
    config = config_for(CONFIGS, D)
    n1, n2, (dy, x, mean, rstd), strides = layout.rows(dx, dy, x, mean, rstd)
    on_grid(backward_kernel, (cdiv(n_rows, config.rows),))(
        dx, dy, x, vector(weight, x), mean, rstd, n_rows, D, n1, n2, *strides[0], *strides[1], *strides[2],
        *strides[3], HAS_WEIGHT=weight is not None, **config.meta(D),
    )  # fmt: skip


def backward_weight(
    outputs: tuple[Tensor, Tensor, Tensor], dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    contiguous: bool,
) -> None:  # fmt: skip
    """Compute dx, dweight and dbias into outputs, from float32 sums over programs."""
    dx, *parameters = outputs
    n_rows, D = rstd.numel(), dx.shape[-1]
    config = config_for(CONFIGS, D)
    n_programs = min(cdiv(n_rows, config.rows), multiprocessors(dx.device) * config.programs)
    partial = torch.empty(2, n_programs, D, dtype=torch.float32, device=dx.device)
    n1, n2, (dy, x, mean, rstd), strides = layout.rows(dx, dy, x, mean, rstd)
    on_grid(backward_weight_kernel, (n_programs,))(
        dx, partial, dy, x, vector(weight, x), mean, rstd, n_rows, D, n1, n2, *strides[0], *strides[1], *strides[2],
        *strides[3], HAS_WEIGHT=weight is not None, **config.meta(D),
    )  # fmt: skip
    for gradient, sums in zip(parameters, partial.sum(1), strict=True):
        gradient.copy_(sums)
