"""Find the live rows of a batch, and the ranges that attention has among them.

All that is computed here are integers for each row [B, S].  A query may attend to the keys from low to high, if these
have its id.  For any key p of a sequence, as many live rows are before it in the batch as base + rank(p), so that the
same range among live rows begins at base + rank(low) and ends at base + rank(high).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 32  # sizes between two powers of two, so that few occur and at most a thirtieth is added
LEAST_STEP = 16


class Ranges(NamedTuple):
    """What restricts an attention: start, end, query_ids and key_ids [B or 1, S], None for what restricts nothing."""

    start: Tensor | None
    end: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    causal: bool
    window: int


class Facts(NamedTuple):
    """What is known of a batch on the host, as numbers of rows.

    live: that are computed.  longest: the most of a sequence.  documents: sequences that have some.  unread: live rows
    that no query attends to, such as padding whose label counts.  strange: live rows that are restricted by more than
    ranges.  bounded: live rows whose ranges tell more than causal and window.  before: rows that are not live, before
    the last of their sequence that is; gaps: those of them that are not before the first.  unique: live rows but for
    those that are the same as in a sequence before, where that was looked at.
    """

    live: int
    longest: int
    documents: int
    unread: int
    strange: int
    bounded: int
    before: int
    gaps: int
    unique: int = 0

    def plain(self, rows: int, *, causal: bool) -> bool:
        """Return whether all rows of the batch can be computed with no masks but causal ones and windows."""
        restricted = self.unread or self.strange or self.bounded
        return not restricted and (self.live == rows or (causal and not self.before))


@dataclass
class Look:
    """A batch that was looked at: live and keys [B, S], which rows are computed and which of them are read as keys.

    rank [B, S + 1]: the keys of a sequence before each place.  facts: on the device.
    """

    live: Tensor
    keys: Tensor
    rank: Tensor
    facts: Tensor


def look(
    counted: Tensor | None, masks: Sequence[Ranges], device: torch.device, B: int, S: int, *, by_labels: bool
) -> Look:
    """Look which rows of a batch are live.

    counted: bool [B, S], rows whose label counts; None if none does.  by_labels: rows from which there is no way to
    a label are not live.
    """
    place = torch.arange(S, device=device)
    reached = torch.ones(B, S, dtype=torch.bool, device=device)
    if by_labels and counted is not None:
        if all(mask.causal for mask in masks):
            reached = place < (counted * (place + 1)).amax(1, keepdim=True)
        else:
            reached = counted.any(1, keepdim=True).expand(B, S)
    live = torch.zeros_like(reached) if counted is None else counted
    for mask in masks:
        live = live | (_keys(mask, reached, place) & reached)
    in_all, in_any = live, torch.zeros_like(live)  # which are keys in all masks, and in one of them
    for mask in masks:
        readable = (
            live if mask.key_ids is None or mask.query_ids is None else live & (mask.key_ids == mask.query_ids[:, :1])
        )
        in_all, in_any = in_all & readable, in_any | readable
    rank = F.pad(in_all.cumsum(1), (1, 0))
    count = live.sum(1)
    last, first = (live * (place + 1)).amax(1), S - (live * (S - place)).amax(1)
    strange, bounded = _restrictions(masks, live, rank, place)
    strange = strange | (in_any & ~in_all)
    before = last - count
    facts = [
        count.sum(), count.max(), (count > 0).sum(), (live & ~in_all).sum(), strange.sum(), bounded.sum(),
        before.sum(), (before - first).clamp(min=0).sum(),
    ]  # fmt: skip
    return Look(live, in_all, rank, torch.stack(facts))


def _low(mask: Ranges, place: Tensor) -> Tensor | None:
    """Return the first key of each query, [B or 1, S]; None where it is the first of all."""
    windowed = (place - (mask.window - 1)).clamp(min=0)[None] if mask.window else None
    if mask.start is None:
        return windowed
    return mask.start.clamp(min=0) if windowed is None else torch.maximum(mask.start, windowed)


def _high(mask: Ranges, place: Tensor) -> Tensor:
    """Return the key behind the last of each query, [S] or [B or 1, S]."""
    high = place + 1 if mask.causal else torch.full_like(place, len(place))
    return high if mask.end is None else torch.minimum(mask.end, high)


def bounds(mask: Ranges, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first key of each query, and the one behind its last: integers that broadcast to [B, S]."""
    place = torch.arange(S, device=device)
    low, high = _low(mask, place), _high(mask, place)
    return torch.zeros_like(place) if low is None else low, high


