"""Lower: what the rewriter made of a graph becomes a function, each kind of layer compiled once."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fastft import kernels, patterns
from fastft.rewriter import compat, cuda_graphs, progress, regions
from fastft.rewriter.options import Options
from fastft.rewriter.recompute import Partitioner
from fastft.rewriter.regions import Piece
from fastft.rewriter.report import GraphReport


def lower(gm: GraphModule, example_inputs: list[Any], options: Options, report: GraphReport) -> Callable:
    """Compile a graph in regions where it has layers, else whole; what was done goes into ``report``."""
    pieces = regions.outline(gm, report) if options.outline else []
    if not options.outline:
        report.whole = "outline=False"
    with progress.line() as say:
        if not pieces:
            say(f"compiling a graph of {report.nodes_after} nodes")
            return compile_graph(gm, example_inputs, options)
        compiled = _compile_regions(gm, pieces, example_inputs, options, report, say)
    if options.cuda_graphs is not False:
        pieces = cuda_graphs.graph_layers(pieces, compiled, options.cuda_graphs)
    return regions.stitch(gm, pieces, compiled)


def _compile_regions(
    gm: GraphModule,
    pieces: Sequence[Piece],
    example_inputs: list[Any],
    options: Options,
    report: GraphReport,
    say: Callable[[str], None],
) -> dict[Any, Callable]:
    """Each region once, in the order in which they are first called, which is that of the report."""
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    compiled: dict[Any, Callable] = {}
    for piece in pieces:
        if piece.key not in compiled:
            region = report.regions[len(compiled)]
            say(f"compiling region {len(compiled) + 1} of {len(report.regions)}, {region}")
            began = time.perf_counter()
            compiled[piece.key] = _compile_piece(gm, piece, given, options)
            region.seconds = time.perf_counter() - began
    return compiled


def _compile_piece(gm: GraphModule, piece: Piece, given: dict[Any, Any], options: Options) -> Callable:
    part = regions.extract(gm, piece)
    recompute = options.recompute == "full" and regions.may_recompute(piece)
    if recompute and options.lower == "eager":  # torch's tag for compilers would not restore the random state here
        return functools.partial(checkpoint, part.forward, use_reentrant=False)
    with compat.apart(given.values()) as mode:
        inputs = regions.example_inputs(piece, given, mode)
        return compile_graph(part, inputs, options, all_of_it=recompute)


def compile_graph(gm: GraphModule, example_inputs: list[Any], options: Options, *, all_of_it: bool = False) -> Callable:
    """Compile one graph as it is; all_of_it: its backward computes all of its forward again."""
    if options.lower == "eager":
        return gm.forward
    return compat.compile_fx(gm, example_inputs, f"fastft-{_sources()}", Partitioner(all_of_it=all_of_it))


@functools.cache
def _sources() -> str:
    """A digest of the ops and the rules: torch's caches hold backward graphs, which a later version may correct."""
    digest = hashlib.sha256()
    for module in (kernels, patterns):
        for path in sorted(Path(str(module.__file__)).parent.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
