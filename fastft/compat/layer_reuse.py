"""Trace one layer of each kind and call it for the others, where Dynamo would read the Python of every layer again.

The first layer of a kind is traced as ever.  For the next one the facts that this trace relied on, Dynamo's guards, are
looked up in the new layer (layer_facts.py).  If all of them are the same, the trace would be the same but for the
layer's own tensors: the graph gets a call of the traced layer with these, and Dynamo a guard that the new layer stays as
it is.  Where anything is in doubt the layer is traced.

The tensors of a layer are one input of Dynamo's graph, a tuple: making an input of each would take most of the time
that is saved.  rewriter/capture/layer_calls.py takes them apart.

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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.bytecode_transformation import create_call_function
from torch._dynamo.variables.builder import GraphArg, wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import TupleVariable
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable, record_nn_module_stack
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._guards import ChainedSource, Source
from torch.fx import Graph, GraphModule, Node, Proxy

from fastft.compat import ddp
from fastft.compat.fake_tensors import computing_in, value_of
from fastft.compat.layer_facts import Differs, Facts, alike, is_under

log = logging.getLogger("fastft")

LAYER_CALL = torch.ops.higher_order.wrap  # runs a body as it is, wherever the graph ends up
MOST_KINDS = 8  # of one class: more are traced layer by layer
_NUMBERED = re.compile(r"\[['\"]?\d+['\"]?\]$")


def install(is_ours: Callable[[], bool]) -> None:
    """Reuse traces in compilations during which ``is_ours`` is true; leave all others alone."""
    original: Any = UnspecializedNNModuleVariable.call_function
    original = getattr(original, "_fastft_original", original)

    @functools.wraps(original)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        plain = functools.partial(original, self, tx, args, kwargs)
        if self.source is None or not _NUMBERED.search(self.source.name):
            return plain()
        traces = getattr(tx.output, "_fastft_traces", None)
        if traces is None:
            traces = tx.output._fastft_traces = Traces(tx.output, active=is_ours())
        return traces.call(self, tx, args, kwargs, plain) if traces.ready() else plain()

    call_function._fastft_original = original  # type: ignore[attr-defined]
    UnspecializedNNModuleVariable.call_function = call_function  # type: ignore[method-assign]


class Traces:
    """The layers that one compilation has traced so far, by their class."""

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


@dataclass(eq=False)
class Trace:
    """What one layer's trace read, and what it became.

    arguments: by their place, as Dynamo's variables.  state: see _state.  nodes: those that it added to the graph.
    given: those that it reads and that were there before, each with its argument's place, or None where every layer
    reads the same.  tensors: the inputs that are the layer's own.  known: its facts.  kinds: those of its tensors.
    results: the tensors that it returns.  body: the name of its copy among the graph's bodies.
    """

    source: Source
    arguments: dict[tuple, Any]
    state: Any
    nodes: list[Node]
    given: dict[Node, tuple | None]
    tensors: list[Node]
    facts: Facts
    known: tuple
    kinds: list[tuple]
    result: Any
    results: list[Node]
    sources: list[Source]
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
        tensors = self.facts.tensors_of(module.value)
        if _kinds(tensors) != self.kinds:
            raise Differs("a tensor of it is of another kind")
        if (cut := ddp.optimizer()) is not None and not ddp.is_whole(cut):
            raise Differs("torch cuts this graph")
        return Bound(self, module, tx, moved, tensors)

    def install(self, output: Any) -> str:
        """Return the name under which the graph has this trace as a body, adding it at the first use.

        The body takes what is given, then a tuple of the layer's tensors.
        """
        if not self.body:
            graph, values = Graph(), {}
            for node in self.given:
                values[node] = graph.placeholder(node.name)
                values[node].meta["example_value"] = value_of(node)
            tensors = graph.placeholder("tensors")
            tensors.meta["example_value"] = tuple(value_of(node) for node in self.tensors)
            for place, node in enumerate(self.tensors):
                values[node] = graph.call_function(operator.getitem, (tensors, place))
                values[node].meta["example_value"] = value_of(node)
            for node in self.nodes:
                values[node] = graph.node_copy(node, values.__getitem__)
            graph.output(tuple(values[node] for node in self.results))
            names = {str(node.target) for node in graph.find_nodes(op="get_attr")}
            body = GraphModule({name: output.nn_modules[name] for name in names}, graph)
            self.body = output.install_subgraph("layer", body)
        return self.body


@dataclass
class LayerCall:
    """What a call's node has in its ``meta["layer_call"]``: its trace, and where its layer's tensors come from."""

    trace: Trace
    sources: list[Source]
    fakes: tuple[Tensor, ...]


@dataclass
class Bound:
    """A trace with another layer's arguments and tensors."""

    trace: Trace
    module: Any
    tx: Any
    moved: dict[Node, Node]
    tensors: tuple[Tensor, ...]

    def call(self) -> Any:
        """Add the call to Dynamo's graph, and what it relies on to its guards."""
        trace, output, source = self.trace, self.tx.output, self.module.source
        guard = trace.facts.guard(source, self.module.value, self.tensors)
        output.guards.add(guard, collect_debug_stack=False)
        tracer = output.current_tracer
        given = [Proxy(self.moved.get(node, node), tracer) for node in trace.given]
        tensors = self._own_tensors()
        with record_nn_module_stack(
            str(id(self.module.value)), self.module.get_nn_module_stack_source(), self.tx, self.module.value
        ):
            body = output.create_proxy("get_attr", trace.install(output), (), {})
            call = output.create_proxy("call_function", LAYER_CALL, (body, *given, tensors), {})
            fakes = [_fresh(value_of(node), output.fake_mode) for node in trace.results]
            call.node.meta["example_value"] = tuple(fakes)
            places: dict[Source, Source] = {trace.source: source}
            sources = [_moved(old, places) for old in trace.sources]
            call.node.meta["layer_call"] = LayerCall(trace, sources, value_of(tensors.node))
            made: dict[Node, Any] = {}
            for place, (node, fake) in enumerate(zip(trace.results, fakes, strict=True)):
                item = output.create_proxy("call_function", operator.getitem, (call, place), {})
                made[node] = wrap_fx_proxy(self.tx, item, example_value=fake)
        return _like(trace.result, made)

    def _own_tensors(self) -> Proxy:
        """Make the layer's tensors an input of the graph."""
        output, old = self.tx.output, self.trace.tensors
        name = output.install_global_by_id("__tensors_of_layer", self.trace.facts.tensors_of)
        source = LayerTensors(self.module.source, name)
        fakes = tuple(_fresh(value_of(node), output.fake_mode) for node in old)
        number = _NUMBERED.search(self.module.source.name)
        hint = f"tensors_of_layer_{re.sub(r'[^0-9]', '', number[0] if number else '')}"
        proxy = output.root_tracer.create_graph_input(hint, tuple, fakes, source=source)
        proxy.node.meta["grapharg"] = GraphArg(source, self.tensors[: len(old)], False, None, is_tensor=False)
        return proxy


