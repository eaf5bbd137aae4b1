"""Trace one layer of each kind and call it for the others, where Dynamo would read the Python of every layer again.

The first layer of a kind is traced as ever.  For the next one the facts that this trace relied on, Dynamo's guards, are
looked up with the new layer in the place of the old.  If all of them hold, the trace would be the same but for the
layer's own tensors: the graph gets one call of the traced layer with these, and Dynamo gets the guards of the new layer,
so that a change in any layer is noticed as ever.  Where anything is in doubt the layer is traced.

torch.compiler.nested_compile_region (torch 2.13 and later) rests on the same argument; it needs a mark in the user's
code, reuses nothing before 2.13, and nothing at all with a cache object among the arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import TupleVariable
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable, record_nn_module_stack
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._guards import Source
from torch.fx import Graph, GraphModule, Node, Proxy

from fastft.compat.fake_tensors import computing_in, value_of
from fastft.compat.layer_facts import Differs, Facts, alike, is_under

log = logging.getLogger("fastft")

LAYER_CALL = torch.ops.higher_order.wrap  # runs a body as it is, wherever the graph ends up
MOST_KINDS = 8  # of one class: more are traced layer by layer
_NUMBERED = re.compile(r"\[['\"]?\d+['\"]?\]$")


def install(is_ours: Callable[[], bool]) -> None:
    """Reuse traces in compilations during which ``is_ours`` is true; leave all others alone."""
    original = UnspecializedNNModuleVariable.call_function
    if hasattr(original, "_fastft_original"):
        original = original._fastft_original

    @functools.wraps(original)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        plain = functools.partial(original, self, tx, args, kwargs)
        if self.source is None or not _NUMBERED.search(self.source.name):
            return plain()
        traces = getattr(tx.output, "_fastft_traces", None)
        if traces is None:
            traces = tx.output._fastft_traces = Traces(tx.output, active=is_ours())
        if not traces.ready():
            return plain()
        return traces.call(self, tx, args, kwargs, plain)

    call_function._fastft_original = original  # type: ignore[attr-defined]
    UnspecializedNNModuleVariable.call_function = call_function  # type: ignore[method-assign]


class Traces:
    """The layers that one compilation has traced so far."""

    def __init__(self, output: Any, *, active: bool) -> None:
        self.output, self.active = output, active
        self.known: dict[type, list[Trace]] = {}

    def ready(self) -> bool:
        """Return whether a layer called now may be reused: not inside another one, nor inside a body."""
        return self.active and self.output.is_root_tracer() and not self.output.export

    def call(self, module: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any], plain: Callable) -> Any:
        """Call a layer: by a trace that fits, else by tracing it."""
        known = self.known.setdefault(type(module.value), [])
        state = _state(tx)
        for trace in reversed(known):
            try:
                bound = trace.bind(module, tx, args, kwargs, state)
            except Differs as reason:
                log.debug("%s is not as %s: %s", module.source.name, trace.source.name, reason)
                continue
            return bound.call()
        if len(known) >= MOST_KINDS:
            return plain()
        self.active = False  # what it calls is part of it
        try:
            recorder = _Recorder(module, tx, args, kwargs, state)
            result = plain()
        finally:
            self.active = True
        try:
            known.append(recorder.trace(result))
        except Differs as reason:
            log.debug("the trace of %s serves no other layer: %s", module.source.name, reason)
        return result


@dataclass
class Trace:
    """What one layer's trace read, and what it became.

    inputs: the nodes that it reads.  kinds: where another layer's input is found: ("argument", path),
    ("tensor", source) or ("same", node).  known: the layer's facts.  tensors: the facts of its tensors.  same_tensors:
    which of them are the same.  results: the tensors it returns, in order.
    """

    module: nn.Module
    source: Source
    arguments: dict[tuple, Any]
    state: Any
    nodes: list[Node]
    inputs: list[Node]
    kinds: list[tuple[str, Any]]
    facts: Facts
    known: Any
    tensors: dict[Source, Any]
    same_tensors: list[int]
    result: Any
    results: list[Node]
    output: Any
    body: str = ""

    def bind(self, module: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any], state: Any) -> Bound:
        """Return how another layer is called by this trace.  Raises Differs where it would be traced otherwise."""
        if state != self.state:
            raise Differs("a mode, or an object that it may read, has changed in between")
        arguments = _flatten(args, kwargs)
        if arguments.keys() != self.arguments.keys():
            raise Differs("it takes other arguments")
        moved: dict[Node, Node] = {}
        for path, old in self.arguments.items():
            _check_argument(path, old, arguments[path], moved)
        if len(set(moved.values())) < len(moved):
            raise Differs("two of its arguments are one")
        if not alike(self.known, self.facts.of(module.value)):
            raise Differs("something in it is another")
        places = {self.source: module.source}
        values = _Values(tx)
        tensors = {old: values.of(_moved(old, places)) for old in self.tensors}
        for old, tensor in tensors.items():
            if _tensor_facts(tensor) != self.tensors[old]:
                raise Differs(f"{places[old].name} is a tensor of another kind")
        if _same_ones(tensors.values()) != self.same_tensors:
            raise Differs("tensors in it are the same, or are not")
        return Bound(self, module, tx, moved, places, tensors)

    def body_name(self) -> str:
        """Return the name under which the graph has this trace as a body, adding it at the first use."""
        if not self.body:
            graph, values = Graph(), {}
            for node in self.inputs:
                values[node] = graph.placeholder(node.name)
                values[node].meta["example_value"] = value_of(node)
            for node in self.nodes:
                values[node] = graph.node_copy(node, values.__getitem__)
            graph.output(tuple(values[node] for node in self.results))
            attributes = {str(node.target): self.output.nn_modules[node.target] for node in graph.find_nodes(op="get_attr")}
            self.body = self.output.install_subgraph("layer", GraphModule(attributes, graph))
            for node in self.nodes:
                node.meta["fastft_layer"] = self
        return self.body


@dataclass
class Bound:
    """A trace with another layer's tensors."""

    trace: Trace
    module: Any
    tx: Any
    moved: dict[Node, Node]
    places: dict[Source, Source]
    tensors: dict[Source, Tensor]

    def call(self) -> Any:
        """Add the call to Dynamo's graph, and what it relies on to its guards."""
        trace, tx, output = self.trace, self.tx, self.tx.output
        inputs = [self._input(node, *kind) for node, kind in zip(trace.inputs, trace.kinds, strict=True)]
        for source in self.tensors:  # Dynamo guards a tensor when it meets it, used or not
            self._tensor(source)
        output.guards.add(trace.facts.guard(self.module.source, self.module.value), collect_debug_stack=False)
        source = self.module.get_nn_module_stack_source()
        with record_nn_module_stack(str(id(self.module.value)), source, tx, self.module.value):
            body = output.create_proxy("get_attr", trace.body_name(), (), {})
            call = output.create_proxy("call_function", LAYER_CALL, (body, *inputs), {})
            fakes = [_fresh(value_of(node), output.fake_mode) for node in trace.results]
            call.node.meta["example_value"] = tuple(fakes)
            made: dict[Node, Any] = {}
            for place, (node, fake) in enumerate(zip(trace.results, fakes, strict=True)):
                item = output.create_proxy("call_function", operator.getitem, (call, place), {})
                made[node] = wrap_fx_proxy(tx, item, example_value=fake)
        return self._result(trace.result, made)

    def _input(self, node: Node, kind: str, where: Any) -> Proxy:
        if kind == "tensor":
            return self._tensor(where).as_proxy()
        return Proxy(self.moved.get(node, node), self.tx.output.current_tracer)

    def _tensor(self, source: Source) -> Any:
        return VariableTracker.build(self.tx, self.tensors[source], self.places[source]).realize()

    def _result(self, result: Any, made: dict[Node, Any]) -> Any:
        if isinstance(result, TupleVariable):
            return TupleVariable([self._result(item, made) for item in result.items])
        return made[result.as_proxy().node] if isinstance(result, TensorVariable) else result


