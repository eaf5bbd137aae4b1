"""Sort the tokens of a mixture of experts by expert, once for all products of a layer, without a host synchronisation.

Each of T tokens chose K experts (Shazeer et al., Outrageously Large Neural Networks, 2017, arXiv:1701.06538), so there
are S = T K slots; slot token * K + k is token's k-th choice.  Nothing is dropped and no expert has a capacity, as in
Gale et al., MegaBlocks, 2022, arXiv:2211.15841.

top_k_index: integers [..., K], the experts' numbers; those outside 0 ... num_experts - 1 are of no expert, and lie
behind all others.

What each expert got is added up for reports (expert_load.py).

Results, int32:
- order [S]: the slot of each row, rows sorted by expert, those of one expert by slot.
- place [S]: the row of each slot, the inverse of order.
- ends [num_experts]: where the rows of each expert end; they begin where those of the expert before end.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastft.kernels import expert_load
from fastft.kernels.core import dispatch
from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.registry import define, load, require

MOST_EXPERTS = 1022  # that the kernels take, whose programs hold a count for each
BLOCK = 256  # slots of a program of the kernels
SMALL = 2**15 - 1  # the largest number of experts that int16 tells apart, which sorts in half the passes of int32


def reference(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort in plain PyTorch."""
    ids = top_k_index.reshape(-1)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(
        torch.int16 if num_experts <= SMALL else torch.int32
    )
    ids, order = torch.sort(ids, stable=True)
    place = torch.empty_like(order, dtype=torch.int32)
    place.scatter_(0, order, torch.arange(order.numel(), dtype=torch.int32, device=order.device))
    experts = torch.arange(num_experts, dtype=ids.dtype, device=ids.device)
    return order.to(torch.int32), place, torch.searchsorted(ids, experts, right=True, out_int32=True)


def new_outputs(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate empty results; raise where numbers are no integers or there is no expert."""
    floating = top_k_index.is_floating_point() or top_k_index.dtype == torch.bool
    require(not floating, lambda: f"top_k_index {top_k_index.dtype}")
    require(num_experts > 0, lambda: f"{num_experts} experts")
    empty = lambda size: torch.empty(size, dtype=torch.int32, device=top_k_index.device)  # noqa: E731
    count = prod(top_k_index.shape)
    return empty(count), empty(count), empty(num_experts)


def scratch_bytes(top_k_index: Tensor, num_experts: int) -> int:
    """Bound the bytes of each block's counts and of where they begin, and of numbers that are not in one piece."""
    slots = prod(top_k_index.shape)
    copied = 0 if top_k_index.is_contiguous() else slots * top_k_index.element_size()
    return 2 * cdiv(slots, BLOCK) * (16 + 2 * (num_experts + 2)) * 4 + copied


def _fill(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    top_k_index, num_experts = arguments
    runs = bool(dispatch.triton_dtypes(top_k_index.device)) and targets[0].numel() > 0 and num_experts <= MOST_EXPERTS
    if runs and dispatch.launched(load("expert_order_triton.sort"), (top_k_index,), targets, *arguments):
        return
    for target, result in zip(targets, reference(*arguments), strict=True):
        target.copy_(result)
    ends = targets[2]
    expert_load.counts(ends.device, num_experts).add_(torch.diff(ends, prepend=ends.new_zeros(1)))


expert_order = define(
    "expert_order", reference, new_outputs, _fill, flops=1, scratch=scratch_bytes,
    cases=[({"top_k_index": f"index ... {count}"}, {"num_experts": count}) for count in (4, 1, 9)],
)  # fmt: skip
