"""From the condition under which a query may attend to a key to what the attention op takes.

The condition is a conjunction; each part of it bounds the keys of a query (a range), is about the key or the query
alone, or says that something of the query equals something of the key.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from fastft.compat.fake_tensors import value_of
from fastft.reasons import Declined
from fastft.rewriter.attention.masks.reader import (
    Reader,
    as_condition,
    as_sum,
    call_name,
    size_of,
    steady,
)
from fastft.rewriter.attention.masks.substitution import substitute
from fastft.rewriter.attention.masks.terms import (
    And,
    Condition,
    Floor,
    Leaf,
    NonNegative,
    Not,
    Or,
    Sum,
    Var,
    Zero,
    atom,
    atoms,
    conjuncts,
    every,
    extreme,
    floor,
    non_negative,
    select,
    variable,
    variables,
    whole,
)


@dataclass
class Parts:
    """A condition, taken apart.  Sums and conditions are of b and q, those in keys of b and j.

    documents: elements at q and at j of tensors that never decrease along their last axis, and are equal.
    """

    q: Sum
    j: Sum
    causal: bool = False
    window: int = 0
    starts: list[Sum] = field(default_factory=list)
    ends: list[Sum] = field(default_factory=list)
    rows: list[Condition] = field(default_factory=list)
    keys: list[Condition] = field(default_factory=list)
    documents: list[tuple[Leaf, Leaf]] = field(default_factory=list)
    ids: tuple[Sum, Sum] | None = None
    reached: bool = False  # there is a key of every query's own number
    never_empty: bool = False
    kinds: dict[str, None] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The names of all that was found, in the same order always."""
        order = lambda kind: _KINDS.index(kind.split()[0])  # noqa: E731
        return ", ".join(sorted(self.kinds, key=order)) or "full"


_KINDS = ("causal", "window", "chunks", "documents", "ids", "prefix", "range", "padding", "rows")
Bound = tuple[str, Sum]  # "start" or "end", and where


def take_apart(condition: Condition, queries: Sum, keys: Sum, q: Sum, j: Sum, reader: Reader) -> Parts:
    """The parts of a condition; q and j: the indices in it, queries and keys: how many there are."""
    solver = _Solver(Parts(q, j), queries, keys, reader)
    condition = solver.within_documents(condition)
    for one in conjuncts(condition):
        solver.add(one)
    return solver.finish(condition)


