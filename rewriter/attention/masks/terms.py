"""What an attention mask says of one query and one key, as terms: integers, and conditions on them.

A Sum is an integer: a constant and atoms with factors.  Atoms are the index variables (b, h, q, j), sizes, elements of
tensors at indices that are Sums, and what is not linear in those.  A condition is True, False, or one of Positive,
Zero, Truth, Not, And, Or.  Only the functions in lower case make them: these fold what is certain, and two terms that
they make equal are equal.  Integers are taken not to overflow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Union

from torch.fx import Node

MOST_CHOICES = 3  # indicators in one comparison that are told apart case by case


@dataclass(frozen=True)
class Var:
    """An index: 0 <= name < size."""

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
    """The smallest or the largest of terms; name: of torch's function of two."""

    name: str
    terms: tuple[Sum, ...]


@dataclass(frozen=True)
class Sum:
    """A constant and atoms with factors that are not 0, in the order of their spelling."""

    parts: tuple[tuple[Atom, int], ...]
    constant: int

    def __add__(self, other: Sum | int) -> Sum:
        other = whole(other)
        return total((*self.parts, *other.parts), self.constant + other.constant)

    def __sub__(self, other: Sum | int) -> Sum:
        return self + whole(other) * -1

    def __mul__(self, factor: int) -> Sum:
        return total(((one, factor * times) for one, times in self.parts), self.constant * factor)

    @property
    def literal(self) -> int | None:
        """The number that this is, if it is one."""
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
    """Of a Zero or a Truth: everything else has its contrary."""

    condition: Condition


@dataclass(frozen=True)
class And:
    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Or:
    parts: tuple[Condition, ...]


Atom = Union[Var, Size, Leaf, Floor, Abs, Indicator, Select, Extreme]  # noqa: UP007
Condition = Union[bool, NonNegative, Zero, Truth, Not, And, Or]  # noqa: UP007


def whole(value: Sum | int) -> Sum:
    return value if isinstance(value, Sum) else Sum((), value)


def atom(one: Atom) -> Sum:
    return Sum(((one, 1),), 0)


def total(parts: Iterable[tuple[Atom, int]], constant: int = 0) -> Sum:
    """The sum of these, each atom once."""
    found: dict[Atom, int] = {}
    for one, times in parts:
        found[one] = found.get(one, 0) + times
    kept = [(one, times) for one, times in found.items() if times]
    return Sum(tuple(sorted(kept, key=repr) if len(kept) > 1 else kept), constant)


def variable(name: str, size: Sum) -> Sum:
    return whole(0) if size.literal == 1 else atom(Var(name, size))


