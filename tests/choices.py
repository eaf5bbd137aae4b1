"""Of many combinations so few that any two choices still meet: a fault that hangs on one choice or on two is seen."""

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case")


def pairwise(
    cases: Sequence[Case], choices: Callable[[Case], Iterable[Hashable]], kept: Sequence[Case] = ()
) -> list[Case]:
    """Of these cases, in their order, so many that any two choices that meet in one meet in one that is left.

    kept: cases that are among them in any way.
    """
    pairs = [set(itertools.combinations(choices(case), 2)) for case in cases]
    chosen = {at for at, case in enumerate(cases) if any(case is one for one in kept)}
    missing = set().union(*pairs).difference(*(pairs[at] for at in chosen))
    while missing:
        best = max(range(len(cases)), key=lambda at: len(pairs[at] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [case for at, case in enumerate(cases) if at in chosen]


def in_pairs(taken: Callable[..., bool] = lambda **_: True, **choices: Iterable[Any]) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize`` for all of these names, with combinations in which any two of their values meet.

    taken: whether a combination is one at all.
    """
    rows = [row for row in itertools.product(*choices.values()) if taken(**dict(zip(choices, row, strict=True)))]
    chosen = pairwise(rows, lambda row: list(enumerate(row)))
    return pytest.mark.parametrize(tuple(choices), chosen, ids=lambda value: str(value).removeprefix("torch."))
