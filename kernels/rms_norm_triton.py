"""Triton kernels of rms_norm: rows of x [N, D] in tiles of [ROWS, BLOCK_D], float32 inside.

Rows are addressed as layout.rows describes; y and dx are dense, row r at r * D.
"""
# mypy: allow-untyped-defs

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels import layout


@dataclass(frozen=True)
class Config:
    """A launch for rows of at most block_d elements; programs is per multiprocessor, for backward_weight_kernel."""

    block_d: int
    rows: int
    warps: int
    programs: int


CONFIGS = (  # 16 to 32 elements a thread, so that loads are 16 bytes wide
    Config(64, rows=32, warps=4, programs=8),
    Config(128, rows=16, warps=4, programs=8),
    Config(256, rows=8, warps=4, programs=8),
    Config(1024, rows=2, warps=4, programs=6),
    Config(4096, rows=1, warps=8, programs=3),
    Config(16384, rows=1, warps=16, programs=1),
)


@triton.jit
def row_start(row, n1, n2, s0, s1, s2):
    """Where rows [ROWS] begin, in elements; int64, as a tensor may have more than 2**31."""
    outer = row // n2
    start = tl.cast(outer // n1, tl.int64) * s0 + tl.cast(outer % n1, tl.int64) * s1
    return start + tl.cast(row % n2, tl.int64) * s2


@triton.jit
def load_tile(ptr, start, d, mask):
    return tl.cast(tl.load(ptr + start[:, None] + d[None, :], mask=mask, other=0.0), tl.float32)  # [ROWS, BLOCK_D]


@triton.jit
def store_tile(ptr, row, d, D, tile, mask):
    """To a dense tensor."""
    start = tl.cast(row, tl.int64) * D
    tl.store(ptr + start[:, None] + d[None, :], tl.cast(tile, ptr.dtype.element_ty), mask=mask)


@triton.jit
def input_gradient(dy, unit, scale, rstd, D):
    """dx: the gradient of unit = x * rstd, projected off unit and scaled by rstd."""
    dunit = dy * scale[None, :]
    return (dunit - unit * (tl.sum(dunit * unit, 1) / D)[:, None]) * rstd[:, None]


@triton.jit
def forward_kernel(
    y_ptr, rstd_ptr, x_ptr, weight_ptr, n_rows, D, n1, n2,
    x_s0, x_s1, x_s2, rstd_s0, rstd_s1, rstd_s2,
    eps: tl.float32, offset: tl.float32,
    ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (row < n_rows)[:, None] & (d < D)[None, :]
    x = load_tile(x_ptr, row_start(row, n1, n2, x_s0, x_s1, x_s2), d, mask)
    weight = tl.cast(tl.load(weight_ptr + d, mask=d < D, other=0.0), tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)  # [ROWS]
    unit = x * rstd[:, None]
    if ROUND_FIRST:
        unit = tl.cast(tl.cast(unit, x_ptr.dtype.element_ty), tl.float32)
    store_tile(y_ptr, row, d, D, unit * (offset + weight)[None, :], mask)
    tl.store(rstd_ptr + row_start(row, n1, n2, rstd_s0, rstd_s1, rstd_s2), rstd, mask=row < n_rows)


@triton.jit
def backward_kernel(
    dx_ptr, dy_ptr, x_ptr, weight_ptr, rstd_ptr, n_rows, D, n1, n2,
    dy_s0, dy_s1, dy_s2, x_s0, x_s1, x_s2, rstd_s0, rstd_s1, rstd_s2,
    offset: tl.float32,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (row < n_rows)[:, None] & (d < D)[None, :]
    dy = load_tile(dy_ptr, row_start(row, n1, n2, dy_s0, dy_s1, dy_s2), d, mask)
    x = load_tile(x_ptr, row_start(row, n1, n2, x_s0, x_s1, x_s2), d, mask)
    weight = tl.cast(tl.load(weight_ptr + d, mask=d < D, other=0.0), tl.float32)
    rstd = tl.load(rstd_ptr + row_start(row, n1, n2, rstd_s0, rstd_s1, rstd_s2), mask=row < n_rows, other=0.0)
    store_tile(dx_ptr, row, d, D, input_gradient(dy, x * rstd[:, None], offset + weight, rstd, D), mask)


@triton.jit
def backward_weight_kernel(
    dx_ptr, partial_ptr, dy_ptr, x_ptr, weight_ptr, rstd_ptr, n_rows, D, n1, n2,
    dy_s0, dy_s1, dy_s2, x_s0, x_s1, x_s2, rstd_s0, rstd_s1, rstd_s2,
    offset: tl.float32,
    ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    scale = offset + tl.cast(tl.load(weight_ptr + d, mask=d < D, other=0.0), tl.float32)
    dweight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & (d < D)[None, :]
        dy = load_tile(dy_ptr, row_start(row, n1, n2, dy_s0, dy_s1, dy_s2), d, mask)
        x = load_tile(x_ptr, row_start(row, n1, n2, x_s0, x_s1, x_s2), d, mask)
        rstd = tl.load(rstd_ptr + row_start(row, n1, n2, rstd_s0, rstd_s1, rstd_s2), mask=row < n_rows, other=0.0)
        unit = x * rstd[:, None]
        store_tile(dx_ptr, row, d, D, input_gradient(dy, unit, scale, rstd, D), mask)
        if ROUND_FIRST:
            unit = tl.cast(tl.cast(unit, x_ptr.dtype.element_ty), tl.float32)
        dweight += dy * unit
    partial = partial_ptr + tl.cast(tl.program_id(0), tl.int64) * D + d
    tl.store(partial, tl.sum(dweight, 0), mask=d < D)


def config_for(row_length: int) -> tuple[Config, dict[str, Any]]:
    """The first configuration that holds row_length elements, and the launch's meta-parameters."""
    config = next(config for config in CONFIGS if row_length <= config.block_d)
    block_d = max(16, triton.next_power_of_2(row_length))
    return config, {"ROWS": config.rows, "BLOCK_D": block_d, "num_warps": config.warps, "enable_fp_fusion": True}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many there are; two stand for the interpreter's, so that a program meets several tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def forward(
    outputs: tuple[Tensor, Tensor], x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> None:
    y, rstd = outputs
    n_rows, D = rstd.numel(), y.shape[-1]
    config, meta = config_for(D)
    n1, n2, (x, rstd), (x_strides, rstd_strides) = layout.rows(y, x, rstd)
    forward_kernel[(triton.cdiv(n_rows, config.rows),)](
        y, rstd, x, weight.contiguous(), n_rows, D, n1, n2, *x_strides, *rstd_strides, eps, offset,
        ROUND_FIRST=round_first, **meta,
    )  # fmt: skip


def backward(
    outputs: tuple[Tensor], dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, round_first: bool
) -> None:
    (dx,) = outputs
    n_rows, D = rstd.numel(), dx.shape[-1]
    config, meta = config_for(D)
    n1, n2, (dy, x, rstd), strides = layout.rows(dx, dy, x, rstd)
    backward_kernel[(triton.cdiv(n_rows, config.rows),)](
        dx, dy, x, weight.contiguous(), rstd, n_rows, D, n1, n2, *strides[0], *strides[1], *strides[2], offset, **meta
    )


def backward_weight(
    outputs: tuple[Tensor, Tensor], dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float,
    round_first: bool,
) -> None:  # fmt: skip
    dx, dweight = outputs
    n_rows, D = rstd.numel(), dx.shape[-1]
    config, meta = config_for(D)
    n_programs = min(triton.cdiv(n_rows, config.rows), multiprocessors(dx.device) * config.programs)
    partial = torch.empty(n_programs, D, dtype=torch.float32, device=dx.device)
    n1, n2, (dy, x, rstd), strides = layout.rows(dx, dy, x, rstd)
    backward_weight_kernel[(n_programs,)](
        dx, partial, dy, x, weight.contiguous(), rstd, n_rows, D, n1, n2, *strides[0], *strides[1], *strides[2],
        offset, ROUND_FIRST=round_first, **meta,
    )  # fmt: skip
    dweight.copy_(partial.sum(0))
