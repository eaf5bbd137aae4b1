"""Terms with other terms in the place of their atoms, against brute force."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_terms_strategy import TABLE, Program, Space, World, build, conditions, integers, spaces

from fastft.rewriter.attention.masks import terms as terms
from fastft.rewriter.attention.masks.substitution import substitute
from fastft.rewriter.attention.masks.terms import Leaf, Var, atom, whole

MANY = settings(max_examples=100)
seeds = st.integers(0, 2**16)
places = st.integers(-2, 6)


@MANY
@given(st.one_of(integers, conditions), st.one_of(integers, places), spaces, seeds)
def test_a_term_with_another_key_is_that_of_this_key(
    program: Program, key: Program | int, space: Space, seed: int
) -> None:
    """Whatever is put in the place of j, everywhere that it stands."""
    term, world = build(program, space), World.of(space, seed)
    new = whole(key) if isinstance(key, int) else build(key, space)
    found = substitute(term, {one: new for one in terms.atoms(space.index("j")) if isinstance(one, Var)})
    elsewhere = World.of(space, seed)
    if space.T > 1:  # else there is no j in the term
        elsewhere.at["j"] = world.term(new)
    expected = elsewhere.term(term)
    # Where j is none of the indices there are, what was certain of them may be said of it.
    inside = (elsewhere.at["j"] >= 0) & (elsewhere.at["j"] < space.T)
    np.testing.assert_array_equal(world.term(found)[inside], expected[inside])


@MANY
@given(st.one_of(integers, conditions), integers, spaces, seeds)
def test_an_element_that_is_known(program: Program, known: Program, space: Space, seed: int) -> None:
    """A number in the place of each element of a tensor that a term reads by the key."""
    term, world = build(program, space), World.of(space, seed)
    leaf, new = Leaf(TABLE, (space.index("b"), space.index("j"))), build(known, space)
    equal = world.term(atom(leaf)) == world.term(new)
    found = world.term(substitute(term, {leaf: new}))
    np.testing.assert_array_equal(found[equal], world.term(term)[equal])


@MANY
@given(st.one_of(integers, conditions), spaces)
def test_nothing_known_changes_nothing(program: Program, space: Space) -> None:
    term = build(program, space)
    assert set(terms.atoms(substitute(term, {}))) == set(terms.atoms(term))


def test_what_becomes_certain_is_folded() -> None:
    space = Space(1, 5, 5, False)
    q, j = space.index("q"), space.index("j")
    (var,) = (one for one in terms.atoms(j) if isinstance(one, Var))
    for program in (
        terms.non_negative(q - j),
        terms.zero(terms.floor(q, 2) - terms.floor(j, 2)),
        terms.every([terms.non_negative(q - j + 1), terms.non_negative(terms.absolute(q - j) * -1 + 3)]),
        terms.negate(terms.zero(terms.extreme("minimum", [j + 1, q * 2 + 1]) - q * 3 - 2)),
    ):
        assert substitute(program, {var: q}) is True
    assert substitute(terms.select(terms.non_negative(q - j), q, j), {var: q}) == q