class _Solver:
    def __init__(self, parts: Parts, queries: Sum, keys: Sum, reader: Reader) -> None:
        self.parts, self.queries, self.keys, self.reader = parts, queries, keys, reader
        self.far_ends: list[Sum] = []  # behind every query's own number, so that causal implies them

    def within_documents(self, condition: Condition) -> Condition:
        """Where documents are equal that begin wherever positions do not grow by 1, positions differ as indices do."""
        for one in conjuncts(condition):
            pair = self._equal_leaves(one)
            positions = pair and _positions(pair[1], self.parts.j, self.reader)
            if not pair or not positions:
                continue
            here = substitute(atom(positions), self._to_query())
            known = {positions: here + self.parts.j - self.parts.q}
            at_query, others = atoms(here)[0], [other for other in conjuncts(condition) if other is not one]
            both = [other for other in others if {positions, at_query} <= set(atoms(other))]
            kept = [other for other in others if other not in both]
            condition = every([one, *kept, *(substitute(other, known) for other in both)])
        return condition

    def _to_query(self) -> dict[Var, Sum]:
        return {one: self.parts.q for one in atoms(self.parts.j) if isinstance(one, Var)}

    def _equal_leaves(self, condition: Condition) -> tuple[Leaf, Leaf] | None:
        """The elements at q and at j of one tensor, along its last axis, if the condition is that they are equal."""
        if not isinstance(condition, Zero) or condition.term.constant or len(condition.term.parts) != 2:
            return None
        (first, times), (second, other) = condition.term.parts
        if times != -other or not isinstance(first, Leaf) or not isinstance(second, Leaf):
            return None
        if second.index and second.index[-1] == self.parts.q:
            first, second = second, first
        q, j = self.parts.q, self.parts.j
        last = q.parts and j.parts and first.index and first.index[-1] == q and second.index[-1] == j
        same = first.node is second.node and first.index[:-1] == second.index[:-1]
        return (first, second) if last and same and variables(*first.index[:-1]) <= {"b"} else None

    def add(self, one: Condition) -> None:
        """Sort a part in."""
        names = variables(one)
        if "h" in names:
            raise Declined("it differs between heads", "mask.per_head")
        pair = self._equal_leaves(one)
        if pair and never_decreases(pair[0].node, self.reader):
            self.parts.documents.append(pair)
            self._note("documents")
        elif (ranges := self._ranges(one)) is not None and ("j" in names):
            self._bound(ranges, substitute(one, self._to_query()) is True)
            if isinstance(one, Or):
                self._note("prefix")
            elif not self._is_plain(ranges):
                self._note(self._range_name(ranges))
        elif "q" not in names:
            self.parts.keys.append(one)
            self._note("padding")
        elif "j" not in names:
            self.parts.rows.append(one)
            self._note("rows")
        elif isinstance(one, Zero):
            self._equal(one)
        else:
            raise Declined(self._why_not(one))

    def _note(self, kind: str) -> None:
        self.parts.kinds[kind] = None

    def _ranges(self, one: Condition) -> list[Bound] | None:
        """The bounds that a part of the condition amounts to; all of them hold."""
        if isinstance(one, NonNegative):
            return self._linear(one.term)
        if isinstance(one, Zero):
            sides = [self._linear(one.term), self._linear(one.term * -1)]
            return None if sides[0] is None or sides[1] is None else sides[0] + sides[1]
        if isinstance(one, Or):
            return self._union(one)
        if isinstance(one, And):
            several = [self._ranges(part) for part in one.parts]
            return None if None in several else [bound for some_ in several if some_ is not None for bound in some_]
        return None

    def _linear(self, term: Sum) -> list[Bound] | None:
        """term >= 0, where j is in one part of it: by itself, or in a quotient that is rounded down."""
        inside = [(one, times) for one, times in term.parts if "j" in variables(atom(one))]
        if len(inside) != 1:
            return None
        one, times = inside[0]
        rest = term - atom(one) * times
        if isinstance(one, Floor) and abs(times) == 1:
            # x // c >= n where x >= c * n; x // c <= n where x < c * (n + 1)
            by = one.by
            return self._linear(one.term + rest * by if times > 0 else rest * by + (by - 1) - one.term)
        if not isinstance(one, Var):
            return None
        return [("start", floor(rest, times) * -1) if times > 0 else ("end", floor(rest, -times) + 1)]

    def _union(self, condition: Or) -> list[Bound] | None:
        """All of one kind: from the first start, or to the last end."""
        found: list[list[Bound] | Condition] = []
        for one in condition.parts:
            bounds_ = self._ranges(one) if "j" in variables(one) else one
            if bounds_ is None:
                return None
            found.append(bounds_)
        kinds = {kind for one in found if isinstance(one, list) for kind, _ in one}
        if len(kinds) != 1:
            return None
        (kind,) = kinds
        inner, outer = ("minimum", "maximum") if kind == "end" else ("maximum", "minimum")
        all_of, none_of = (self.keys, whole(0)) if kind == "end" else (whole(0), self.keys)
        terms = [
            extreme(inner, (term for _, term in one)) if isinstance(one, list) else select(one, all_of, none_of)
            for one in found
        ]
        return [(kind, extreme(outer, terms))]

    def _bound(self, ranges: list[Bound], beyond: bool) -> None:
        """beyond: they hold where j is q, so that their ends are beyond it."""
        for kind, term in ranges:
            behind = self._behind(term)
            if kind == "end" and behind == -1:
                self.parts.causal = True
                self._note("causal")
            elif kind == "start" and behind is not None and behind >= 0:
                self.parts.window = min(self.parts.window or behind + 1, behind + 1)
            else:
                (self.parts.starts if kind == "start" else self.far_ends if beyond else self.parts.ends).append(term)

    def _behind(self, term: Sum) -> int | None:
        """How far before the query's own number a bound is, if that is known."""
        return (self.parts.q - term).literal if self.parts.q.parts else None

    def _is_plain(self, ranges: list[Bound]) -> bool:
        """Whether causal and window say it all."""
        places = [(kind, self._behind(term)) for kind, term in ranges]
        return all(at is not None and (at == -1 if kind == "end" else at >= 0) for kind, at in places)

    def _range_name(self, ranges: list[Bound]) -> str:
        divided = {one.by for _, term in ranges for one in atoms(term) if isinstance(one, Floor)}
        return f"chunks of {min(divided)}" if len(ranges) == 2 and len(divided) == 1 else "range"

    def _equal(self, one: Zero) -> None:
        """Something of the query equals something of the key."""
        keys = [(part, times) for part, times in one.term.parts if "j" in variables(atom(part))]
        if any("q" in variables(atom(part)) for part, _ in keys):
            raise Declined(self._why_not(one))
        if self.parts.ids is not None:
            raise Declined("two equalities of which neither is known to be of ranges")
        side = Sum(tuple(keys), 0)
        self.parts.ids = one.term - side, side * -1
        self._note("ids")

    def _why_not(self, one: Condition) -> str:
        for leaf in atoms(one):
            if isinstance(leaf, Leaf) and {"q", "j"} <= variables(atom(leaf)):
                return self.reader.unknown(leaf.node) or f"{leaf.node} is data, of queries and keys"
        if isinstance(one, Or):
            return "a union that is no range"
        if isinstance(one, Not):
            return "an inequality that is no range"
        return "it compares data of queries and of keys"

    def finish(self, condition: Condition) -> Parts:
        """Leave out what the rest implies."""
        parts, q = self.parts, self.parts.q
        at_query = substitute(condition, self._to_query())
        parts.reached = non_negative(self.keys - 1 - q) is True
        parts.never_empty = parts.reached and at_query is True
        if not (parts.causal and parts.reached):
            parts.ends += self.far_ends
        parts.starts = [one for one in parts.starts if non_negative(one * -1) is not True]
        parts.ends = [one for one in parts.ends if non_negative(one - self.keys) is not True]
        if parts.window and non_negative(q * -1 + parts.window - 1) is True:
            parts.window = 0
        if parts.window:
            parts.kinds[f"window {parts.window}"] = None
        return parts


