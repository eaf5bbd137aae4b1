"""Plan: which layer keeps what, so that a step's simulated peak of memory fits a budget and takes the least time.

A graph is a sequence of stages, its pieces.  Memory is simulated over their forward in order, their backward in
reverse, and the optimizer's step (simulate.py).  Every stage has choices from fast to lean (pareto.py); the plan goes
from all at their fastest towards all at their leanest by the step that frees a byte in the least time, early layers
first, since what they need to run again is needed when the later ones have been freed.  It stops at the first that
fits.
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
    """No plan fits.  torch.compile hands it on as it is, where it wraps other errors of a backend."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


def plan(
    sequence: StageSequence, facts: Facts, budget_bytes: int | None, sizes: Sizes | None = None, *, graphs: bool = True
) -> Plan:
    """The fastest plan within the budget, the leanest of all for 0, the fastest of all for None.

    With CUDA graphs, where the sequence may have them, if any such plan fits: what launches cost without them is
    more than what can be saved by having their memory.  sizes: of the batch, where they are not those of the
    example.  Raises BudgetError where nothing fits.
    """
    sizes = sequence.hints | (sizes or {})
    if graphs and sequence.graphed is not None and budget_bytes != 0:
        with suppress(BudgetError):
            return _first(sequence, facts, budget_bytes, sizes, sequence.graphed)
    return _first(sequence, facts, budget_bytes, sizes, None)


def _first(
    sequence: StageSequence, facts: Facts, budget_bytes: int | None, sizes: Sizes, graphed: range | None
) -> Plan:
    """The first plan of the walk that fits."""
    leanest: Plan | None = None
    for chosen in _walk(sequence, facts):
        found = simulate(sequence, chosen, facts, sizes, graphed)
        if budget_bytes is None or found.peak_bytes <= budget_bytes:
            return found
        if leanest is None or found.peak_bytes < leanest.peak_bytes:
            leanest = found
    assert leanest is not None
    if budget_bytes == 0:
        return leanest
    raise BudgetError(budget_error_message(leanest, budget_bytes or 0))


def concatenate(sequences: Sequence[StageSequence]) -> StageSequence:
    """Graphs that run one after another forward, and the other way round backward; one of them may run twice."""
    if len(sequences) == 1:
        return sequences[0]
    found, done = StageSequence([], {}, {}), 0
    for at, sequence in enumerate(sequences):
        for stage in sequence.stages:
            found.stages.append(replace(stage, inputs={place: (at, name) for place, name in stage.inputs.items()}))
        found.values |= {(at, name): Value(value.bytes, value.made + done) for name, value in sequence.values.items()}
        found.last |= {(at, name): last + done for name, last in sequence.last.items()}
        found.hints |= sequence.hints
        done += len(sequence.stages)
    return found


def budget_error_message(leanest: Plan, budget_bytes: int) -> str:
    """Why no plan fits, in one sentence."""
    held = sorted(leanest.peak.parts.items(), key=lambda part: -part[1])
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in held if size >= 0.005 * leanest.peak_bytes)
    return (
        f"memory_budget of {format_bytes(budget_bytes)} is below the {format_bytes(leanest.peak_bytes)} that a step "
        f"takes at the least, in {leanest.peak.label} ({parts}): use a smaller batch, shorter texts or more."
    )


def _walk(sequence: StageSequence, facts: Facts) -> Iterator[tuple[Choice, ...]]:
    """From all stages at their fastest to all at their leanest."""
    at = [0] * len(sequence.stages)
    chosen = [stage.kind.choices[0] for stage in sequence.stages]
    host = 0
    yield tuple(chosen)
    steps = [
        (slope(one, other), number, place + 1)
        for number, stage in enumerate(sequence.stages)
        for place, (one, other) in enumerate(zip(stage.kind.choices, stage.kind.choices[1:], strict=False))
    ]
    for _, number, place in sorted(steps):
        new = sequence.stages[number].kind.choices[place]
        more = new.offloaded_bytes - chosen[number].offloaded_bytes
        if place <= at[number] or host + more > facts.host:
            continue
        at[number], chosen[number], host = place, new, host + more
        yield tuple(chosen)


def corrected(facts: Facts, error_bytes: int) -> Facts:
    """The facts after a measurement that differed by so much."""
    return replace(facts, error=facts.error + error_bytes)


def rounded(size: int) -> int:
    """Up to one of eight steps in each doubling, so that a plan serves many lengths."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step
