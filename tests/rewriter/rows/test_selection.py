"""Which rows of a batch are live, and attention among them, against all scores of the whole batch."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastft.kernels.attention import allowed, attention
from fastft.rewriter.rows import selection
from fastft.rewriter.rows.selection import Facts, Ranges

HEADS, D = 2, 4
ODD = 10**6  # the id of a key that no query has


@dataclass(frozen=True)
class Batch:
    """A batch of B sequences, drawn from a seed.  share: of the rows that are padded, and of those without a label."""

    B: int
    S: int
    side: str
    kinds: tuple[str, ...]
    causal: bool
    window: int
    labelled: bool
    by_labels: bool
    share: float
    seed: int

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def read(self) -> Tensor:
        """Which rows are no padding."""
        lengths = torch.randint(0, self.S + 1, (self.B, 1), generator=self.generator)
        place = torch.arange(self.S)
        if self.side == "holes":
            return torch.rand(self.B, self.S, generator=self.generator) > self.share
        return place < lengths if self.side == "right" else place >= self.S - lengths

    def counted(self) -> Tensor:
        """Which labels count: some of padding too."""
        drawn = torch.rand(self.B, self.S, generator=self.generator.manual_seed(self.seed + 1))
        return (drawn > self.share) & (self.read() | (drawn > 0.8))

    def masks(self) -> list[Ranges]:
        return [self.mask(kind) for kind in self.kinds]

    def mask(self, kind: str) -> Ranges:
        """padding: as ids.  ends: as ranges.  documents: of three rows, or by ids that come back."""
        read, place = self.read(), torch.arange(self.S)
        start = end = queries = keys = None
        if kind in ("padding", "documents", "window"):
            queries, keys = torch.zeros(1, self.S, dtype=torch.int32), read.int() - 1
        if kind == "documents":
            start = (place // 3 * 3).expand(self.B, -1).int()
            end = None if self.causal else start + 3
        if kind == "ids":
            queries = torch.randint(2, (self.B, self.S), generator=self.generator)
            keys = torch.where(read, queries, ODD)
        if kind == "ends":
            end = (read * (place + 1)).amax(1, keepdim=True).expand(-1, self.S).contiguous()
        if kind == "alike":
            start = torch.where(read, 0, -1)
        return Ranges(start, end, queries, keys, self.causal, self.window if kind == "window" else 0)


KINDS = (
    ("padding",), ("documents",), ("window",), ("ids",), ("ends",), ("none",), ("padding", "window"),
    ("padding", "none"), ("documents", "alike"), ("alike",),
)  # fmt: skip


def batches(kinds: tuple[str, ...], causal: bool) -> st.SearchStrategy[Batch]:
    return st.builds(
        Batch,
        B=st.sampled_from((1, 1, 2, 3)), S=st.integers(1, 20), side=st.sampled_from(("right", "left", "holes")),
        kinds=st.just(kinds), causal=st.just(causal), window=st.integers(1, 6), labelled=st.booleans(),
        by_labels=st.booleans(), share=st.sampled_from((0.0, 0.3, 0.7)), seed=st.integers(0, 10**6),
    )  # fmt: skip


def meets(mask: Ranges, B: int, S: int) -> Tensor:
    """Which key a query may attend to, bool [B, S, S]."""
    query = torch.zeros(B, 1, S, 1)
    vectors = (mask.start, mask.end, mask.query_ids, mask.key_ids)
    return allowed(query, query, *vectors, None, mask.causal, mask.window).expand(B, 1, S, S)[:, 0]


def needed(batch: Batch, counted: Tensor | None) -> Tensor:
    """The rows that are counted, all that these read, and so on; all that anybody reads, where labels do not tell."""
    masks = [meets(mask, batch.B, batch.S) for mask in batch.masks()]
    live = torch.zeros(batch.B, batch.S, dtype=torch.bool) if counted is None else counted
    if counted is None or not batch.by_labels:
        for one, mask in zip(batch.masks(), masks, strict=True):  # a row that weighs all keys alike is padding itself
            live = live | (mask if one.start is None else mask & (one.start >= 0)[..., None]).any(1)
    while True:
        more = live | torch.stack([(live[:, :, None] & mask).any(1) for mask in masks]).any(0)
        if torch.equal(more, live):
            return live
        live = more


def attend(mask: Ranges, rows: Tensor, max_seqlen: int = 0) -> Tensor:
    """Attention [B, HEADS, S, D] of rows [B, S, 3 * HEADS * D]."""
    query, key, value = rows.unflatten(-1, (3 * HEADS, D)).transpose(1, 2).split(HEADS, 1)
    vectors = (mask.start, mask.end, mask.query_ids, mask.key_ids)
    out, _ = attention(
        query, key, value, *vectors, None, None, None, mask.causal, mask.window, max_seqlen, 0.5, 0.0, 0.0, True
    )
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@given(st.data())
def test_live_rows_see_what_they_saw(kinds: tuple[str, ...], causal: bool, data: st.DataObject) -> None:
    """Nothing that is needed is left out, and attention among live rows is that of the whole batch."""
    batch = data.draw(batches(kinds, causal))
    B, S, masks = batch.B, batch.S, batch.masks()
    counted = batch.counted() if batch.labelled else None
    looked = selection.look(counted, masks, torch.device("cpu"), B, S, by_labels=batch.by_labels)
    facts = Facts(*looked.facts.tolist())
    assert facts.live == looked.live.sum()
    assert not (needed(batch, counted) & ~looked.live).any() or facts.strange
    rows = torch.randn(B, S, 3 * HEADS * D, dtype=torch.float64, generator=batch.generator)
    if facts.plain(B * S, causal=batch.causal):
        for mask in masks:
            whole, plain = attend(mask, rows), attend(mask, rows, S)
            torch.testing.assert_close(plain[looked.live], whole[looked.live])
    if facts.strange or not facts.live:
        return
    ends = [mask.end is not None or mask.query_ids is not None or not mask.causal for mask in masks]
    longest, size = selection.rounded(facts.longest), selection.rounded(facts.live)
    longest, size = data.draw(st.sampled_from([longest, max(longest, S)])), size + data.draw(st.sampled_from([0, 7]))
    selected = selection.select(looked, facts, masks, ends, size, longest)
    assert selected.size == size
    taken = selected.rows[: facts.live]
    assert set(taken.tolist()) == set(looked.live.flatten().nonzero().flatten().tolist())
    assert len(set(taken.tolist())) == facts.live
    assert looked.live.flatten()[selected.rows].all()  # those that are added too
    assert (selected.places == selected.rows % S).all()
    compact = rows.flatten(0, 1)[selected.rows][None]
    for mask, (start, end) in zip(masks, selected.ranges, strict=True):
        whole = attend(mask, rows).flatten(0, 1)
        among = Ranges(start, end, None, None, mask.causal, mask.window)
        part = attend(among, compact, selected.max_seqlen)[0]
        torch.testing.assert_close(part[: facts.live], whole[taken])
        assert part.isfinite().all()


@pytest.mark.quick
@given(st.integers(1, 10**6))
def test_sizes_repeat(rows: int) -> None:
    size = selection.rounded(rows)
    assert rows <= size <= max(rows + selection.LEAST_STEP - 1, rows * 34 // 32)
    assert size % selection.LEAST_STEP == 0
    assert selection.rounded(size) == size


@pytest.mark.quick
def test_what_is_left_out() -> None:
    """Padding on both sides, a tail without labels where only labels tell, and a sequence of padding alone."""
    read = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    counted = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    mask = Ranges(None, None, torch.zeros(1, 6, dtype=torch.int32), read.int() - 1, True, 0)
    live = lambda by_labels: selection.look(counted, [mask], read.device, 4, 6, by_labels=by_labels).live  # noqa: E731
    assert live(False).int().tolist() == read.tolist()
    read[0, 5] = read[1, 2] = 0
    assert live(True).int().tolist() == read.tolist()


@pytest.mark.quick
def test_a_window_over_gaps() -> None:
    """Of one sequence, whose live rows are nearer to one another than they were: their ranges have to be read."""
    read = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1]]).bool()
    mask = Ranges(None, None, torch.zeros(1, 8, dtype=torch.int32), read.int() - 1, True, 2)
    looked = selection.look(None, [mask], read.device, 1, 8, by_labels=False)
    facts = Facts(*looked.facts.tolist())
    selected = selection.select(looked, facts, [mask], [True], selection.rounded(facts.live), 8)
    assert 0 < selected.max_seqlen < selected.size
    assert selected.ranges[0][0][0, : facts.live].tolist() == [0, 1, 1, 3, 3]