def floor(term: Sum, by: int) -> Sum:
    """term // by; what is divisible comes out."""
    outside = total(((one, times // by) for one, times in term.parts if times % by == 0), term.constant // by)
    inside = total(((one, times) for one, times in term.parts if times % by), term.constant % by)
    return outside + (atom(Floor(inside, by)) if inside.parts else 0)


def absolute(term: Sum) -> Sum:
    low, high = bounds(term)
    if low is not None and low >= 0:
        return term
    return term * -1 if high is not None and high <= 0 else atom(Abs(term))


def indicator(condition: Condition) -> Sum:
    return whole(int(condition)) if isinstance(condition, bool) else atom(Indicator(condition))


def select(condition: Condition, then: Sum, otherwise: Sum) -> Sum:
    if isinstance(condition, bool) or then == otherwise:
        return then if condition else otherwise
    difference = (then - otherwise).literal
    if difference is not None:
        return otherwise + indicator(condition) * difference
    return atom(Select(condition, then, otherwise))


def extreme(name: str, terms: Iterable[Sum]) -> Sum:
    """The smallest or largest: ``minimum`` or ``maximum``; those that another one bounds for certain are left out."""
    kept: list[Sum] = []
    sign = 1 if name == "minimum" else -1
    for term in terms:
        if not any(non_negative((term - other) * sign) is True for other in kept):
            kept = [other for other in kept if non_negative((other - term) * sign) is not True]
            kept.append(term)
    return kept[0] if len(kept) == 1 else atom(Extreme(name, tuple(kept)))


def bounds(term: Sum) -> tuple[int | None, int | None]:
    """Numbers that the term lies between for certain, None where there is none."""
    return _low(term), None if (low := _low(term * -1)) is None else -low


def _low(term: Sum) -> int | None:
    """Variables take their first or last value; then every atom is as low as it gets."""
    indices = [(one, times) for one, times in term.parts if isinstance(one, Var)]
    for var, times in indices:
        term = term - atom(var) * times + ((var.size - 1) * times if times < 0 else 0)
    result = term.constant
    for one, times in term.parts:
        low, high = _range(one)
        bound = low if times > 0 else high
        if bound is None:
            return None
        result += bound * times
    return result


def _range(one: Atom) -> tuple[int | None, int | None]:
    if isinstance(one, Indicator):
        return 0, 1
    if isinstance(one, Abs):
        return 0, None
    if isinstance(one, Size):
        return one.low, None
    if isinstance(one, Floor):
        low, high = bounds(one.term)
        return None if low is None else low // one.by, None if high is None else high // one.by
    if isinstance(one, (Select, Extreme)):
        several = one.terms if isinstance(one, Extreme) else (one.then, one.otherwise)
        lows, highs = zip(*map(bounds, several), strict=True)
        return (None if None in lows else min(lows)), (None if None in highs else max(highs))
    return None, None


def non_negative(term: Sum) -> Condition:
    """term >= 0."""
    low, high = bounds(term)
    if low is not None and low >= 0:
        return True
    if high is not None and high < 0:
        return False
    for one, times in term.parts:
        if isinstance(one, Abs):
            rest = term - atom(one) * times
            either = [non_negative(rest + one.term * times), non_negative(rest - one.term * times)]
            return every(either) if times < 0 else some(either)
    if _by_cases(term):
        return some(condition for condition, number in cases(term) if number >= 0)
    divisor = math.gcd(*(times for _, times in term.parts))
    return NonNegative(Sum(tuple((one, times // divisor) for one, times in term.parts), term.constant // divisor))


def zero(term: Sum) -> Condition:
    """term == 0."""
    low, high = bounds(term)
    if low == high == 0:
        return True
    divisor = math.gcd(*(times for _, times in term.parts))
    if (low is not None and low > 0) or (high is not None and high < 0) or term.constant % max(divisor, 1):
        return False
    if _by_cases(term):
        return some(condition for condition, number in cases(term) if number == 0)
    divisor = divisor if term.parts[0][1] > 0 else -divisor
    return Zero(Sum(tuple((one, times // divisor) for one, times in term.parts), term.constant // divisor))


def _by_cases(term: Sum) -> bool:
    """Whether only conditions decide what this is, and they are better told one by one."""
    few = len(term.parts) <= MOST_CHOICES and all(isinstance(one, Indicator) for one, _ in term.parts)
    return few and (len(term.parts) == 1 or not {"q", "j"} <= variables(term))


def cases(term: Sum) -> list[tuple[Condition, int]]:
    """Conditions that exclude each other, and the number under each, of a sum of indicators."""
    conditions = [one.condition for one, _ in term.parts if isinstance(one, Indicator)]
    assert len(conditions) == len(term.parts)
    result: list[tuple[Condition, int]] = []
    for held in itertools.product((True, False), repeat=len(conditions)):
        number = term.constant + sum(times for (_, times), yes in zip(term.parts, held, strict=True) if yes)
        all_of = every(one if yes else negate(one) for one, yes in zip(conditions, held, strict=True))
        if all_of is not False:
            result.append((all_of, number))
    return result


def truth(leaf: Leaf) -> Condition:
    return Truth(leaf)


def negate(condition: Condition) -> Condition:
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
    """All of them."""
    return _joined(And, conditions, True)


def some(conditions: Iterable[Condition]) -> Condition:
    """At least one of them."""
    return _joined(Or, conditions, False)


def _joined(kind: Any, conditions: Iterable[Condition], neutral: bool) -> Condition:
    found: dict[Condition, None] = {}
    for one in conditions:
        if one is (not neutral):
            return one
        if one is not neutral:
            found.update(dict.fromkeys(one.parts if isinstance(one, kind) else (one,)))
    if any(negate(one) in found for one in found if not isinstance(one, (And, Or))):
        return not neutral
    parts = tuple(found)
    return neutral if not parts else parts[0] if len(parts) == 1 else kind(parts)


def conjuncts(condition: Condition) -> tuple[Condition, ...]:
    """The conditions that must all hold."""
    return condition.parts if isinstance(condition, And) else () if condition is True else (condition,)


def disjuncts(condition: Condition) -> tuple[Condition, ...]:
    """The conditions one of which must hold."""
    return condition.parts if isinstance(condition, Or) else () if condition is False else (condition,)


def variables(*terms: Any) -> set[str]:
    """The names of the index variables in terms, atoms and conditions."""
    return {one.name for one in atoms(*terms) if isinstance(one, Var)}


def atoms(*terms: Any) -> list[Atom]:
    """All atoms in these, those inside others too, but not the sizes of variables."""
    found: dict[Any, None] = {}
    pending = list(terms)
    while pending:
        term = pending.pop()
        if isinstance(term, Sum):
            pending += [one for one, _ in term.parts]
        elif isinstance(term, (And, Or)):
            pending += term.parts
        elif term not in found and not isinstance(term, bool):
            found[term] = None
            pending += _inside(term)
    return [one for one in found if isinstance(one, (Var, Size, Leaf, Floor, Abs, Indicator, Select, Extreme))]


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
