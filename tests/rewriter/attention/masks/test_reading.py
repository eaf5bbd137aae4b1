"""Attention masks read out of graphs that are recorded without Dynamo: many, and spellings that are easily misread."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from mask_programs import Draw, compute, conditions, conjunctions, draws
from mask_reading import Reading, Seen
from recording import record
from torch import Tensor

X = torch.tensor([[3, 1, 2, 2, 5, 0, 1, 7], [0, 0, 4, 4, 4, 1, 8, 2]])
LOWEST = torch.finfo(torch.float32).min


def seen(function: Callable, *values: Any, **sizes: int) -> list[Seen]:
    """Each mask that a function returns; those that are recognised say exactly what they did."""
    gm, recording = record(function, *values)
    reading = Reading(gm, sizes)
    reading.run(*recording.inputs)
    return reading.seen()


def test_a_recording_computes_what_the_function_does() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        ones = torch.ones(8, 8, dtype=torch.bool).tril()
        ones &= x[0, None] > 1
        return ones, x.T.float().masked_fill(x.T == 0, 2.0), x[:, torch.arange(3)], torch.diff(x, prepend=x[:, :1])

    gm, recording = record(function, X)
    for mine, other in zip(gm(*recording.inputs), function(X), strict=True):
        torch.testing.assert_close(mine, other)


@settings(max_examples=40)
@given(draws(conditions, 3))
def test_any_mask_is_read_exactly_or_declined(drawn: Draw) -> None:
    seen(compute(drawn), drawn.data())


def test_most_masks_as_they_are_in_practice_are_recognised() -> None:
    recognised: list[bool] = []

    @settings(max_examples=25)
    @given(draws(conjunctions, 3))
    def read(drawn: Draw) -> None:
        recognised.extend(not isinstance(one.found, str) for one in seen(compute(drawn), drawn.data()))

    read()
    assert sum(recognised) > 0.7 * len(recognised)


def keys_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function's result as the keys of every query."""
    return lambda x: function(x)[:, None, None, :].expand(2, 1, 8, 8)


def one_equals_minus_five(x: Tensor) -> Tensor:
    """Counted along one axis, and compared along the other."""
    places = torch.arange(8)
    counts = (places[:, None] - places == 5).long().cumsum(0)
    return torch.diff(counts.cumsum(0), dim=1) == 0


def cubes(x: Tensor) -> Tensor:
    places = torch.arange(8)
    return places[:, None, None] + places[:, None] * 10 + places * 100


def signed_zero(x: Tensor) -> Tensor:
    """-inf where a key comes later."""
    zeros = torch.where(torch.arange(8)[:, None] >= torch.arange(8), 0.0, -0.0)
    return torch.where(torch.ones(8, 8) / zeros > 0, 0.0, -torch.inf)


ODD = {
    "arange(start, end=)": lambda x: torch.arange(3, end=11)[None] <= torch.arange(8)[:, None],
    "arange(start=, end=)": lambda x: torch.arange(start=3, end=11)[None] <= torch.arange(8)[:, None],
    "arange(start, end, step=)": lambda x: torch.arange(0, 16, step=2)[None] <= torch.arange(8)[:, None],
    "a comparison in place of numbers": lambda x: torch.ones(8, 8).tril().lt_(torch.ones(8, 8)),
    "a float that rounds its neighbour": keys_of(lambda x: (x + (2**24 - 1)) == 2.0**24),
    "ends that 32 bits do not hold": keys_of(lambda x: torch.arange(8) < x[:, :1] - (2**31 + 10)),
    "starts that 32 bits do not hold": keys_of(lambda x: torch.arange(8) >= x[:, :1] + (2**32 - 4)),
    "counted along two axes": one_equals_minus_five,
    "a place between slices": lambda x: cubes(x)[torch.tensor(3), :, torch.arange(8)] <= 230,
    "divided by a zero with a sign": signed_zero,
    "no integers": lambda x: torch.arange(0.5, 8.5)[None] <= torch.arange(8)[:, None],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_spellings(name: str) -> None:
    seen(ODD[name], X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_that_are_compared_in_the_default_dtype(dtype: torch.dtype) -> None:
    """torch rounds an integer before it compares it with a float."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for limit in (2.0**8, 2.0**11, 2.0**24, 2.0**24 - 1):
            for comparison in (torch.eq, torch.le, torch.gt):
                seen(keys_of(lambda x: comparison(x + int(limit) - 1, limit)), X)  # noqa: B023
    finally:
        torch.set_default_dtype(before)


def lowest(allowed: Tensor) -> Tensor:
    return torch.where(allowed, 0.0, LOWEST)


def causal() -> Tensor:
    return torch.arange(8)[:, None] >= torch.arange(8)


def documents(x: Tensor) -> Tensor:
    numbers = (x == 0).cumsum(-1)
    return numbers[:, None, :, None] == numbers[:, None, None, :]


KNOWN = {
    "documents": documents,
    "causal documents": lambda x: documents(x) & causal(),
    "starts": lambda x: keys_of(lambda x: (torch.arange(8) >= x[:, :1]) & (torch.arange(8) >= x[:, 1:2] - 1))(x),
    "ends": lambda x: keys_of(lambda x: (torch.arange(8) < x[:, :1] + 3) & (torch.arange(8) < x[:, 3:4] + 2))(x),
    "rows": lambda x: causal() & x.bool()[:, None, :, None],
    "ids and padding": lambda x: (x[:, None, :, None] == x[:, None, None, :]) & (x > 0)[:, None, None, :],
    "a window over padding": lambda x: lowest(
        causal() & (torch.arange(8)[:, None] - torch.arange(8) < 2) & (x > 1)[:, None, None, :]
    ),
    "rows without a key": lambda x: lowest((torch.arange(8) < torch.arange(8)[:, None] - 3)[None, None]),
    "a window of lengths": lambda x: lowest(
        (torch.arange(8)[:, None] - torch.arange(8) < 3) & (torch.arange(8) < x[:, :1])[:, None, None]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_masks_that_are_recognised(name: str) -> None:
    (one,) = seen(KNOWN[name], X)
    assert not isinstance(one.found, str), one.found