def never_decreases(node: Node, reader: Reader) -> bool:
    """Whether a tensor's rows never decrease: counts, and where growing numbers are found in a list."""
    name, rank, args = call_name(node), value_of(node).dim(), node.args
    if name == "cumsum":
        dim = args[1] if len(args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
        counted = isinstance(args[0], Node) and value_of(args[0]).dtype == torch.bool if args else False
        return counted and isinstance(dim, int) and dim % rank == rank - 1
    if name not in ("searchsorted", "bucketize") or len(args) != 2 or not set(node.kwargs) <= _SEARCHES:
        return False
    numbers = args[1] if name == "searchsorted" else args[0]
    return isinstance(numbers, Node) and rank > 0 and value_of(numbers).dim() == rank and _grows(numbers, reader)


_SEARCHES = {"right", "side", "out_int32"}


def _grows(node: Node, reader: Reader) -> bool:
    """Whether every row of integers grows by the same number that is not negative."""
    *lengths, last = (size_of(length) for length in value_of(node).shape)
    others = [variable(f"axis {axis}", length) for axis, length in enumerate(lengths)]
    at = variable("k", last)
    here, before = (as_sum(reader.value(node, (*others, at - back))) for back in (0, 1))
    change = (here - before).literal if here is not None and before is not None else None
    return change is not None and change >= 0


def _positions(document: Leaf, j: Sum, reader: Reader) -> Leaf | None:
    """Of documents counted where positions do not grow by 1: the position at j."""
    if not never_decreases(document.node, reader):
        return None
    counted = document.node.args[0]
    breaks = as_condition(reader.value(counted, document.index)) if isinstance(counted, Node) else None
    term = breaks.condition.term if isinstance(breaks, Not) and isinstance(breaks.condition, Zero) else None
    if term is None or len(term.parts) != 1 or term.constant != -1:
        return None
    leaf, times = term.parts[0]
    if times != 1 or not isinstance(leaf, Leaf) or leaf.index[-1] != j or call_name(leaf.node) != "diff":
        return None
    return _differences_of(leaf, reader)


def _differences_of(leaf: Leaf, reader: Reader) -> Leaf | None:
    """The element whose difference to the one before it this is."""
    node, last = leaf.node, value_of(leaf.node).dim() - 1
    source, prepend = node.args[0], node.kwargs.get("prepend")
    dim = node.kwargs.get("dim", -1)
    if len(node.args) != 1 or not set(node.kwargs) <= {"prepend", "dim"} or not isinstance(dim, int):
        return None
    if dim % (last + 1) != last or not isinstance(source, Node) or not isinstance(prepend, Node):
        return None
    if not steady(value_of(prepend).shape[-1] == 1):
        return None
    value = reader.value(source, leaf.index)
    one = value.parts[0][0] if isinstance(value, Sum) and len(value.parts) == 1 else None
    if not isinstance(one, Leaf) or value != atom(one) or not one.index or one.index[-1] != leaf.index[-1]:
        return None
    return one
