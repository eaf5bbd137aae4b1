"""Plans of made-up stages: they fit, are as fast as can be told, and say why not; and what a layer may keep."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import joints

from fastft.rewriter.memory import pareto, planner, simulate
from fastft.rewriter.memory.device_rates import TYPICAL, Rates
from fastft.rewriter.memory.joint_graph import Joint, Memory, Storage
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.memory.planner import BudgetError
from fastft.rewriter.memory.simulate import Facts, Kind, Stage, StageSequence, Value


@given(joints(), st.data())
def test_backward_finds_all_that_it_reads(joint: Joint, data: st.DataObject) -> None:
    """Kept, or made again from what is there, each op once and behind those it needs."""
    forward = [at for at, op in enumerate(joint.ops) if op.forward]
    kept = data.draw(st.sets(st.sampled_from(forward)))
    saved, again = joint.closure(kept)
    assert not kept.intersection(again)
    assert all(joint.ops[at].recomputable for at in again)
    there = {*saved, *(at for at, one in enumerate(joint.storages) if one.tangent)}
    order = list(joint._backward_order(set(saved)))
    assert sorted(op.node for op in order if op.forward) == sorted(joint.ops[at].node for at in again)
    for op in order:
        assert there.issuperset(op.reads), op.node
        there.update(op.makes)
    memory = joint.memory(kept)
    assert memory.saved == sum(joint.storages[one].bytes for one in saved if one in joint.maker)
    largest = max(sum(joint.storages[one].bytes for one in op.makes) for op in joint.ops if not op.forward)
    assert memory.backward + memory.saved >= largest


@given(joints(), st.booleans())
def test_choices_are_a_falling_convex_curve(joint: Joint, offload: bool) -> None:
    found = pareto.choices(joint, TYPICAL, {0}, offload=offload)
    everything = [at for at, op in enumerate(joint.ops) if op.forward]
    assert found[0].seconds == 0  # nothing is run again, nothing is waited for
    assert found[0].saved_bytes <= pareto._with_ops(joint, tuple(everything), {0}).saved_bytes
    for one, other in pairwise(found):
        assert other.saved_bytes < one.saved_bytes
        assert other.seconds > one.seconds
    slopes = [pareto.slope(one, other) for one, other in pairwise(found)]
    assert slopes == sorted(slopes)
    leanest = pareto._with_ops(joint, (), {0})
    assert found[-1].saved_bytes <= leanest.saved_bytes
    assert offload or not any(choice.offloaded for choice in found)


@given(joints())
def test_a_slow_link_moves_nothing(joint: Joint) -> None:
    slow = Rates(TYPICAL.flops, TYPICAL.bytes, to_host=1e3, from_host=1e3)
    found = pareto.choices(joint, slow, {0}, offload=True)
    keeping = pareto.choices(joint, slow, {0}, offload=False)
    assert [one for one in found if not one.offloaded] == keeping[: len(found)]


curves = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3)


def kind_of(curve: list[tuple[int, int]]) -> Kind:
    """A layer that needs no memory but what it keeps: from the fastest on, bytes that a step frees and its seconds."""
    steps = sorted(curve, key=lambda step: step[1] / step[0])
    kept, seconds = sum(freed for freed, _ in steps), 0
    choices = [Choice(("all",), (), kept, 0, 0.0, (0,))]
    for number, (freed, slower) in enumerate(steps, 1):
        kept, seconds = kept - freed, seconds + slower
        choices.append(Choice((f"{number}",), (), kept, 0, float(seconds), (number,)))
    made = Kind("layer", Joint(), choices)
    made.memories = {(choice.ops, ()): Memory(choice.saved_bytes, 0, 0) for choice in choices}
    return made


@given(st.lists(curves, min_size=1, max_size=4), st.integers(0, 200))
def test_a_plan_is_within_a_step_of_the_best(layers: list[list[tuple[int, int]]], budget: int) -> None:
    kinds = [kind_of(curve) for curve in layers]
    sequence = StageSequence([Stage(kind, str(number), {}) for number, kind in enumerate(kinds)], {}, {})
    fitting = [
        sum(choice.seconds for choice in chosen)
        for chosen in product(*(kind.choices for kind in kinds))
        if simulate.simulate(sequence, chosen, Facts(5), {}).peak_bytes <= budget
    ]
    if not fitting:
        with pytest.raises(BudgetError, match="at the least"):
            planner.plan(sequence, Facts(5), budget or -1, {})
        return
    found = planner.plan(sequence, Facts(5), budget, {})
    assert found.peak_bytes <= budget
    steps = [other.seconds - one.seconds for kind in kinds for one, other in pairwise(kind.choices)]
    assert min(fitting) <= found.seconds <= min(fitting) + max(steps)


def test_what_goes_between_stages_lives_until_it_was_read() -> None:
    """Three stages that keep nothing hand a value of 7 on; the first one's is read by the last as well."""
    plain = Kind("", None, [Choice(())])
    stages = [Stage(plain, "a", {}), Stage(plain, "b", {0: "a"}), Stage(plain, "c", {0: "b", 1: "a"})]
    sequence = StageSequence(stages, {"a": Value(7, 0), "b": Value(7, 1)}, {"a": 2, "b": 2})
    held = [moment.parts["between layers"] for moment in planner.plan(sequence, Facts(1), None).moments]
    assert held == [0, 7, 14, 0, 0, 0, 0]
    twice = planner.plan(planner.concatenate([sequence, sequence]), Facts(1), None)
    assert [moment.parts["between layers"] for moment in twice.moments[:6]] == [0, 7, 14, 0, 7, 14]


def test_the_host_is_bounded() -> None:
    moved = Choice((), ("x",), 4, 6, 1.0, (1,))
    again = Choice((), (), 0, 0, 5.0, (2,))
    kind = Kind("", Joint([Storage("x", 6, "f", "")]), [Choice(("x",), (), 10, 0, 0.0, (0,)), moved, again])
    kind.memories = {((0,), ()): Memory(10, 0, 0), ((1,), ()): Memory(10, 0, 0), ((2,), ()): Memory(0, 0, 0)}
    sequence = StageSequence([Stage(kind, str(number), {}) for number in range(3)], {}, {})
    for host in (18, 17, 5):
        walked = [
            sum(choice.offloaded_bytes for choice in chosen) for chosen in planner._walk(sequence, Facts(0, host=host))
        ]
        assert max(walked) == host // 6 * 6
        assert [choice.seconds for choice in planner.plan(sequence, Facts(0, host=host), 0).choices] == [5.0, 5.0, 5.0]
