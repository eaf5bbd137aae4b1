"""Shared parts of Triton kernels over rows: tiles of [ROWS, BLOCK_D], float32 inside, at addresses from layout.rows."""
# mypy: allow-untyped-defs

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastft.kernels.core.dispatch import MAX_ROW, MAX_ROW_WITH_SUMS

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Config:
    """A launch for rows of at most block_d elements; programs: per multiprocessor, where a program takes many tiles."""

    block_d: int
    rows: int
    warps: int
    programs: int = 4

    def meta(self, row_length: int) -> dict[str, int]:
        """Return the launch's meta-parameters for rows of this length."""
        return {"ROWS": self.rows, "BLOCK_D": padded(row_length), "num_warps": self.warps}


CONFIGS = (  # of whole rows; 8 to 32 elements a thread, so that loads are 16 bytes wide
    Config(64, rows=16, warps=4, programs=8),
    Config(128, rows=16, warps=4, programs=8),
    Config(256, rows=8, warps=4, programs=8),
    Config(1024, rows=2, warps=4, programs=6),
    Config(4096, rows=1, warps=8, programs=2),
    Config(MAX_ROW_WITH_SUMS, rows=1, warps=16, programs=1),
    Config(MAX_ROW, rows=1, warps=16),
)


def config_for(configs: Sequence[Config], row_length: int) -> Config:
    """Return the first configuration that holds row_length elements."""
    return next(config for config in configs if row_length <= config.block_d)


def padded(length: int) -> int:
    """Return the smallest length of a tile's axis that holds length elements: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(length))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Count the device's multiprocessors; 2 for the interpreter, so that a program meets several tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def row_start(row, n1, n2, s0, s1, s2):
    """Compute where rows [ROWS] begin, in elements; int64, as a tensor may have more than 2**31."""
    outer = row // n2
    start = tl.cast(outer // n1, tl.int64) * s0 + tl.cast(outer % n1, tl.int64) * s1
    return start + tl.cast(row % n2, tl.int64) * s2


@triton.jit
def load_tile(ptr, start, d, mask):
    """Load a tile [ROWS, BLOCK_D] as float32, 0 outside the mask."""
    return tl.cast(tl.load(ptr + start[:, None] + d[None, :], mask=mask, other=0.0), tl.float32)  # [ROWS, BLOCK_D]


@triton.jit
def load_vector(ptr, d, mask):
    """Load a vector [BLOCK_D] as float32, 0 outside the mask."""
    return tl.cast(tl.load(ptr + d, mask=mask, other=0.0), tl.float32)  # [BLOCK_D]


@triton.jit
def store_at(ptr, start, d, tile, mask):
    """Store a tile [ROWS, BLOCK_D] whose rows begin at start, in ptr's dtype."""
    tl.store(ptr + start[:, None] + d[None, :], tl.cast(tile, ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(ptr, row, d, D, tile, mask):
    """Store a tile to a dense tensor, row r at r * D."""
    store_at(ptr, tl.cast(row, tl.int64) * D, d, tile, mask)


@triton.jit
def rounded(tile, ptr):
    """Round to the dtype of ptr, as storing there does, and return float32."""
    return tl.cast(tl.cast(tile, ptr.dtype.element_ty), tl.float32)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """Compute tanh by exp2; EXACT: without cancellation, by a polynomial where x is small."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    result = tl.where(x < 0.0, -far, far)
    if EXACT:
        square = x * x
        series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * 62.0 / 2835.0)
        series = x * (1.0 + square * (-1.0 / 3.0 + square * series))
        result = tl.where(tl.abs(x) < 0.15, series, result)
    return result
