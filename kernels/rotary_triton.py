"""Triton kernel of rotary: tiles of [ROWS, BLOCK_H] pairs, queries and keys in one launch.

Rows are addressed as layout.rows describes, the angles' too: they have the rows of x, at strides of 0 where they are
shared by heads.  y is dense, row r at r * D.  half is the number of pairs; elements from 2 * half on are copied.
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
from fastft.kernels.core.tiles import Config, config_for, load_tile, row_start, store_at
from fastft.kernels.rotary import LONGEST_HEAD

CONFIGS = (  # 8 pairs a thread, so that loads are 16 bytes wide
    Config(32, rows=64, warps=4),
    Config(64, rows=32, warps=4),
    Config(128, rows=8, warps=2, programs=8),
    Config(256, rows=8, warps=4),
    Config(LONGEST_HEAD, rows=2, warps=4),
)


@triton.jit
def load_pairs(ptr, start, half, rows, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load the first and the second elements of each row's pairs, [ROWS, BLOCK_H] each; 0 outside."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_H)
        tile = load_tile(ptr, start, d, rows[:, None] & (d < 2 * half)[None, :])
        a, b = tl.split(tl.reshape(tile, [ROWS, BLOCK_H, 2]))
    else:
        i = tl.arange(0, BLOCK_H)
        mask = rows[:, None] & (i < half)[None, :]
        a, b = load_tile(ptr, start, i, mask), load_tile(ptr, start, half + i, mask)
    return a, b


@triton.jit
def store_pairs(ptr, start, half, rows, a, b, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Store the first and the second elements of each row's pairs, [ROWS, BLOCK_H] each."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_H)
        tile = tl.reshape(tl.join(a, b), [ROWS, 2 * BLOCK_H])
        store_at(ptr, start, d, tile, rows[:, None] & (d < 2 * half)[None, :])
    else:
        i = tl.arange(0, BLOCK_H)
        mask = rows[:, None] & (i < half)[None, :]
        store_at(ptr, start, i, a, mask)
        store_at(ptr, start, half + i, b, mask)


@triton.jit
def load_angles(
    ptr, start, half, rows,
    INTERLEAVED: tl.constexpr, PER_PAIR: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Load cos or sin for the first and for the second elements of the pairs."""
    if PER_PAIR:
        i = tl.arange(0, BLOCK_H)
        a = load_tile(ptr, start, i, rows[:, None] & (i < half)[None, :])
        b = a
    else:
        a, b = load_pairs(ptr, start, half, rows, INTERLEAVED, ROWS, BLOCK_H)
    return a, b


@triton.jit
def rotated(a, b, cos_a, cos_b, sin_a, sin_b, BACK: tl.constexpr):
    """Rotate the pairs (a, b), or rotate them back."""
    if BACK:
        first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    return first, second


@triton.jit
def starts(row, n1, n2, strides):
    """Compute where rows begin, by three strides."""
    return row_start(row, n1, n2, strides[0], strides[1], strides[2])


