"""Triton kernels of glu and glu_packed: one tile [ROWS, BLOCK_D] a program, long rows in several of them.

Rows are addressed as layout.rows describes; y is dense, row r at r * D, and the gradients have strides of their own, as
two halves of one tensor have.
"""
# mypy: allow-untyped-defs

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.core import layout
from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.core.tiles import Config, config_for, load_tile, row_start, store_at, store_tile
from fastft.kernels.glu import ACTIVATIONS, CUBIC, SLOPE

CONFIGS = (  # 16 elements a thread: two loads of 16 bytes for each tensor
    Config(64, rows=32, warps=4),
    Config(128, rows=16, warps=4),
    Config(256, rows=8, warps=4),
    Config(1024, rows=2, warps=4),
    Config(2048, rows=1, warps=4),
)
LONGEST = CONFIGS[-1].block_d  # rows are cut into pieces of this length

LINEAR: tl.constexpr = tl.constexpr(2.0 * SLOPE)
THIRD: tl.constexpr = tl.constexpr(2.0 * SLOPE * CUBIC)
ROOT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
DENSITY: tl.constexpr = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


@triton.jit
def sigmoids(x):
    """Compute sigmoid(x) and sigmoid(-x), neither by a difference; exp cannot overflow."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)


@triton.jit
def activation(x, ACT: tl.constexpr):
    """Compute act(x)."""
    if ACT == "silu":
        act = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        act = x * (0.5 + 0.5 * tl.erf(x * ROOT_HALF))
    elif ACT == "gelu_tanh":
        act = x / (1.0 + tl.exp(-x * (LINEAR + THIRD * x * x)))  # (1 + tanh(u)) / 2 = sigmoid(2 * u)
    else:
        tl.static_assert(ACT == "relu2")
        positive = tl.where(x < 0.0, 0.0, x)  # keeps NaN
        act = positive * positive
    return act


@triton.jit
def activation_and_slope(x, ACT: tl.constexpr):
    """Compute act(x) and its derivative."""
    if ACT == "silu":
        s, rest = sigmoids(x)
        act, slope = x * s, s + x * (s * rest)
    elif ACT == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * ROOT_HALF)
        act, slope = x * cdf, cdf + x * (DENSITY * tl.exp(-0.5 * x * x))
    elif ACT == "gelu_tanh":
        square = tl.minimum(x * x, 100.0)  # s is 0 or 1 from there on, and infinity * 0 is NaN
        s, rest = sigmoids(x * (LINEAR + THIRD * square))
        act, slope = x * s, s + x * (s * rest) * (LINEAR + 3.0 * THIRD * square)
    else:
        tl.static_assert(ACT == "relu2")
        positive = tl.where(x < 0.0, 0.0, x)
        act, slope = positive * positive, 2.0 * positive
    return act, slope


@triton.jit
def tile_of(n_rows, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the rows, columns and mask of this program's tile; the pieces of a row are neighbouring programs."""
    pieces = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // pieces * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % pieces * BLOCK_D + tl.arange(0, BLOCK_D)
    return row, d, (row < n_rows)[:, None] & (d < D)[None, :]