def _keys(mask: Ranges, reached: Tensor, place: Tensor) -> Tensor:
    """Return which keys some query that is reached attends to, or more: bool [B, S]."""
    B, S = reached.shape
    keys = reached
    if mask.start is not None or mask.end is not None:
        low, high = _low(mask, place), _high(mask, place)
        low = torch.zeros_like(place) if low is None else low
        asks = reached & (low < high)
        if mask.start is not None:
            asks = asks & (mask.start >= 0)  # a query that weighs all keys alike: _restrictions counts it if it is live
        change = torch.zeros(B * (S + 1), dtype=torch.int64, device=place.device)
        begin = torch.arange(B, device=place.device)[:, None] * (S + 1)
        for bound, step in ((low, 1), (high, -1)):
            change.scatter_add_(0, (begin + bound.clamp(0, S)).flatten(), (asks.long() * step).flatten())
        keys = change.view(B, S + 1).cumsum(1)[:, :S] > 0
    if mask.query_ids is not None and mask.key_ids is not None:
        ids, first = mask.query_ids, mask.query_ids[:, :1]
        keys = keys & ((mask.key_ids == first) | (ids != first).any(1, keepdim=True))
    return keys


def _restrictions(masks: Sequence[Ranges], live: Tensor, rank: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Return which live rows have queries that are restricted otherwise than by ranges, and by ranges of their own."""
    B, S = live.shape
    strange, bounded = torch.zeros_like(live), torch.zeros_like(live)
    for mask in masks:
        if mask.query_ids is not None:
            strange = strange | (mask.query_ids != mask.query_ids[:, :1])
        if mask.start is not None:
            strange = strange | (mask.start < 0)
            bounded = bounded | (rank.gather(1, mask.start.clamp(0, S).expand(B, S).long()) > 0)
        if mask.end is not None:
            high = place + 1 if mask.causal else torch.full_like(place, S)
            cut = rank.gather(1, mask.end.clamp(0, S).expand(B, S).long())
            bounded = bounded | (cut < rank.gather(1, high.expand(B, S)))
    return strange & live, bounded & live


def rounded(rows: int) -> int:
    """Return the number of rows to compute for so many live ones."""
    step = max(LEAST_STEP, 2 ** ((rows - 1).bit_length() - 1) // STEPS)
    return -(-rows // step) * step


@dataclass
class Selection:
    """The live rows as one sequence of N, of which the first ``live`` are rows of the batch; the others are copies.

    rows: the number of each in the batch [N].  places: in its sequence.  ranges: start and end [1, N], int32, by mask.
    copies: where rows stand for those of other sequences too, the keys as attention is given them: which row each is,
    int32.  home: then, which of the N rows each row of the batch is, int64; N for those that are not computed.
    """

    live: int
    rows: Tensor
    places: Tensor
    ranges: list[tuple[Tensor, Tensor | None]]
    max_seqlen: int
    copies: Tensor | None = None
    home: Tensor | None = None

    @property
    def size(self) -> int:
        """How many rows are computed."""
        return len(self.rows)


def select(
    looked: Look, facts: Facts, masks: Sequence[Ranges], ends: Sequence[bool], N: int, longest: int
) -> Selection:
    """Select N rows, the live ones, of which there is one at least, and copies.

    ends: whether each mask's attention is given an end.  longest: as long as any sequence's live rows, or longer.
    """
    rank = looked.rank
    (B, S), device = looked.live.shape, looked.live.device
    flat = looked.live.flatten()
    keys = looked.keys.flatten()
    # Rows that are added are copies of one that is live, so that whatever is computed of them is finite.
    rows = flat.to(torch.uint8).argmax().expand(N + 1).clone()
    to = torch.where(keys, keys.cumsum(0) - 1, N)
    if facts.unread:  # behind all keys, so that they are in no range of them
        unread = flat & ~keys
        to = torch.where(unread, unread.cumsum(0) + (facts.live - facts.unread - 1), to)
    rows.scatter_(0, to, torch.arange(B * S, device=device))
    rows = rows[:N]
    batch, places = rows // S, rows % S
    base = rank[:, -1].cumsum(0) - rank[:, -1]
    place, own = torch.arange(S, device=device), torch.arange(N, device=device)

    def among_live(bound: Tensor) -> Tensor:
        """Turn a bound of each row's keys [B or 1, S] into one among live rows [N]."""
        bound = bound.expand(B, S).flatten()[rows].clamp(0, S).long()
        return base[batch] + rank[batch, bound]

    ranges = []
    for mask, has_end in zip(masks, ends, strict=True):
        low = _low(mask, place)
        start = among_live(torch.zeros_like(place) if low is None else low)
        end = among_live(_high(mask, place)) if has_end else None
        start[facts.live :] = own[facts.live :]  # what is added attends to itself
        if end is not None:
            end[facts.live :] = own[facts.live :] + 1
        ranges.append((_vector(start), None if end is None else _vector(end)))
    return Selection(facts.live, rows, places, ranges, _max_seqlen(facts, masks, N, longest))


def _vector(bounds: Tensor) -> Tensor:
    return bounds.to(torch.int32)[None]


def _max_seqlen(facts: Facts, masks: Sequence[Ranges], N: int, longest: int) -> int:
    """Return N where all live rows are one document whose ranges tell nothing; else the longest document's length."""
    windows_fit = not facts.gaps or not any(mask.window for mask in masks)
    added = facts.live < N and not all(mask.causal for mask in masks)  # queries that are not causal would read these
    if facts.documents == 1 and not facts.bounded and not facts.unread and windows_fit and not added:
        return N
    return min(longest, N - 1)
