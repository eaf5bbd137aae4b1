"""Attention masks read out of graphs: what is recognised says exactly what the mask did, the rest is declined."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_programs import Draw, compute, conditions, conjunctions, draws
from mask_reading import only, sdpa, seen
from torch import Tensor
from transformers import masking_utils as hf

LOWEST = torch.finfo(torch.float32).min
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
HOLES = torch.tensor([[0, 1, 0, 1, 1, 1, 0, 1], [1, 0, 1, 1, 1, 0, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8, 0, 1]])
IDS = torch.tensor([[3, 3, 1, 1, 1, 7, 7, 3], [0, 0, 0, 0, 5, 5, 5, 5]])
IDENTITIES = ("query_ids", "key_ids")


def additive(function: Callable, dtype: torch.dtype = torch.float32, lowest: float | None = None) -> Callable:
    """The mask as transformers' eager attention adds it."""

    def mask(*given: Tensor) -> Tensor:
        number = torch.finfo(dtype).min if lowest is None else lowest
        return torch.where(function(*given), torch.zeros((), dtype=dtype), number)

    return mask


def documents(positions: Tensor) -> Callable:
    return hf.packed_sequence_mask_function(hf.find_packed_sequence_indices(positions))


def packed(inner: Callable) -> Callable:
    """The rule of documents whose positions start anew, as transformers finds them."""

    def rule(positions: Tensor) -> Callable:
        return hf.and_masks(hf.remap_positions_for_packed_sequence(inner, positions), documents(positions))

    return rule


def left_padding(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=-1) == 0).sum(dim=-1)


