"""Dynamo: the compilation that is under way, what it remembers, how it is started and left."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch._dynamo import convert_frame, pgo
from torch._dynamo.exc import BackendCompilerFailed, RestartAnalysis, ShortenTraceback
from torch._dynamo.pgo import FrameStateSizeEntry as SizeEntry
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import get_metrics_context
from torch._dynamo.variables import builder
from torch._dynamo.variables.tensor import TensorVariable
from torch.fx import Graph, GraphModule, Node

from fastft.compat import ddp

__all__ = ["BackendCompilerFailed", "RestartAnalysis", "ShortenTraceback", "SizeEntry"]  # what is only passed on


maybe_mark_dynamic = torch._dynamo.maybe_mark_dynamic
DYNAMIC = pgo.auto_dynamic  # the size, as Dynamo remembers it, of what it saw change

break_log = torch._logging.getArtifactLogger("torch._dynamo.symbolic_convert", "graph_breaks")


def describe_input(placeholder: Node, source: Node) -> None:
    """Copy to a region's input what AOTAutograd reads of Dynamo's inputs."""
    placeholder.meta = {key: source.meta[key] for key in ("example_value", "tensor_dict") if key in source.meta}
    placeholder._dynamo_source = None  # a region serves many layers: no guard on one of them


def inherit_capture_metadata(part: GraphModule, whole: GraphModule) -> GraphModule:
    """Mark a part of a captured graph as captured itself, or AOTAutograd will not know its static inputs."""
    if "dynamo_compile_id" in whole.meta:
        part.meta["dynamo_compile_id"] = whole.meta["dynamo_compile_id"]
    part._param_name_to_source = {}  # type: ignore[assignment]
    return part


@contextmanager
def compiled_meanwhile(function: Callable, backend: Callable) -> Iterator[Callable]:
    """Compile a function for a while, leaving no compiled code behind and counting no recompilation.

    Code that was compiled before keeps one more entry: removing it would remove the others too.
    """
    compiled = torch.compile(function, backend=backend)
    known = _compiled_code()
    unlimited = {"recompile_limit": 2**31, "accumulated_recompile_limit": 2**31}
    try:
        with torch._dynamo.config.patch(unlimited):
            yield compiled
    finally:
        for code in _compiled_code() - known:
            torch._dynamo.reset_code(code)
            _forget(code)


def compile_once(function: Callable, backend: Callable) -> Callable:
    """Compile a function whose code and recompilations are forgotten after each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with compiled_meanwhile(function, backend) as compiled:
            return compiled(*args, **kwargs)

    return call


def _compiled_code() -> set[CodeType]:
    """Return every code object that Dynamo has compiled, including those that resume after a graph break."""
    return {code for reference in convert_frame.input_codes.seen if (code := reference()) is not None}


def _forget(code: CodeType) -> None:
    """Make Dynamo treat this code as if it met it for the first time."""
    tracker = convert_frame.input_codes
    tracker.seen[:] = [reference for reference in tracker.seen if reference() is not code]
    tracker.seen_ids.discard(id(code))


def copy_graph(graph: Graph) -> Graph:
    """Copy a graph whose inputs keep their Dynamo source, which AOTAutograd reads."""
    result = copy.deepcopy(graph)
    for node, original in zip(result.nodes, graph.nodes, strict=True):
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    return result


def recompile_reason() -> str:
    """Return why Dynamo recompiles what it compiles now; "" for a first compilation."""
    metrics = get_metrics_context()
    return (metrics._metrics.get("recompile_reason", "unknown") or "") if metrics.in_progress() else ""


def current_code() -> tuple[CodeType, Any]:
    """Return the code that Dynamo compiles now, and the module that it is a method of, or None."""
    tx = InstructionTranslator.current_tx()
    return tx.f_code, tx.f_locals.get("self")


def current_backend() -> Any:
    """Return the backend that torch.compile was given, with its options."""
    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    if (between := ddp.optimizer()) is not None:
        backend = between.backend_compile_fn
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


