"""What a condition is taken apart into, against the condition at every query and key."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_terms_strategy import FLAGS, TABLE, Program, Space, World, build, conditions, spaces
from recording import Recording, record
from torch import Tensor
from torch.fx import Node

from fastft.reasons import Declined
from fastft.rewriter.attention.masks import indexing, pointwise  # noqa: F401  # what they tell the reader
from fastft.rewriter.attention.masks import terms as terms
from fastft.rewriter.attention.masks.intervals import never_decreases, take_apart
from fastft.rewriter.attention.masks.reader import Reader
from fastft.rewriter.attention.masks.terms import Condition, Leaf, atom, whole

MANY = settings(max_examples=200)
LENGTH = 6
seeds = st.integers(0, 2**16)
numbers = st.integers(-3, 5)


def nodes(*positions: list[int], step: int) -> tuple[Recording, list[Node]]:
    """Positions of each batch, and the documents that begin wherever they do not grow by this step."""

    def documents(positions: Tensor) -> Tensor:
        return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != step).cumsum(-1)

    gm, recording = record(documents, torch.tensor(positions))
    (end,) = gm.graph.output_node().args[0]  # type: ignore[misc,union-attr]
    return recording, [next(iter(gm.graph.nodes)), end]


class Taken:
    """A condition of a space, its parts, and both at every point."""

    def __init__(self, space: Space, world: World, condition: Condition) -> None:
        self.space, self.world, self.condition = space, world, condition
        self.sizes = space.queries, whole(space.T)
        self.parts = take_apart(condition, *self.sizes, space.index("q"), space.index("j"), Reader())

    def allowed(self) -> Any:
        """What the parts say, as the attention op understands them."""
        world, parts = self.world, self.parts
        q, j = world.at["q"], world.at["j"]
        held = [world.everywhere(True), *map(world.term, (*parts.rows, *parts.keys))]
        held += [j >= world.term(one) for one in parts.starts] + [j < world.term(one) for one in parts.ends]
        held += [world.term(terms.atom(one)) == world.term(terms.atom(other)) for one, other in parts.documents]
        if parts.causal:
            held.append(j <= q)
        if parts.window:
            held.append(j > q - parts.window)
        if parts.ids is not None:
            held.append(world.term(parts.ids[0]) == world.term(parts.ids[1]))
        return reduce(np.logical_and, held)

    def check(self) -> None:
        """The parts are the condition, each of what it may depend on; promises of rows are kept."""
        expected, parts = self.world.term(self.condition), self.parts
        np.testing.assert_array_equal(self.allowed(), expected)
        assert terms.variables(*parts.starts, *parts.ends, *parts.rows) <= {"b", "q"}
        assert terms.variables(*parts.keys) <= {"b", "j"}
        assert parts.ids is None or "j" not in terms.variables(parts.ids[0])
        assert parts.ids is None or "q" not in terms.variables(parts.ids[1])
        assert not parts.reached or (self.world.at["q"] < self.space.T).all()
        assert not parts.never_empty or expected.any(-1).all()


def taken(space: Space, world: World, condition: Condition) -> Taken | None:
    """The parts, held to the condition; None where they are declined."""
    try:
        found = Taken(space, world, condition)
    except Declined:
        return None
    found.check()
    return found


def _floor(name: str, shift: Program, by: int) -> Program:
    return ("floor", ("sub", (name,), shift), by)


def _at_most(left: Program, right: Program) -> Program:
    return ("positive", ("sub", right, left))


@st.composite
def clauses(draw: st.DrawFn) -> Program:
    """What masks are made of: ranges, chunks, prefixes, padding, rows, ids."""
    n, by = ("number", draw(numbers)), draw(st.integers(1, 3))
    data = draw(st.sampled_from([("element", ("number", 0)), ("element", ("q",)), n, n]))
    factor = draw(st.sampled_from((1, 1, 1, 2, 3)))
    key = draw(st.sampled_from([("times", ("j",), factor), ("floor", ("j",), by), _floor("j", data, by)]))
    query = draw(st.sampled_from([("q",), ("floor", ("q",), by), _floor("q", data, by), data, ("sub", ("q",), n)]))
    near = ("sub", ("number", draw(st.integers(0, 3))), ("abs", ("sub", ("q",), ("j",))))
    bound = st.sampled_from([_at_most(key, query), _at_most(query, key), _at_most(("j",), ("add", ("q",), n))])
    one, other = draw(bound), draw(bound)
    same = ("zero", ("sub", ("element", ("q",)), ("element", ("j",))))
    return draw(
        st.sampled_from([
            one, one, other, ("zero", ("sub", key, query)), ("some", one, other), ("some", one, ("flag", ("q",))),
            ("positive", near), ("flag", ("j",)), ("flag", ("q",)), ("some", ("flag", ("j",)), ("flag", ("number", 0))),
            same, ("negate", one), ("some", one, ("every", other, one)),
        ])
    )  # fmt: skip


conjunctions = st.lists(clauses(), min_size=1, max_size=4).map(lambda parts: ("every", *parts))


@MANY
@given(st.one_of(conjunctions, conjunctions, conditions), spaces, seeds)
def test_parts_are_the_condition(program: Program, space: Space, seed: int) -> None:
    taken(space, World.of(space, seed), build(program, space))


def test_most_conjunctions_are_taken_apart() -> None:
    found: list[bool] = []

    @settings(max_examples=100)
    @given(st.lists(clauses(), min_size=1, max_size=2).map(lambda parts: ("every", *parts)), seeds)
    def draw(program: Program, seed: int) -> None:
        space = Space(2, 4, 4, False)
        found.append(taken(space, World.of(space, seed), build(program, space)) is not None)

    draw()
    assert sum(found) > 0.8 * len(found)


@st.composite
def rows_of_positions(draw: st.DrawFn) -> list[list[int]]:
    """For two batches, positions that begin anew here and there; some stand still."""
    step = st.sampled_from((1, 1, 1, None, 0, 2))
    found = []
    for _ in range(2):
        row = [draw(st.integers(0, 3))]
        for one in draw(st.lists(step, min_size=LENGTH - 1, max_size=LENGTH - 1)):
            row.append(0 if one is None else row[-1] + one)
        found.append(row)
    return found


@MANY
@given(rows_of_positions(), st.lists(st.tuples(st.sampled_from("qj"), numbers), max_size=2), st.data())
def test_documents_by_positions(positions: list[list[int]], near: list[tuple[str, int]], data: st.DataObject) -> None:
    """Within a document positions differ as indices do; ids of others are not documents."""
    S, T = data.draw(st.tuples(st.integers(1, LENGTH), st.integers(1, LENGTH)))
    space = Space(2, S, T, False)
    step = data.draw(st.sampled_from((1, 1, 2)))
    recording, (position, document) = nodes(*positions, step=step)
    tables = {node: value.numpy() for node, value in recording.values.items()}
    world = World(space, tables)
    b, q, j = (space.index(name) for name in "bqj")
    at = lambda node, place: atom(Leaf(node, (b, place)))  # noqa: E731
    parts = [terms.zero(at(document, q) - at(document, j))]
    for side, number in near:
        difference = at(position, q) - at(position, j)
        parts.append(terms.non_negative((difference if side == "q" else difference * -1) + number))
    found = taken(space, world, terms.every(parts))
    assert found is not None or (near and step != 1)
    if found is not None and S > 1 and T > 1:
        assert found.parts.documents or found.parts.keys == [False]  # positions that are never so near
    other = taken(space, world, terms.zero(at(position, q) - at(position, j)))
    assert other is None or not other.parts.documents


def test_positions_that_grow_by_two_are_no_indices() -> None:
    """One row of a document whose positions grow by two: what is near by position is nearer by index."""
    space = Space(2, LENGTH, LENGTH, False)
    recording, (position, document) = nodes([0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11], step=2)
    b, q, j = (space.index(name) for name in "bqj")
    at = lambda node, place: atom(Leaf(node, (b, place)))  # noqa: E731
    same = terms.zero(at(document, q) - at(document, j))
    near = terms.non_negative(at(position, j) - at(position, q) + 2)
    world = World(space, {node: value.numpy() for node, value in recording.values.items()})
    assert taken(space, world, terms.every([same, near])) is None


def grown(function: Callable[[Tensor], Tensor], x: Any) -> bool:
    """Whether a function's rows are said never to decrease."""
    gm, _ = record(function, torch.tensor(x))
    return never_decreases(gm.graph.output_node().args[0][0], Reader())  # type: ignore[index,arg-type]


