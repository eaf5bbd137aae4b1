"""Plan a graph's memory before anything is compiled: trace its regions, simulate a step, choose for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastft.compat import symbolic
from fastft.compat.fake_tensors import value_of
from fastft.compat.symbolic import Sizes
from fastft.rewriter.lowering.region import RegionCompiler
from fastft.rewriter.memory import device_budget, device_rates, stages
from fastft.rewriter.memory.describe import describe
from fastft.rewriter.memory.device_rates import Rates
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.memory.simulate import Facts, Plan, StageSequence
from fastft.rewriter.options import Options
from fastft.rewriter.outline.partition import Piece
from fastft.rewriter.report.plan import PlanReport
from fastft.rewriter.runtime import controller
from fastft.rewriter.runtime.offload import Offloader
from fastft.rewriter.runtime.planned_graph import Call, Variants


@dataclass(frozen=True)
class GraphPlan:
    """The plan for one graph, and what it was computed from.

    budget: as the user gave it, converted to bytes if it has a unit.
    """

    sequence: StageSequence
    facts: Facts
    budget: Any
    device: torch.device
    plan: Plan

    def describe(self) -> PlanReport:
        """Describe the plan for a report."""
        report = PlanReport()
        limit_bytes = device_budget.budget_bytes(self.budget, self.device)
        describe(report, self.sequence, self.plan, self.budget, limit_bytes, self.device)
        return report


def should_plan(gm: GraphModule, options: Options) -> bool:
    """Return whether to plan a graph's memory: if it may go backward; on a CPU, only if the user set a budget."""
    wanted = stages.device_of(gm).type == "cuda" or options.memory_budget is not None
    return wanted and options.outline and torch.is_grad_enabled()


def plan_graph(
    gm: GraphModule,
    pieces: Sequence[Piece],
    regions: Mapping[Any, RegionCompiler],
    options: Options,
    graphed: range | None,
    say: Callable[[str], None],
    *,
    exact: bool = True,
    sharding: Callable[[StageSequence, torch.device], int] | None = None,
) -> GraphPlan | None:
    """Plan a graph; return None if nothing in it goes backward.

    regions: by the kind of piece.  graphed: the range of pieces that may run as CUDA graphs.  say: takes messages on
    progress.  exact: whether steps are of the sizes in the example, and not of fewer rows.  sharding: adds to the
    stages what is gathered for them, and returns the bytes of it that are held before the step too.  Raises BudgetError
    where a number of bytes that the user named is too small.
    """
    device = stages.device_of(gm)
    sequence = traced(gm, pieces, regions, device_rates.rates(device), say)
    if all(region.capture is None for region in regions.values()):
        return None
    sequence.graphed = graphed
    twice = sharding(sequence, device) if sharding is not None else 0
    gradient_bytes = sum(stage.gradient_bytes for stage in sequence.stages)
    facts = device_budget.facts(device, stages.input_bytes(gm), gradient_bytes)
    facts = replace(facts, before=facts.before - twice)
    limit_bytes = device_budget.budget_bytes(options.budget, device)
    # If another graph of the same step has run, the bytes allocated now include its activations.
    strict = exact and isinstance(options.budget, int) and not any(graph.waiting() for graph in controller.alive)
    plan = controller.plan_or_leanest(sequence, facts, limit_bytes, {}, strict=strict)
    if sequence.hints:
        _keep_few_choices(sequence, plan.choices)
        plan = controller.plan_or_leanest(sequence, facts, limit_bytes, {}, strict=False)
    return GraphPlan(sequence, facts, options.budget, device, plan)


def traced(
    gm: GraphModule, pieces: Sequence[Piece], regions: Mapping[Any, RegionCompiler], rate: Rates,
    say: Callable[[str], None],
) -> StageSequence:  # fmt: skip
    """Trace the regions, and return the stages of a step."""
    for region in regions.values():
        say(f"planning the memory of {region.name}")
        region.trace()
    captures = {key: region.capture for key, region in regions.items()}
    return stages.read(gm, pieces, captures, rate)


def _keep_few_choices(sequence: StageSequence, chosen: Sequence[Choice]) -> None:
    """Limit each kind of layer to choices that are compiled now: the fastest, the leanest and those that are chosen.

    With dynamic sizes, a plan for other sizes could use others, but guards that a later compilation adds would be lost.
    """
    kinds = {id(stage.kind): stage.kind for stage in sequence.stages}
    used: dict[int, set[tuple[str, ...]]] = {key: set() for key in kinds}
    for stage, choice in zip(sequence.stages, chosen, strict=True):
        ends = stage.kind.choices[0], stage.kind.choices[-1]
        used[id(stage.kind)] |= {end.kept for end in (*ends, choice)}
    for key, kind in kinds.items():
        kind.choices = [choice for choice in kind.choices if choice.kept in used[key]]


def planned_calls(
    pieces: Sequence[Piece], regions: Mapping[Any, RegionCompiler], plan: GraphPlan, offloader: Offloader
) -> dict[Piece, Call]:
    """Make a call for each piece that follows the plan; nothing is compiled yet."""
    joints = {piece.key: stage.kind.joint for piece, stage in zip(pieces, plan.sequence.stages, strict=True)}
    variants = {key: Variants(region.compile, region.saved_places(joints[key])) for key, region in regions.items()}
    last = len(pieces) - 1
    return {
        piece: Call(variants[piece.key], offloader, choice, first=number == 0, last=number == last)
        for number, (piece, choice) in enumerate(zip(pieces, plan.plan.choices, strict=True))
    }


def sizes_of(placeholders: Sequence[Node]) -> Callable[[Sequence[Any]], Sizes]:
    """Return a function that computes the values of a graph's size symbols from the graph's inputs."""
    values = [value_of(node) for node in placeholders]
    symbols = {
        symbolic.expression(value): place for place, value in enumerate(values) if isinstance(value, torch.SymInt)
    }
    symbols = {symbol: place for symbol, place in symbols.items() if not isinstance(symbol, int)}
    return lambda inputs: {symbol: int(inputs[place]) for symbol, place in symbols.items()}
