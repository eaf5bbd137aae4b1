"""Choose what each layer keeps, so that a step's simulated peak memory fits a budget and takes the least time.

A graph is a sequence of stages, its pieces.  Memory is simulated over their forward in order, their backward in
reverse, and the optimizer's step (simulate.py).  Every stage has choices from fast to lean (pareto.py).  The plan moves
from all stages at their fastest towards all at their leanest, each time by the step that costs the least time for each
byte it frees, early layers first: what they recompute is needed when the later ones have been freed.  It stops at the
first plan that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from fastft.compat import dynamo
from fastft.compat.symbolic import Sizes
from fastft.rewriter.memory.pareto import Choice, slope
from fastft.rewriter.memory.simulate import Facts, Plan, StageSequence, Value, simulate
from fastft.units import format_bytes


class BudgetError(dynamo.ShortenTraceback, ValueError):
    """No plan fits the budget.  torch.compile passes it on unwrapped, unlike other errors of a backend."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


def plan(
    sequence: StageSequence, facts: Facts, budget_bytes: int | None, sizes: Sizes | None = None, *, graphs: bool = True
) -> Plan:
    """Return the fastest plan within the budget, the leanest of all for 0, the fastest of all for None.

    With CUDA graphs, where the sequence allows them, if any such plan fits: launch overhead without them costs more
    than the memory that they take could save.  sizes: of the batch, where they are not those of the example.  Raises
    BudgetError where nothing fits.
    """
    sizes = sequence.hints | (sizes or {})
    if graphs and sequence.graphed is not None and budget_bytes != 0:
        with suppress(BudgetError):
            return _first(sequence, facts, budget_bytes, sizes, sequence.graphed)
    return _first(sequence, facts, budget_bytes, sizes, None)


def _first(
    sequence: StageSequence, facts: Facts, budget_bytes: int | None, sizes: Sizes, graphed: range | None
) -> Plan:
    """Return the first plan of the walk that fits.  Raises BudgetError."""
    leanest: Plan | None = None
    for chosen in _walk(sequence, facts):
        candidate = simulate(sequence, chosen, facts, sizes, graphed)
        if budget_bytes is None or candidate.peak_bytes <= budget_bytes:
            return candidate
        if leanest is None or candidate.peak_bytes < leanest.peak_bytes:
            leanest = candidate
    assert leanest is not None
    if budget_bytes == 0:
        return leanest
    raise BudgetError(budget_error_message(leanest, budget_bytes or 0))


def concatenate(sequences: Sequence[StageSequence]) -> StageSequence:
    """Join graphs that run one after another in forward and in reverse order in backward; a graph may occur twice."""
    if len(sequences) == 1:
        return sequences[0]
    joined, done = StageSequence([], {}, {}), 0
    for index, sequence in enumerate(sequences):
        for stage in sequence.stages:
            joined.stages.append(replace(stage, inputs={place: (index, name) for place, name in stage.inputs.items()}))
        joined.values |= {
            (index, name): Value(value.bytes, value.made + done) for name, value in sequence.values.items()
        }
        joined.last |= {(index, name): last + done for name, last in sequence.last.items()}
        joined.hints |= sequence.hints
        done += len(sequence.stages)
    return joined


def budget_error_message(leanest: Plan, budget_bytes: int) -> str:
    """Say in one sentence why no plan fits."""
    held = sorted(leanest.peak.parts.items(), key=lambda part: -part[1])
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in held if size >= 0.005 * leanest.peak_bytes)
    return (
        f"memory_budget of {format_bytes(budget_bytes)} is below the {format_bytes(leanest.peak_bytes)} that a step "
        f"takes at the least, in {leanest.peak.label} ({parts}): use a smaller batch, shorter texts or more."
    )


def _walk(sequence: StageSequence, facts: Facts) -> Iterator[tuple[Choice, ...]]:
    """Iterate over choices for all stages, from all at their fastest to all at their leanest."""
    reached = [0] * len(sequence.stages)
    chosen = [stage.kind.choices[0] for stage in sequence.stages]
    host = 0
    yield tuple(chosen)
    steps = [
        (slope(faster, leaner), number, place + 1)
        for number, stage in enumerate(sequence.stages)
        for place, (faster, leaner) in enumerate(zip(stage.kind.choices, stage.kind.choices[1:], strict=False))
    ]
    for _, number, place in sorted(steps):
        new = sequence.stages[number].kind.choices[place]
        more = new.offloaded_bytes - chosen[number].offloaded_bytes
        if place <= reached[number] or host + more > facts.host:
            continue
        reached[number], chosen[number], host = place, new, host + more
        yield tuple(chosen)


def corrected(facts: Facts, error_bytes: int) -> Facts:
    """Return the facts after a measurement that differed by ``error_bytes`` from the simulation."""
    return replace(facts, error=facts.error + error_bytes)


def rounded(size: int) -> int:
    """Round bytes up to one of eight steps per doubling, so that a plan serves many sequence lengths."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step