FLAGGED = [[True, False, True, True], [False, True, False, True]]
ENDS = torch.tensor([0, 2, 3])
GROWN = {
    "counts": (lambda x: x.cumsum(-1), True),
    "counts by name": (lambda x: torch.cumsum(x, dim=1), True),
    "counts along the other axis": (lambda x: x.cumsum(0), False),
    "sums of numbers": (lambda x: (x.long() - 1).cumsum(-1), False),
    "places in a list": (lambda x: torch.searchsorted(ENDS, torch.arange(4), right=True), True),
    "buckets": (lambda x: torch.bucketize(torch.arange(4), ENDS), True),
    "places of falling numbers": (lambda x: torch.searchsorted(ENDS, 3 - torch.arange(4)), False),
    "places of data": (lambda x: torch.searchsorted(ENDS, x.long()), False),
    "a list in another order": (lambda x: torch.searchsorted(ENDS, torch.arange(4), sorter=torch.arange(3)), False),
    "numbers": (lambda x: x.long(), False),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWN)
def test_what_never_decreases(name: str) -> None:
    function, expected = GROWN[name]
    assert grown(function, FLAGGED) is expected


SQUARE = Space(2, 4, 4, False)
b, q, j = (SQUARE.index(name) for name in "bqj")
CAUSAL, LENGTHS = terms.non_negative(q - j), atom(Leaf(TABLE, (b, whole(0))))
KINDS: dict[str, tuple[Condition, dict[str, Any]]] = {
    "causal": (CAUSAL, {"causal": True, "window": 0, "starts": [], "ends": [], "never_empty": True}),
    "causal, window 2": (terms.every([CAUSAL, terms.non_negative(j - q + 1)]), {"window": 2, "starts": []}),
    "causal, window 1": (
        terms.every([CAUSAL, *(terms.non_negative(j - q + n) for n in (1, 0, 2))]), {"causal": True, "window": 1},
    ),
    "full": (terms.non_negative(j - q + 3), {"window": 0, "starts": [], "ends": []}),
    "causal, chunks of 2": (
        terms.every([CAUSAL, terms.zero(terms.floor(q, 2) - terms.floor(j, 2))]), {"ends": [], "causal": True},
    ),
    "range": (terms.non_negative(LENGTHS - j - 1), {"ends": [LENGTHS], "never_empty": False}),
    "causal, range": (terms.every([CAUSAL, terms.non_negative(q - j + 1)]), {"ends": [], "starts": []}),
    "padding": (terms.truth(Leaf(FLAGS, (b, j))), {"never_empty": False}),
    "rows": (terms.truth(Leaf(FLAGS, (b, q))), {"never_empty": False}),
    "ids": (terms.zero(atom(Leaf(TABLE, (b, q))) - atom(Leaf(TABLE, (b, j)))), {"never_empty": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    condition, expected = KINDS[kind]
    found = taken(SQUARE, World.of(SQUARE, 0), condition)
    assert found is not None
    assert {name: getattr(found.parts, name) for name in expected} == expected
    assert found.parts.kind == kind or kind in ("full", "causal, range")


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (terms.non_negative(atom(Leaf(TABLE, (b, q))) - atom(Leaf(TABLE, (b, j)))), "it compares data of queries"),
        (terms.some([CAUSAL, terms.truth(Leaf(FLAGS, (b, j)))]), "a union that is no range"),
        (
            terms.every([
                terms.zero(atom(Leaf(TABLE, (b, q))) * factor - atom(Leaf(TABLE, (b, j))) - 1) for factor in (1, 2)
            ]),
            "two equalities of which neither",
        ),
        (terms.negate(terms.zero(q - j)), "an inequality that is no range"),
        (terms.non_negative(q - j + terms.variable("h", whole(2))), "it differs between heads"),
    ],
)  # fmt: skip
def test_what_is_declined(condition: Condition, reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        Taken(SQUARE, World.of(SQUARE, 0), condition)
