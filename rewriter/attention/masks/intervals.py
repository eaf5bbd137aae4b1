"""Translate the condition under which a query may attend to a key into what the attention op takes.

The condition is a conjunction; each part of it bounds the keys of a query (a range), depends on the key or the query
alone, or says that a value of the query equals a value of the key.
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
from fastft.rewriter.attention.masks.runs import flags_of, lengths, steps
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
    some,
    variable,
    variables,
    whole,
)


@dataclass
class Parts:
    """The parts of a condition.  Sums and conditions are functions of b and q, those in ``keys`` of b and j.

    documents: equal elements at q and at j of tensors that never decrease along their last axis.
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
    reached: bool = False  # every query's own index is that of a key
    never_empty: bool = False
    kinds: dict[str, None] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The names of all parts, in a fixed order."""
        order = lambda kind: _KINDS.index(kind.split()[0])  # noqa: E731
        return ", ".join(sorted(self.kinds, key=order)) or "full"


_KINDS = ("causal", "window", "chunks", "documents", "ids", "runs", "prefix", "range", "padding", "rows")
Bound = tuple[str, Sum]  # "start" or "end", and where


def take_apart(condition: Condition, queries: Sum, keys: Sum, q: Sum, j: Sum, reader: Reader) -> Parts:
    """Split a condition into its parts.  Raises Declined.

    q, j: the indices of query and key; queries, keys: how many there are.
    """
    solver = _Solver(Parts(q, j), queries, keys, reader)
    condition = solver.within_documents(condition)
    for part in conjuncts(condition):
        solver.add(part)
    return solver.finish(condition)


class _Solver:
    def __init__(self, parts: Parts, queries: Sum, keys: Sum, reader: Reader) -> None:
        self.parts, self.queries, self.keys, self.reader = parts, queries, keys, reader
        self.far_ends: list[Sum] = []  # beyond every query's own index, so that causal implies them

    def within_documents(self, condition: Condition) -> Condition:
        """Replace position by index differences within documents that begin where positions do not grow by 1."""
        for part in conjuncts(condition):
            pair = self._equal_leaves(part)
            positions = pair and _positions(pair[1], self.parts.j, self.reader)
            if not pair or not positions:
                continue
            here = substitute(atom(positions), self._to_query())
            known = {positions: here + self.parts.j - self.parts.q}
            at_query, others = atoms(here)[0], [other for other in conjuncts(condition) if other is not part]
            both = [other for other in others if {positions, at_query} <= set(atoms(other))]
            kept = [other for other in others if other not in both]
            condition = every([part, *kept, *(substitute(other, known) for other in both)])
        return condition

    def _to_query(self) -> dict[Var, Sum]:
        return {atom_: self.parts.q for atom_ in atoms(self.parts.j) if isinstance(atom_, Var)}

    def _equal_leaves(self, condition: Condition) -> tuple[Leaf, Leaf] | None:
        """Return the elements at q and at j of one tensor, along its last axis, that the condition equates, or None."""
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

    def add(self, part: Condition) -> None:
        """Classify a part.  Raises Declined."""
        names = variables(part)
        if "h" in names:
            raise Declined("it differs between heads", "mask.per_head")
        pair = self._equal_leaves(part)
        if pair and never_decreases(pair[0].node, self.reader):
            self.parts.documents.append(pair)
            self._note("documents")
        elif (ranges := self._ranges(part)) is not None and ("j" in names):
            self._bound(ranges, substitute(part, self._to_query()) is True)
            if isinstance(part, Or):
                self._note("runs" if any(map(self._run, part.parts)) else "prefix")
            elif not self._is_plain(ranges):
                self._note(self._range_name(ranges))
        elif "q" not in names:
            self.parts.keys.append(part)
            self._note("padding")
        elif "j" not in names:
            self.parts.rows.append(part)
            self._note("rows")
        elif isinstance(part, Zero):
            self._equal(part)
        else:
            raise Declined(self._why_not(part))

    def _note(self, kind: str) -> None:
        self.parts.kinds[kind] = None

    def _ranges(self, condition: Condition) -> list[Bound] | None:
        """Return the bounds whose conjunction this part of the condition is, or None."""
        if isinstance(condition, NonNegative):
            return self._linear(condition.term)
        if isinstance(condition, Zero):
            sides = [self._linear(condition.term), self._linear(condition.term * -1)]
            return None if sides[0] is None or sides[1] is None else sides[0] + sides[1]
        if isinstance(condition, Or):
            return self._union(condition)
        if isinstance(condition, And):
            several = [self._ranges(part) for part in condition.parts]
            return None if None in several else [bound for ranges in several if ranges is not None for bound in ranges]
        return None

    def _linear(self, term: Sum) -> list[Bound] | None:
        """Return the bounds for term >= 0 if j is in one atom, by itself or in a floor division, or None."""
        inside = [(atom_, times) for atom_, times in term.parts if "j" in variables(atom(atom_))]
        if len(inside) != 1:
            return None
        atom_, times = inside[0]
        rest = term - atom(atom_) * times
        if isinstance(atom_, Floor) and abs(times) == 1:
            # x // c >= n where x >= c * n; x // c <= n where x < c * (n + 1)
            by = atom_.by
            return self._linear(atom_.term + rest * by if times > 0 else rest * by + (by - 1) - atom_.term)
        if not isinstance(atom_, Var):
            return None
        return [("start", floor(rest, times) * -1) if times > 0 else ("end", floor(rest, -times) + 1)]

    def _union(self, condition: Or) -> list[Bound] | None:
        """Return the bound for a union of ranges, from the smallest start or to the largest end; None for a mixture."""
        parts: list[list[Bound] | Condition] = []
        runs = [run for part in condition.parts if (run := self._run(part)) is not None]
        if len(runs) == 1:
            return self._with_run(condition, runs[0])
        for part in condition.parts:
            bounds_ = self._ranges(part) if "j" in variables(part) else part
            if bounds_ is None:
                return None
            parts.append(bounds_)
        kinds = {kind for part in parts if isinstance(part, list) for kind, _ in part}
        if len(kinds) != 1:
            several = [part for part in parts if isinstance(part, list)]
            return _joined(several) if len(several) == len(parts) else None
        (kind,) = kinds
        inner, outer = ("minimum", "maximum") if kind == "end" else ("maximum", "minimum")
        all_of, none_of = (self.keys, whole(0)) if kind == "end" else (whole(0), self.keys)
        terms = [
            extreme(inner, (term for _, term in part)) if isinstance(part, list) else select(part, all_of, none_of)
            for part in parts
        ]
        return [(kind, extreme(outer, terms))]

    def _run(self, condition: Condition) -> tuple[Condition, Leaf] | None:
        """Return a part of a union that says that query and key are of one run, and the query's id; or None."""
        parts = condition.parts if isinstance(condition, And) else ()
        pair = next(filter(None, map(self._equal_leaves, parts)), None)
        if pair is None or len(parts) != 2 or non_negative(atom(pair[0])) not in parts:
            return None
        return (condition, pair[0]) if flags_of(pair[0].node) is not None else None

    def _with_run(self, condition: Or, run: tuple[Condition, Leaf]) -> list[Bound] | None:
        """Return the range of a union of the query's run with ranges that have the query itself; None otherwise."""
        others = some(part for part in condition.parts if part is not run[0])
        ranges = self._ranges(others) if "j" in variables(others) else None
        if ranges is None or substitute(others, self._to_query()) is not True:
            return None
        ids, made = run[1], list[Node]()
        self.reader.visited |= steps(ids.node)
        found = lengths(ids.node, made)
        assert found is not None
        self.reader.made += made
        before, after = (extreme("maximum", [whole(0), atom(Leaf(node, ids.index))]) for node in found)
        sides = {"start": ("maximum", self.parts.q - before), "end": ("minimum", self.parts.q + after + 1)}
        result = []
        for side, (inner, own) in sides.items():
            terms = [term for kind, term in ranges if kind == side]
            outer = "minimum" if side == "start" else "maximum"
            result += [(side, extreme(outer, [extreme(inner, terms), own]))] if terms else []
        return result

    def _bound(self, ranges: list[Bound], beyond: bool) -> None:
        """Add bounds.  beyond: they hold where j is q, so that the ends are beyond it."""
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
        """Return by how much a bound is below the query's own index, if that is known."""
        return (self.parts.q - term).literal if self.parts.q.parts else None

    def _is_plain(self, ranges: list[Bound]) -> bool:
        """Tell whether causal and window express these bounds completely."""
        places = [(kind, self._behind(term)) for kind, term in ranges]
        return all(behind is not None and (behind == -1 if kind == "end" else behind >= 0) for kind, behind in places)

    def _range_name(self, ranges: list[Bound]) -> str:
        divided = {atom_.by for _, term in ranges for atom_ in atoms(term) if isinstance(atom_, Floor)}
        return f"chunks of {min(divided)}" if len(ranges) == 2 and len(divided) == 1 else "range"

    def _equal(self, equality: Zero) -> None:
        """Make ids of a part that equates a value of the query and one of the key.  Raises Declined."""
        keys = [(part, times) for part, times in equality.term.parts if "j" in variables(atom(part))]
        if any("q" in variables(atom(part)) for part, _ in keys):
            raise Declined(self._why_not(equality))
        if self.parts.ids is not None:
            raise Declined("two equalities of which neither is known to be of ranges")
        side = Sum(tuple(keys), 0)
        self.parts.ids = equality.term - side, side * -1
        self._note("ids")

    def _why_not(self, condition: Condition) -> str:
        for leaf in atoms(condition):
            if isinstance(leaf, Leaf) and {"q", "j"} <= variables(atom(leaf)):
                return self.reader.unknown(leaf.node) or f"{leaf.node} is data, of queries and keys"
        if isinstance(condition, Or):
            return "a union that is no range"
        if isinstance(condition, Not):
            return "an inequality that is no range"
        return "it compares data of queries and of keys"

    def finish(self, condition: Condition) -> Parts:
        """Drop the bounds that the rest implies."""
        parts, q = self.parts, self.parts.q
        at_query = substitute(condition, self._to_query())
        parts.reached = non_negative(self.keys - 1 - q) is True
        parts.never_empty = parts.reached and at_query is True
        if not (parts.causal and parts.reached):
            parts.ends += self.far_ends
        parts.starts = [bound for bound in parts.starts if non_negative(bound * -1) is not True]
        parts.ends = [bound for bound in parts.ends if non_negative(bound - self.keys) is not True]
        if parts.window and non_negative(q * -1 + parts.window - 1) is True:
            parts.window = 0
        if parts.window:
            parts.kinds[f"window {parts.window}"] = None
        return parts


