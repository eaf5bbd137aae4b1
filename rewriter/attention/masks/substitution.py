"""Terms of an attention mask with other terms in the place of some of their atoms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastft.rewriter.attention.masks.terms import (
    Abs,
    And,
    Atom,
    Extreme,
    Floor,
    Indicator,
    Leaf,
    NonNegative,
    Not,
    Or,
    Select,
    Sum,
    Truth,
    Zero,
    absolute,
    atom,
    every,
    extreme,
    floor,
    indicator,
    negate,
    non_negative,
    select,
    some,
    truth,
    whole,
    zero,
)


def substitute(term: Any, known: Mapping[Any, Sum]) -> Any:
    """A Sum or a condition with sums in the place of atoms."""
    inside: Callable[[Any], Any] = lambda one: substitute(one, known)  # noqa: E731
    if isinstance(term, Sum):
        result = whole(term.constant)
        for one, times in term.parts:
            result = result + (known[one] if one in known else _rebuilt(one, inside)) * times
        return result
    if isinstance(term, NonNegative):
        return non_negative(inside(term.term))
    if isinstance(term, Zero):
        return zero(inside(term.term))
    if isinstance(term, Truth):
        return truth(Leaf(term.leaf.node, tuple(map(inside, term.leaf.index))))
    if isinstance(term, Not):
        return negate(inside(term.condition))
    if isinstance(term, (And, Or)):
        return (every if isinstance(term, And) else some)(map(inside, term.parts))
    return term


def _rebuilt(one: Atom, inside: Callable[[Any], Any]) -> Sum:
    if isinstance(one, Leaf):
        return atom(Leaf(one.node, tuple(map(inside, one.index))))
    if isinstance(one, Floor):
        return floor(inside(one.term), one.by)
    if isinstance(one, Abs):
        return absolute(inside(one.term))
    if isinstance(one, Indicator):
        return indicator(inside(one.condition))
    if isinstance(one, Select):
        return select(inside(one.condition), inside(one.then), inside(one.otherwise))
    if isinstance(one, Extreme):
        return extreme(one.name, map(inside, one.terms))
    return atom(one)