class _Recorder:
    """Watches what tracing a layer adds."""

    def __init__(self, module: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any], state: Any) -> None:
        self.module, self.tx, self.state = module, tx, state
        self.args, self.kwargs = args, kwargs
        self.arguments = _flatten(args, kwargs)
        self.last = next(iter(reversed(tx.output.graph.nodes)), None)

    def trace(self, result: Any) -> Trace:
        """Return the trace.  Raises Differs where it can serve no other layer."""
        output = self.tx.output
        if _state(self.tx) != self.state:
            raise Differs("it changes a mode, or an object from outside")
        if _flatten(self.args, self.kwargs).keys() != self.arguments.keys():
            raise Differs("it changes an argument")
        nodes = self._added()
        own = set(nodes)
        inputs = list(dict.fromkeys(value for node in nodes for value in node.all_input_nodes if value not in own))
        results = [node for node in dict.fromkeys(_tensors(result))]
        if not own.issuperset(results):
            raise Differs("it returns what it was given")
        kinds = [self._kind(node) for node in inputs]
        layer = self.module.source
        guards = [guard for guard in output.guards if is_under(guard.originating_source, layer)]
        values = _Values(self.tx).of
        facts = Facts(layer, guards, values)
        read = [guard.originating_source for guard in guards if guard.create_fn_name() == "TENSOR_MATCH"]
        read += [where for kind, where in kinds if kind == "tensor"]
        tensors = {source: values(source) for source in dict.fromkeys(read)}
        return Trace(
            self.module.value, layer, self.arguments, self.state, nodes, inputs, kinds, facts,
            facts.of(self.module.value), {source: _tensor_facts(tensor) for source, tensor in tensors.items()},
            _same_ones(tensors.values()), result, results, output,
        )  # fmt: skip

    def _added(self) -> list[Node]:
        graph = self.tx.output.graph
        if self.last is None or self.last._erased:
            raise Differs("the graph before it has changed")
        nodes, node = [], self.last.next
        while node.op != "root":
            if node.op != "placeholder":
                nodes.append(node)
            node = node.next
        for node in nodes:
            if node.meta.get("unbacked_bindings"):
                raise Differs("a size depends on data")
            if node.op == "get_attr" and not isinstance(self.tx.output.nn_modules.get(node.target), GraphModule):
                raise Differs("it reads an attribute of the graph")
        del graph
        return nodes

    def _kind(self, node: Node) -> tuple[str, Any]:
        for path, variable in self.arguments.items():
            if isinstance(variable, (TensorVariable, SymNodeVariable)) and variable.as_proxy().node is node:
                return "argument", path
        if isinstance(value_of(node), torch.SymInt):
            return "same", node
        if node.op == "placeholder":
            source = getattr(node.meta.get("grapharg"), "source", None)
            if source is None:
                raise Differs("an input comes from nowhere")
            return ("tensor", source) if is_under(source, self.module.source) else ("same", node)
        raise Differs(f"it reads {node.name}, which is none of its arguments")


