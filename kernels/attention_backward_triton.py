"""Triton kernels of attention's backward: one over tiles of queries for dq, one over tiles of keys for dk and dv.

Dao, FlashAttention-2, arXiv:2307.08691, algorithm 2, with a pass of its own for dq: nothing is added by atomics, so two
runs give the same bits.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels import attention_tiles, key_copies
from fastft.kernels.attention_engines import restricting
from fastft.kernels.attention_tiles import (
    LOG2E,
    Tiles,
    columns,
    head_sizes,
    kept,
    key_range,
    load_ids,
    load_mask,
    load_rows,
    masked,
    narrowed,
    operands,
    row_hash,
    shaped,
    tiles_for,
    unit,
)
from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.key_copies_triton import sum_copies

# By the longer of the heads of keys and values, padded, bytes of an element, and whether there is much shared memory.
QUERY_TILES = {
    (64, 2, True): Tiles(64, 64, 4, 3), (64, 2, False): Tiles(64, 64, 4, 2),
    (128, 2, True): Tiles(64, 64, 4, 2), (128, 2, False): Tiles(64, 32, 4, 2),
    (256, 2, True): Tiles(64, 32, 4, 2), (256, 2, False): Tiles(32, 32, 4, 1),
    (64, 4, True): Tiles(32, 32, 8, 2), (64, 4, False): Tiles(32, 32, 8, 2),
    (128, 4, True): Tiles(32, 32, 8, 1), (128, 4, False): Tiles(16, 32, 8, 1),
    (256, 4, True): Tiles(16, 16, 8, 1), (256, 4, False): Tiles(16, 16, 8, 1),
}  # fmt: skip
KEY_TILES = {
    (64, 2, True): Tiles(64, 64, 4, 3), (64, 2, False): Tiles(64, 64, 4, 2),
    (128, 2, True): Tiles(32, 64, 4, 3), (128, 2, False): Tiles(32, 64, 4, 2),
    (256, 2, True): Tiles(64, 64, 8, 1), (256, 2, False): Tiles(32, 32, 4, 1),
    (64, 4, True): Tiles(32, 32, 8, 2), (64, 4, False): Tiles(32, 32, 8, 2),
    (128, 4, True): Tiles(32, 32, 8, 1), (128, 4, False): Tiles(32, 16, 8, 1),
    (256, 4, True): Tiles(16, 16, 8, 1), (256, 4, False): Tiles(16, 16, 8, 1),
}  # fmt: skip


@triton.jit
def load_lse(ptr, i, S):
    """Load the log-sum-exp of rows in units of log 2; 0 where no key counts, as all weights are 0 there."""
    lse = tl.load(ptr + i, mask=i < S, other=0.0) * LOG2E
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def query_tiles(
    dq, q, dout, lse, delta, k_ptr, v_ptr, low, high, i, first, last, alike, query_ids, key_ids_ptr, mask_ptr,
    mask_si, mask_sj, k_stride, v_stride, S, T, scale, softcap, hashes, threshold, keep_scale,
    MASKED: tl.constexpr, START: tl.constexpr, IDS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add the keys from low to high to dq [BLOCK_M, BLOCK_D], which is not scaled."""
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for j0 in range(low, high, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, j, d, k_stride, T, D, BLOCK_D, not MASKED)
        v = load_rows(v_ptr, j, e, v_stride, T, DV, BLOCK_DV, not MASKED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores, slope = shaped(products, scale, softcap, SOFTCAP, q.dtype == tl.float32)
        if MASKED:
            key_ids = tl.load(key_ids_ptr + j, mask=j < T, other=0)[None, :] if IDS else 0
            mask = load_mask(mask_ptr, i[:, None], j[None, :], mask_si, mask_sj, S, T, MASK) if MASK > 0 else 0
            scores = masked(
                scores, i[:, None], j[None, :], first[:, None], last[:, None], alike[:, None], query_ids, key_ids,
                mask, T, START, IDS, MASK,
            )  # fmt: skip
        p = tl.exp2(scores - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            dp = tl.where(kept(hashes[:, None], j[None, :], threshold), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(tl.cast(ds, k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def query_kernel(
    dq_ptr, base_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr,
    start_ptr, end_ptr, query_ids_ptr, key_ids_ptr, mask_ptr, seed_ptr,
    dq_sb, dq_sh, dq_si, q_sb, q_sh, q_si, k_sb, k_sh, k_sj, v_sb, v_sh, v_sj,
    out_sb, out_sh, out_si, dout_sb, dout_sh, dout_si,
    start_sb, end_sb, query_ids_sb, key_ids_sb, mask_sb, mask_sh, mask_si, mask_sj,
    padded_S, H, GROUP, S, T, window,
    scale: tl.float32, softcap: tl.float32, threshold: tl.int64, keep_scale: tl.float32,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, START: tl.constexpr, END: tl.constexpr, IDS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SCAN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of queries, and what key_kernel needs of each row: base, delta.

    base is the log-sum-exp in units of log 2, delta = dout . out.  Both are [B, H, padded_S]: there are values
    for whole tiles of either kernel, 0 outside.
    """
    tiles = padded_S // BLOCK_M
    tile, head = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = head // H, head % H
    wide_b, wide_h, g = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(h // GROUP, tl.int64)
    i, d, e = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q = load_rows(q_ptr + wide_b * q_sb + wide_h * q_sh, i, d, q_si, S, D, BLOCK_D, False)
    out = load_rows(out_ptr + wide_b * out_sb + wide_h * out_sh, i, e, out_si, S, DV, BLOCK_DV, False)
    dout = load_rows(dout_ptr + wide_b * dout_sb + wide_h * dout_sh, i, e, dout_si, S, DV, BLOCK_DV, False)
    delta = tl.sum(tl.cast(out, tl.float32) * tl.cast(dout, tl.float32), 1)
    wide_head = tl.cast(head, tl.int64)
    lse, rows = load_lse(lse_ptr + wide_head * S, i, S), wide_head * padded_S + i
    tl.store(base_ptr + rows, lse)
    tl.store(delta_ptr + rows, delta)
    key_ids_ptr, mask_ptr = key_ids_ptr + wide_b * key_ids_sb, mask_ptr + wide_b * mask_sb + wide_h * mask_sh
    first, last, alike, query_ids, low, full_low, full_high, high = columns(
        i, tile * BLOCK_M, start_ptr + wide_b * start_sb, end_ptr + wide_b * end_sb,
        query_ids_ptr + wide_b * query_ids_sb, key_ids_ptr, S, T, window,
        CAUSAL, WINDOW, START, END, IDS, MASK, BLOCK_N, SCAN,
    )  # fmt: skip
    hashes = row_hash(seed_ptr, (b * H + h) * S + i) if DROPOUT else i
    k_ptr, v_ptr = k_ptr + wide_b * k_sb + g * k_sh, v_ptr + wide_b * v_sb + g * v_sh
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW or START or IDS:
        dq = query_tiles(
            dq, q, dout, lse, delta, k_ptr, v_ptr, low, full_low, i, first, last, alike, query_ids, key_ids_ptr,
            mask_ptr, mask_si, mask_sj, k_sj, v_sj, S, T, scale, softcap, hashes, threshold, keep_scale,
            True, START, IDS, MASK, SOFTCAP, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if not MASK > 0:
        dq = query_tiles(
            dq, q, dout, lse, delta, k_ptr, v_ptr, full_low, full_high, i, first, last, alike, query_ids, key_ids_ptr,
            mask_ptr, mask_si, mask_sj, k_sj, v_sj, S, T, scale, softcap, hashes, threshold, keep_scale,
            False, START, IDS, MASK, SOFTCAP, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    dq = query_tiles(
        dq, q, dout, lse, delta, k_ptr, v_ptr, full_high, high, i, first, last, alike, query_ids, key_ids_ptr,
        mask_ptr, mask_si, mask_sj, k_sj, v_sj, S, T, scale, softcap, hashes, threshold, keep_scale,
        True, START, IDS, MASK, SOFTCAP, DROPOUT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    address = dq_ptr + wide_b * dq_sb + wide_h * dq_sh + tl.cast(i, tl.int64)[:, None] * dq_si + d[None, :]
    tl.store(address, tl.cast(dq * scale, dq_ptr.dtype.element_ty), mask=(i < S)[:, None] & (d < D)[None, :])


@triton.jit
def row_span(
    j0, start_ptr, end_ptr, S, T, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, START: tl.constexpr,
    END: tl.constexpr, IDS: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """Return low, full_low, full_high, high: the rows that attend to a column from j0; full: to all of the tile's.

    Ranges that are given in tensors are all scanned: full is the first run of rows that attend to the whole tile.  With
    a dense mask, or where rows that are alike compare no ids (start beside ids), no row is known to.
    """
    if START or END:
        low, high, begin, until = S, 0, S, S
        for i0 in range(0, S, SCAN):
            i = i0 + tl.arange(0, SCAN)
            first, last, alike = key_range(i, start_ptr, end_ptr, S, T, window, CAUSAL, WINDOW, START, END)
            meets = (i < S) & (first < last) & (first < j0 + BLOCK_N) & (last > j0)
            low = tl.minimum(low, tl.min(tl.where(meets, i, S), 0))
            high = tl.maximum(high, tl.max(tl.where(meets, i + 1, 0), 0))
            covers = meets & (alike == 0) & (first <= j0) & (last >= tl.minimum(j0 + BLOCK_N, T))
            begin = tl.minimum(begin, tl.min(tl.where(covers, i, S), 0))
            until = tl.minimum(until, tl.min(tl.where((i > begin) & (covers == 0), i, S), 0))
        low = low // BLOCK_M * BLOCK_M
        full_low, full_high = tl.cdiv(begin, BLOCK_M) * BLOCK_M, until // BLOCK_M * BLOCK_M
    else:
        low, high, full_low, full_high = 0, S, 0, S // BLOCK_M * BLOCK_M
        if CAUSAL:
            low = j0 // BLOCK_M * BLOCK_M
            full_low = tl.cdiv(j0 + BLOCK_N - 1, BLOCK_M) * BLOCK_M
        if WINDOW:
            high = tl.minimum(S, j0 + BLOCK_N - 1 + window)
            full_high = tl.minimum(full_high, (j0 + window) // BLOCK_M * BLOCK_M)
    if MASK > 0 or (START and IDS):
        return low, low, low, high
    none = full_low >= full_high
    return low, tl.where(none, low, full_low), tl.where(none, low, full_high), high


@triton.jit
def key_tiles(
    dk, dv, k, v, q_ptr, dout_ptr, base_ptr, delta_ptr, low, high, j, start_ptr, end_ptr, query_ids_ptr, key_ids,
    mask_ptr, mask_si, mask_sj, q_stride, dout_stride, S, T, window, scale, softcap, seed_ptr, row0, threshold,
    keep_scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, START: tl.constexpr, END: tl.constexpr,
    IDS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add one head's queries from low to high to dk [BLOCK_N, BLOCK_D], not scaled, and dv [BLOCK_N, BLOCK_DV].

    Scores are transposed.
    """
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    # Loading ahead in the short loops at the ends of the long one makes short heads' registers spill: 2 kB a thread.
    ahead: tl.constexpr = not MASKED or MASK > 0 or (START and IDS) or BLOCK_D > 64
    for i0 in tl.range(low, high, BLOCK_M, num_stages=None if ahead else 1):
        i = i0 + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, i, d, q_stride, S, D, BLOCK_D, not MASKED)
        dout = load_rows(dout_ptr, i, e, dout_stride, S, DV, BLOCK_DV, not MASKED)
        base, delta = tl.load(base_ptr + i), tl.load(delta_ptr + i)
        products = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        scores, slope = shaped(products, scale, softcap, SOFTCAP, k.dtype == tl.float32)
        if MASKED:
            first, last, alike = key_range(i, start_ptr, end_ptr, S, T, window, CAUSAL, WINDOW, START, END)
            query_ids = tl.load(query_ids_ptr + i, mask=i < S, other=0)[None, :] if IDS else 0
            mask = load_mask(mask_ptr, i[None, :], j[:, None], mask_si, mask_sj, S, T, MASK) if MASK > 0 else 0
            scores = masked(
                scores, i[None, :], j[:, None], first[None, :], last[None, :], alike[None, :], query_ids, key_ids,
                mask, T, START, IDS, MASK,
            )  # fmt: skip
        p = tl.exp2(scores - base[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        weights = p
        if DROPOUT:
            keeps = kept(row_hash(seed_ptr, row0 + i)[None, :], j[:, None], threshold)
            weights, dp = tl.where(keeps, p * keep_scale, 0.0), tl.where(keeps, dp * keep_scale, 0.0)
        dv = tl.dot(tl.cast(weights, dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :]) * slope
        dk = tl.dot(tl.cast(ds, q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def key_kernel(
    dk_ptr, dv_ptr, q_ptr, k_ptr, v_ptr, dout_ptr, base_ptr, delta_ptr,
    start_ptr, end_ptr, query_ids_ptr, key_ids_ptr, mask_ptr, seed_ptr,
    dk_sb, dk_sh, dk_sj, dv_sb, dv_sh, dv_sj, q_sb, q_sh, q_si, k_sb, k_sh, k_sj, v_sb, v_sh, v_sj,
    dout_sb, dout_sh, dout_si,
    start_sb, end_sb, query_ids_sb, key_ids_sb, mask_sb, mask_sh, mask_si, mask_sj,
    padded_S, H, GROUP, S, T, window,
    scale: tl.float32, softcap: tl.float32, threshold: tl.int64, keep_scale: tl.float32,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, START: tl.constexpr, END: tl.constexpr, IDS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SCAN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of a tile of keys, summed over the heads that read them."""
    G, tiles = H // GROUP, tl.cdiv(T, BLOCK_N)
    b, g = tl.program_id(0) // tiles // G, tl.program_id(0) // tiles % G
    wide_b, wide_g = tl.cast(b, tl.int64), tl.cast(g, tl.int64)
    j0 = tl.program_id(0) % tiles * BLOCK_N
    j, d, e = j0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k = load_rows(k_ptr + wide_b * k_sb + wide_g * k_sh, j, d, k_sj, T, D, BLOCK_D, False)
    v = load_rows(v_ptr + wide_b * v_sb + wide_g * v_sh, j, e, v_sj, T, DV, BLOCK_DV, False)
    start_ptr, end_ptr = start_ptr + wide_b * start_sb, end_ptr + wide_b * end_sb
    query_ids_ptr, key_ids_ptr = query_ids_ptr + wide_b * query_ids_sb, key_ids_ptr + wide_b * key_ids_sb
    low, full_low, full_high, high = row_span(
        j0, start_ptr, end_ptr, S, T, window, CAUSAL, WINDOW, START, END, IDS, MASK, BLOCK_M, BLOCK_N, SCAN
    )
    key_ids = 0
    if IDS:
        ids, first_id, same = load_ids(key_ids_ptr, j0, j, T)
        key_ids = ids[:, None]
        if not START:  # rows that are alike compare no ids
            low, full_low, full_high, high = narrowed(
                low, full_low, full_high, high, first_id, same, query_ids_ptr, BLOCK_M, SCAN
            )
    split: tl.constexpr = not (MASK > 0 or (START and IDS))  # whether some rows may be known to attend to all
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for h in range(g * GROUP, (g + 1) * GROUP):
        wide_h = tl.cast(h, tl.int64)
        head, row0 = wide_b * H + wide_h, (b * H + h) * S
        q_at, dout_at = q_ptr + wide_b * q_sb + wide_h * q_sh, dout_ptr + wide_b * dout_sb + wide_h * dout_sh
        base_at, delta_at = base_ptr + head * padded_S, delta_ptr + head * padded_S
        mask_at = mask_ptr + wide_b * mask_sb + wide_h * mask_sh
        if (CAUSAL or IDS or START or END) and split:
            dk, dv = key_tiles(
                dk, dv, k, v, q_at, dout_at, base_at, delta_at, low, full_low, j, start_ptr, end_ptr, query_ids_ptr,
                key_ids, mask_at, mask_si, mask_sj, q_si, dout_si, S, T, window, scale, softcap, seed_ptr, row0,
                threshold, keep_scale,
                True, CAUSAL, WINDOW, START, END, IDS, MASK, SOFTCAP, DROPOUT, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        if split:
            dk, dv = key_tiles(
                dk, dv, k, v, q_at, dout_at, base_at, delta_at, full_low, full_high, j, start_ptr, end_ptr,
                query_ids_ptr, key_ids, mask_at, mask_si, mask_sj, q_si, dout_si, S, T, window, scale, softcap,
                seed_ptr, row0, threshold, keep_scale,
                False, CAUSAL, WINDOW, START, END, IDS, MASK, SOFTCAP, DROPOUT, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        dk, dv = key_tiles(
            dk, dv, k, v, q_at, dout_at, base_at, delta_at, full_high, high, j, start_ptr, end_ptr, query_ids_ptr,
            key_ids, mask_at, mask_si, mask_sj, q_si, dout_si, S, T, window, scale, softcap, seed_ptr, row0,
            threshold, keep_scale,
            True, CAUSAL, WINDOW, START, END, IDS, MASK, SOFTCAP, DROPOUT, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    dk_at = dk_ptr + wide_b * dk_sb + wide_g * dk_sh + tl.cast(j, tl.int64)[:, None] * dk_sj + d[None, :]
    dv_at = dv_ptr + wide_b * dv_sb + wide_g * dv_sh + tl.cast(j, tl.int64)[:, None] * dv_sj + e[None, :]
    tl.store(dk_at, tl.cast(dk * scale, dk_ptr.dtype.element_ty), mask=(j < T)[:, None] & (d < D)[None, :])
    tl.store(dv_at, tl.cast(dv, dv_ptr.dtype.element_ty), mask=(j < T)[:, None] & (e < DV)[None, :])


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    for constants in attention_tiles.variants(QUERY_TILES):
        yield query_kernel, constants
    for constants in attention_tiles.variants(KEY_TILES):
        yield key_kernel, constants


def backward(
    outputs: tuple[Tensor, Tensor, Tensor], grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, start: Tensor | None, end: Tensor | None, query_ids: Tensor | None,
    key_ids: Tensor | None, mask: Tensor | None, seed: Tensor | None, causal: bool, window: int, max_seqlen: int,
    scale: float, softcap: float, dropout: float, copies: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute dq, dk and dv into outputs, by both kernels."""
    dq, dk, dv = outputs
    B, H, S, D = query.shape
    key, value, vectors, causal, window = restricting(
        key, value, (start, end, query_ids, key_ids), causal, window, max_seqlen, copies
    )
    if key_copies.given(copies):
        dk, dv = torch.empty_like(key), torch.empty_like(value)
    G, T = key.shape[1:3]
    q, k, v, out, dout = map(unit, (query, key, value, out, grad_output))
    shared = operands(q, k, (*vectors, mask), seed, causal, window, scale, softcap, dropout)
    meta = {**shared.meta, **head_sizes(D, value.shape[-1])}
    for_queries, for_keys = (tiles_for(table, query, value, mask) for table in (QUERY_TILES, KEY_TILES))
    # Rows of unknown alignment are copied element by element, in each turn of the loop over queries.
    most_rows = max(for_queries.rows, for_keys.rows)
    padded_S = cdiv(S, most_rows) * most_rows
    base, delta = (torch.empty(B, H, padded_S, dtype=torch.float32, device=q.device) for _ in range(2))
    sizes = (padded_S, H, H // G, S, T, *shared.numbers)
    on_grid(query_kernel, (padded_S // for_queries.rows * B * H,))(
        dq, base, delta, q, k, v, out, dout, lse.contiguous(), *shared.pointers, *dq.stride()[:3], *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *dout.stride()[:3], *shared.strides, *sizes, **meta,
        **for_queries.meta,
    )  # fmt: skip
    on_grid(key_kernel, (cdiv(T, for_keys.columns) * B * G,))(
        dk, dv, q, k, v, dout, base, delta, *shared.pointers, *dk.stride()[:3], *dv.stride()[:3], *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *shared.strides, *sizes, **meta, **for_keys.meta,
    )  # fmt: skip
    if copies is not None and key_copies.given(copies):
        for target, gradient in zip(outputs[1:], (dk, dv), strict=True):
            sum_copies(target, gradient, copies)
