"""Triton kernels of expert_order: a counting sort in three launches, blocks of slots at a time.

Each block is counted, the counts are summed up to where each block's slots of each expert go, and a slot goes as far
behind that as there are slots of its expert before it in the block.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels import expert_load
from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.launch_recorder import on_grid
from fastft.kernels.core.tiles import padded
from fastft.kernels.expert_order import BLOCK

PART = 32  # a program compares any two of its slots, so many at a time
SUMMED = 8192  # counts that are summed at a time
MOST_COUNTS = 1024  # of experts, in a program


@triton.jit
def load_experts(index_ptr, slot, slots, EXPERTS, BLOCK_E: tl.constexpr):
    """Load the experts of slots; EXPERTS for numbers of none, and past the slots a number above all."""
    found = tl.load(index_ptr + slot, mask=slot < slots, other=0)
    expert = tl.cast(tl.where((found >= 0) & (found < EXPERTS), found, EXPERTS), tl.int32)
    return tl.where(slot < slots, expert, BLOCK_E - 1)


@triton.jit(do_not_specialize=["slots"])
def count_kernel(counts_ptr, index_ptr, slots, EXPERTS, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Count the slots of each expert in a block."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.histogram(load_experts(index_ptr, slot, slots, EXPERTS, BLOCK_E), BLOCK_E)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["blocks"])
def sum_kernel(
    starts_ptr, ends_ptr, totals_ptr, counts_ptr, blocks, EXPERTS, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Sum the counts: where rows of each expert end, where those of a block begin, and totals of all calls."""
    expert, block = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, blocks, BLOCK):
        address = counts_ptr + (first + block)[:, None] * BLOCK_E + expert[None, :]
        total += tl.sum(tl.load(address, mask=(first + block < blocks)[:, None], other=0), 0)
    ends = tl.cumsum(total, 0)
    tl.store(ends_ptr + expert, ends, mask=expert < EXPERTS)
    before_call = tl.load(totals_ptr + expert, mask=expert < EXPERTS, other=0)
    tl.store(totals_ptr + expert, before_call + total, mask=expert < EXPERTS)
    before = ends - total
    for first in range(0, blocks, BLOCK):
        here = first + block
        address = here[:, None] * BLOCK_E + expert[None, :]
        counts = tl.load(counts_ptr + address, mask=(here < blocks)[:, None], other=0)
        earlier = tl.cumsum(counts, 0) - counts
        tl.store(starts_ptr + address, before[None, :] + earlier, mask=(here < blocks)[:, None])
        before += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["slots"])
def place_kernel(
    order_ptr, place_ptr, index_ptr, starts_ptr, slots, EXPERTS, BLOCK: tl.constexpr, PART: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Put the slots of a block where they belong."""
    first = tl.program_id(0) * BLOCK
    slot = first + tl.arange(0, BLOCK)
    expert = load_experts(index_ptr, slot, slots, EXPERTS, BLOCK_E)
    mask = slot < slots
    row = tl.load(starts_ptr + tl.program_id(0) * BLOCK_E + expert, mask=mask, other=0)
    for part in range(0, BLOCK, PART):
        other = first + part + tl.arange(0, PART)
        others = load_experts(index_ptr, other, slots, EXPERTS, BLOCK_E)
        earlier = (others[None, :] == expert[:, None]) & (other[None, :] < slot[:, None])
        row += tl.sum(tl.cast(earlier, tl.int32), 1)
    tl.store(order_ptr + row, slot, mask=mask)
    tl.store(place_ptr + slot, row, mask=mask)


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every kernel with its launch constants, for the tests that compile them ahead of time."""
    names = ("counts_ptr", "starts_ptr", "ends_ptr", "order_ptr", "place_ptr")
    pointers = dict.fromkeys(names, "*i32") | {"index_ptr": "*i64", "totals_ptr": "*i64"}
    for experts in (16, MOST_COUNTS):
        meta = {"BLOCK": BLOCK, "BLOCK_E": experts, "num_warps": 4}
        yield count_kernel, {**pointers, **meta}
        yield sum_kernel, {**pointers, **meta, "BLOCK": SUMMED // experts, "num_warps": 8}
        yield place_kernel, {**pointers, **meta, "PART": PART, "num_warps": 8}


def sort(targets: Sequence[Tensor], top_k_index: Tensor, num_experts: int) -> None:
    """Write order, place and ends into targets."""
    order, place, ends = targets
    index, slots, block_e = top_k_index.contiguous(), order.shape[0], padded(num_experts + 2)
    blocks = cdiv(slots, BLOCK)
    counts, starts = torch.empty(2, blocks, block_e, dtype=torch.int32, device=index.device).unbind(0)
    meta = {"BLOCK": BLOCK, "BLOCK_E": block_e, "num_warps": 4}
    on_grid(count_kernel, (blocks,))(counts, index, slots, num_experts, **meta)
    summed = {**meta, "BLOCK": max(1, SUMMED // block_e), "num_warps": 8}
    totals = expert_load.counts(index.device, num_experts)
    on_grid(sum_kernel, (1,))(starts, ends, totals, counts, blocks, num_experts, **summed)
    meta |= {"PART": PART, "num_warps": 8}
    on_grid(place_kernel, (blocks,))(order, place, index, starts, slots, num_experts, **meta)
