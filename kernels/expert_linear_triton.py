"""Triton kernels of expert_linear: products of rows sorted by expert, and sums over an expert's rows.

A program finds the expert of its tile by itself, in the experts' ends, so nothing waits for the host, and a number of
rows compiles nothing.  Rows behind the last expert's are of none: they are zero.
"""
# mypy: allow-untyped-defs

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.compat import triton_launch
from fastft.compat.triton_launch import ALIGNMENT
from fastft.kernels.core.arith import at_least_one, cdiv
from fastft.kernels.core.dispatch import has_shared_operands, has_tensor_memory_accelerator
from fastft.kernels.core.launch_recorder import is_aligned, on_grid
from fastft.kernels.core.tiles import multiprocessors, padded
from fastft.kernels.lora_linear_triton import add_product

BESIDE = 32  # the most ranks of a step: more do not fit beside a whole tile of a result in shared memory


@dataclass(frozen=True)
class Tiles:
    """The tiles of a product: rows and columns of its result, and the step between; stages of the pipeline."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int

    @property
    def meta(self) -> dict[str, int]:
        """The launch's meta-parameters."""
        return {
            "BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.step, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


LARGE = Tiles(128, 256, 64, 8, 3)  # where both operands are read from shared memory
PLAIN = Tiles(128, 128, 32, 8, 3)
WIDE = Tiles(64, 64, 16, 4, 2)  # float32
NARROW = Tiles(128, 64, 64, 4, 3)  # few columns
SUMS = Tiles(128, 128, 64, 4, 3)  # of rows, where both operands are read from shared memory
OUTER = Tiles(64, 128, 64, 4, 2)  # with few columns on the left


@triton.jit
def scaled(tile, scale):
    """Scale a tile in float32, and round it."""
    return tl.cast(tl.cast(tile, tl.float32) * scale, tile.dtype)


@triton.jit
def row_ends(ends_ptr, rows, EXPERTS, BLOCK_E: tl.constexpr):
    """Load where the rows of each expert begin and end; expert number EXPERTS has the rows of none."""
    expert = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + expert, mask=expert < EXPERTS, other=0)
    end = tl.where(expert < EXPERTS, end, rows)
    begin = tl.load(ends_ptr + expert - 1, mask=(expert > 0) & (expert <= EXPERTS), other=0)
    return tl.where(expert <= EXPERTS, begin, rows), end