class _Values:
    """The Python objects behind sources, each looked up once."""

    def __init__(self, tx: Any) -> None:
        root = tx.output.root_tx
        self.scope = {"G": root.f_globals, "L": root.f_locals}
        self.locals: dict[str, Any] = {}
        self.cache: Any = {}

    def of(self, source: Source) -> Any:
        """Return the object; raises what looking it up raises."""
        return source.get_value(self.scope, self.locals, self.cache)


def _moved(source: Source, places: dict[Source, Source]) -> Source:
    """Return where a layer has what another has at ``source``.  places: what is known of it, to which this adds."""
    if source in places:
        return places[source]
    changes = {
        item.name: moved
        for item in dataclasses.fields(source)  # type: ignore[arg-type]
        if isinstance(value := getattr(source, item.name, None), Source) and (moved := _moved(value, places)) is not value
    }
    places[source] = result = dataclasses.replace(source, **changes) if changes else source  # type: ignore[type-var]
    return result


def _tensor_facts(tensor: Any) -> tuple:
    if not isinstance(tensor, Tensor):
        raise Differs("what was a tensor is none")
    # Dynamo itself says of a module's tensors that they stay in place, once it has met them.
    marks = {name: value for name, value in vars(tensor).items() if name.startswith("_dynamo") and "static_input" not in name}
    geometry = (tensor.shape, tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else ()
    return (
        type(tensor), tensor.dtype, tensor.device, tensor.layout, geometry, tensor.requires_grad, tensor.is_leaf,
        torch._C._dispatch_keys(tensor), marks,
    )  # fmt: skip


def _flatten(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[tuple, Any]:
    """Return a layer's arguments by their place, with what is in tuples and dicts by its place there."""
    pairs = [((place,), value) for place, value in enumerate(args)] + [((name,), value) for name, value in kwargs.items()]
    return dict(leaf for path, value in pairs for leaf in _leaves(path, value))


def _leaves(path: tuple, variable: Any) -> Iterator[tuple[tuple, Any]]:
    if isinstance(variable, LazyVariableTracker) and variable.is_realized():
        variable = variable.realize()
    if isinstance(variable, TupleVariable):
        yield (*path, "tuple", len(variable.items)), None
        for place, item in enumerate(variable.items):
            yield from _leaves((*path, place), item)
    elif type(variable) is ConstDictVariable and all(isinstance(key.vt, ConstantVariable) for key in variable.items):
        yield (*path, "dict", len(variable.items)), None
        for key, item in variable.items.items():
            yield from _leaves((*path, key.vt.value), item)
    else:
        yield path, variable


def _check_argument(path: tuple, old: Any, new: Any, moved: dict[Node, Node]) -> None:
    """Check that one layer's argument may take the place of another's.  Raises Differs."""
    if isinstance(old, LazyVariableTracker):
        if old.is_realized():
            old = old.realize()
        elif old is new or (isinstance(new, LazyVariableTracker) and old.source == new.source):
            return
    if isinstance(new, LazyVariableTracker):
        new = new.realize()
    if old is None and new is None:
        return
    if isinstance(old, (TensorVariable, SymNodeVariable)) and type(old) is type(new):
        nodes = old.as_proxy().node, new.as_proxy().node
        if moved.setdefault(nodes[0], nodes[1]) is not nodes[1]:
            raise Differs(f"argument {path} is another at each place")
        if old is not new and _fake_facts(value_of(nodes[0])) != _fake_facts(value_of(nodes[1])):
            raise Differs(f"argument {path} has another shape, or another need for a gradient")
        return
    if isinstance(old, ConstantVariable) and isinstance(new, ConstantVariable):
        if type(old.value) is type(new.value) and (old.value is new.value or old.value == new.value):
            return
    elif type(old) is type(new) and getattr(old, "source", None) is not None and old.source == new.source:
        return
    raise Differs(f"argument {path} is another {type(new).__name__}")


def _fake_facts(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return type(value), repr(value)
    geometry = repr((tuple(value.shape), tuple(value.stride()), value.storage_offset()))
    return (
        type(value), value.dtype, value.device, value.layout, geometry, value.requires_grad, value.is_leaf,
        value.is_conj(), value.is_neg(), value._version,
    )  # fmt: skip


def _same_ones(tensors: Iterable[Tensor]) -> list[int]:
    """Return for each tensor the place of the first that is the same."""
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), place) for place, tensor in enumerate(tensors)]