@triton.jit
def rotated_by_angles(
    a, b, operand, row, half,
    BACK: tl.constexpr, INTERLEAVED: tl.constexpr, PER_PAIR: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate the pairs a and b of these rows by the angles of an operand from rows_of."""
    _, _, cos_ptr, sin_ptr, n_rows, n1, n2, _, cos_strides, sin_strides = operand
    rows = row < n_rows
    cos_start, sin_start = starts(row, n1, n2, cos_strides), starts(row, n1, n2, sin_strides)
    cos_a, cos_b = load_angles(cos_ptr, cos_start, half, rows, INTERLEAVED, PER_PAIR, ROWS, BLOCK_H)
    sin_a, sin_b = load_angles(sin_ptr, sin_start, half, rows, INTERLEAVED, PER_PAIR, ROWS, BLOCK_H)
    return rotated(a, b, cos_a, cos_b, sin_a, sin_b, BACK)


@triton.jit
def rotate_rows(
    operand, tile, D, half,
    BACK: tl.constexpr, FROM_PAIRS: tl.constexpr, TO_PAIRS: tl.constexpr, PER_PAIR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rotate the rows of one tile and copy the elements that are not rotated."""
    y_ptr, x_ptr, _, _, n_rows, n1, n2, x_strides, _, _ = operand
    row = tile * ROWS + tl.arange(0, ROWS)
    rows = row < n_rows
    start, y_start = starts(row, n1, n2, x_strides), tl.cast(row, tl.int64) * D
    a, b = load_pairs(x_ptr, start, half, rows, FROM_PAIRS, ROWS, BLOCK_H)
    a, b = rotated_by_angles(a, b, operand, row, half, BACK, FROM_PAIRS or TO_PAIRS, PER_PAIR, ROWS, BLOCK_H)
    store_pairs(y_ptr, y_start, half, rows, a, b, TO_PAIRS, ROWS, BLOCK_H)
    if BLOCK_P > 0:
        d = 2 * half + tl.arange(0, BLOCK_P)
        mask = rows[:, None] & (d < D)[None, :]
        store_at(y_ptr, y_start, d, load_tile(x_ptr, start, d, mask), mask)


@triton.jit
def rotary_kernel(
    q, k, D, half, q_tiles,
    BACK: tl.constexpr, FROM_PAIRS: tl.constexpr, TO_PAIRS: tl.constexpr, PER_PAIR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rotate the rows of q in the first q_tiles programs, of k in the others; q and k are what rows_of returns.

    FROM_PAIRS, TO_PAIRS: whether the pairs are interleaved in what is read and in what is written.
    """
    tile = tl.program_id(0)
    if tile < q_tiles:
        rotate_rows(q, tile, D, half, BACK, FROM_PAIRS, TO_PAIRS, PER_PAIR, ROWS, BLOCK_H, BLOCK_P)
    else:
        rotate_rows(k, tile - q_tiles, D, half, BACK, FROM_PAIRS, TO_PAIRS, PER_PAIR, ROWS, BLOCK_H, BLOCK_P)


def blocks(D: int, half: int) -> dict[str, int]:
    """Return the sizes of the tiles for the pairs and for what is passed through."""
    passed = D - 2 * half
    return {
        "BLOCK_H": triton.next_power_of_2(half),
        "BLOCK_P": triton.next_power_of_2(passed) if passed else 0,
    }


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    for config in CONFIGS:
        meta = {"ROWS": config.rows, "num_warps": config.warps}
        for source, target in ((False, False), (True, True), (True, False), (False, True)):
            for half in (config.block_d // 2, config.block_d // 4):
                back = half < config.block_d // 2 if source == target else target
                yield rotary_kernel, {
                    "q": SIGNATURE, "k": SIGNATURE, "BACK": back,
                    "FROM_PAIRS": source, "TO_PAIRS": target, "PER_PAIR": source or target,
                    **meta, **blocks(config.block_d, half),
                }  # fmt: skip


_STRIDES = ("i32",) * 3
SIGNATURE = ("*row", "*row", "*row", "*row", "i32", "i32", "i32", _STRIDES, _STRIDES, _STRIDES)  # of rows_of


def rows_of(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *more: Tensor) -> tuple[Any, ...]:
    """Return what the kernel needs to know about one tensor, then each of more with its strides."""
    angles = [angle if layout.has_unit_rows(angle) else angle.contiguous() for angle in (cos, sin)]
    angles = [angle.expand(*x.shape[:-1], angle.shape[-1]) for angle in angles]
    n1, n2, (x, cos, sin, *others), strides = layout.rows(y, x, *angles, *more)
    operand = (y, x, cos, sin, y.numel() // y.shape[-1], n1, n2, *strides[:3])
    return operand, *zip(others, strides[3:], strict=True)


def launch(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool,
    deinterleaved: bool, back: bool,
) -> None:  # fmt: skip
    """Rotate one input, or two by the same angles, into outputs."""
    D, half = outputs[0].shape[-1], cos.shape[-1] // (1 if per_pair else 2)
    config = config_for(CONFIGS, D)
    operands = [rows_of(y, x, cos, sin)[0] for y, x in zip(outputs, inputs, strict=True)]
    q_tiles, *k_tiles = (cdiv(operand[4], config.rows) for operand in operands)
    on_grid(rotary_kernel, (q_tiles + sum(k_tiles),))(
        operands[0], operands[-1], D, half, q_tiles,
        BACK=back, FROM_PAIRS=interleaved and not (back and deinterleaved),
        TO_PAIRS=interleaved and (back or not deinterleaved), PER_PAIR=per_pair,
        ROWS=config.rows, num_warps=config.warps, **blocks(D, half),
    )  # fmt: skip


def forward(
    outputs: Sequence[Tensor], x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool,
    deinterleaved: bool, contiguous: bool,
) -> None:  # fmt: skip
    """Rotate x into outputs."""
    launch(outputs, (x,), cos, sin, interleaved, per_pair, deinterleaved, back=False)


def backward(
    outputs: Sequence[Tensor], dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool,
    deinterleaved: bool,
) -> None:  # fmt: skip
    """Rotate dy back into outputs."""
    launch(outputs, (dy,), cos, sin, interleaved, per_pair, deinterleaved, back=True)


def forward_qk(
    outputs: Sequence[Tensor], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool,
    deinterleaved: bool, contiguous: bool,
) -> None:  # fmt: skip
    """Rotate q and k into outputs."""
    launch(outputs, (q, k), cos, sin, interleaved, per_pair, deinterleaved, back=False)


def backward_qk(
    outputs: Sequence[Tensor], dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool,
    deinterleaved: bool,
) -> None:  # fmt: skip
    """Rotate dq and dk back into outputs."""
    launch(outputs, (dq, dk), cos, sin, interleaved, per_pair, deinterleaved, back=True)