CAUSAL = lambda _: hf.causal_mask_function  # noqa: E731
ALL = lambda _: hf.bidirectional_mask_function  # noqa: E731
WINDOW = lambda _: hf.sliding_window_bidirectional_mask_function(2)  # noqa: E731
SLIDING = lambda _: hf.sliding_window_causal_mask_function(3)  # noqa: E731
CHUNKS = lambda mask: hf.chunked_causal_mask_function(3, left_padding(mask))  # noqa: E731
PREFIX = lambda lengths: hf.or_masks(hf.causal_mask_function, lambda b, h, q, k: k < lengths[b, 0] + 3)  # noqa: E731
HF = {
    "causal": (sdpa(CAUSAL), PADDING, "causal", {"causal"}),
    "padding": (sdpa(CAUSAL, True), PADDING, "causal, padding", {"causal", *IDENTITIES}),
    "holes": (sdpa(CAUSAL, True), HOLES, "causal, padding", {"causal", *IDENTITIES}),
    "sliding": (sdpa(SLIDING), PADDING, "causal, window 3", {"causal", "window"}),
    "sliding padding": (sdpa(SLIDING, True), HOLES, "causal, window 3, padding", {"causal", "window", *IDENTITIES}),
    "chunks": (sdpa(CHUNKS, True), PADDING, "causal, chunks of 3, padding", {"start", "causal", *IDENTITIES}),
    "all": (sdpa(ALL), PADDING, "full", set()),
    "all padding": (sdpa(ALL, True), HOLES, "padding", {*IDENTITIES}),
    "window": (sdpa(WINDOW), PADDING, "window 3, range", {"window", "end"}),
    "packed": (sdpa(packed(hf.causal_mask_function)), POSITIONS, "causal, documents", {"start", "causal"}),
    "packed sliding": (
        sdpa(packed(SLIDING(None))), POSITIONS, "causal, window 3, documents", {"start", "causal", "window"},
    ),
    "packed, indices not remapped": (
        sdpa(lambda positions: hf.and_masks(hf.causal_mask_function, documents(positions))),
        POSITIONS, "causal, documents", {"start", "causal"},
    ),
    "one document": (
        sdpa(lambda p: packed(hf.causal_mask_function)(torch.arange(p.shape[1])[None].expand(p.shape[0], -1))),
        POSITIONS, "causal", {"causal"},
    ),
    "blocks": (
        sdpa(lambda ids: hf.and_masks(hf.causal_mask_function, hf.blockwise_overlay(ids))), IDS, "causal, ids, rows",
        {"causal", "query_ids", "key_ids", "end"},
    ),
    "prefix": (sdpa(PREFIX), IDS, "prefix", {"end"}),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", HF)
def test_transformers_masks(name: str, dynamic: bool) -> None:
    function, value, kind, given_ = HF[name]
    value = value.clone()
    if dynamic:
        torch._dynamo.mark_dynamic(value, (0, 1))
    one = only(function, value)
    assert (one.kind, one.given) == (kind, given_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HF)
def test_additive_masks(name: str, dtype: torch.dtype) -> None:
    function, value, kind, given_ = HF[name]
    lowest = only(additive(function, dtype), value)
    if name == "blocks":  # rows of ids may be empty
        assert lowest.found == "rows may be masked throughout, among ids that are no ranges"
    else:
        assert (lowest.kind, lowest.given - {"start", "end"}) == (kind, given_ - {"start", "end"})
    infinite = only(additive(function, dtype, -torch.inf), value)
    assert (infinite.kind, infinite.given) == (kind, given_)


def test_rows_that_cannot_be_empty_are_not_counted() -> None:
    for name in ("causal", "sliding", "packed", "packed sliding", "window"):
        function, value, _, given_ = HF[name]
        assert only(additive(function), value).given == given_
    assert only(additive(HF["padding"][0]), PADDING).given == {"causal", "query_ids", "key_ids", "start"}


def corner(size: int) -> Tensor:
    return torch.triu(torch.full((size, size), LOWEST), diagonal=1)


def in_place(mask: Tensor) -> Tensor:
    result = torch.ones(8, 8, dtype=torch.bool).tril()
    result &= mask.bool()[:, None, None, :][0, 0]
    return result.logical_and_(torch.ones(8, 1, dtype=torch.bool))


HANDWRITTEN = {
    "tril": (lambda x: torch.tril(torch.ones(8, 8)).bool(), "causal"),
    "tril of a view": (lambda x: torch.tril(torch.ones(8, 8, dtype=torch.bool)).view(1, 1, 8, 8), "causal"),
    "not triu": (lambda x: ~torch.triu(torch.ones(8, 8, dtype=torch.bool), diagonal=1), "causal"),
    "masked_fill": (lambda x: torch.zeros(8, 8).masked_fill(torch.ones(8, 8).tril() == 0, float("-inf")), "causal"),
    "triu of the lowest": (lambda x: corner(8), "causal"),
    "triu and padding": (lambda x: corner(8).masked_fill(x[:, None, None, :] == 0, LOWEST), "causal, padding"),
    "one minus": (lambda x: (1.0 - x.bool()[:, None, None, :].float()) * LOWEST, "padding"),
    "one minus, masked_fill": (
        lambda x: (1.0 - x[:, None, None, :].expand(2, 1, 8, 8).to(torch.float32)).masked_fill(
            (x[:, None, None, :].expand(2, 1, 8, 8).to(torch.float32) != 1.0), LOWEST
        ) * 1.0,
        None,
    ),
    "inverted": (
        lambda x: (lambda y: y.masked_fill(y.bool(), LOWEST))(1.0 - x[:, None, None].expand(2, 1, 8, 8).float()),
        "padding",
    ),
    "segments": (lambda x: x.unsqueeze(2).eq(x.unsqueeze(1)).unsqueeze(1), "ids"),
    "documents that end": (
        lambda x: (lambda d: (d[:, None, :, None] == d[:, None, None]) & torch.ones(8, 8).tril().bool())(
            (x == 0).cumsum(-1)
        ),
        "causal, documents",
    ),
    "cumulative lengths": (
        lambda x: (lambda d: (d[:, None] == d[None, :]) & (torch.arange(8)[:, None] >= torch.arange(8)))(
            torch.searchsorted(torch.tensor([2, 5, 8]), torch.arange(8), right=True)
        ),
        "causal, documents",
    ),
    "lengths": (lambda x: (torch.arange(8) < x.sum(-1, keepdim=True))[:, None, None, :], "range"),
    "queries too": (lambda x: x.bool()[:, None, :, None] & x.bool()[:, None, None, :], "padding, rows"),
    "written before it is read": (in_place, "causal, padding"),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_handwritten_masks(name: str) -> None:
    function, kind = HANDWRITTEN[name]
    one = only(function, HOLES)
    assert isinstance(one.found, str) if kind is None else one.kind == kind


def written(x: Tensor) -> Tensor:
    mask = x.bool()
    result = torch.ones(8, 8).tril().bool() & mask[:, None, None, :]
    mask[0, 0] = True
    return result


NEAR_MISSES = {
    "it compares data of queries and of keys": lambda x: x[:, None, :, None] <= x[:, None, None, :],
    "a union that is no range": lambda x: torch.ones(8, 8).tril().bool() | x.bool()[:, None, None, :],
    "it differs between heads": lambda x: (
        torch.arange(8) - torch.arange(8)[:, None] <= torch.arange(2)[:, None, None]
    ),
    "unknown: cat": lambda x: torch.cat([x[:1].expand(4, 8), x[1:].expand(4, 8)]) == 1,
    "it adds -10000.0, which is not the lowest torch.float32": lambda x: (
        (1.0 - x.bool()[:, None, None, :].float()) * -1e4
    ),
    "the lowest float16 does not outweigh every score": lambda x: torch.where(
        torch.ones(8, 8).tril().bool(), torch.zeros((), dtype=torch.float16), torch.finfo(torch.float16).min
    ),
    "setitem writes to what it is made of": written,
    "two equalities of which neither is known to be of ranges": lambda x: (
        (x[:, None, :, None] == x[:, None, None, :]) & (x[:, None, :, None] % 2 == x[:, None, None, :] % 2)
    ),
    "it is data": lambda x: x[:, None, None, :].float().expand(2, 1, 8, 8) * 1.0,
}  # fmt: skip


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_near_misses_tell_why(reason: str) -> None:
    found = only(NEAR_MISSES[reason], IDS).found
    assert isinstance(found, str)
    assert found.startswith(reason), found


def test_a_mask_that_is_given_is_data() -> None:
    given_ = torch.ones(8, 8).tril().bool()
    assert only(lambda mask: mask[None, None] & True, given_).found == "l_mask_ is data, of queries and keys"


def test_other_positions_than_those_of_the_documents() -> None:
    """That positions differ as indices do is only known of those that the documents were found by."""

    def mask(positions: Tensor, others: Tensor) -> Tensor:
        documents = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        return (documents[:, :, None] == documents[:, None, :])[:, None] & (
            others[:, None, None] <= others[:, None, :, None]
        )

    assert only(mask, POSITIONS, IDS).found == "it compares data of queries and of keys"
    assert only(lambda x: mask(x, x), POSITIONS).kind == "causal, documents"


def test_sizes_that_the_mask_does_not_tell() -> None:
    one = only(lambda x: x.bool()[:, None, None, :], HOLES, rows=5)
    assert one.arguments["query_ids"].shape == (1, 5)
    assert only(lambda x: x.bool()[:, None, None, :], HOLES, columns=9).found == "the mask's size 8 is not 9"


def test_few_nodes_are_left_of_a_causal_mask() -> None:
    one = only(HF["packed sliding"][0], POSITIONS)
    assert (one.arguments["causal"], one.arguments["window"]) == (True, 3)
    assert one.arguments["start"].dtype == torch.int32


@given(draws(conditions, 4), st.booleans())
def test_any_mask_is_read_exactly_or_declined(drawn: Draw, dynamic: bool) -> None:
    seen(compute(drawn), drawn.data(), dynamic=dynamic)


def test_most_masks_as_they_are_in_practice_are_recognised() -> None:
    recognised: list[bool] = []

    @settings(max_examples=15)
    @given(draws(conjunctions, 6))
    def read(drawn: Draw) -> None:
        recognised.extend(not isinstance(one.found, str) for one in seen(compute(drawn), drawn.data()))

    read()
    assert sum(recognised) > 0.7 * len(recognised)
