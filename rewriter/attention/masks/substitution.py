"""Substitute sums for atoms in the terms of an attention mask."""

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
    """Return a Sum or a condition with sums in the place of some of its atoms."""
    inside: Callable[[Any], Any] = lambda inner: substitute(inner, known)  # noqa: E731
    if isinstance(term, Sum):
        result = whole(term.constant)
        for atom_, times in term.parts:
            result = result + (known[atom_] if atom_ in known else _rebuilt(atom_, inside)) * times
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


def _rebuilt(atom_: Atom, inside: Callable[[Any], Any]) -> Sum:
    """Rebuild an atom with ``inside`` applied to the terms in it."""
    if isinstance(atom_, Leaf):
        return atom(Leaf(atom_.node, tuple(map(inside, atom_.index))))
    if isinstance(atom_, Floor):
        return floor(inside(atom_.term), atom_.by)
    if isinstance(atom_, Abs):
        return absolute(inside(atom_.term))
    if isinstance(atom_, Indicator):
        return indicator(inside(atom_.condition))
    if isinstance(atom_, Select):
        return select(inside(atom_.condition), inside(atom_.then), inside(atom_.otherwise))
    if isinstance(atom_, Extreme):
        return extreme(atom_.name, map(inside, atom_.terms))
    return atom(atom_)