@dataclass(frozen=True)
class LayerTensors(ChainedSource):
    """The tensors of the layer at ``base``, looked up by the global function of this name."""

    collect: str = ""

    def reconstruct(self, codegen: Any) -> None:
        """Write the call into the bytecode."""
        load = lambda: codegen.append_output(codegen.create_load_global(self.collect, add=True))  # noqa: E731
        codegen.add_push_null(load)
        codegen(self.base)
        codegen.extend_output(create_call_function(1, False))

    @functools.cached_property
    def _name_template(self) -> str:
        return f"G[{self.collect!r}]({{0}})"


class _Recorder:
    """Watches what tracing a layer adds."""

    def __init__(self, module: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any], state: Any) -> None:
        self.module, self.tx, self.state = module, tx, state
        self.args, self.kwargs = args, kwargs
        self.arguments = _flatten(args, kwargs)
        self.last = next(iter(reversed(tx.output.graph.nodes)), None)

    def trace(self, result: Any) -> Trace:
        """Return the trace.  Raises Differs where it can serve no other layer."""
        if _state(self.tx) != self.state:
            raise Differs("it changes a mode, or an object from outside")
        if _flatten(self.args, self.kwargs).keys() != self.arguments.keys():
            raise Differs("it changes an argument")
        nodes = self._added()
        own = set(nodes)
        results = list(dict.fromkeys(_tensors(result)))
        if not own.issuperset(results):
            raise Differs("it returns what it was given")
        given: dict[Node, tuple | None] = {}
        tensors: dict[Node, Source] = {}
        for node in dict.fromkeys(value for node in nodes for value in node.all_input_nodes if value not in own):
            where = self._origin(node)
            if isinstance(where, Source):
                tensors[node] = where
            else:
                given[node] = where
        layer, values = self.module.source, _values(self.tx)
        guards = [guard for guard in self.tx.output.guards if is_under(guard.originating_source, layer)]
        read = [guard.originating_source for guard in guards if guard.create_fn_name() == "TENSOR_MATCH"]
        sources = list(dict.fromkeys([*tensors.values(), *read]))
        facts = Facts(layer, guards, values, sources)
        return Trace(
            layer, self.arguments, self.state, nodes, given, list(tensors), facts, facts.of(self.module.value),
            _kinds(facts.tensors_of(self.module.value)), result, results, list(tensors.values()),
        )  # fmt: skip

    def _added(self) -> list[Node]:
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
        return nodes

    def _origin(self, node: Node) -> Source | tuple | None:
        """Return where another layer's input is in the place of this one: its source, its argument; None: the same."""
        for path, variable in self.arguments.items():
            if isinstance(variable, (TensorVariable, SymNodeVariable)) and variable.as_proxy().node is node:
                return path
        if isinstance(value_of(node), torch.SymInt):
            return None
        source = getattr(node.meta.get("grapharg"), "source", None)
        if node.op != "placeholder" or source is None:
            raise Differs(f"it reads {node.name}, which is none of its arguments")
        if not is_under(source, self.module.source):
            return None
        if not isinstance(value_of(node), Tensor) or not all(isinstance(size, int) for size in value_of(node).shape):
            raise Differs(f"{source.name} is no tensor of fixed size")
        return source


