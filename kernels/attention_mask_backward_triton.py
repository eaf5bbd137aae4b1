"""Triton kernel of the gradient of attention's mask: one program a tile of it, over what the mask is broadcast to.

The gradients of scores are computed again, as in attention's backward (Dao, FlashAttention-2, arXiv:2307.08691), and
summed over the batches and heads that share the tile.  Nothing is added by atomics, so two runs give the same bits.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels import attention_tiles
from fastft.kernels.attention_backward_triton import QUERY_TILES, load_lse
from fastft.kernels.attention_engines import restricting
from fastft.kernels.attention_tiles import (
    ADDED_MASK,
    head_sizes,
    kept,
    key_range,
    load_mask,
    load_rows,
    masked,
    operands,
    row_hash,
    shaped,
    tiles_for,
    unit,
)
from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.launch_recorder import on_grid


@triton.jit
def mask_kernel(
    dmask_ptr, q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr,
    start_ptr, end_ptr, query_ids_ptr, key_ids_ptr, mask_ptr, seed_ptr,
    dmask_sb, dmask_sh, dmask_si, q_sb, q_sh, q_si, k_sb, k_sh, k_sj, v_sb, v_sh, v_sj,
    out_sb, out_sh, out_si, dout_sb, dout_sh, dout_si,
    start_sb, end_sb, query_ids_sb, key_ids_sb, mask_sb, mask_sh, mask_si, mask_sj,
    MASK_H, BATCHES, HEADS, H, GROUP, S, T, window,
    scale: tl.float32, softcap: tl.float32, threshold: tl.int64, keep_scale: tl.float32,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, START: tl.constexpr, END: tl.constexpr, IDS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SCAN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the mask's gradient, which BATCHES and HEADS share: each 1, or all of them."""
    columns, rows = tl.cdiv(T, BLOCK_N), tl.cdiv(S, BLOCK_M)
    tile, part = tl.program_id(0) % (rows * columns), tl.program_id(0) // (rows * columns)
    i, j = tile // columns * BLOCK_M + tl.arange(0, BLOCK_M), tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    dmask = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(BATCHES * HEADS):
        b, h = part // MASK_H + number // HEADS, part % MASK_H + number % HEADS
        wide_b, wide_h, g = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(h // GROUP, tl.int64)
        q = load_rows(q_ptr + wide_b * q_sb + wide_h * q_sh, i, d, q_si, S, D, BLOCK_D, False)
        k = load_rows(k_ptr + wide_b * k_sb + g * k_sh, j, d, k_sj, T, D, BLOCK_D, False)
        v = load_rows(v_ptr + wide_b * v_sb + g * v_sh, j, e, v_sj, T, DV, BLOCK_DV, False)
        out = load_rows(out_ptr + wide_b * out_sb + wide_h * out_sh, i, e, out_si, S, DV, BLOCK_DV, False)
        dout = load_rows(dout_ptr + wide_b * dout_sb + wide_h * dout_sh, i, e, dout_si, S, DV, BLOCK_DV, False)
        delta = tl.sum(tl.cast(out, tl.float32) * tl.cast(dout, tl.float32), 1)
        lse = load_lse(lse_ptr + (wide_b * H + wide_h) * S, i, S)
        first, last, alike = key_range(
            i, start_ptr + wide_b * start_sb, end_ptr + wide_b * end_sb, S, T, window, CAUSAL, WINDOW, START, END
        )
        query_ids, key_ids = 0, 0
        if IDS:
            query_ids = tl.load(query_ids_ptr + wide_b * query_ids_sb + i, mask=i < S, other=0)[:, None]
            key_ids = tl.load(key_ids_ptr + wide_b * key_ids_sb + j, mask=j < T, other=0)[None, :]
        mask_at = mask_ptr + wide_b * mask_sb + wide_h * mask_sh
        mask = load_mask(mask_at, i[:, None], j[None, :], mask_si, mask_sj, S, T, MASK)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores, _ = shaped(products, scale, softcap, SOFTCAP, q.dtype == tl.float32)
        scores = masked(
            scores, i[:, None], j[None, :], first[:, None], last[:, None], alike[:, None], query_ids, key_ids, mask, T,
            START, IDS, MASK,
        )  # fmt: skip
        p = tl.exp2(scores - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            hashes = row_hash(seed_ptr, (b * H + h) * S + i)
            dp = tl.where(kept(hashes[:, None], j[None, :], threshold), dp * keep_scale, 0.0)
        dmask += tl.where(alike[:, None], 0.0, p * (dp - delta[:, None]))
    at = dmask_ptr + tl.cast(part // MASK_H, tl.int64) * dmask_sb + tl.cast(part % MASK_H, tl.int64) * dmask_sh
    address = at + tl.cast(i, tl.int64)[:, None] * dmask_si + j[None, :]
    tl.store(address, tl.cast(dmask, dmask_ptr.dtype.element_ty), mask=(i < S)[:, None] & (j < T)[None, :])


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    for constants in attention_tiles.variants(QUERY_TILES, ADDED_MASK):
        yield mask_kernel, constants


def backward(
    outputs: tuple[Tensor], grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    start: Tensor | None, end: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, mask: Tensor,
    seed: Tensor | None, causal: bool, window: int, max_seqlen: int, scale: float, softcap: float, dropout: float,
) -> None:  # fmt: skip
    """Compute the mask's gradient into outputs."""
    (dmask,) = outputs
    B, H, S, D = query.shape
    T = key.shape[2]
    q, k, v, out, dout = map(unit, (query, key, value, out, grad_output))
    *_, vectors, causal, window = restricting(key, value, (start, end, query_ids, key_ids), causal, window, max_seqlen)
    shared = operands(q, k, (*vectors, mask), seed, causal, window, scale, softcap, dropout)
    tiles = tiles_for(QUERY_TILES, query, value, mask)
    mask_B, mask_H = (1, 1, *mask.shape)[-4:-2]
    dmask_sb, dmask_sh = (0, 0, *dmask.stride())[-4:-2]
    on_grid(mask_kernel, (cdiv(S, tiles.rows) * cdiv(T, tiles.columns) * mask_B * mask_H,))(
        dmask, q, k, v, out, dout, lse.contiguous(), *shared.pointers, dmask_sb, dmask_sh, dmask.stride(-2),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *dout.stride()[:3], *shared.strides,
        mask_H, B // mask_B, H // mask_H, H, H // key.shape[1], S, T, *shared.numbers,
        **shared.meta, **head_sizes(D, value.shape[-1]), **tiles.meta,
    )  # fmt: skip
