"""Triton kernel of attention's forward: one program a tile of query rows of a head, over the tiles of keys it meets.

Dao, FlashAttention-2, arXiv:2307.08691, algorithm 1.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels import attention_tiles
from fastft.kernels.attention_engines import restricting
from fastft.kernels.attention_tiles import (
    LN2,
    LOG2E,
    Tiles,
    columns,
    head_sizes,
    kept,
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

# By the longer of the heads of keys and values, padded, bytes of an element, and whether there is much shared memory.
TILES = {
    (64, 2, True): Tiles(64, 64, 4, 3), (64, 2, False): Tiles(64, 64, 4, 3),
    (128, 2, True): Tiles(64, 64, 4, 3), (128, 2, False): Tiles(64, 64, 4, 2),
    (256, 2, True): Tiles(128, 64, 8, 2), (256, 2, False): Tiles(64, 32, 8, 2),
    (64, 4, True): Tiles(64, 32, 8, 2), (64, 4, False): Tiles(64, 32, 8, 2),
    (128, 4, True): Tiles(32, 16, 4, 2), (128, 4, False): Tiles(32, 16, 4, 2),
    (256, 4, True): Tiles(32, 16, 8, 2), (256, 4, False): Tiles(16, 16, 4, 1),
}  # fmt: skip


@triton.jit
def forward_tiles(
    acc, top, total, q, k_ptr, v_ptr, low, high, i, first, last, alike, query_ids, key_ids_ptr, mask_ptr,
    mask_si, mask_sj, k_stride, v_stride, S, T, scale, softcap, hashes, threshold, keep_scale,
    MASKED: tl.constexpr, START: tl.constexpr, IDS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add the keys from low to high to acc [BLOCK_M, BLOCK_DV], top and total [BLOCK_M]."""
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for j0 in range(low, high, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, j, d, k_stride, T, D, BLOCK_D, not MASKED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores, _ = shaped(products, scale, softcap, SOFTCAP, q.dtype == tl.float32)
        if MASKED:
            key_ids = tl.load(key_ids_ptr + j, mask=j < T, other=0)[None, :] if IDS else 0
            mask = load_mask(mask_ptr, i[:, None], j[None, :], mask_si, mask_sj, S, T, MASK) if MASK > 0 else 0
            scores = masked(
                scores, i[:, None], j[None, :], first[:, None], last[:, None], alike[:, None], query_ids, key_ids,
                mask, T, START, IDS, MASK,
            )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(hashes[:, None], j[None, :], threshold), p * keep_scale, 0.0)
        v = load_rows(v_ptr, j, e, v_stride, T, DV, BLOCK_DV, not MASKED)
        acc = acc * shrink[:, None]
        acc = tl.dot(tl.cast(p, v.dtype), v, acc, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def forward_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, sinks_ptr,
    start_ptr, end_ptr, query_ids_ptr, key_ids_ptr, mask_ptr, seed_ptr,
    out_sb, out_sh, out_si, q_sb, q_sh, q_si, k_sb, k_sh, k_sj, v_sb, v_sh, v_sj,
    start_sb, end_sb, query_ids_sb, key_ids_sb, mask_sb, mask_sh, mask_si, mask_sj,
    H, GROUP, S, T, window, scale: tl.float32, softcap: tl.float32, threshold: tl.int64, keep_scale: tl.float32,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, START: tl.constexpr, END: tl.constexpr, IDS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SCAN: tl.constexpr, SINKS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Compute out and log-sum-exp of a tile of query rows of one head."""
    tiles = tl.cdiv(S, BLOCK_M)
    tile, head = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles  # the longest of a causal mask first
    b, h = head // H, head % H
    wide_b, wide_h, g = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(h // GROUP, tl.int64)
    i, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr + wide_b * q_sb + wide_h * q_sh, i, d, q_si, S, D, BLOCK_D, False)
    key_ids_ptr, mask_ptr = key_ids_ptr + wide_b * key_ids_sb, mask_ptr + wide_b * mask_sb + wide_h * mask_sh
    first, last, alike, query_ids, low, full_low, full_high, high = columns(
        i, tile * BLOCK_M, start_ptr + wide_b * start_sb, end_ptr + wide_b * end_sb,
        query_ids_ptr + wide_b * query_ids_sb, key_ids_ptr, S, T, window,
        CAUSAL, WINDOW, START, END, IDS, MASK, BLOCK_N, SCAN,
    )  # fmt: skip
    hashes = row_hash(seed_ptr, (b * H + h) * S + i) if DROPOUT else i
    acc, total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    top = total - float("inf")
    if SINKS:
        top, total = total + tl.cast(tl.load(sinks_ptr + h), tl.float32) * LOG2E, total + 1.0
    k_ptr, v_ptr = k_ptr + wide_b * k_sb + g * k_sh, v_ptr + wide_b * v_sb + g * v_sh
    if WINDOW or START or IDS:
        acc, top, total = forward_tiles(
            acc, top, total, q, k_ptr, v_ptr, low, full_low, i, first, last, alike, query_ids, key_ids_ptr,
            mask_ptr, mask_si, mask_sj, k_sj, v_sj, S, T, scale, softcap, hashes, threshold, keep_scale,
            True, START, IDS, MASK, SOFTCAP, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if not MASK > 0:
        acc, top, total = forward_tiles(
            acc, top, total, q, k_ptr, v_ptr, full_low, full_high, i, first, last, alike, query_ids, key_ids_ptr,
            mask_ptr, mask_si, mask_sj, k_sj, v_sj, S, T, scale, softcap, hashes, threshold, keep_scale,
            False, START, IDS, MASK, SOFTCAP, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    acc, top, total = forward_tiles(
        acc, top, total, q, k_ptr, v_ptr, full_high, high, i, first, last, alike, query_ids, key_ids_ptr,
        mask_ptr, mask_si, mask_sj, k_sj, v_sj, S, T, scale, softcap, hashes, threshold, keep_scale,
        True, START, IDS, MASK, SOFTCAP, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    e = tl.arange(0, BLOCK_DV)
    address = out_ptr + wide_b * out_sb + wide_h * out_sh + tl.cast(i, tl.int64)[:, None] * out_si + e[None, :]
    tl.store(address, tl.cast(out, out_ptr.dtype.element_ty), mask=(i < S)[:, None] & (e < DV)[None, :])
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse_ptr + tl.cast(head, tl.int64) * S + i, lse, mask=i < S)


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    for constants in attention_tiles.variants(TILES):
        yield forward_kernel, {"SINKS": constants["WINDOW"], **constants}


def forward(
    outputs: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, start: Tensor | None,
    end: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, mask: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, causal: bool, window: int, max_seqlen: int, scale: float, softcap: float, dropout: float,
    contiguous: bool, copies: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute out and log-sum-exp into outputs."""
    out, lse = outputs
    (B, H, S, D), DV = query.shape, value.shape[-1]
    key, value, vectors, causal, window = restricting(
        key, value, (start, end, query_ids, key_ids), causal, window, max_seqlen, copies
    )
    q, k, v = unit(query), unit(key), unit(value)
    shared = operands(q, k, (*vectors, mask), seed, causal, window, scale, softcap, dropout)
    tiles = tiles_for(TILES, query, value, mask)
    on_grid(forward_kernel, (cdiv(S, tiles.rows) * B * H,))(
        out, lse, q, k, v, q if sinks is None else sinks, *shared.pointers, *out.stride()[:3], *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *shared.strides, H, H // key.shape[1], S, key.shape[2], *shared.numbers,
        **shared.meta, SINKS=sinks is not None, **head_sizes(D, DV), **tiles.meta,
    )  # fmt: skip
