"""Triton kernel of RMSNorm with a residual stream: total = [inner_norm](x) + residual, y = [norm](total).

Rows are addressed as layout.rows describes; y and total are dense, row r at r * D.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.core import layout
from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.core.tiles import CONFIGS, config_for, load_tile, load_vector, rounded, row_start, store_tile
from fastft.kernels.rms_norm_triton import normalized


@triton.jit
def add_kernel(
    y_ptr, total_ptr, inner_rstd_ptr, rstd_ptr, x_ptr, residual_ptr, inner_weight_ptr, weight_ptr, n_rows, D, n1, n2,
    x_s0, x_s1, x_s2, residual_s0, residual_s1, residual_s2, rstd_s0, rstd_s1, rstd_s2,
    inner_eps: tl.float32, eps: tl.float32, offset: tl.float32,
    INNER: tl.constexpr, OUTER: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute total = [inner_norm](x) + residual and, if OUTER, y = norm(total) for ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    rows = row < n_rows
    mask = rows[:, None] & (d < D)[None, :]
    total = load_tile(x_ptr, row_start(row, n1, n2, x_s0, x_s1, x_s2), d, mask)
    rstd_start = row_start(row, n1, n2, rstd_s0, rstd_s1, rstd_s2)
    if INNER:
        inner_weight = load_vector(inner_weight_ptr, d, d < D)
        total, inner_rstd = normalized(total, inner_weight, D, inner_eps, offset, x_ptr, ROUND_FIRST)
        tl.store(inner_rstd_ptr + rstd_start, inner_rstd, mask=rows)
    total += load_tile(residual_ptr, row_start(row, n1, n2, residual_s0, residual_s1, residual_s2), d, mask)
    store_tile(total_ptr, row, d, D, total, mask)
    if OUTER:
        weight = load_vector(weight_ptr, d, d < D)
        y, rstd = normalized(rounded(total, total_ptr), weight, D, eps, offset, total_ptr, ROUND_FIRST)
        store_tile(y_ptr, row, d, D, y, mask)
        tl.store(rstd_ptr + rstd_start, rstd, mask=rows)


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    for config in CONFIGS:
        for inner, outer in ((False, True), (True, False), (True, True)):
            for round_first in (False, True):
                meta = {"INNER": inner, "OUTER": outer, "ROUND_FIRST": round_first}
                yield add_kernel, {**meta, **config.meta(config.block_d)}


def launch(
    y: Tensor | None, total: Tensor, inner_rstd: Tensor | None, rstd: Tensor | None, x: Tensor, residual: Tensor,
    inner_weight: Tensor | None, weight: Tensor | None, inner_eps: float, eps: float, offset: float,
    round_first: bool,
) -> None:  # fmt: skip
    """Launch add_kernel; results that are None are not computed.  inner_rstd and rstd have the same strides."""
    D = total.shape[-1]
    n_rows, config = total.numel() // D, config_for(CONFIGS, D)
    any_rstd = rstd if inner_rstd is None else inner_rstd
    assert any_rstd is not None
    n1, n2, (x, residual, _), strides = layout.rows(total, x, residual, any_rstd)
    vectors = [x if vector is None else vector.contiguous() for vector in (inner_weight, weight)]
    results = [total if result is None else result for result in (y, total, inner_rstd, rstd)]
    on_grid(add_kernel, (cdiv(n_rows, config.rows),))(
        *results, x, residual, *vectors, n_rows, D, n1, n2, *strides[0], *strides[1], *strides[2],
        inner_eps, eps, offset, INNER=inner_rstd is not None, OUTER=rstd is not None, ROUND_FIRST=round_first,
        **config.meta(D),
    )  # fmt: skip


def add_rms_norm(
    outputs: Sequence[Tensor], x: Tensor, residual: Tensor, weight: Tensor, eps: float, *spelling: Any
) -> None:
    """Compute y, total and rstd into outputs."""
    y, total, rstd = outputs
    launch(y, total, None, rstd, x, residual, None, weight, 0.0, eps, *spelling)


def rms_norm_add(
    outputs: Sequence[Tensor], x: Tensor, residual: Tensor, weight: Tensor, eps: float, *spelling: Any
) -> None:
    """Compute total and rstd into outputs."""
    total, rstd = outputs
    launch(None, total, rstd, None, x, residual, weight, None, eps, 0.0, *spelling)


def rms_norm_add_rms_norm(
    outputs: Sequence[Tensor], x: Tensor, residual: Tensor, inner_weight: Tensor, weight: Tensor, *spelling: Any
) -> None:
    """Compute y, total, inner_rstd and rstd into outputs."""
    y, total, inner_rstd, rstd = outputs
    launch(y, total, inner_rstd, rstd, x, residual, inner_weight, weight, *spelling)
