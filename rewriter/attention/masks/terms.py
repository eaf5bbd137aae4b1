"""Terms that describe an attention mask for one query and one key: integers, and conditions on them.

A Sum is an integer: a constant and atoms with factors.  Atoms are the index variables (b, h, q, j), sizes, elements of
tensors at indices that are Sums, and what is not linear in those.  A condition is True, False, or one of NonNegative,
Zero, Truth, Not, And, Or.  Only the functions in lower case construct them: these fold what is certain, and terms that
they make equal are equal values.  Integers are assumed not to overflow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Union

from torch.fx import Node

MOST_CHOICES = 3  # indicators in one comparison that are distinguished case by case


@dataclass(frozen=True)
class Var:
    """An index variable: 0 <= name < size."""

    name: str
    size: Sum


@dataclass(frozen=True)
class Size:
    """A symbolic size or other number of the graph, at least ``low`` if that is known."""

    spelling: str
    low: int | None = field(default=0, compare=False)


@dataclass(frozen=True)
class Leaf:
    """An element of a tensor."""

    node: Node
    index: tuple[Sum, ...]


@dataclass(frozen=True)
class Floor:
    """term // by, rounded down; by is positive."""

    term: Sum
    by: int


@dataclass(frozen=True)
class Abs:
    """|term|."""

    term: Sum


@dataclass(frozen=True)
class Indicator:
    """1 where the condition holds, else 0."""

    condition: Condition


@dataclass(frozen=True)
class Select:
    """then where the condition holds, else otherwise."""

    condition: Condition
    then: Sum
    otherwise: Sum


@dataclass(frozen=True)
class Extreme:
    """The minimum or maximum of terms; name: of torch's binary function."""

    name: str
    terms: tuple[Sum, ...]


@dataclass(frozen=True)
class Sum:
    """A constant and atoms with nonzero factors, sorted by their repr."""

    parts: tuple[tuple[Atom, int], ...]
    constant: int

    def __add__(self, other: Sum | int) -> Sum:
        other = whole(other)
        return total((*self.parts, *other.parts), self.constant + other.constant)

    def __sub__(self, other: Sum | int) -> Sum:
        return self + whole(other) * -1

    def __mul__(self, factor: int) -> Sum:
        return total(((atom_, factor * times) for atom_, times in self.parts), self.constant * factor)

    @property
    def literal(self) -> int | None:
        """The constant, if there are no atoms."""
        return None if self.parts else self.constant


@dataclass(frozen=True)
class NonNegative:
    """term >= 0."""

    term: Sum


@dataclass(frozen=True)
class Zero:
    """term == 0."""

    term: Sum


@dataclass(frozen=True)
class Truth:
    """An element of a bool tensor."""

    leaf: Leaf


@dataclass(frozen=True)
class Not:
    """The negation of a Zero or a Truth: other conditions have one of their own."""

    condition: Condition


