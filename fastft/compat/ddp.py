"""How torch cuts graphs for DistributedDataParallel, and how fastft gets them whole, by private torch symbols.

With ``torch._dynamo.config.optimize_ddp`` Dynamo hands each graph inside a DDP module to a DDPOptimizer, made for this
compilation, which cuts it wherever a bucket of gradients is full and passes the pieces on to the backend.

DDP looks for buffers in all modules before each forward.  Dynamo, which is on then, looks at each function called for
that, which takes longer than the search itself, while the device waits.
"""

from __future__ import annotations

import math
from typing import Any

from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel


class TraceAgain(TensorifyScalarRestartAnalysis):
    """Makes Dynamo trace again what it compiles; a subclass of an exception that torch lets pass from a backend."""


def optimizer() -> Any:
    """Return the DDPOptimizer between Dynamo and the backend in this compilation, or None."""
    owner = getattr(InstructionTranslator.current_tx().output.compiler_fn, "__self__", None)
    return owner if hasattr(owner, "backend_compile_fn") else None


def is_cut(gm: GraphModule) -> bool:
    """Return whether this is a piece of a graph that torch cut at the buckets of DistributedDataParallel."""
    return "DDPOptimizer" in str(getattr(gm, "compile_subgraph_reason", ""))


def is_whole(ddp_optimizer: Any) -> bool:
    """Return whether a DDPOptimizer has been told to leave its graph whole, or is told now."""
    return keep_whole() or ddp_optimizer.bucket_bytes_cap == math.inf


def keep_whole() -> bool:
    """Give this compilation's graph a single bucket; return False if it has one already or that is not possible."""
    try:
        ddp_optimizer = optimizer()
        finite = ddp_optimizer is not None and ddp_optimizer.bucket_bytes_cap < math.inf
    except Exception:  # called without Dynamo, or by another torch
        return False
    if finite:
        ddp_optimizer.bucket_bytes_cap = ddp_optimizer.first_bucket_cap = math.inf
    return finite


def uncut(gm: GraphModule) -> None:
    """Raise TraceAgain at a piece of a cut graph, so that the whole comes next; return where that is not possible."""
    if is_cut(gm) and keep_whole():
        raise TraceAgain(restart_reason="fastft compiles whole what torch cut at the buckets of DDP")


def is_active() -> bool:
    """Return whether a forward of DistributedDataParallel is running."""
    try:
        return DistributedDataParallel._get_active_ddp_module() is not None
    except AttributeError:  # another torch
        return False


def leave_buffers_to_ddp() -> None:
    """Have Dynamo leave alone what DDP does to a model's buffers before and behind a forward."""
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        if is_active():
            code = DistributedDataParallel._sync_buffers.__code__
            set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    except (AttributeError, ImportError):  # another torch
        return
