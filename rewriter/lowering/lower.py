"""Lower a rewritten graph to a function, each kind of layer compiled once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from fastft.compat import inductor
from fastft.compat.fsdp import Home
from fastft.compat.symbolic import Sizes
from fastft.errors import describe
from fastft.kernels.attention_engines import AS_GIVEN
from fastft.rewriter.lowering import cuda_graph_policy, plan_builder
from fastft.rewriter.lowering.inductor import compile_graph
from fastft.rewriter.lowering.plan_builder import GraphPlan
from fastft.rewriter.lowering.region import RegionCompiler, by_kind
from fastft.rewriter.lowering.sharding import Sharding
from fastft.rewriter.options import Options
from fastft.rewriter.outline import partition, stitch
from fastft.rewriter.outline.partition import Piece
from fastft.rewriter.report import compile_progress
from fastft.rewriter.report.data import GraphReport, RowsReport
from fastft.rewriter.rows.live_rows import LiveRows
from fastft.rewriter.runtime import profiling
from fastft.rewriter.runtime.cuda_graphs import Graphed
from fastft.rewriter.runtime.live_rows import LiveRun
from fastft.rewriter.runtime.offload import Offloader
from fastft.rewriter.runtime.part import Part
from fastft.rewriter.runtime.planned_graph import Call, Planned
from fastft.rewriter.runtime.row_choice import RowChoice
from fastft.rewriter.runtime.sharded import Sharded

log = logging.getLogger("fastft")


class WholeError(Exception):
    """Raised for a graph that had checkpoints, but has no layers to plan for."""


class UnshardedError(Exception):
    """Raised for a graph of a sharded model that is no sequence of pieces, and would need all of its parameters."""


def lower(
    gm: GraphModule,
    example_inputs: list[Any],
    options: Options,
    report: GraphReport,
    *,
    plan: bool,
    planned_only: bool = False,
    live: LiveRows | None = None,
    homes: Mapping[int, Home] | None = None,
    taken: Collection[Any] = (),
) -> Callable:
    """Compile a graph in regions if it has layers, else as a whole; ``report`` records what was done.

    plan: whether to plan its memory.  planned_only: raise WholeError where it cannot be planned.  live: what the
    graph was prepared for, by which it has an input more than its caller gives.  homes: of the inputs that are
    sharded, which only a graph in regions may have; taken: groups that it may let go of.  Raises BudgetError where a
    number of bytes that the user named is too small.
    """
    pieces = partition.outline(gm, report, always=bool(homes)) if options.outline else []
    if pieces and live is not None and live.rest is not None:
        pieces = partition.divide(gm, pieces, live.rest, report)
    if planned_only and not pieces:
        raise WholeError
    if homes and not pieces:
        raise UnshardedError(report.whole or "outline=False")
    if not options.outline:
        report.whole = "outline=False"
    with compile_progress.line() as say:
        if not pieces:
            say(f"compiling a graph of {report.nodes_after} nodes")
            whole = compile_graph(gm, example_inputs, options)
            return whole if live is None else lambda *inputs: whole(*inputs, AS_GIVEN, *live.no_copies())
        return _lower_pieces(
            gm, pieces, example_inputs, options, report, say, plan=plan, live=live, homes=homes or {}, taken=taken
        )


def _lower_pieces(
    gm: GraphModule,
    pieces: Sequence[Piece],
    example_inputs: list[Any],
    options: Options,
    report: GraphReport,
    say: Callable[[str], None],
    *,
    plan: bool,
    live: LiveRows | None,
    homes: Mapping[int, Home],
    taken: Collection[Any],
) -> Callable:
    """Compile each region, in the variants that its plan needs if it has one, and stitch the pieces together."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = dict(zip(placeholders, example_inputs, strict=True))
    regions = {key: RegionCompiler(gm, alike[0], examples, options) for key, alike in by_kind(pieces).items()}
    graphed = cuda_graph_policy.capturable(gm, pieces, options.cuda_graphs, sharded=bool(homes))
    planned = None
    sharding = Sharding(pieces, placeholders, homes, regions, lambda home: home.group in taken) if homes else None
    if plan:
        planned = plan_builder.plan_graph(
            gm, pieces, regions, options, graphed, say, exact=live is None,
            sharding=sharding.account if sharding is not None else None,
        )  # fmt: skip
    offloader = Offloader(planned.device, planned.facts.host) if planned is not None else None
    with inductor.expecting(_first_sizes(gm, live, examples) if live is not None else {}):
        calls = _compile_regions(pieces, regions, report, say, planned, offloader)
    running, called = pieces, dict(calls)
    if graphed is not None:
        running = cuda_graph_policy.graph_layers(pieces, called, graphed, options.cuda_graphs, offloader)
    sharded = Sharded(sharding.units) if sharding is not None else None
    if sharded is not None:
        called |= {piece: sharded.around(number, called[piece]) for number, piece in enumerate(pieces)}
    named = profiling.named(running, called)
    graphs = [call for call in called.values() if isinstance(call, Graphed)]
    given = [node for node in placeholders if live is None or node not in (live.max_seqlen, live.copies)]
    if live is None:
        run: Callable = stitch.stitch(gm, running, named)
    else:
        run = _live_run(gm, running, named, given, live, report, graphs)
    if planned is not None and offloader is not None:
        run = _planned(planned, offloader, run, calls, graphs, given, report, again=sharded is None)
    if sharded is None:
        return run
    sharded.run = run
    return sharded


