"""Lower: what the rewriter made of a graph becomes a function, each kind of layer compiled once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from fastft.compat import aot
from fastft.rewriter.lowering import cuda_graph_policy, plan_builder
from fastft.rewriter.lowering.inductor import compile_graph
from fastft.rewriter.options import Options
from fastft.rewriter.outline import partition, stitch
from fastft.rewriter.outline.partition import Piece
from fastft.rewriter.report import compile_progress
from fastft.rewriter.report.data import GraphReport
from fastft.rewriter.runtime import cuda_graphs, profiling
from fastft.rewriter.runtime.planned_graph import Planned


class WholeError(Exception):
    """A graph that has no layers to plan for, but had checkpoints."""


def lower(
    gm: GraphModule, example_inputs: list[Any], options: Options, report: GraphReport, *, planned_only: bool = False
) -> Callable:
    """Compile a graph in regions where it has layers, else whole; what was done goes into ``report``.

    planned_only: raise WholeError where no plan can be made.
    """
    pieces = partition.outline(gm, report) if options.outline else []
    if planned_only and not pieces:
        raise WholeError
    if not options.outline:
        report.whole = "outline=False"
    with compile_progress.line() as say:
        if not pieces:
            say(f"compiling a graph of {report.nodes_after} nodes")
            return compile_graph(gm, example_inputs, options)
        planned = plan_builder.build_planned_graph(gm, pieces, example_inputs, options, say)
        calls = _compile_regions(gm, pieces, example_inputs, options, report, say, planned)
    offloader = planned.offloader if planned is not None else None
    layers = cuda_graph_policy.capturable(pieces, options.cuda_graphs)
    if layers is not None:
        pieces = cuda_graph_policy.graph_layers(pieces, calls, layers, offloader)
    stitched = stitch.stitch(gm, pieces, profiling.named(pieces, calls))
    if planned is None:
        return stitched
    planned.run, report.plan = stitched, planned.report
    planned.graphed = [one for one in calls.values() if isinstance(one, cuda_graphs.Graphed)]
    planned.controller.replan(strict=False)
    return planned


def _compile_regions(
    gm: GraphModule,
    pieces: Sequence[Piece],
    example_inputs: list[Any],
    options: Options,
    report: GraphReport,
    say: Callable[[str], None],
    planned: Planned | None,
) -> dict[Piece, Callable]:
    """What each piece calls, each region compiled once for all it may be asked to keep, in the order of the report."""
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    calls: dict[Piece, Callable] = {}
    compiled: dict[Any, Callable] = {}
    number_of = {key: number for number, key in enumerate(dict.fromkeys(piece.key for piece in pieces))}
    for at, piece in enumerate(pieces):
        wanted = piece.key, planned.choices[at].kept if planned is not None else ()
        if wanted not in compiled:
            region = report.regions[number_of[piece.key]]
            say(f"compiling region {number_of[piece.key] + 1} of {len(report.regions)}, {region}")
            began = time.perf_counter()
            if planned is None:
                compiled[wanted] = _compile_piece(gm, piece, given, options)
            else:
                planned.calls[at].prepare()
                compiled[wanted] = planned.calls[at]
            region.seconds += time.perf_counter() - began
        calls[piece] = compiled[wanted] if planned is None else planned.calls[at]
    return calls


def _compile_piece(gm: GraphModule, piece: Piece, given: dict[Any, Any], options: Options) -> Callable:
    part = stitch.extract(gm, piece)
    with aot.isolated_tracing_context(given.values()) as mode:
        return compile_graph(part, stitch.example_inputs(piece, given, mode), options)