@triton.jit
def forward_kernel(
    y_ptr, gate_ptr, up_ptr, n_rows, D, n1, n2, gate_s0, gate_s1, gate_s2, up_s0, up_s1, up_s2,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute y = act(gate) * up for one tile."""
    row, d, mask = tile_of(n_rows, D, ROWS, BLOCK_D)
    gate = load_tile(gate_ptr, row_start(row, n1, n2, gate_s0, gate_s1, gate_s2), d, mask)
    up = load_tile(up_ptr, row_start(row, n1, n2, up_s0, up_s1, up_s2), d, mask)
    store_tile(y_ptr, row, d, D, activation(gate, ACT) * up, mask)


@triton.jit
def backward_kernel(
    dgate_ptr, dup_ptr, dy_ptr, gate_ptr, up_ptr, n_rows, D, n1, n2,
    dgate_s0, dgate_s1, dgate_s2, dup_s0, dup_s1, dup_s2, dy_s0, dy_s1, dy_s2,
    gate_s0, gate_s1, gate_s2, up_s0, up_s1, up_s2,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dgate and dup for one tile."""
    row, d, mask = tile_of(n_rows, D, ROWS, BLOCK_D)
    dy = load_tile(dy_ptr, row_start(row, n1, n2, dy_s0, dy_s1, dy_s2), d, mask)
    gate = load_tile(gate_ptr, row_start(row, n1, n2, gate_s0, gate_s1, gate_s2), d, mask)
    up = load_tile(up_ptr, row_start(row, n1, n2, up_s0, up_s1, up_s2), d, mask)
    act, slope = activation_and_slope(gate, ACT)
    store_at(dgate_ptr, row_start(row, n1, n2, dgate_s0, dgate_s1, dgate_s2), d, dy * up * slope, mask)
    store_at(dup_ptr, row_start(row, n1, n2, dup_s0, dup_s1, dup_s2), d, dy * act, mask)


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    for config in CONFIGS:
        for name in ACTIVATIONS:
            for kernel in (forward_kernel, backward_kernel):
                yield kernel, {"ACT": name, **config.meta(config.block_d)}


def forward(outputs: tuple[Tensor], gate: Tensor, up: Tensor, activation: str) -> None:
    """Compute y into outputs."""
    (y,) = outputs
    n_rows, D = y.numel() // y.shape[-1], y.shape[-1]
    config = config_for(CONFIGS, min(D, LONGEST))
    n1, n2, (gate, up), strides = layout.rows(y, gate, up)
    on_grid(forward_kernel, (cdiv(n_rows, config.rows) * cdiv(D, LONGEST),))(
        y, gate, up, n_rows, D, n1, n2, *strides[0], *strides[1], ACT=activation, **config.meta(min(D, LONGEST))
    )


def launch_backward(
    dense: Tensor, dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor, activation: str
) -> None:
    """Launch backward_kernel over rows in the memory order of dense, in which dgate and dup need no copy."""
    n_rows, D = gate.numel() // gate.shape[-1], gate.shape[-1]
    config = config_for(CONFIGS, min(D, LONGEST))
    n1, n2, tensors, strides = layout.rows(dense, dgate, dup, dy, gate, up)
    on_grid(backward_kernel, (cdiv(n_rows, config.rows) * cdiv(D, LONGEST),))(
        *tensors, n_rows, D, n1, n2, *strides[0], *strides[1], *strides[2], *strides[3], *strides[4],
        ACT=activation, **config.meta(min(D, LONGEST)),
    )  # fmt: skip


def backward(outputs: tuple[Tensor, Tensor], dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """Compute dgate and dup into outputs."""
    dgate, dup = outputs
    alike = dup.dim() - 1 <= layout.MAX_AXES or dup.stride() == dgate.stride()  # else layout.rows might copy dup
    target = dup if alike else torch.empty_like(dgate, dtype=dup.dtype)
    launch_backward(dgate, dgate, target, dy, gate, up, activation)
    if not alike:
        dup.copy_(target)


def packed_forward(outputs: tuple[Tensor], gate_up: Tensor, activation: str) -> None:
    """Compute y from the halves of gate_up into outputs."""
    gate, up = gate_up.chunk(2, -1)
    forward(outputs, gate, up, activation)


def packed_backward(outputs: tuple[Tensor], dy: Tensor, gate_up: Tensor, activation: str) -> None:
    """Compute the gradient of gate_up into outputs."""
    (dgate_up,) = outputs
    (dgate, dup), (gate, up) = dgate_up.chunk(2, -1), gate_up.chunk(2, -1)
    launch_backward(dgate_up, dgate, dup, dy, gate, up, activation)