def _tensors(result: Any) -> Iterable[Node]:
    """List the nodes of a result.  Raises Differs for one that is more than tensors, tuples and constants."""
    if isinstance(result, LazyVariableTracker):
        result = result.realize()
    if type(result) is TensorVariable:
        return [result.as_proxy().node]
    if type(result) is TupleVariable:
        return [node for item in result.items for node in _tensors(item)]
    if isinstance(result, ConstantVariable):
        return []
    raise Differs(f"it returns a {type(result).__name__}")


def _fresh(fake: Tensor, mode: Any) -> Tensor:
    """Return a fake tensor like this one, in storage of its own."""
    with computing_in(mode), torch.enable_grad():
        empty = torch.empty_strided(
            fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device, requires_grad=fake.requires_grad
        )
        return empty.clone() if fake.requires_grad and not fake.is_leaf else empty


def _state(tx: Any) -> tuple:
    """Return what a trace depends on beside arguments and guards: modes, and which objects it has changed so far."""
    effects, output = tx.output.side_effects, tx.output
    changed = frozenset(
        id(variable) for variable in effects.id_to_variable.values()
        if getattr(variable, "source", None) is not None and variable.mutation_type is not None
        and effects.is_modified(variable)
    )  # fmt: skip
    stored = tuple((id(item), *map(id, names.values())) for item, names in effects.store_attr_mutations.items() if getattr(item, "source", None) is not None)
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, torch.is_autocast_cache_enabled()
    counts = len(effects.tensor_hooks), len(effects.save_for_backward), len(getattr(output, "random_calls", ()))
    return modes, changed, stored, counts