@dataclass(frozen=True)
class And:
    """All of two or more conditions."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Or:
    """At least one of two or more conditions."""

    parts: tuple[Condition, ...]


Atom = Union[Var, Size, Leaf, Floor, Abs, Indicator, Select, Extreme]  # noqa: UP007
Condition = Union[bool, NonNegative, Zero, Truth, Not, And, Or]  # noqa: UP007


def whole(value: Sum | int) -> Sum:
    """Return a number as a Sum; a Sum as it is."""
    return value if isinstance(value, Sum) else Sum((), value)


def atom(value: Atom) -> Sum:
    """Return an atom as a Sum."""
    return Sum(((value, 1),), 0)


def total(parts: Iterable[tuple[Atom, int]], constant: int = 0) -> Sum:
    """Return the sum of these atoms with factors, each atom once."""
    factors: dict[Atom, int] = {}
    for atom_, times in parts:
        factors[atom_] = factors.get(atom_, 0) + times
    kept = [(atom_, times) for atom_, times in factors.items() if times]
    return Sum(tuple(sorted(kept, key=repr) if len(kept) > 1 else kept), constant)


def variable(name: str, size: Sum) -> Sum:
    """Return an index variable as a Sum; it is 0 in an axis of size 1."""
    return whole(0) if size.literal == 1 else atom(Var(name, size))


def floor(term: Sum, by: int) -> Sum:
    """Return term // by, with what is divisible taken out."""
    outside = total(((atom_, times // by) for atom_, times in term.parts if times % by == 0), term.constant // by)
    inside = total(((atom_, times) for atom_, times in term.parts if times % by), term.constant % by)
    return outside + (atom(Floor(inside, by)) if inside.parts else 0)


def absolute(term: Sum) -> Sum:
    """Return |term|."""
    low, high = bounds(term)
    if low is not None and low >= 0:
        return term
    return term * -1 if high is not None and high <= 0 else atom(Abs(term))


def indicator(condition: Condition) -> Sum:
    """Return 1 where the condition holds, else 0."""
    return whole(int(condition)) if isinstance(condition, bool) else atom(Indicator(condition))


def select(condition: Condition, then: Sum, otherwise: Sum) -> Sum:
    """Return ``then`` where the condition holds, else ``otherwise``."""
    if isinstance(condition, bool) or then == otherwise:
        return then if condition else otherwise
    difference = (then - otherwise).literal
    if difference is not None:
        return otherwise + indicator(condition) * difference
    return atom(Select(condition, then, otherwise))


def extreme(name: str, terms: Iterable[Sum]) -> Sum:
    """Return the ``minimum`` or ``maximum`` of terms, without those that another is known to bound."""
    kept: list[Sum] = []
    sign = 1 if name == "minimum" else -1
    for term in terms:
        if not any(non_negative((term - other) * sign) is True for other in kept):
            kept = [other for other in kept if non_negative((other - term) * sign) is not True]
            kept.append(term)
    return kept[0] if len(kept) == 1 else atom(Extreme(name, tuple(kept)))


def bounds(term: Sum) -> tuple[int | None, int | None]:
    """Return the smallest and largest known bound of a term, None where there is none."""
    return _low(term), None if (low := _low(term * -1)) is None else -low


def _low(term: Sum) -> int | None:
    """Return a lower bound: variables at their first or last value, every other atom at its own bound."""
    indices = [(atom_, times) for atom_, times in term.parts if isinstance(atom_, Var)]
    for var, times in indices:
        term = term - atom(var) * times + ((var.size - 1) * times if times < 0 else 0)
    result = term.constant
    for atom_, times in term.parts:
        low, high = _range(atom_)
        bound = low if times > 0 else high
        if bound is None:
            return None
        result += bound * times
    return result


def _range(atom_: Atom) -> tuple[int | None, int | None]:
    """Return the bounds of an atom."""
    if isinstance(atom_, Indicator):
        return 0, 1
    if isinstance(atom_, Abs):
        return 0, None
    if isinstance(atom_, Size):
        return atom_.low, None
    if isinstance(atom_, Floor):
        low, high = bounds(atom_.term)
        return None if low is None else low // atom_.by, None if high is None else high // atom_.by
    if isinstance(atom_, (Select, Extreme)):
        several = atom_.terms if isinstance(atom_, Extreme) else (atom_.then, atom_.otherwise)
        lows, highs = zip(*map(bounds, several), strict=True)
        return (None if None in lows else min(lows)), (None if None in highs else max(highs))
    return None, None


def non_negative(term: Sum) -> Condition:
    """Return the condition term >= 0."""
    low, high = bounds(term)
    if low is not None and low >= 0:
        return True
    if high is not None and high < 0:
        return False
    for atom_, times in term.parts:
        if isinstance(atom_, Abs):
            rest = term - atom(atom_) * times
            either = [non_negative(rest + atom_.term * times), non_negative(rest - atom_.term * times)]
            return every(either) if times < 0 else some(either)
    if _by_cases(term):
        return some(condition for condition, number in cases(term) if number >= 0)
    divisor = math.gcd(*(times for _, times in term.parts))
    return NonNegative(Sum(tuple((atom_, times // divisor) for atom_, times in term.parts), term.constant // divisor))


def zero(term: Sum) -> Condition:
    """Return the condition term == 0."""
    low, high = bounds(term)
    if low == high == 0:
        return True
    divisor = math.gcd(*(times for _, times in term.parts))
    if (low is not None and low > 0) or (high is not None and high < 0) or term.constant % max(divisor, 1):
        return False
    if _by_cases(term):
        return some(condition for condition, number in cases(term) if number == 0)
    divisor = divisor if term.parts[0][1] > 0 else -divisor
    return Zero(Sum(tuple((atom_, times // divisor) for atom_, times in term.parts), term.constant // divisor))


def _by_cases(term: Sum) -> bool:
    """Tell whether a term has only a few indicators, which are better compared case by case."""
    few = len(term.parts) <= MOST_CHOICES and all(isinstance(atom_, Indicator) for atom_, _ in term.parts)
    return few and (len(term.parts) == 1 or not {"q", "j"} <= variables(term))


def cases(term: Sum) -> list[tuple[Condition, int]]:
    """Return mutually exclusive conditions and the number under each, for a sum of indicators."""
    conditions = [atom_.condition for atom_, _ in term.parts if isinstance(atom_, Indicator)]
    assert len(conditions) == len(term.parts)
    result: list[tuple[Condition, int]] = []
    for held in itertools.product((True, False), repeat=len(conditions)):
        number = term.constant + sum(times for (_, times), yes in zip(term.parts, held, strict=True) if yes)
        all_of = every(condition if yes else negate(condition) for condition, yes in zip(conditions, held, strict=True))
        if all_of is not False:
            result.append((all_of, number))
    return result


def truth(leaf: Leaf) -> Condition:
    """Return the condition that an element of a bool tensor is True."""
    return Truth(leaf)


def negate(condition: Condition) -> Condition:
    """Return the negation of a condition."""
    if isinstance(condition, bool):
        return not condition
    if isinstance(condition, NonNegative):
        return non_negative(condition.term * -1 - 1)
    if isinstance(condition, Not):
        return condition.condition
    if isinstance(condition, (And, Or)):
        return (some if isinstance(condition, And) else every)(map(negate, condition.parts))
    return Not(condition)


def every(conditions: Iterable[Condition]) -> Condition:
    """Return the conjunction of conditions."""
    return _joined(And, conditions, True)


def some(conditions: Iterable[Condition]) -> Condition:
    """Return the disjunction of conditions."""
    return _joined(Or, conditions, False)


def _joined(kind: Any, conditions: Iterable[Condition], neutral: bool) -> Condition:
    distinct: dict[Condition, None] = {}
    for condition in conditions:
        if condition is (not neutral):
            return condition
        if condition is not neutral:
            distinct.update(dict.fromkeys(condition.parts if isinstance(condition, kind) else (condition,)))
    if any(negate(condition) in distinct for condition in distinct if not isinstance(condition, (And, Or))):
        return not neutral
    parts = tuple(distinct)
    return neutral if not parts else parts[0] if len(parts) == 1 else kind(parts)


def conjuncts(condition: Condition) -> tuple[Condition, ...]:
    """Return the conditions that must all hold."""
    return condition.parts if isinstance(condition, And) else () if condition is True else (condition,)


def disjuncts(condition: Condition) -> tuple[Condition, ...]:
    """Return the conditions of which one must hold."""
    return condition.parts if isinstance(condition, Or) else () if condition is False else (condition,)


def variables(*terms: Any) -> set[str]:
    """Return the names of the index variables in terms, atoms and conditions."""
    return {atom_.name for atom_ in atoms(*terms) if isinstance(atom_, Var)}


def atoms(*terms: Any) -> list[Atom]:
    """List all atoms in these, nested ones too, but not the sizes of variables."""
    seen: dict[Any, None] = {}
    pending = list(terms)
    while pending:
        term = pending.pop()
        if isinstance(term, Sum):
            pending += [atom_ for atom_, _ in term.parts]
        elif isinstance(term, (And, Or)):
            pending += term.parts
        elif term not in seen and not isinstance(term, bool):
            seen[term] = None
            pending += _inside(term)
    return [atom_ for atom_ in seen if isinstance(atom_, (Var, Size, Leaf, Floor, Abs, Indicator, Select, Extreme))]


def _inside(term: Any) -> tuple[Any, ...]:
    if isinstance(term, Leaf):
        return term.index
    if isinstance(term, (Floor, Abs, NonNegative, Zero)):
        return (term.term,)
    if isinstance(term, Truth):
        return (term.leaf,)
    if isinstance(term, (Not, Indicator)):
        return (term.condition,)
    if isinstance(term, Select):
        return term.condition, term.then, term.otherwise
    return term.terms if isinstance(term, Extreme) else ()