def _values(tx: Any) -> Callable[[Source], Any]:
    """Return a function that looks up the Python object at a source, each once."""
    root = tx.output.root_tx
    scope = {"G": root.f_globals, "L": root.f_locals}
    cache: Any = {}
    return lambda source: source.get_value(scope, {}, cache)


def _moved(source: Source, places: dict[Source, Source]) -> Source:
    """Return where a layer has what another has at ``source``.  places: what is known of it, to which this adds."""
    if source in places:
        return places[source]
    changes = {
        item.name: moved
        for item in dataclasses.fields(source)  # type: ignore[arg-type]
        if isinstance(value := getattr(source, item.name, None), Source)
        and (moved := _moved(value, places)) is not value
    }
    result = dataclasses.replace(source, **changes) if changes else source  # type: ignore[type-var]
    return places.setdefault(source, result)


def _kinds(tensors: Sequence[Any]) -> list[tuple]:
    """Return what a trace depends on in tensors, and which of them are the same."""
    first: dict[int, int] = {}
    return [(*_kind(tensor), first.setdefault(id(tensor), place)) for place, tensor in enumerate(tensors)]


def _kind(tensor: Any) -> tuple:
    if not isinstance(tensor, Tensor):
        raise Differs("what was a tensor is none")
    # Dynamo itself says of a module's tensors that they stay in place, once it has met them.
    marks = [
        (name, value) for name, value in vars(tensor).items() if name.startswith("_dynamo") and "static" not in name
    ]
    geometry = (tensor.shape, tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else ()
    return (
        type(tensor), tensor.dtype, tensor.device, tensor.layout, geometry, tensor.requires_grad, tensor.is_leaf,
        torch._C._dispatch_keys(tensor), marks,
    )  # fmt: skip


def _flatten(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[tuple, Any]:
    """Return a layer's arguments by their place, with what is in tuples and dicts by its place there."""
    pairs = [((place,), value) for place, value in enumerate(args)]
    pairs += [((name,), value) for name, value in kwargs.items()]
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
        if old is not new and _fake_kind(value_of(nodes[0])) != _fake_kind(value_of(nodes[1])):
            raise Differs(f"argument {path} has another shape, or another need for a gradient")
        return
    if isinstance(old, ConstantVariable) and isinstance(new, ConstantVariable):
        if type(old.value) is type(new.value) and (old.value is new.value or old.value == new.value):
            return
    elif type(old) is type(new) and getattr(old, "source", None) is not None and old.source == new.source:
        return
    raise Differs(f"argument {path} is another {type(new).__name__}")


def _fake_kind(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return type(value), repr(value)
    geometry = repr((tuple(value.shape), tuple(value.stride()), value.storage_offset()))
    return (
        type(value), value.dtype, value.device, value.layout, geometry, value.requires_grad, value.is_leaf,
        value.is_conj(), value.is_neg(), value._version,
    )  # fmt: skip


def _tensors(result: Any) -> Iterable[Node]:
    """List the nodes of a result.  Raises Differs for one that is more than tensors, tuples and constants."""
    if type(result) is TensorVariable:
        return [result.as_proxy().node]
    if type(result) is TupleVariable:
        return [node for item in result.items for node in _tensors(item)]
    if isinstance(result, ConstantVariable):
        return []
    raise Differs(f"it returns a {type(result).__name__}")


def _like(result: Any, made: dict[Node, Any]) -> Any:
    """Return a layer's result with other tensors in it."""
    if isinstance(result, TupleVariable):
        return TupleVariable([_like(item, made) for item in result.items])
    return made[result.as_proxy().node] if isinstance(result, TensorVariable) else result


def _fresh(fake: Tensor, mode: Any) -> Tensor:
    """Return a fake tensor like this one, in storage of its own."""
    with computing_in(mode), torch.enable_grad():
        empty = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
        if isinstance(fake, nn.Parameter):
            return nn.Parameter(empty, requires_grad=fake.requires_grad)
        empty.requires_grad_(fake.requires_grad)
        return empty.clone() if fake.requires_grad and not fake.is_leaf else empty


def _state(tx: Any) -> tuple:
    """Return what a trace depends on beside arguments and guards: modes, and which objects it has changed so far."""
    effects, output = tx.output.side_effects, tx.output
    changed = frozenset(
        id(variable) for variable in effects.id_to_variable.values()
        if getattr(variable, "source", None) is not None and variable.mutation_type is not None
        and effects.is_modified(variable)
    )  # fmt: skip
    stored = tuple(
        (id(item), *map(id, names.values())) for item, names in effects.store_attr_mutations.items()
        if getattr(item, "source", None) is not None
    )  # fmt: skip
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, torch.is_autocast_cache_enabled()
    counts = len(effects.tensor_hooks), len(effects.save_for_backward), len(getattr(output, "random_calls", ()))
    return modes, changed, stored, counts
