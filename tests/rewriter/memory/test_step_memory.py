"""Bytes of a step and curves of choices, each counted in another way."""

from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from plan_strategies import MIB, Made, joints, made_sequences, most_alive, peaks

from fastft.rewriter.memory import pareto, planner, simulate
from fastft.rewriter.memory.device_rates import Rates
from fastft.rewriter.memory.joint_graph import Joint, Memory, Storage
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.memory.simulate import Facts, StageSequence

MANY = settings(max_examples=100)


@MANY
@given(joints(), st.data())
def test_a_layer_takes_what_lives_in_it(joint: Joint, data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.sampled_from([at for at, op in enumerate(joint.ops) if op.forward])))
    saved, _ = joint.closure(kept)
    mine = [one for one in saved if one in joint.maker]
    found = joint.memory(kept)
    size = sum(joint.storages[one].bytes for one in mine)
    forward = [op for op in joint.ops if op.forward]
    assert found.saved == size
    assert found.forward == most_alive(joint, forward, [*mine, *joint.forward_outputs], [])
    order = list(joint._backward_order(set(saved)))
    assert found.backward + size == most_alive(joint, order, joint.backward_outputs, [*mine, 1])


@MANY
@given(made_sequences(), st.builds(Facts, *[st.integers(0, 9)] * 3, st.just(0), st.integers(-3, 3)))
def test_a_step_takes_what_lives_in_it(drawn: tuple[list[Made], StageSequence], facts: Facts) -> None:
    stages, sequence = drawn
    found = simulate.simulate(sequence, [one.choice for one in stages], facts, {})
    assert [moment.bytes for moment in found.moments] == peaks(stages, facts)
    assert all(sum(moment.parts.values()) == moment.bytes for moment in found.moments)
    assert found.peak_bytes == max(peaks(stages, facts))


@MANY
@given(made_sequences(), made_sequences(), st.builds(Facts, *[st.integers(0, 9)] * 3))
def test_rows_that_run_one_after_another(
    one: tuple[list[Made], StageSequence], other: tuple[list[Made], StageSequence], facts: Facts
) -> None:
    """As one sequence would, whose later stages read nothing of the earlier ones."""
    both = [*one[0], *(_moved(made, len(one[0])) for made in other[0])]
    found = simulate.simulate(planner.concatenate([one[1], other[1]]), [made.choice for made in both], facts, {})
    assert [moment.bytes for moment in found.moments] == peaks(both, facts)


def _moved(made: Made, by: int) -> Made:
    inputs, saved, moved = ([one + by for one in places] for places in (made.inputs, made.saved, made.moved))
    return Made(made.memory, made.own, made.offloaded, made.gradient, made.value, inputs, saved, moved)


def every_choice(joint: Joint) -> list[tuple[int, float]]:
    """Bytes and seconds of all sets of ops that may be kept."""
    ops = [at for at, op in enumerate(joint.ops) if op.forward]
    found = []
    for count in range(len(ops) + 1):
        for kept in combinations(ops, count):
            saved, again = joint.closure(kept)
            size = sum(joint.storages[one].bytes for one in saved)
            found.append((size, sum(joint.ops[at].seconds for at in again)))
    return found


@MANY
@given(joints())
def test_nothing_is_below_the_curve(joint: Joint) -> None:
    """Any other choice takes more bytes, or more seconds, than a mixture of two that are offered."""
    found = pareto.choices(joint, Rates(1.0, 1.0, 1.0, 1.0), {0}, offload=False)
    points = [(choice.saved_bytes, choice.seconds) for choice in found]
    every = every_choice(joint)
    assert all(min(abs(size - a) + abs(seconds - b) for a, b in every) < 1e-9 for size, seconds in points)
    assert points[0][1] == min(seconds for _, seconds in every)
    assert points[-1][0] == min(size for size, _ in every)
    for size, seconds in every:
        for (more, fast), (less, slow) in pairwise(points):
            if less <= size <= more:
                assert seconds >= fast + (more - size) * (slow - fast) / (more - less) - 1e-12


@MANY
@given(joints(), st.sampled_from((1e9, 1e11, 1e13)), st.sampled_from((1e9, 1e11, 1e13)))
def test_what_is_offloaded_waits_for_its_copies(joint: Joint, to_host: float, from_host: float) -> None:
    """As long as the ops of forward, and of backward, do not hide them; and they disturb what runs beside."""
    forward = sum(op.seconds for op in joint.ops if op.forward)
    for choice in pareto.choices(joint, Rates(1.0, 1.0, to_host, from_host), {0}, offload=True):
        saved, again = joint.closure(choice.ops)
        repeated = sum(joint.ops[at].seconds for at in again)
        backward = sum(op.seconds for op in joint.ops if not op.forward) + repeated
        sizes = {joint.storages[one].name: joint.storages[one].bytes for one in saved}
        moved = sum(sizes[name] for name in choice.offloaded)
        assert choice.offloaded_bytes == moved
        assert choice.saved_bytes == sum(sizes.values()) - moved
        away, back = moved / to_host, moved / from_host
        waits = max(0, away - forward) + max(0, back - backward) + pareto.COPY_SLOWDOWN * (away + back)
        assert abs(choice.seconds - repeated - waits) < 1e-9 * (1 + waits)


def test_parameters_and_values_of_others_are_not_freed_by_a_layer() -> None:
    """An input that other layers need as well is not a layer's own to keep or to offload."""
    joint = Joint([Storage("x", 3 * MIB, "f", "", input=0)])
    joint.backward_outputs = [0]
    for private, size in (({0}, 3 * MIB), (set(), 0)):
        (first, *others) = pareto.choices(joint, Rates(1.0, 1.0, 1e20, 1e20), private, offload=True)
        assert first.saved_bytes == size
        assert bool(others) == bool(private)


def test_the_budget_is_kept_to_the_byte() -> None:
    """The fastest plan that fits, the fastest of all without a budget, the leanest of all for 0."""
    fast, lean = Choice(("all",), (), 9, 0, 0.0, (0,)), Choice((), (), 2, 0, 1.0, (1,))
    kind = simulate.Kind("", Joint(), [fast, lean])
    kind.memories = {(one.ops, ()): Memory(one.saved_bytes, 0, 0) for one in (fast, lean)}
    sequence = StageSequence([simulate.Stage(kind, str(number), {}) for number in range(2)], {}, {})
    facts = Facts(5, 3, 2)
    for budget, expected in ((None, 28), (28, 28), (27, 21), (21, 21), (20, 14), (14, 14), (0, 14)):
        assert planner.plan(sequence, facts, budget).peak_bytes == expected
    first, second = planner.plan(sequence, facts, 27).choices
    assert (first.seconds, second.seconds) == (1.0, 0.0)  # early layers first
