"""The mask algebra against brute force: what it folds is equal at every point, and nothing is proven that is not so."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_terms_strategy import (
    FLAGS,
    NAMES,
    TABLE,
    Program,
    Space,
    World,
    build,
    conditions,
    conditions_of_indices,
    integers,
    integers_of_indices,
    spaces,
)

from fastft.rewriter.attention.masks import terms as terms
from fastft.rewriter.attention.masks.terms import And, Or, atom, whole

MANY = settings(max_examples=200)
SMALL = Space(2, 4, 4, False)
seeds = st.integers(0, 2**16)


@MANY
@given(st.one_of(integers, conditions), spaces, seeds)
def test_a_fold_is_equal_everywhere(program: Program, space: Space, seed: int) -> None:
    world = World.of(space, seed)
    np.testing.assert_array_equal(world.term(build(program, space)), world.program(program))


@MANY
@given(integers, spaces, seeds)
def test_bounds_hold_everywhere(program: Program, space: Space, seed: int) -> None:
    low, high = terms.bounds(build(program, space))
    found = World.of(space, seed).program(program)
    assert low is None or (found >= low).all()
    assert high is None or (found <= high).all()


@MANY
@given(conditions, spaces, seeds)
def test_the_contrary_is_the_contrary(program: Program, space: Space, seed: int) -> None:
    world, condition = World.of(space, seed), build(program, space)
    contrary = terms.negate(condition)
    np.testing.assert_array_equal(world.term(contrary), ~world.program(program))
    np.testing.assert_array_equal(world.term(terms.negate(contrary)), world.program(program))
    for one, other in ((condition, contrary), (contrary, condition)):
        if not isinstance(one, (And, Or)):
            assert terms.every([one, other]) is False
            assert terms.some([one, other]) is True


@MANY
@given(conditions, spaces, seeds)
def test_parts_are_the_whole(program: Program, space: Space, seed: int) -> None:
    world, condition = World.of(space, seed), build(program, space)
    every, some = (world.everywhere(start) for start in (True, False))
    for one in terms.conjuncts(condition):
        every = every & world.term(one)
    for one in terms.disjuncts(condition):
        some = some | world.term(one)
    np.testing.assert_array_equal(every, world.program(program))
    np.testing.assert_array_equal(some, world.program(program))


@MANY
@given(st.lists(st.tuples(conditions, st.integers(-3, 3)), min_size=1, max_size=3), st.integers(-3, 3), spaces, seeds)
def test_cases_are_all_there_is(parts: list[Any], constant: int, space: Space, seed: int) -> None:
    """One of the conditions holds everywhere, and the number under it is the sum."""
    world, term = World.of(space, seed), whole(constant)
    for program, times in parts:
        term = term + terms.indicator(build(program, space)) * times
    found = terms.cases(term)
    held = np.array([world.term(condition) for condition, _ in found]).reshape(len(found), *world.at["b"].shape)
    assert (held.sum(0) == 1).all()
    np.testing.assert_array_equal(
        sum(one * number for one, (_, number) in zip(held, found, strict=True)), world.term(term)
    )


@MANY
@given(st.one_of(integers, conditions), spaces, seeds)
def test_nothing_else_matters_than_the_variables_in_it(program: Program, space: Space, seed: int) -> None:
    world, term = World.of(space, seed), build(program, space)
    found = world.term(term)
    for axis, name in enumerate(NAMES):
        if name not in terms.variables(term) and found.size:
            np.testing.assert_array_equal(found, np.broadcast_to(found.take([0], axis), found.shape))


@MANY
@given(integers, integers, integers, spaces)
def test_sums_that_are_equal_are_the_same(one: Program, two: Program, three: Program, space: Space) -> None:
    a, b, c = (build(program, space) for program in (one, two, three))
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a - a == whole(0)
    assert (a - b) * 3 == a * 3 - b * 3
    assert terms.zero(a - b) == terms.zero(b - a)
    assert terms.non_negative((a - b) * 2) == terms.non_negative(a - b)


def decided(programs: st.SearchStrategy[Program], space: Space) -> tuple[int, int]:
    """Of conditions that brute force finds always or never to hold, how many are proven, and how many there are."""
    found: list[bool] = []
    world = World.of(space, 0)

    @settings(max_examples=400)
    @given(programs)
    def draw(program: Program) -> None:
        held = world.program(program)
        if held.all() or not held.any():
            found.append(build(program, space) is bool(held.all()))

    draw()
    return sum(found), len(found)


def linear(kind: str) -> st.SearchStrategy[Program]:
    """Conditions on a q + c j + n."""
    factors = st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(-9, 9))
    return factors.map(
        lambda one: (
            kind,
            ("add", ("add", ("times", ("q",), one[0]), ("times", ("j",), one[1])), ("number", one[2])),
        )
    )


def test_all_inequalities_that_always_or_never_hold_are_proven() -> None:
    """Between bounds that a linear term takes nothing is left to prove."""
    proven, certain = decided(linear("positive"), SMALL)
    assert proven == certain > 50


@pytest.mark.parametrize(
    "programs", [linear("zero"), conditions_of_indices], ids=["equalities", "conditions of any kind"]
)
def test_most_of_what_is_certain_is_proven(programs: st.SearchStrategy[Program]) -> None:
    proven, certain = decided(programs, SMALL)
    assert certain > 50
    assert proven >= 0.75 * certain


def test_most_bounds_are_tight() -> None:
    tight: list[bool] = []
    world = World.of(SMALL, 0)

    @settings(max_examples=400)
    @given(integers_of_indices)
    def draw(program: Program) -> None:
        found = world.program(program)
        tight.append(terms.bounds(build(program, SMALL)) == (found.min(), found.max()))

    draw()
    assert sum(tight) >= 0.75 * len(tight)


q, j = (SMALL.index(name) for name in "qj")
n = atom(terms.Size("n"))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: terms.non_negative(q), True),
        (lambda: terms.non_negative(q - 4), False),
        (lambda: terms.non_negative(n * 2 - terms.variable("k", n * 2) - 1), True),
        (lambda: terms.zero(q * 2 - j * 2 + 1), False),
        (lambda: terms.non_negative(q * 3 - 4), terms.non_negative(q - 2)),
        (lambda: terms.floor(q * 4 + j * 2 - 5, 4), q + terms.floor(j * 2 + 3, 4) - 2),
        (lambda: terms.floor(whole(-7), 4), whole(-2)),
        (lambda: terms.extreme("minimum", [q, q + 1, j]), terms.extreme("minimum", [q, j])),
        (lambda: terms.extreme("maximum", [q, whole(9), q + 1]), whole(9)),
        (lambda: terms.absolute(q * -1), q),
        (
            lambda: terms.non_negative(terms.absolute(q - j) * -1 + 2),
            terms.every([terms.non_negative(j - q + 2), terms.non_negative(q - j + 2)]),
        ),
        (
            lambda: terms.non_negative(terms.absolute(q - j) * 2 - 3),
            terms.some([terms.non_negative(q - j - 2), terms.non_negative(j - q - 2)]),
        ),
        (lambda: terms.select(terms.non_negative(q - j), q + 2, q), q + terms.indicator(terms.non_negative(q - j)) * 2),
        (lambda: terms.non_negative(terms.indicator(terms.non_negative(q - j)) - 1), terms.non_negative(q - j)),
        (lambda: terms.zero(terms.indicator(terms.non_negative(q - j))), terms.non_negative(j - q - 1)),
        (lambda: terms.variable("q", whole(1)), whole(0)),
        (lambda: terms.floor(q + 1, 2) == terms.floor(q, 2), False),
    ],
)  # fmt: skip
def test_folds(made: Callable[[], Any], expected: Any) -> None:
    assert made() == expected


flag = terms.truth(terms.Leaf(FLAGS, (q, whole(0))))
INSIDE = (
    terms.floor(q, 2), terms.absolute(q - 2), terms.indicator(flag), terms.select(flag, j, whole(7)),
    terms.extreme("minimum", [q, whole(2)]), atom(terms.Leaf(TABLE, (whole(0), q * 2))), terms.non_negative(q - 2),
    terms.zero(q - 2), flag, terms.negate(flag), terms.every([flag, terms.non_negative(j - 2)]),
    terms.some([terms.non_negative(j - 2), flag]),
)  # fmt: skip


@pytest.mark.parametrize("term", INSIDE, ids=lambda term: type(term).__name__)
def test_variables_are_found_inside_of_anything(term: Any) -> None:
    assert "q" in terms.variables(term)
    assert terms.variables(terms.indicator(terms.non_negative(terms.floor(j, 3) - 1))) == {"j"}
