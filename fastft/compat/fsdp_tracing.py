"""Trace a model that FSDP2 has sharded as if it was whole: without hooks, its parameters as they are in forward.

By private torch symbols.  Dynamo breaks the graph at each of these hooks, so that no graph would hold more than a
layer, and a model whose parameters are not gathered could not be traced without them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import GraphArg, VariableBuilder, wrap_fx_proxy

from fastft.compat import fsdp
from fastft.compat.ddp import TraceAgain
from fastft.compat.dynamo import compiled_modules, put_around
from fastft.compat.hook_tracing import BEFORE, BEHIND, keep

log = logging.getLogger("fastft")


def install(is_ours: Callable[[], bool]) -> None:
    """Trace whole models in compilations during which ``is_ours`` is true; leave all others alone."""

    def wrap_tensor(original: Callable, self: Any, value: Any) -> Any:
        home = fsdp.home_of(value) if fsdp.is_sharded(value) else None
        if home is None or home.root not in roots_of(self.tx.output):
            return original(self, value)
        return _whole(self, value, home)

    put_around(VariableBuilder, "wrap_tensor", wrap_tensor)


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 has hooks on a module."""
    return fsdp.state_of(module) is not None


def hooks_of_others(tx: Any, module: nn.Module, name: str, found: Any) -> Any:
    """Return a module's hooks without FSDP2's, if it is traced whole."""
    return _without_hooks(tx, module, name, found) if _is_whole(tx.output, module) else found


def traced_roots() -> list[Any]:
    """Return the roots' states of the models that this compilation traced without FSDP2's hooks."""
    try:
        return roots_of(InstructionTranslator.current_tx().output)
    except AttributeError:  # the backend is called without Dynamo
        return []


def traced_homes(example_inputs: Sequence[Any]) -> dict[int, fsdp.Home]:
    """Return where inputs of a graph are kept, by place, of the models that were traced without FSDP2's hooks."""
    roots = traced_roots()
    homes = ((place, fsdp.home_of(value)) for place, value in enumerate(example_inputs)) if roots else ()
    return {place: home for place, home in homes if home is not None and home.root in roots}


def is_all_of_forward() -> bool:
    """Return whether nothing of the traced models' forward follows the graph: it ends with the root's own code."""
    roots = [root._modules[0] for root in traced_roots()]
    if not roots:
        return False
    reason = getattr(InstructionTranslator.current_tx().output, "compile_subgraph_reason", None)
    inside = {id(module) for module in compiled_modules()}
    return not getattr(reason, "graph_break", True) and all(id(root) in inside for root in roots)


def trace_again(reason: str) -> None:
    """Have Dynamo trace again what it compiles, with FSDP2's hooks."""
    for root in traced_roots():
        fsdp.refuse(root, reason)
    InstructionTranslator.current_tx().speculation_log.clear()  # it knows a trace without them
    raise TraceAgain(restart_reason=reason)


def roots_of(output: Any) -> list[Any]:
    """Return the roots' states of the models that a compilation traces without FSDP2's hooks."""
    return [root for root in vars(output).get("_fastft_roots", {}).values() if root is not None]


def _is_whole(output: Any, module: nn.Module) -> bool:
    """Return whether a module is traced without hooks: as all of its model, whose root is called first."""
    roots = vars(output).setdefault("_fastft_roots", {})  # by what all states of a model share
    state = fsdp.state_of(module)
    if state._state_ctx not in roots:
        root = None
        try:
            root, reason = fsdp.adopt(state) if not output.export else (None, "it is not fastft's")
        except Exception as error:  # what another torch does not have
            reason = str(error)
        if reason:
            log.info("FSDP2's hooks break the graph: %s", reason)
        roots[state._state_ctx] = None if reason else root
    return roots[state._state_ctx] is not None


def _without_hooks(tx: Any, module: nn.Module, name: str, found: Any) -> Any:
    """Return a module's hooks without FSDP2's, or with what is left of these: casts of what goes in and out."""
    state, hooks = fsdp.state_of(module), getattr(module, name)
    taken, returned, device = fsdp.casts(state, module)
    before, behind = getattr(module, BEFORE), getattr(module, BEHIND)
    casting = {}
    for key in (key for key, hook in before.items() if fsdp.is_hook(hook)):
        casting[key] = _casting_inputs(taken, device) if taken is not None or device is not None else None
    for key in (key for key, hook in behind.items() if fsdp.is_hook(hook)):
        casting[key] = _casting_results(returned) if returned is not None else None
    items = {}
    for key, item in zip(hooks, list(found.items), strict=True):
        if key not in casting:
            items[item] = found.items[item]
        elif casting[key] is not None:
            flag = name not in (BEFORE, BEHIND)
            items[item] = found.items[item] if flag else VariableTracker.build(tx, casting[key])
    if len(items) < len(found.items) or name in (BEFORE, BEHIND):
        return keep(found, items)
    return found


def _casting_inputs(dtype: torch.dtype | None, device: torch.device | None) -> Callable:
    def cast_inputs(module: Any, args: Any, kwargs: Any) -> Any:
        return _cast(args, dtype, device), _cast(kwargs, dtype, device)

    return cast_inputs


def _casting_results(dtype: torch.dtype) -> Callable:
    def cast_results(module: Any, args: Any, output: Any) -> Any:
        return _cast(output, dtype, None)

    return cast_results


def _cast(value: Any, dtype: torch.dtype | None, device: torch.device | None) -> Any:
    """Cast the floating-point tensors in a value, and move all."""
    if isinstance(value, Tensor):
        if device is not None and value.device != device:
            value = value.to(device)
        if dtype is not None and value.is_floating_point() and value.dtype != dtype:
            value = value.to(dtype)
        return value
    if type(value) is tuple:
        return tuple([_cast(item, dtype, device) for item in value])
    if type(value) is list:
        return [_cast(item, dtype, device) for item in value]
    if isinstance(value, dict):
        for name in list(value):
            if value[name] is not None:
                value[name] = _cast(value[name], dtype, device)
    return value


def _whole(builder: Any, value: Any, home: fsdp.Home) -> Any:
    """Make a parameter that is sharded an input of Dynamo's graph as it is when it is gathered."""
    output, source = builder.tx.output, builder.get_source()
    if source in output.input_source_to_var:
        return output.input_source_to_var[source]
    kind = home.like()
    with output.fake_mode:
        empty = torch.empty_strided(kind["size"], kind["stride"], dtype=kind["dtype"], device=kind["device"])
        fake: Any = nn.Parameter(empty, requires_grad=value.requires_grad)
    name = re.sub(r"[^a-zA-Z0-9]+", "_", builder.name)
    proxy = output.root_tracer.create_graph_input(name, type(value), fake, source=source)
    proxy.node.meta["grapharg"] = GraphArg(source, value, False, fake)
    variable = wrap_fx_proxy(tx=builder.tx, proxy=proxy, example_value=fake, source=source)
    output.side_effects.track_object_existing(value, variable)
    builder.install_guards(GuardBuilder.TYPE_MATCH)
    for attribute in (fsdp.MARK, "requires_grad"):
        install_guard(AttrSource(source, attribute).make_guard(GuardBuilder.EQUALS_MATCH))
    output.input_source_to_var[source] = variable
    return variable
