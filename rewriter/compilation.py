"""How one graph becomes a function: AOTAutograd and Inductor, or as it is."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from fastft import kernels, patterns
from fastft.rewriter import compat
from fastft.rewriter.options import Options
from fastft.rewriter.recompute import Partitioner


def compile_graph(
    gm: GraphModule, example_inputs: list[Any], options: Options, partitioner: compat.CustomPartitionerFn | None = None
) -> Callable:
    """Compile one graph.  partitioner: says what forward keeps; without Inductor a graph is divided only for one."""
    if options.lower == "eager":
        return gm.forward if partitioner is None else compat.partitioned(gm, example_inputs, partitioner)
    return compat.compile_fx(gm, example_inputs, f"fastft-{sources()}", partitioner or Partitioner())


@functools.cache
def sources() -> str:
    """A digest of the ops and the rules: torch's caches hold backward graphs, which a later version may correct."""
    digest = hashlib.sha256()
    for module in (kernels, patterns):
        for path in sorted(Path(str(module.__file__)).parent.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