def given_backend() -> tuple[Any, dict[str, Any]]:
    """Return the function that torch.compile was given as a backend, and its named arguments."""
    backend = current_backend()
    keywords: dict[str, Any] = dict(getattr(backend, "kwargs", {}))
    function = getattr(backend, "compiler_fn", backend)
    return getattr(function, "func", function), keywords | getattr(function, "keywords", {})


def remembered_sizes() -> dict[str, SizeEntry]:
    """Return the sizes that Dynamo remembers for inputs of the current code; empty without automatic dynamic shapes."""
    if not torch._dynamo.config.automatic_dynamic_shapes:
        return {}
    tx = InstructionTranslator.current_tx()
    make: Callable = pgo.CodeId.make
    told_apart_by = (tx.f_code, tx.closure)[: make.__code__.co_argcount]  # torch 2.11: by the code alone
    return pgo.get_code_state()[make(*told_apart_by)].automatic_dynamic


def before_sizes(look: Callable[[torch.Tensor, str], None]) -> None:
    """Call ``look(tensor, name)`` before Dynamo decides which sizes of a tensor from outside any module are symbols."""

    def automatic_dynamic(
        original: Callable, e: Any, tx: Any, source: Any, static_shapes: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if not static_shapes and not _of_a_module(source):
            look(e, source.name)
        return original(e, tx, source, static_shapes, *args, **kwargs)

    put_around(builder, "_automatic_dynamic", automatic_dynamic)


def _of_a_module(source: Any) -> bool:
    """Tell whether Dynamo found a value in a module, or in an object that one holds, as a quantised weight's state."""
    found_in = source.guard_source
    return found_in.is_specialized_nn_module() or found_in.is_unspecialized_nn_module()


def put_around(owner: Any, name: str, function: Callable) -> None:
    """Put ``function(original, *args, **kwargs)`` around a function of Dynamo's, in the place of one put there before.

    owner: the class or module that has it; nothing happens where it has none, as with another torch.
    """
    original = getattr(owner, name, None)
    original = getattr(original, "_fastft_original", original)
    if original is None:
        return

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    replacement._fastft_original = original  # type: ignore[attr-defined]
    setattr(owner, name, replacement)


def break_early(is_ours: Callable[[], bool]) -> None:
    """Let graphs break at ``requires_grad_()`` of an intermediate where Dynamo meets it, if ``is_ours``.

    From torch 2.13 on it goes on and finds out at the end of the graph, and so once in each of the frames around the
    call: ten traces of a model whose hook on the embeddings asks for gradients, as PEFT's does for checkpoints.
    """

    def method_requires_grad_(original: Callable, self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        log: Any = getattr(tx, "speculation_log", None)
        if self.source is None and hasattr(log, "graph_break_on_requires_grad_") and is_ours():
            log.graph_break_on_requires_grad_ = True
        return original(self, tx, *args, **kwargs)

    put_around(TensorVariable, "method_requires_grad_", method_requires_grad_)


def compiled_modules() -> list[torch.nn.Module]:
    """List the modules that the function has by name which is compiled now, and those of its ``*args``."""
    root = InstructionTranslator.current_tx().output.root_tx
    names = [root.f_globals.get(name) for name in root.f_code.co_names]
    values = [*root.f_locals.values(), *names]
    values += [inner for value in values if type(value) is tuple for inner in value]
    return [value for value in values if isinstance(value, torch.nn.Module)]


def is_compiled(model: torch.nn.Module) -> bool:
    """Tell whether a module, or one inside, was compiled: in place, or by ``torch.compile`` around it."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )


def in_eval_mode() -> bool:
    """Return whether what is compiled now are modules in eval mode; False where it is not known."""
    try:
        modules = compiled_modules()
    except Exception:  # called without Dynamo
        return False
    return bool(modules) and not any(module.training for module in modules)


def source_name(placeholder: Node) -> str:
    """Return where an input comes from, as Dynamo spells it: ``L['batch']['input_ids']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    return source.name if source is not None else ""


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to the structured trace that tlparse shows; without TORCH_TRACE it is not asked for."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text, expect_trace_id=False
    )
