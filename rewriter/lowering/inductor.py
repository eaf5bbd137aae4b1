"""Compile one graph to a function, with AOTAutograd and Inductor or, for debugging, without."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from fastft.compat import aot, inductor
from fastft.kernels import REGISTRY
from fastft.kernels.core import launch_plan
from fastft.rewriter.memory.partitioner import Partitioner
from fastft.rewriter.options import Options
from fastft.source_digest import sources


def compile_graph(
    gm: GraphModule, example_inputs: list[Any], options: Options, partitioner: aot.CustomPartitionerFn | None = None,
    *, exact_strides: bool = False,
) -> Callable:  # fmt: skip
    """Compile one graph.

    exact_strides: its results lie in memory as they do in eager, for code that was compiled to read them.
    partitioner: chooses what forward saves for backward.  With ``lower="eager"`` the graph is split into forward and
    backward only if a partitioner is given.
    """
    if options.lower == "eager":
        return gm.forward if partitioner is None else aot.partitioned(gm, example_inputs, partitioner)
    inductor.guard_stores_in_place()
    _call_plans()
    version = f"fastft-{sources()}"
    return aot.compile_fx(gm, example_inputs, version, partitioner or Partitioner(), exact_strides=exact_strides)


@functools.cache
def _call_plans() -> None:
    """Let Inductor's code call the launch plans of our ops."""
    names = [name.partition("::")[2] for name, entry in REGISTRY.items() if entry.planned]
    ops = [getattr(torch.ops.fastft, name).default for name in names]
    inductor.call_plans(ops, lambda device: device.type in launch_plan.PLANNED_ON, launch_plan.record_ahead)
