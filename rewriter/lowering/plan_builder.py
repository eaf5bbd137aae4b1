"""From a graph's pieces to a plan at work: trace them, plan, and make what compiles them as the plan wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastft.compat import aot, dynamo, fake_tensors, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.compat.symbolic import Sizes
from fastft.rewriter.lowering import cuda_graph_policy
from fastft.rewriter.lowering.inductor import compile_graph
from fastft.rewriter.memory import device_budget, device_rates, stages
from fastft.rewriter.memory.joint_graph import Joint
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.memory.partitioner import JointGraphCapture, Partitioner
from fastft.rewriter.options import Options
from fastft.rewriter.outline import stitch
from fastft.rewriter.outline.partition import Piece
from fastft.rewriter.runtime.planned_graph import Call, Planned, Variants


def build_planned_graph(
    gm: GraphModule, pieces: Sequence[Piece], example_inputs: list[Any], options: Options, say: Callable[[str], None]
) -> Planned | None:
    """A plan for a graph, and calls that follow it; None where nothing is to be planned."""
    if not should_plan(gm, options):
        return None
    device = stages.device_of(gm)
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    builders = {key: _Builder(gm, piece, given, options) for key, piece in _first(pieces).items()}
    for builder in builders.values():
        say(f"planning the memory of {builder.name}")
        builder.trace()
    if all(builder.probe is None for builder in builders.values()):
        return None
    sequence = stages.read(
        gm, pieces, {key: builder.probe for key, builder in builders.items()}, device_rates.rates(device)
    )
    gradients = sum(stage.gradient_bytes for stage in sequence.stages)
    facts = device_budget.facts(device, stages.input_bytes(gm), gradients)
    sequence.graphed = cuda_graph_policy.capturable(pieces, options.cuda_graphs)
    planned = Planned(sequence, facts, options.budget, device)
    joints = {piece.key: stage.kind.joint for piece, stage in zip(pieces, sequence.stages, strict=True)}
    variants = {key: Variants(builder.build, builder.places(joints[key])) for key, builder in builders.items()}
    last = len(pieces) - 1
    planned.calls = [
        Call(variants[piece.key], planned.offloader, choice, first=at == 0, last=at == last)
        for at, (piece, choice) in enumerate(zip(pieces, planned.choices, strict=True))
    ]
    planned.sizes_of = _sizes_of(list(given))
    if sequence.hints:
        _compile_variants_for_other_sizes(planned)
    return planned


def _compile_variants_for_other_sizes(planned: Planned) -> None:
    """Where sizes change, compile now what other sizes may want: guards that compiling adds later would be lost."""
    kinds = {id(stage.kind): stage.kind for stage in planned.sequence.stages}
    used: dict[int, set[tuple[str, ...]]] = {key: set() for key in kinds}
    for stage, choice in zip(planned.sequence.stages, planned.choices, strict=True):
        ends = stage.kind.choices[0], stage.kind.choices[-1]
        used[id(stage.kind)] |= {one.kept for one in (*ends, choice)}
    for key, kind in kinds.items():
        kind.choices = [one for one in kind.choices if one.kept in used[key]]
    planned.controller.replan(strict=False)
    for call, stage in zip(planned.calls, planned.sequence.stages, strict=True):
        call.prepare(stage.kind.choices)


def should_plan(gm: GraphModule, options: Options) -> bool:
    """Whether a graph's memory is to be planned: where it may go backward, on a CPU only by a budget of the user's."""
    planned = stages.device_of(gm).type == "cuda" or options.memory_budget is not None
    return planned and options.outline and torch.is_grad_enabled()


class _Builder:
    """Compiles a kind of piece in one way or another, also when Dynamo has long forgotten the graph."""

    def __init__(self, gm: GraphModule, piece: Piece, given: dict[Node, Any], options: Options) -> None:
        self.options, self.name = options, piece.module or "the rest"
        self.part = stitch.extract(gm, piece)
        with aot.isolated_tracing_context(given.values()) as mode:
            self.inputs = stitch.example_inputs(piece, given, mode)
        values = [tensor for node in piece.outputs for tensor in fake_tensors.tensors_in(value_of(node))]
        self.trained = any(value.requires_grad for value in values)
        self.probe: JointGraphCapture | None = None

    def trace(self) -> None:
        """Get the joint graph of forward and backward, if there is one."""
        if self.trained:
            probe = JointGraphCapture()
            try:
                self._compile(probe)
            except Exception:
                if probe.joint is None:
                    raise
            self.probe = probe

    def build(self, kept: tuple[str, ...]) -> Callable:
        return self._compile(Partitioner(kept) if self.probe is not None else None)

    def _compile(self, partitioner: aot.CustomPartitionerFn | None) -> Callable:
        part = dynamo.inherit_capture_metadata(GraphModule(self.part, dynamo.copy_graph(self.part.graph)), self.part)
        with aot.isolated_tracing_context(self.inputs):
            return compile_graph(part, self.inputs, self.options, partitioner)

    def places(self, joint: Joint | None) -> Callable[[Choice], frozenset[int]]:
        """Which of the tensors that autograd saves are those that a choice offloads."""

        def find(choice: Choice) -> frozenset[int]:
            assert self.probe is not None
            assert joint is not None
            going = [at for at, storage in enumerate(joint.storages) if storage.name in choice.offloaded]
            names = {joint.nodes[at] for at in going if at in joint.nodes}
            return frozenset(at for at, name in enumerate(self.probe.saved(choice.kept)) if name in names)

        return find


def _first(pieces: Sequence[Piece]) -> dict[Any, Piece]:
    """The first piece of each kind."""
    found: dict[Any, Piece] = {}
    for piece in pieces:
        found.setdefault(piece.key, piece)
    return found


def _sizes_of(placeholders: Sequence[Node]) -> Callable[[Sequence[Any]], Sizes]:
    """What a graph's symbols are, by its inputs."""
    values = [value_of(node) for node in placeholders]
    symbols = {
        symbolic.expression(value): place for place, value in enumerate(values) if isinstance(value, torch.SymInt)
    }
    symbols = {symbol: place for symbol, place in symbols.items() if not isinstance(symbol, int)}
    return lambda inputs: {symbol: int(inputs[place]) for symbol, place in symbols.items()}
