"""Which rows of a batch are the same as in a sequence before, and attention with copies of keys."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastft.kernels.attention import attention
from fastft.rewriter.rows import prefixes, selection
from fastft.rewriter.rows.selection import Facts, Look, Ranges

H, D = 2, 4


def drawn(B: int, S: int, values: int, seed: int) -> Tensor:
    """Sequences that often begin alike."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(values, (B, S), generator=generator)
    for b in range(1, B):
        other = int(torch.randint(b, (), generator=generator))
        length = int(torch.randint(S + 1, (), generator=generator))
        ids[b, :length] = ids[other, :length]
    return ids


def by_definition(ids: Tensor, live: Tensor, counted: Tensor) -> Tensor:
    """The first sequence that is the same up to a place, whose row there is computed and has no label."""
    B, S = ids.shape
    found = torch.arange(B)[:, None].repeat(1, S)
    for b in range(B):
        for s in range(S):
            if live[b, s] and not counted[b, s]:
                found[b, s] = next(
                    a for a in range(B)
                    if torch.equal(ids[a, : s + 1], ids[b, : s + 1]) and live[a, s] and not counted[a, s]
                )  # fmt: skip
    return found


def looked(live: Tensor) -> tuple[Look, list[Ranges]]:
    masks = [Ranges(None, None, None, None, True, 0)]
    return selection.look(live, masks, live.device, *live.shape, by_labels=False), masks


@given(
    B=st.integers(1, 5), S=st.integers(1, 12), values=st.integers(1, 3), seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)  # fmt: skip
def test_owners_are_the_first_that_begin_alike(B: int, S: int, values: int, seed: int, dtype: torch.dtype) -> None:
    ids = drawn(B, S, values, seed)
    counted = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.2
    look, masks = looked(torch.ones(B, S, dtype=torch.bool))
    table = torch.randn(values, 5, generator=torch.Generator().manual_seed(1)).mul(4).to(dtype)
    found = prefixes.owners(look, counted, masks, [table[ids]])
    rows = ids if dtype != torch.int64 else torch.unique(table, dim=0, return_inverse=True)[1][ids]
    assert torch.equal(found, by_definition(rows, look.live, counted))


@given(B=st.integers(2, 5), S=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_places_are_compared_in_parts(B: int, S: int, seed: int) -> None:
    ids = drawn(B, S, 2, seed)
    look, masks = looked(torch.ones(B, S, dtype=torch.bool))
    before, prefixes.MOST_PAIRS = prefixes.MOST_PAIRS, 3 * B * B
    try:
        found = prefixes.owners(look, None, masks, [ids, torch.complex(ids.float(), ids.float())])
    finally:
        prefixes.MOST_PAIRS = before
    assert torch.equal(found, by_definition(ids, look.live, torch.zeros_like(look.live)))


def test_rows_that_differ_in_one_bit_are_told_apart() -> None:
    rows = torch.zeros(3, 4, 1000)
    rows[1, 2, 777] = -0.0
    rows[2, 3, 999] = torch.finfo(torch.float32).tiny
    look, masks = looked(torch.ones(3, 4, dtype=torch.bool))
    found = prefixes.owners(look, None, masks, [rows])
    assert found.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 2]]


def test_sums_that_are_equal_of_rows_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "FACTOR", 0)
    rows = torch.tensor([1, 2, 1, 3])[:, None, None].expand(4, 2, 3)
    found = prefixes.numbered([rows])
    assert (found[0] == found[2]).all()
    assert len({*found[:, 0].tolist()}) == 3


@given(
    B=st.integers(2, 5), S=st.integers(2, 12), seed=st.integers(0, 2**16), extra=st.integers(0, 3), holes=st.booleans()
)  # fmt: skip
def test_attention_of_shared_rows(B: int, S: int, seed: int, extra: int, holes: bool) -> None:
    """Results and gradients are those of all rows, in float64."""
    generator = torch.Generator().manual_seed(seed)
    ids = drawn(B, S, 2, seed)
    lengths = torch.randint(1, S + 1, (B, 1), generator=generator)
    live = torch.rand(B, S, generator=generator) < 0.8 if holes else torch.arange(S) < lengths
    live[0, 0] = True
    masks = [Ranges(None, None, torch.zeros(1, S, dtype=torch.int64), live.long() - 1, True, 0)]
    look = selection.look(live, masks, live.device, B, S, by_labels=False)
    owner = prefixes.owners(look, None, masks, [ids])
    count = int(prefixes.unique(look, owner).sum())
    facts = Facts(*look.facts.tolist(), count)
    whole = selection.select(look, facts, masks, [True], facts.live + extra, S)
    chosen = prefixes.share(whole, look, owner, facts, count + extra)
    # rows that depend on all tokens up to theirs, as hidden states do
    table = torch.randn(B * S, 3, H, D, generator=generator, dtype=torch.float64)
    parts = table[(owner * S + torch.arange(S)).flatten()].requires_grad_()
    q, k, v = (one.transpose(1, 2) for one in parts.view(B, S, 3, H, D).unbind(2))
    numbers: tuple[Any, ...] = (0, 0, 0.5, 0.0, 0.0, True)
    out = attention(q, k, v, None, None, masks[0].query_ids, masks[0].key_ids, None, None, None, True, *numbers)[0]
    upstream = torch.randn(B, S, H, D, generator=generator, dtype=torch.float64) * live[..., None, None]
    out = out.transpose(1, 2)
    expected = torch.autograd.grad((out * upstream).sum(), parts)[0]
    rows = parts.detach()[chosen.rows].requires_grad_()
    q, k, v = (one[None].transpose(1, 2) for one in rows.unbind(1))
    start, end = chosen.ranges[0]
    mine = attention(q, k, v, start, end, None, None, None, None, None, True, *numbers, chosen.copies)[0]
    mine = mine[0].transpose(0, 1)
    assert chosen.home is not None
    where = torch.where(live.flatten(), chosen.home, 0)
    assert (chosen.home < count).eq(live.flatten()).all()
    torch.testing.assert_close(mine[where][live.flatten()], out.flatten(0, 1)[live.flatten()])
    summed = torch.zeros(len(rows), H, D, dtype=torch.float64)
    summed = summed.index_add(0, where, upstream.flatten(0, 1))
    found = torch.autograd.grad((mine * summed).sum(), rows)[0]
    by_row = torch.zeros_like(found).index_add(0, where, expected.where(live.flatten()[:, None, None, None], 0.0))
    torch.testing.assert_close(found, by_row)
