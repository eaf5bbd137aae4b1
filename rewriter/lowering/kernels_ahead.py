"""Which ops a region will call, forward and backward, so that their kernels are compiled while the region is."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fastft.compat import symbolic
from fastft.kernels import REGISTRY
from fastft.kernels.core import warm_up
from fastft.kernels.core.warm_up import Call
from fastft.rewriter.fx.metadata import name_of
from fastft.rewriter.lowering.region import RegionCompiler

SPARE_CORES = 8  # from so many on, kernels for lengths that 16 does not divide are compiled too, after the others


def start(regions: Iterable[RegionCompiler], device: torch.device) -> threading.Thread | None:
    """Begin to compile the kernels of these regions; return a thread to join before they run, or None."""
    joints = [region.capture.joint for region in regions if region.capture is not None]
    graphs = [joint.graph for joint in joints if joint is not None]
    return warm_up.start([call for graph in graphs for call in _calls(graph, 0)], device)


def start_for_other_lengths(regions: Iterable[RegionCompiler], device: torch.device) -> None:
    """Begin to compile, while steps run, what lengths need that 16 does not divide."""
    joints = [region.capture.joint for region in regions if region.capture is not None]
    if (os.cpu_count() or 1) >= SPARE_CORES:
        warm_up.start([call for joint in joints if joint is not None for call in _calls(joint.graph, 1)], device)


def _calls(graph: Graph, longer: int) -> Iterator[Call]:
    """List the calls of ops in a joint graph, with the sizes of the example, or longer by this."""
    for node in graph.nodes:
        name = name_of(node.target).replace("fastft.", "fastft::", 1) if node.op == "call_function" else ""
        entry = REGISTRY.get(name)
        if entry is None:
            continue
        try:
            arguments = tuple(_described(argument, longer) for argument in entry.complete(node.args, node.kwargs))
            hash(arguments)
        except Exception:  # an argument of a kind that a kernel does not depend on
            continue
        yield name, arguments


def _described(argument: Any, longer: int) -> Any:
    value = argument.meta.get("val") if isinstance(argument, Node) else argument
    if isinstance(value, Tensor):
        sizes = {symbol: size + longer if size > 2 else size for symbol, size in symbolic.hints_of(value).items()}
        shape, stride = (
            [symbolic.evaluate(symbolic.expression(size), sizes) for size in of] for of in (value.shape, value.stride())
        )
        return warm_up.like(value, shape, stride)
    if isinstance(value, torch.SymInt):
        return symbolic.hint(value) + longer
    return tuple(_described(inner, longer) for inner in value) if isinstance(value, (tuple, list)) else value