def _planned(
    planned: GraphPlan, offloader: Offloader, run: Callable, calls: Mapping[Piece, Callable],
    graphs: Sequence[Graphed], given: Sequence[Node], report: GraphReport, *, again: bool,
) -> Planned:  # fmt: skip
    """Return what runs a graph by its plan.  again: whether a forward that runs out of memory may run again."""
    result = Planned(
        planned.sequence, planned.facts, planned.budget, planned.device, planned.plan,
        run=run, calls=[call for call in calls.values() if isinstance(call, Call)], offloader=offloader,
        graphed=graphs, sizes_of=plan_builder.sizes_of(given), again=again,
    )  # fmt: skip
    report.plan = result.report
    return result


def _first_sizes(gm: GraphModule, live: LiveRows, examples: Mapping[Node, Any]) -> Sizes:
    """Return the sizes that layers will meet at first, as far as they are not those of the batch."""
    try:
        return RowChoice(live, RowsReport()).expected(gm, examples)
    except Exception as error:
        log.debug("what the first batch holds is not known: %s", describe(error))
        return {}


def _live_run(
    gm: GraphModule, pieces: Sequence[Piece], calls: Mapping[Piece, Callable], given: Sequence[Node], live: LiveRows,
    report: GraphReport, graphs: Sequence[Graphed],
) -> LiveRun:  # fmt: skip
    """Return what runs the pieces from the first layer on with the live rows of a batch.  given: the run's inputs."""
    begin = next(number for number, piece in enumerate(pieces) if live.first in piece.nodes)
    end = next((number for number, piece in enumerate(pieces) if live.rest in piece.nodes), len(pieces))
    outputs = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    before, among, rest = pieces[:begin], pieces[begin:end], pieces[end:]
    parts = []
    for part, others in ((among, rest), (rest, [])):
        made = [node for piece in part for node in piece.outputs]
        taken = list(dict.fromkeys(node for piece in part for node in piece.inputs if node not in made))
        read = {*outputs, *(node for piece in others for node in piece.inputs)}
        left = [node for node in made if node in read]
        parts.append(Part(stitch.chain(part, calls, taken, tuple(left)), taken, left))
    later = {node for piece in (*among, *rest) for node in piece.nodes}
    wanted = dict.fromkeys((*parts[0].taken, *parts[1].taken, live.hidden, *live.labels, *live.read, *outputs))
    carried = [node for node in wanted if isinstance(node, Node) and node.op != "placeholder" and node not in later]
    first = Part(stitch.chain(before, calls, given, tuple(carried)), given, carried)
    choice = RowChoice(live, report.rows or RowsReport(), next(iter(graphs), None))
    return LiveRun(choice, first, parts[0], parts[1] if rest else None, outputs)


def _compile_regions(
    pieces: Sequence[Piece],
    regions: Mapping[Any, RegionCompiler],
    report: GraphReport,
    say: Callable[[str], None],
    planned: GraphPlan | None,
    offloader: Offloader | None,
) -> dict[Piece, Callable]:
    """Return the call of each piece, those of a plan in the order of the graph; compile in the order of the report."""
    calls: dict[Piece, Callable] = {}
    if planned is not None and offloader is not None:
        calls |= plan_builder.planned_calls(pieces, regions, planned, offloader)
    stages = dict(zip(pieces, planned.sequence.stages, strict=True)) if planned is not None else {}
    for number, (key, alike) in enumerate(by_kind(pieces).items()):
        region = report.regions[number]
        say(f"compiling region {number + 1} of {len(report.regions)}, {region}")
        began = time.perf_counter()
        if planned is None:
            calls |= dict.fromkeys(alike, regions[key].compile())
        for piece in alike:
            call = calls[piece]
            if isinstance(call, Call):  # with dynamic sizes, also all variants that plans for other sizes may need
                call.prepare(stages[piece].kind.choices if planned and planned.sequence.hints else ())
        region.seconds += time.perf_counter() - began
    return calls