@triton.jit
def read_rows(order_ptr, i, mask, top_k, GATHER: tl.constexpr):
    """Return the rows of the operand that rows i read: tokens, if GATHER."""
    source = tl.load(order_ptr + i, mask=mask, other=0) // top_k if GATHER else i
    return tl.cast(source, tl.int64)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    out_ptr, x_ptr, weight_ptr, s_ptr, factor_ptr, bias_ptr, order_ptr, ends_ptr, rows, EXPERTS, K, N, R, top_k,
    scale: tl.float32, out_stride, out_stride_n, x_stride, weight_stride_e, weight_stride_k, weight_stride_n, s_stride,
    factor_stride_e, factor_stride_r, factor_stride_n, bias_stride,
    TILED_OUT: tl.constexpr, TILED_X: tl.constexpr, TILED_WEIGHT: tl.constexpr, TRANSPOSED: tl.constexpr,
    GATHER: tl.constexpr, ADAPTED: tl.constexpr, BIAS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute tiles of scale x_i W_e + s_i F_e + bias_e.

    Without ADAPTED scale is for the product with W, otherwise for that with F.  TILED: what comes and goes in tiles by
    the tensor memory accelerator, rows side by side and aligned.  A tile that is read may reach into rows that are not
    stored; one that reaches into another expert's is stored by its addresses.
    """
    begin, end = row_ends(ends_ptr, rows, EXPERTS, BLOCK_E)
    last = tl.cumsum(tl.cdiv(end - begin, BLOCK_M), 0)  # tile behind each expert's
    across = tl.cdiv(N, BLOCK_N)
    if TILED_OUT:
        out_tiles = tl.make_tensor_descriptor(out_ptr, [rows, N], [out_stride, 1], [BLOCK_M, BLOCK_N])
    if TILED_X:
        x_tiles = tl.make_tensor_descriptor(x_ptr, [rows, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
    if TILED_WEIGHT and TRANSPOSED:
        weights = tl.make_tensor_descriptor(
            weight_ptr, [EXPERTS, N, K], [weight_stride_e, weight_stride_n, 1], [1, BLOCK_N, BLOCK_K]
        )
    elif TILED_WEIGHT:
        weights = tl.make_tensor_descriptor(
            weight_ptr, [EXPERTS, K, N], [weight_stride_e, weight_stride_k, 1], [1, BLOCK_K, BLOCK_N]
        )
    for tile in range(tl.program_id(0), tl.max(last, 0) * across, tl.num_programs(0)):
        before = last <= tile // across
        expert = tl.sum(tl.cast(before, tl.int32), 0)
        first = tl.max(tl.where(before, end, 0), 0) + (tile // across - tl.max(tl.where(before, last, 0), 0)) * BLOCK_M
        own_end = tl.min(tl.where(before, rows, end), 0)
        i = first + tl.arange(0, BLOCK_M)
        i_mask = i < own_end
        n_first = tile % across * BLOCK_N
        n = n_first + tl.arange(0, BLOCK_N)
        n_mask, k = n < N, tl.arange(0, BLOCK_K)
        wide_e = tl.cast(expert, tl.int64)
        x_rows = x_ptr + (read_rows(order_ptr, i, i_mask, top_k, GATHER) * x_stride)
        weight_tile = weight_ptr + wide_e * weight_stride_e + tl.cast(n_first, tl.int64) * weight_stride_n
        across_n = tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R)
        s_rows = s_ptr + (tl.cast(i, tl.int64) * s_stride)[:, None]
        factor_rows = factor_ptr + wide_e * factor_stride_e + (n * factor_stride_n)[None, :]
        if ADAPTED:  # before the loop, which hides how long it takes
            s = tl.load(s_rows + r[None, :], mask=i_mask[:, None] & (r < R)[None, :], other=0.0)
            factor = tl.load(
                factor_rows + (r * factor_stride_r)[:, None],
                mask=(r < tl.where(expert < EXPERTS, R, 0))[:, None] & n_mask[None, :],
                other=0.0,
            )
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, tl.where(expert < EXPERTS, K, 0), BLOCK_K):
            k_mask = k < K - start
            if TILED_X:
                x = x_tiles.load([first, start])
            else:
                x = tl.load(x_rows[:, None] + (start + k)[None, :], mask=i_mask[:, None] & k_mask[None, :], other=0.0)
            if TILED_WEIGHT and TRANSPOSED:
                weight = tl.trans(tl.reshape(weights.load([expert, n_first, start]), [BLOCK_N, BLOCK_K]))
            elif TILED_WEIGHT:
                weight = tl.reshape(weights.load([expert, start, n_first]), [BLOCK_K, BLOCK_N])
            else:
                here = weight_tile + tl.cast(start, tl.int64) * weight_stride_k
                if TRANSPOSED:  # as it lies in memory
                    address = here + (across_n * weight_stride_n)[:, None] + (k * weight_stride_k)[None, :]
                    weight = tl.trans(tl.load(address, mask=n_mask[:, None] & k_mask[None, :], other=0.0))
                else:
                    address = here + (k * weight_stride_k)[:, None] + (across_n * weight_stride_n)[None, :]
                    weight = tl.load(address, mask=k_mask[:, None] & n_mask[None, :], other=0.0)
            total = add_product(x, weight, total)
        if ADAPTED:
            total = add_product(scaled(s, scale), factor, total)
            for start in range(BLOCK_R, tl.where(expert < EXPERTS, R, 0), BLOCK_R):
                r_mask = start + r < R
                s = tl.load(s_rows + (start + r)[None, :], mask=i_mask[:, None] & r_mask[None, :], other=0.0)
                address = factor_rows + ((start + r) * factor_stride_r)[:, None]
                factor = tl.load(address, mask=r_mask[:, None] & n_mask[None, :], other=0.0)
                total = add_product(scaled(s, scale), factor, total)
        else:
            total *= scale
        if BIAS:
            bias = tl.load(bias_ptr + wide_e * bias_stride + n, mask=n < tl.where(expert < EXPERTS, N, 0), other=0.0)
            total += tl.cast(bias, tl.float32)[None, :]
        result = tl.cast(total, out_ptr.dtype.element_ty)
        if TILED_OUT and first + BLOCK_M <= own_end:
            out_tiles.store([first, n_first], result)
        else:
            address = out_ptr + (tl.cast(i, tl.int64) * out_stride)[:, None] + (n * out_stride_n)[None, :]
            tl.store(address, result, mask=i_mask[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["rows"])
def outer_kernel(
    out_ptr, left_ptr, right_ptr, row_weights_ptr, order_ptr, ends_ptr, rows, M, N, top_k, scale: tl.float32,
    out_stride_e, out_stride_m, out_stride_n, left_stride, left_stride_m, right_stride,
    GATHER: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a tile of scale sum_i w_i left_i^T right_i over the rows of an expert."""
    across = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * across
    expert = tl.program_id(0) // tiles  # programs side by side read the same expert's rows
    tile = tl.program_id(0) % tiles
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    m = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        i_mask = i < end
        address = left_ptr + (tl.cast(i, tl.int64) * left_stride)[:, None] + (m * left_stride_m)[None, :]
        left = tl.load(address, mask=i_mask[:, None] & (m < M)[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
        if WEIGHTED:
            slot = tl.load(order_ptr + i, mask=i_mask, other=0)
            weights = tl.cast(tl.load(row_weights_ptr + slot, mask=i_mask, other=0.0), tl.float32)
            left = scaled(left, weights[:, None])
        source = read_rows(order_ptr, i, i_mask, top_k, GATHER)
        address = right_ptr + (source * right_stride)[:, None] + n[None, :]
        right = tl.load(address, mask=i_mask[:, None] & (n < N)[None, :], other=0.0)
        total = add_product(tl.trans(left), right, total)
    address = out_ptr + tl.cast(expert, tl.int64) * out_stride_e + (tl.cast(m, tl.int64) * out_stride_m)[:, None]
    address = address + (tl.cast(n, tl.int64) * out_stride_n)[None, :]
    tl.store(address, tl.cast(total * scale, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    index = {"order_ptr": "*i32", "ends_ptr": "*i32", "out_stride_n": 1}
    flags = list(itertools.product((False, True), repeat=3))
    everywhere = (8, 9, 10, 12)
    by_descriptor = ((PLAIN, (12,)), (LARGE, (9, 10)), (NARROW, (9, 10, 12)))
    by_address = ((PLAIN, (8,)), (NARROW, (8,)), (WIDE, everywhere))
    for tiles, majors in (*by_descriptor, *by_address):
        tiled = (tiles, majors) in by_descriptor
        for gather, adapted, bias in flags:
            dense = ("weight_stride_k", "factor_stride_r") if gather else ("weight_stride_n", "factor_stride_n")
            yield product_kernel, {
                **index, **dict.fromkeys(dense, 1), "TILED_OUT": tiles is LARGE, "TILED_X": tiled and not gather,
                "TILED_WEIGHT": tiled, "TRANSPOSED": gather, "GATHER": gather, "ADAPTED": adapted,
                "BIAS": bias, "BLOCK_E": 128, "BLOCK_R": BESIDE, **tiles.meta, "majors": majors,
                **({"spilled_bytes": 56} if adapted and tiles is LARGE else {}),  # before the loop, of s and F
            }  # fmt: skip
    narrow = replace(OUTER, rows=16)
    for tiles, majors in ((SUMS, (9, 10)), (PLAIN, (8, 12)), (narrow, everywhere)):
        for gather, weighted in itertools.product((False, True), repeat=2):
            yield outer_kernel, {
                **index, "left_stride_m": 1, "GATHER": gather, "WEIGHTED": weighted,
                **tiles.meta, "majors": majors,
                **({"spilled_bytes": 48} if weighted and tiles is SUMS else {}),  # by some versions; of ranks above 64
            }  # fmt: skip


def tiles_for(x: Tensor, columns: int) -> Tiles:
    """Return the tiles of a product with so many columns."""
    if x.dtype == torch.float32:
        return WIDE
    if columns <= NARROW.columns:
        return NARROW
    return LARGE if has_shared_operands(x.device) else PLAIN


def is_tiled(operand: Tensor, along: int) -> bool:
    """Return whether a descriptor can load an operand in tiles: 16-bit numbers side by side along an axis, aligned."""
    inner = along % operand.dim()
    others = [stride for axis, stride in enumerate(operand.stride()) if axis != inner]
    aligned = all(stride > 0 and stride * operand.element_size() % ALIGNMENT == 0 for stride in others)
    fits = operand.stride(inner) == 1 and aligned and operand.element_size() == 2 and is_aligned(operand)
    return fits and has_tensor_memory_accelerator(operand.device)


def outer_tiles(left: Tensor, columns: int) -> Tiles:
    """Return the tiles of a sum over rows, whose result has as many rows as left has columns."""
    if left.dtype == torch.float32:
        return replace(WIDE, rows=min(padded(columns), WIDE.rows))
    if columns > OUTER.rows:
        return SUMS if has_shared_operands(left.device) else PLAIN
    return replace(OUTER, rows=padded(columns))


def product(
    out: Tensor, x: Tensor, matrices: Tensor, order: Tensor, ends: Tensor, top_k: int, gathers: bool, *,
    scale: float = 1.0, adapter: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Write out [S, N] = scale x W_e + bias_e of rows that x has, or, if it gathers, of their tokens.

    matrices: W [E, K, N].  adapter: s [S, R] and F [E, R, N]: then out = x W_e + scale s F_e + bias_e.
    """
    experts, K, N = matrices.shape
    block_r = 16 if adapter is None else min(padded(adapter[1].shape[1]), BESIDE)
    s, factor = adapter if adapter is not None else (x, matrices)
    tiles, rows = tiles_for(x, N), out.shape[0]
    most = (cdiv(rows, tiles.rows) + experts + 1) * cdiv(N, tiles.columns)
    programs = multiprocessors(x.device) * (1 if tiles is LARGE else 2)
    transposed = matrices.stride(2) != 1
    tiled_x = tiles is not WIDE and not gathers and is_tiled(x, -1)
    tiled_weight = tiles is not WIDE and is_tiled(matrices, 1 if transposed else 2)
    tiled_out = is_tiled(out, -1) and (tiles is LARGE or out.device.type == "cpu")  # others' do not fit beside operands
    with triton_launch.scratch_memory() if tiled_x or tiled_weight or tiled_out else nullcontext():
        on_grid(product_kernel, (at_least_one(most, programs),))(
            out, x, matrices, s, factor, x if bias is None else bias, order, ends, rows, experts, K, N,
            factor.shape[1], top_k, scale, out.stride(0), out.stride(1), x.stride(0), *matrices.stride(), s.stride(0),
            *factor.stride(), 0 if bias is None else bias.stride(0),
            TILED_OUT=tiled_out, TILED_X=tiled_x, TILED_WEIGHT=tiled_weight, TRANSPOSED=transposed,
            GATHER=gathers, ADAPTED=adapter is not None, BIAS=bias is not None,
            BLOCK_E=padded(experts + 1), BLOCK_R=block_r, **tiles.meta,
        )  # fmt: skip


def outer(
    out: Tensor, left: Tensor, right: Tensor, order: Tensor, ends: Tensor, top_k: int, *, scale: float = 1.0,
    row_weights: Tensor | None = None, gathers: bool = False,
) -> None:  # fmt: skip
    """Write out [E, M, N] = scale sum_i w_i left_i^T right_i over the rows of each expert.

    left [S, M]; right [S, N], or, if it gathers, of tokens; row_weights: of slots.
    """
    experts, M, N = out.shape
    tiles = outer_tiles(left, M)
    on_grid(outer_kernel, (experts * cdiv(M, tiles.rows) * cdiv(N, tiles.columns),))(
        out, left, right, left if row_weights is None else row_weights, order, ends, order.shape[0], M, N, top_k, scale,
        *out.stride(), *left.stride(), right.stride(0), GATHER=gathers, WEIGHTED=row_weights is not None, **tiles.meta,
    )  # fmt: skip
