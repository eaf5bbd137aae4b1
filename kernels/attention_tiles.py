"""Shared parts of the attention kernels: which keys a tile of rows may attend to, and the scores of a tile.

A tile has rows i [BLOCK_M] of queries and columns j [BLOCK_N] of keys.  Scores are in units of log 2: exp2 is faster.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.attention import HIGHEST, INCREMENT, LOWEST, MULTIPLIER
from fastft.kernels.core import dispatch
from fastft.kernels.core.layout import has_unit_rows
from fastft.kernels.core.tiles import LOG2E, padded, tanh

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_MULTIPLIER: tl.constexpr = tl.constexpr(MULTIPLIER)
_INCREMENT: tl.constexpr = tl.constexpr(INCREMENT)
_LOWEST: tl.constexpr = tl.constexpr(LOWEST)
_HIGHEST: tl.constexpr = tl.constexpr(HIGHEST)
NO_MASK, BOOL_MASK, ADDED_MASK = range(3)
_ADDED: tl.constexpr = tl.constexpr(ADDED_MASK)
_BOOL: tl.constexpr = tl.constexpr(BOOL_MASK)
SCANNED = 1024  # ids, and ranges of rows, are looked at together
NARROW = (8, 12)  # generations with less shared memory than dispatch.SHARED_OPERANDS


class Tiles(NamedTuple):
    """A launch configuration: rows and columns of a tile, warps, and how many tiles are loaded ahead."""

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def meta(self) -> dict[str, int]:
        """Return the launch's meta-parameters."""
        return {
            "BLOCK_M": self.rows, "BLOCK_N": self.columns, "num_warps": self.warps, "num_stages": self.stages
        }  # fmt: skip

    def for_mask(self) -> "Tiles":
        """Return smaller tiles, for a dense mask: the addresses of its elements take registers."""
        return self._replace(rows=max(16, self.rows // 2), columns=max(16, self.columns // 2))


Table = dict[tuple[int, int, bool], Tiles]  # by padded head size, bytes of an element, and whether there is much memory


def head_sizes(D: int, DV: int) -> dict[str, int]:
    """Return the meta-parameters for heads of D elements whose values have DV: both in tiles of one width.

    Triton 3.6 lets some kernels whose tiles differ read beyond their shared memory on sm_90.
    """
    return {"D": D, "DV": DV, "BLOCK_D": padded(max(D, DV)), "BLOCK_DV": padded(max(D, DV))}


def tiles_for(table: Table, query: Tensor, value: Tensor, mask: Tensor | None) -> Tiles:
    """Return the tiles for query's dtype, device and heads, or longer ones of value; smaller ones with a dense mask."""
    longest = max(64, padded(max(query.shape[-1], value.shape[-1])))
    tiles = table[longest, query.element_size(), dispatch.has_shared_operands(query.device)]
    return tiles if mask is None else tiles.for_mask()


@triton.jit
def key_range(
    i, start_ptr, end_ptr, S, T, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, START: tl.constexpr,
    END: tl.constexpr,
):  # fmt: skip
    """Return the first key of each row, the one after its last, and whether the row weighs its keys alike."""
    end = tl.zeros_like(i) + T
    if END:
        end = tl.load(end_ptr + i, mask=i < S, other=0)
        end = tl.cast(tl.maximum(tl.minimum(end, T), 0), tl.int32)
    first, last, alike = tl.zeros_like(i), end, i < 0
    if CAUSAL:
        last = tl.minimum(last, i + 1)
    if WINDOW:
        first = tl.maximum(i - window + 1, 0)
    if START:
        start = tl.load(start_ptr + i, mask=i < S, other=0)
        start = tl.cast(tl.minimum(tl.maximum(start, -1), T), tl.int32)
        alike = start < 0
        first = tl.where(alike, 0, tl.maximum(first, start))
        last = tl.where(alike, end, last)
    return first, last, alike


@triton.jit
def column_range(i, first, last, alike, S, T, BLOCK_N: tl.constexpr, MASK: tl.constexpr):
    """Return low, full_low, full_high, high: a tile's columns; full: those that every row attends to, by ranges.

    With a dense mask there are none of the latter: their range is empty and at the beginning.
    """
    inside = i < S
    nonempty = inside & (first < last)
    low = tl.min(tl.where(nonempty, first, T), 0) // BLOCK_N * BLOCK_N
    high = tl.max(tl.where(nonempty, last, 0), 0)
    if MASK > 0:
        return low, low, low, high
    full_low = tl.cdiv(tl.max(tl.where(inside, tl.where(alike, T, first), 0), 0), BLOCK_N) * BLOCK_N
    full_high = tl.min(tl.where(inside, last, T), 0) // BLOCK_N * BLOCK_N
    none = full_low >= full_high
    return low, tl.where(none, low, full_low), tl.where(none, low, full_high), high


@triton.jit
def load_ids(ids_ptr, i0, i, N):
    """Load the ids of a tile that begins at i0; also return the first of them, and whether all are equal to it."""
    ids, first_id = tl.load(ids_ptr + i, mask=i < N, other=0), tl.load(ids_ptr + i0)
    return ids, first_id, tl.min(tl.where((i < N) & (ids != first_id), 0, 1), 0) == 1


@triton.jit
def narrowed(low, full_low, full_high, high, first_id, same, ids_ptr, BLOCK: tl.constexpr, SCAN: tl.constexpr):
    """Narrow ranges of column_range to elements whose id is first_id, if same; else have every element compared.

    So padding, and documents told apart by ids, cost neither a comparison nor a tile where all of a tile's ids are the
    same.
    """
    high = tl.maximum(low, high)
    stop = tl.where(same, high, low)
    begin, end, until = stop, tl.where(same, low, high), stop  # until: where the first run of them ends
    for j0 in range(low, stop, SCAN):
        j = j0 + tl.arange(0, SCAN)
        there = j < high
        equal = there & (tl.load(ids_ptr + j, mask=there, other=0) == first_id)
        begin = tl.minimum(begin, tl.min(tl.where(equal, j, high), 0))
        end = tl.maximum(end, tl.max(tl.where(equal, j + 1, low), 0))
        until = tl.minimum(until, tl.min(tl.where(there & (j > begin) & (equal == 0), j, high), 0))
    low, high = begin // BLOCK * BLOCK, tl.minimum(high, end)
    full_low = tl.maximum(full_low, tl.cdiv(begin, BLOCK) * BLOCK)
    full_high = tl.minimum(full_high, until // BLOCK * BLOCK)
    none = full_low >= full_high
    return low, tl.where(none, low, full_low), tl.where(none, low, full_high), high


@triton.jit
def columns(
    i, i0, start_ptr, end_ptr, query_ids_ptr, key_ids_ptr, S, T, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, START: tl.constexpr, END: tl.constexpr, IDS: tl.constexpr,
    MASK: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Return key_range, ids [BLOCK_M, 1] and ranges of columns for a tile of rows that begins at i0."""
    first, last, alike = key_range(i, start_ptr, end_ptr, S, T, window, CAUSAL, WINDOW, START, END)
    low, full_low, full_high, high = column_range(i, first, last, alike, S, T, BLOCK_N, MASK)
    if IDS:
        ids, first_id, same = load_ids(query_ids_ptr, i0, i, S)
        same = same & (tl.max(tl.where(alike, 1, 0), 0) == 0)  # rows that are alike compare no ids
        low, full_low, full_high, high = narrowed(
            low, full_low, full_high, high, first_id, same, key_ids_ptr, BLOCK_N, SCAN
        )
        return first, last, alike, ids[:, None], low, full_low, full_high, high
    else:
        return first, last, alike, 0, low, full_low, full_high, high


@triton.jit
def mixed(number):
    """Hash 32-bit numbers by the permutation that attention.kept draws with."""
    for _ in tl.static_range(2):
        number = (number ^ (number >> 16)) * tl.cast(_MULTIPLIER, tl.uint32)
    return number ^ (number >> 16)


@triton.jit
def row_hash(seed_ptr, row):
    """Hash rows of scores, numbered through all heads, with the seed."""
    return mixed(mixed(tl.cast(row, tl.uint32)) ^ tl.cast(tl.load(seed_ptr), tl.uint32))


@triton.jit
def kept(hashes, j, threshold):
    """Return which elements dropout keeps; hashes of the rows and j broadcast."""
    return mixed(hashes + tl.cast(j, tl.uint32) * tl.cast(_INCREMENT, tl.uint32)) >= tl.cast(threshold, tl.uint32)


@triton.jit
def shaped(products, scale, softcap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Turn products into scores in units of log 2; also return the softcap's slope there."""
    if SOFTCAP:
        bent = tanh(products * (scale / softcap), EXACT)
        return bent * (softcap * LOG2E), 1.0 - bent * bent
    else:
        return products * (scale * LOG2E), 1.0


@triton.jit
def masked(
    scores, i, j, first, last, alike, query_ids, key_ids, mask, T,
    START: tl.constexpr, IDS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Set scores that do not count to -inf.  All arguments broadcast: a tile may be transposed."""
    counts = (j >= first) & (j < last)
    if IDS:
        counts = counts & (alike | (query_ids == key_ids))
    if MASK == _BOOL:
        counts = counts & (alike | mask)
    if MASK == _ADDED:
        scores = tl.where(mask > _HIGHEST, 0.0, scores + tl.where(mask < _LOWEST, float("-inf"), mask * LOG2E))
    if START:
        scores = tl.where(alike, 0.0, scores)
    return tl.where(counts, scores, float("-inf"))


@triton.jit
def load_mask(mask_ptr, i, j, stride_i, stride_j, S, T, MASK: tl.constexpr):
    """Load a tile of the dense mask: bool, or float32 to be added."""
    address = mask_ptr + tl.cast(i, tl.int64) * stride_i + tl.cast(j, tl.int64) * stride_j
    tile = tl.load(address, mask=(i < S) & (j < T), other=0)
    if MASK == _ADDED:
        return tl.cast(tile, tl.float32)
    else:
        return tile != 0


@triton.jit
def load_rows(ptr, i, d, stride, N, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """Load rows i of [N, D], 0 outside; WHOLE: all of them are inside."""
    address = ptr + tl.cast(i, tl.int64)[:, None] * stride + d[None, :]
    if WHOLE and D == BLOCK_D:
        return tl.load(address)
    if D == BLOCK_D:
        return tl.load(address, mask=(i < N)[:, None], other=0.0)
    return tl.load(address, mask=(i < N)[:, None] & (d < D)[None, :], other=0.0)


class Operands(NamedTuple):
    """Launch arguments that all three kernels share."""

    pointers: tuple[Any, ...]  # of start, end, query_ids, key_ids, mask, seed
    strides: tuple[int, ...]  # of a batch of each but seed; then of mask along heads, rows and columns
    numbers: tuple[Any, ...]  # window, scale, softcap, dropout's threshold and factor
    meta: dict[str, Any]


def operands(
    query: Tensor, key: Tensor, masks: tuple[Tensor | None, ...], seed: Tensor | None, causal: bool, window: int,
    scale: float, softcap: float, dropout: float,
) -> Operands:  # fmt: skip
    """Collect the shared operands.  masks: start, end, query_ids, key_ids and mask; a None among them is not read."""
    start, end, query_ids, _, mask = masks
    rows = [None if vector is None else unit(vector) for vector in masks[:4]]
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
        mask = (mask.view(torch.uint8) if kind == BOOL_MASK else mask).expand(*query.shape[:-1], mask.shape[-1])
    strides = [0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0) for tensor in rows]
    of_mask = (0, 0, 0, 0) if mask is None else mask.stride()
    meta = {
        "CAUSAL": causal, "WINDOW": window > 0, "START": start is not None, "END": end is not None,
        "IDS": query_ids is not None, "MASK": NO_MASK if mask is None else kind, "SOFTCAP": softcap != 0.0,
        "DROPOUT": seed is not None, "SCAN": SCANNED,
    }  # fmt: skip
    pointers = tuple(query if tensor is None else tensor for tensor in (*rows, mask, seed))
    window = min(window, max(query.shape[2], key.shape[2]))  # sums with it stay in 32 bits
    numbers = (window, scale, softcap, int(dropout * 2**32), 1.0 / (1.0 - dropout))
    return Operands(pointers, (*strides, *of_mask), numbers, meta)


KINDS = (  # of masks, which a kernel is compiled for
    {"CAUSAL": True}, {"CAUSAL": True, "WINDOW": True}, {"CAUSAL": True, "START": True}, {"CAUSAL": True, "IDS": True},
    {"CAUSAL": True, "SOFTCAP": True}, {"CAUSAL": True, "WINDOW": True, "START": True, "END": True, "IDS": True},
    {"MASK": BOOL_MASK}, {"MASK": ADDED_MASK, "DROPOUT": True},
)  # fmt: skip
LATENT = (192, 128)  # sizes of keys and values that differ, which a kernel is compiled for too: DeepSeek-V2's
_FLAGS = ("CAUSAL", "WINDOW", "START", "END", "IDS", "SOFTCAP", "DROPOUT")
SPILLED_BYTES = {64: 512, 128: 2048, 256: 2048}  # of a thread, by head_dim: what the fastest tiles may store


def variants(table: Table, mask: int = NO_MASK) -> Iterator[dict[str, Any]]:
    """Yield the constants and types that a kernel is launched with, for the tests that compile them ahead of time.

    mask: of which kind it always is, if the kernel has no other way.

    Each tiling is compiled for one kind of mask, so that the kinds are covered in turn; the first tiling, of the
    shortest heads, for ids, with which it needs the most registers.
    """
    types = dict.fromkeys(("start_ptr", "end_ptr", "query_ids_ptr", "key_ids_ptr"), "*i32")
    types |= dict.fromkeys(("lse_ptr", "base_ptr", "delta_ptr"), "*fp32")
    types |= {"seed_ptr": "*i64", "threshold": "i64"}
    types |= dict.fromkeys(("scale", "softcap", "keep_scale"), "fp32")
    keys = [key for key in table if key[1] == 2 or key == (128, 4, True)]  # float32 takes long, and is rare
    for number, key in enumerate(keys):
        (D, element_bytes, roomy), tiles = key, table[key]
        rows = "*fp32" if element_bytes == 4 else "*bf16"
        of_rows = {f"{name}_ptr": rows for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "sinks")}
        majors = dispatch.SHARED_OPERANDS if roomy else NARROW
        launch = {"SCAN": SCANNED, "majors": majors, "spilled_bytes": SPILLED_BYTES[D]}
        ways = [(KINDS[3 * (number + 1) % len(KINDS)], (D, D))]
        ways += [(KINDS[0], LATENT)] if padded(LATENT[0]) == D and element_bytes == 2 else []
        for kind, sizes in ways:
            flags = dict.fromkeys(_FLAGS, False) | {"MASK": NO_MASK} | kind | ({"MASK": mask} if mask else {})
            of_mask = dict.fromkeys(("mask_ptr", "dmask_ptr"), "*fp32" if flags["MASK"] == ADDED_MASK else "*u8")
            meta = (tiles.for_mask() if flags["MASK"] else tiles).meta
            yield {**flags, **types, **of_rows, **of_mask, **launch, **meta, **head_sizes(*sizes)}


def unit(tensor: Tensor) -> Tensor:
    """Return the tensor with unit stride along its last axis, copied if needed."""
    return tensor if has_unit_rows(tensor) else tensor.contiguous()
