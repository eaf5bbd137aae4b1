"""Random terms of the mask algebra as nested tuples, built by it and computed without it, at every point at once.

A program is what a term was before anything was folded: ("add", ("q",), ("number", 2)).  build makes the term that the
algebra makes of it; World computes the program, and the term by what its atoms say they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch.fx import Graph, Node

from fastft.compat import fake_tensors
from fastft.rewriter.attention.masks import terms as terms
from fastft.rewriter.attention.masks.terms import Leaf, Size, Sum, atom, variable, whole

Program = tuple
Array = Any  # of numpy: numbers, or whether conditions hold, at every point
NAMES = ("b", "q", "j")
TABLE, FLAGS = (Graph().placeholder(name) for name in ("table", "flags"))  # [b, place], of integers and of bools
for _node, _dtype in ((TABLE, torch.int64), (FLAGS, torch.bool)):
    fake_tensors.set_value(_node, fake_tensors.fake_tensor((3, 5), _dtype))
_numbers = st.integers(-4, 6)
_places = st.sampled_from([("q",), ("j",), ("sub", ("q",), ("number", 1)), ("number", 0)])
_plain = st.one_of(
    st.sampled_from([("q",), ("j",), ("b",), ("queries",), ("sub", ("q",), ("j",)), ("abs", ("sub", ("q",), ("j",)))]),
    st.tuples(st.just("number"), _numbers),
)


def _leaves(data: bool) -> st.SearchStrategy[Program]:
    return st.one_of(_plain, _plain, st.tuples(st.just("element"), _places)) if data else _plain


def _integers(conditions: st.SearchStrategy[Program], data: bool) -> st.SearchStrategy[Program]:
    def grow(inner: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
        return st.one_of(
            st.tuples(st.sampled_from(("add", "sub", "minimum", "maximum")), inner, inner),
            st.tuples(st.sampled_from(("minimum", "maximum")), inner, inner, inner),
            st.tuples(st.just("times"), inner, st.integers(-3, 3)),
            st.tuples(st.just("floor"), inner, st.integers(1, 4)),
            st.tuples(st.just("abs"), inner),
            st.tuples(st.just("one if"), conditions),
            st.tuples(st.just("select"), conditions, inner, inner),
        )

    return st.recursive(_leaves(data), grow, max_leaves=5)


def _conditions(data: bool) -> st.SearchStrategy[Program]:
    atoms = [st.tuples(st.sampled_from(("positive", "zero")), _integers(st.just(("true",)), data))]
    if data:
        atoms.append(st.tuples(st.just("flag"), _places))

    def grow(inner: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
        return st.one_of(
            st.tuples(st.sampled_from(("positive", "zero")), _integers(inner, data)),
            st.tuples(st.sampled_from(("every", "some")), inner, inner),
            st.tuples(st.sampled_from(("every", "some")), inner, inner, inner),
            st.tuples(st.just("negate"), inner),
        )

    return st.recursive(st.one_of(*atoms, st.sampled_from([("true",), ("false",)])), grow, max_leaves=4)


conditions, conditions_of_indices = _conditions(data=True), _conditions(data=False)
integers, integers_of_indices = _integers(conditions, data=True), _integers(conditions_of_indices, data=False)


@dataclass(frozen=True)
class Space:
    """How many batches, queries and keys there are; symbolic: the queries are a number that is only known later."""

    B: int
    S: int
    T: int
    symbolic: bool

    @property
    def queries(self) -> Sum:
        return atom(Size("s0", 1 if self.S else 0)) if self.symbolic else whole(self.S)

    def index(self, name: str) -> Sum:
        sizes = {"b": whole(self.B), "q": self.queries, "j": whole(self.T)}
        return variable(name, sizes[name])


spaces = st.builds(Space, st.integers(1, 3), st.integers(0, 5), st.integers(1, 5), st.booleans())


def build(program: Program, space: Space) -> Any:
    """The term or condition that the algebra makes of a program."""
    name, *rest = program
    if name in NAMES:
        return space.index(name)
    if name in ("true", "false"):
        return name == "true"
    if name in ("number", "queries"):
        return whole(rest[0]) if rest else space.queries
    built = [build(one, space) if isinstance(one, tuple) else one for one in rest]
    if name in ("element", "flag"):
        leaf = Leaf(TABLE if name == "element" else FLAGS, (space.index("b"), *built))
        return atom(leaf) if name == "element" else terms.truth(leaf)
    if name in ("every", "some"):
        return getattr(terms, name)(built)
    if name in ("minimum", "maximum"):
        return terms.extreme(name, built)
    return _BUILT[name](*built)


_BUILT = {
    "add": Sum.__add__, "sub": Sum.__sub__, "times": Sum.__mul__, "floor": terms.floor, "abs": terms.absolute,
    "one if": terms.indicator, "select": terms.select, "positive": terms.non_negative, "zero": terms.zero,
    "negate": terms.negate,
}  # fmt: skip
_COMPUTED: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "times": np.multiply, "floor": np.floor_divide, "abs": np.abs,
    "minimum": np.minimum, "maximum": np.maximum, "one if": lambda one: np.where(one, 1, 0), "select": np.where,
    "positive": lambda one: one >= 0, "zero": lambda one: one == 0, "negate": np.logical_not,
    "every": np.logical_and, "some": np.logical_or,
}  # fmt: skip


class World:
    """All points of a space, and tensors [b, place]; a place beyond them is their first or last."""

    def __init__(self, space: Space, tables: Mapping[Node, Array]) -> None:
        self.space, self.tables = space, tables
        grids = np.meshgrid(*(np.arange(size) for size in (space.B, space.S, space.T)), indexing="ij")
        self.at: dict[str, Array] = dict(zip(NAMES, grids, strict=True))

    @classmethod
    def of(cls, space: Space, seed: int) -> World:
        random = np.random.default_rng(seed)
        return cls(space, {TABLE: random.integers(-3, 6, (space.B, 5)), FLAGS: random.random((space.B, 5)) < 0.6})

    def element(self, node: Node, index: list[Array]) -> Array:
        table = self.tables[node]
        return table[tuple(np.clip(one, 0, size - 1) for one, size in zip(index, table.shape, strict=True))]

    def everywhere(self, value: Any) -> Array:
        return np.broadcast_to(value, self.at["b"].shape)

    def program(self, program: Program) -> Array:
        """What a program is, at every point."""
        name, *rest = program
        if name in NAMES:
            return self.at[name]
        if name in ("true", "false"):
            return self.everywhere(name == "true")
        if name in ("number", "queries"):
            return self.everywhere(rest[0] if rest else self.space.S)
        values = [self.program(one) if isinstance(one, tuple) else one for one in rest]
        if name in ("element", "flag"):
            return self.element(TABLE if name == "element" else FLAGS, [self.at["b"], *values])
        if name in ("every", "some", "minimum", "maximum"):
            return reduce(_COMPUTED[name], values)
        return _COMPUTED[name](*values)

    def term(self, term: Any) -> Array:
        """What a term or a condition says it is, at every point."""
        return self.everywhere(self._term(term))

    def _term(self, term: Any) -> Any:
        known = self._number(term) if isinstance(term, (Sum, terms.Var, Size, Leaf)) else None
        if known is not None:
            return known
        if isinstance(term, bool):
            return term
        if isinstance(term, (terms.And, terms.Or)):
            parts = [self.term(one) for one in term.parts]
            return reduce(np.logical_and if isinstance(term, terms.And) else np.logical_or, parts)
        if isinstance(term, terms.Truth):
            return self._term(term.leaf)
        if isinstance(term, terms.Extreme):
            return reduce(_COMPUTED[term.name], [self.term(one) for one in term.terms])
        name = _SAID[type(term)]
        return _COMPUTED[name](*(self._term(one) if not isinstance(one, int) else one for one in vars(term).values()))

    def _number(self, term: Any) -> Any:
        if isinstance(term, Sum):
            return sum((times * self._term(one) for one, times in term.parts), term.constant)
        if isinstance(term, terms.Var):
            return self.at[term.name]
        if isinstance(term, Size):
            return self.space.S
        return self.element(term.node, [self.term(one) for one in term.index])


_SAID: dict[type, str] = {
    terms.Floor: "floor", terms.Abs: "abs", terms.Indicator: "one if", terms.Select: "select",
    terms.NonNegative: "positive", terms.Zero: "zero", terms.Not: "negate",
}  # fmt: skip
