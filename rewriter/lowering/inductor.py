"""How one graph becomes a function: AOTAutograd and Inductor, or as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from fastft.compat import aot
from fastft.rewriter.memory.partitioner import Partitioner
from fastft.rewriter.options import Options
from fastft.source_digest import sources


def compile_graph(
    gm: GraphModule, example_inputs: list[Any], options: Options, partitioner: aot.CustomPartitionerFn | None = None
) -> Callable:
    """Compile one graph.  partitioner: says what forward keeps; without Inductor a graph is divided only for one."""
    if options.lower == "eager":
        return gm.forward if partitioner is None else aot.partitioned(gm, example_inputs, partitioner)
    return aot.compile_fx(gm, example_inputs, f"fastft-{sources()}", partitioner or Partitioner())
