"""Find rows of a batch that are the same as in a sequence before: those of a beginning that sequences have in common.

Under a causal mask a row depends on the rows before it and on nothing else.  So where two sequences are alike up to a
place, in all that the layers read of them, all that is computed there is the same: the rows of the first are computed,
and the others read copies of their keys.  Nothing is assumed of a batch: rows are compared, every bit of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastft.rewriter.rows.selection import Facts, Look, Ranges, Selection, bounds

MOST_PAIRS = 2**24  # of sequences, times places, that are compared at once
COLUMNS = 512  # of rows that are compared at once
FACTOR, PRIME = 0x9E3779B1, 65521  # of the sums by which rows are told apart
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def owners(looked: Look, counted: Tensor | None, masks: Sequence[Ranges], read: Sequence[Tensor]) -> Tensor:
    """Return for each row the number of the sequence whose row at the same place is computed for it, int64 [B, S].

    counted: bool [B, S], rows whose label counts: each is its own.  read: all that the layers read of rows [B, S, ...].
    """
    B, S = looked.live.shape
    own = torch.arange(B, device=looked.live.device)[:, None].expand(B, S)
    if B < 2:
        return own
    alike = numbered(_described(looked, masks, read))  # [B, S]
    may = looked.live if counted is None else looked.live & ~counted
    first = own.clone()
    differ = torch.zeros(B, B, dtype=torch.int32, device=own.device)  # at how many places so far
    for places in _few(B, S):
        here = alike[:, places]
        differences = (here[:, None] != here[None]).cumsum(-1, dtype=torch.int32) + differ[..., None]  # [B, B, N]
        first[:, places] = ((differences == 0) & may[None, :, places]).to(torch.uint8).argmax(1)
        differ = differences[..., -1]
    return torch.where(may, first, own)


def _few(B: int, S: int) -> Iterator[slice]:
    """Yield places in parts, for each of which all pairs of B sequences are compared at once."""
    step = max(1, MOST_PAIRS // (B * B))
    for start in range(0, S, step):
        yield slice(start, min(start + step, S))


def _described(looked: Look, masks: Sequence[Ranges], read: Sequence[Tensor]) -> list[Tensor]:
    """List what decides about rows, as integers [B, S, N]: what is read of them, and which keys they attend to."""
    B, S = looked.live.shape
    found = [_bits(one.reshape(B, S, -1)) for one in read]
    for mask in masks:
        found += [bound.expand(B, S).unsqueeze(-1) for bound in bounds(mask, S, looked.live.device)]
    return [*found, looked.keys.unsqueeze(-1).to(torch.int64)]


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).flatten(2)
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8)
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]) if tensor.is_floating_point() else tensor


def numbered(described: Sequence[Tensor]) -> Tensor:
    """Number the sequences' rows at each place, int64 [B, S]: two have one number only if all that is described is one.

    Rows are told apart by a sum first; then each is compared with the first that has its sum, and gets a number of its
    own if it is another.
    """
    B, S = described[0].shape[:2]
    total = torch.zeros(B, S, dtype=torch.int64, device=described[0].device)
    for place, one in enumerate(described):
        for start, part in _parts(one):
            at = torch.arange(start + place, start + place + part.shape[-1], device=one.device)
            weights = (at * FACTOR % PRIME).to(torch.int32)
            total = total * 31 + (part.to(torch.int32) * weights).sum(-1, dtype=torch.int64)
    parts = [total[:, places] for places in _few(B, S)]
    first = torch.cat([(part[:, None] == part[None]).to(torch.uint8).argmax(1) for part in parts], 1)  # [B, S]
    equal = torch.ones(B, S, dtype=torch.bool, device=total.device)
    other = (first * S + torch.arange(S, device=total.device)).flatten()
    for one in described:
        for _, part in _parts(one):
            rows = part.flatten(0, 1)
            equal &= (rows == rows.index_select(0, other)).all(-1).view(B, S)
    return torch.where(equal, first, B + torch.arange(B, device=total.device)[:, None])


def _parts(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield columns of rows, and where they begin: what is computed of them is short-lived, and may be wide."""
    for start in range(0, rows.shape[-1], COLUMNS):
        yield start, rows[..., start : start + COLUMNS]


def unique(looked: Look, owner: Tensor) -> Tensor:
    """Return which rows are computed, bool [B, S]."""
    return looked.live & (owner == torch.arange(len(owner), device=owner.device)[:, None])


def share(whole: Selection, looked: Look, owner: Tensor, facts: Facts, N: int) -> Selection:
    """Return N rows of ``whole``, which has all live ones: those that are computed, for all of its keys.

    facts.unique: how many are computed.
    """
    B, S = owner.shape
    total, device = len(whole.rows), owner.device
    computed = unique(looked, owner).flatten()[whole.rows]
    computed[whole.live :] = False
    place = torch.where(computed, computed.cumsum(0) - 1, N)
    chosen = torch.zeros(N + 1, dtype=torch.int64, device=device)  # of whole's rows
    chosen = chosen.scatter_(0, place, torch.arange(total, device=device))[:N]
    chosen[facts.unique :] = chosen[0]
    home = torch.full((B * S + 1,), N, dtype=torch.int64, device=device)  # of the batch's rows, among the N
    at = torch.where(torch.arange(N, device=device) < facts.unique, whole.rows[chosen], B * S)
    home = home.scatter_(0, at, torch.arange(N, device=device))[: B * S]
    home = home[(owner * S + torch.arange(S, device=device)).flatten()].masked_fill(~looked.live.flatten(), N)
    copies = home[whole.rows].clamp(max=N - 1).to(torch.int32)
    ranges = [(start[:, chosen], None if end is None else end[:, chosen]) for start, end in whole.ranges]
    rows = whole.rows[chosen]
    return Selection(facts.unique, rows, whole.places[chosen], ranges, whole.max_seqlen, copies, home)
