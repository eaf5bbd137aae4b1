"""How torch cuts graphs for DistributedDataParallel, and how fastft gets them whole, by private torch symbols.

With ``torch._dynamo.config.optimize_ddp`` Dynamo hands each graph inside a DDP module to a DDPOptimizer, made for this
compilation, which cuts it wherever a bucket of gradients is full and passes the pieces on to the backend.
"""

from __future__ import annotations

import math
from typing import Any

from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule


class TraceAgain(TensorifyScalarRestartAnalysis):
    """Makes Dynamo trace again what it compiles; of this class, which torch lets pass from a backend."""


def optimizer() -> Any:
    """The DDPOptimizer between Dynamo and the backend in this compilation; None without one."""
    owner = getattr(InstructionTranslator.current_tx().output.compiler_fn, "__self__", None)
    return owner if hasattr(owner, "backend_compile_fn") else None


def is_cut(gm: GraphModule) -> bool:
    """Whether this is a piece of a graph that torch cut at the buckets of DistributedDataParallel."""
    return "DDPOptimizer" in str(getattr(gm, "compile_subgraph_reason", ""))


def keep_whole() -> bool:
    """Let this compilation's graph be of one bucket; False where that changes nothing any more, or is not possible."""
    try:
        found = optimizer()
        finite = found is not None and found.bucket_bytes_cap < math.inf
    except Exception:  # called without Dynamo, or by another torch
        return False
    if finite:
        found.bucket_bytes_cap = found.first_bucket_cap = math.inf
    return finite


def uncut(gm: GraphModule) -> None:
    """Raise TraceAgain at a piece of a cut graph, so that the whole comes next; return where nothing can be done."""
    if is_cut(gm) and keep_whole():
        raise TraceAgain(restart_reason="fastft compiles whole what torch cut at the buckets of DDP")