def _joined(several: list[list[Bound]]) -> list[Bound] | None:
    """Return the range that two-sided ranges make together; None unless all have keys, and overlap or touch the first.

    An empty one would add the keys between itself and the others.
    """
    ranges = []
    for bounds_ in several:
        starts, ends = ([term for kind, term in bounds_ if kind == side] for side in ("start", "end"))
        if not starts or not ends:
            return None
        ranges.append((extreme("maximum", starts), extreme("minimum", ends)))
    first_start, first_end = ranges[0]
    for start, end in ranges:
        if any(non_negative(gap) is not True for gap in (end - start - 1, end - first_start, first_end - start)):
            return None
    first, last = (extreme(kind, (pair[at] for pair in ranges)) for at, kind in enumerate(("minimum", "maximum")))
    return [("start", first), ("end", last)]


def never_decreases(node: Node, reader: Reader) -> bool:
    """Tell whether a tensor's rows never decrease: counts, and positions of growing numbers in a sorted list."""
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
    """Tell whether every row of integers grows by a constant that is not negative."""
    *lengths, last = (size_of(length) for length in value_of(node).shape)
    others = [variable(f"axis {axis}", length) for axis, length in enumerate(lengths)]
    index = variable("k", last)
    here, before = (as_sum(reader.value(node, (*others, index - back))) for back in (0, 1))
    change = (here - before).literal if here is not None and before is not None else None
    return change is not None and change >= 0


def _positions(document: Leaf, j: Sum, reader: Reader) -> Leaf | None:
    """Return the position at j if documents are counted where positions do not grow by 1, or None."""
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
    """Return the element whose difference from its predecessor this is, or None."""
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
    element = value.parts[0][0] if isinstance(value, Sum) and len(value.parts) == 1 else None
    if (
        not isinstance(element, Leaf)
        or value != atom(element)
        or not element.index
        or element.index[-1] != leaf.index[-1]
    ):
        return None
    return element
