"""Trace one layer of each kind and call it for the others, where Dynamo would read the Python of every layer again.

The first layer of a kind is traced as ever.  For the next one the facts that this trace relied on, Dynamo's guards, are
looked up in the new layer (layer_facts.py).  If all of them are the same, the trace would be the same but for the
layer's own tensors: the graph gets a call of the traced layer with these, and Dynamo a guard that the new layer stays
as it is.  Where anything is in doubt the layer is traced.

The tensors of a layer are one input of Dynamo's graph, a tuple: making an input of each would take most of the time
that is saved.  rewriter/capture/layer_calls.py takes them apart.

torch.compiler.nested_compile_region rests on the same argument (docs/decisions.md says why it is not used).
"""

from __future__ import annotations

import functools
import logging
import operator
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.bytecode_transformation import create_call_function
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.builder import GraphArg, wrap_fx_proxy
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable, record_nn_module_stack
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._guards import ChainedSource, Source
from torch.fx import Graph, GraphModule, Node, Proxy

from fastft.compat import ddp
from fastft.compat.dynamo import put_around
from fastft.compat.fake_tensors import value_of
from fastft.compat.layer_arguments import (
    check_argument,
    check_memory,
    flatten,
    fresh,
    kind_of_fake,
    kinds_of,
    like,
    state_of,
    tensors_of,
)
from fastft.compat.layer_facts import Differs, Facts, alike, is_under, moved_source, values_of
from fastft.compat.operators import LAYER_CALL

log = logging.getLogger("fastft")

LEAST_NODES = 12  # below it a module of a list is a part of something, which rules look at as a whole
MOST_KINDS = 8  # of one class: more are traced layer by layer
_NUMBERED = re.compile(r"\[['\"]?\d+['\"]?\]$")


def install(is_ours: Callable[[], bool]) -> None:
    """Reuse traces in compilations during which ``is_ours`` is true; leave all others alone."""

    def call_function(original: Callable, self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        plain = functools.partial(original, self, tx, args, kwargs)
        if self.source is None or not _NUMBERED.search(self.source.name):
            return plain()
        try:
            traces = getattr(tx.output, "_fastft_traces", None)
            if traces is None:
                active = is_ours() and tx.output.root_tx.f_code not in _refused
                traces = tx.output._fastft_traces = Traces(tx.output, active=active)
            ready = traces.ready()
            state = state_of(tx) if ready else None
        except Exception as error:  # what another torch does not have, or options that the backend will complain about
            log.debug("every layer is traced: %s", error)
            return plain()
        return traces.call(self, tx, args, kwargs, state, plain) if ready else plain()

    put_around(UnspecializedNNModuleVariable, "call_function", call_function)


_refused: weakref.WeakSet[Any] = weakref.WeakSet()  # code objects in which every layer is traced


def refuse() -> bool:
    """Trace every layer when Dynamo traces again what it compiles; return False where none was reused."""
    tx = InstructionTranslator.current_tx()
    traces = getattr(tx.output, "_fastft_traces", None)
    used = traces is not None and any(trace.body for known in traces.known.values() for trace in known)
    if used:
        _refused.add(tx.output.root_tx.f_code)
        tx.speculation_log.clear()  # it knows a trace in which layers were left out
    return used


class Traces:
    """The layers that one compilation has traced so far, by their class."""

    def __init__(self, output: Any, *, active: bool) -> None:
        self.output, self.active = output, active
        self.known: dict[type, list[Trace]] = {}

    def ready(self) -> bool:
        """Return whether a layer called now may be reused: not inside another one, nor inside a body."""
        return self.active and self.output.is_root_tracer() and not self.output.export

    def call(
        self, module: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any], state: Any, plain: Callable
    ) -> Any:  # fmt: skip
        """Call a layer: by a trace that fits, else by tracing it.  state: see state_of."""
        known = self.known.setdefault(type(module.value), [])
        for trace in reversed(known):
            try:
                return trace.bind(module, tx, args, kwargs, state).call()
            except Exception as reason:  # also what another torch does not have
                log.debug("%s is not as %s: %s", module.source.name, trace.source.name, reason)
        if len(known) >= MOST_KINDS:
            return plain()
        self.active = False  # what it calls is part of it
        try:
            recorder = _Recorder(module, tx, args, kwargs, state)
            result = plain()
        finally:
            self.active = True
        try:
            trace = recorder.trace(result)
            trace.stand_in_for(known)
            known.append(trace)
        except Exception as reason:
            log.debug("the trace of %s serves no other layer: %s", module.source.name, reason)
        return result


@dataclass(eq=False)
class Trace:
    """What one layer's trace read, and what it became.

    arguments: by their place, as Dynamo's variables.  state: see state_of.  nodes: those that it added to the graph.
    given: what it reads that was there before: arguments, and what every layer reads.
    tensors, sources: the inputs that are the layer's own, and where they come from.
    known: the layer's facts.  kinds: those of its tensors.
    result: what it returns, as Dynamo's variable; results: the tensors in it.
    body: the name of its copy among the graph's bodies.  also: other traces in whose place its body may be called.
    """

    module: Any
    source: Source
    arguments: dict[tuple, Any]
    state: Any
    nodes: list[Node]
    given: list[Node]
    tensors: list[Node]
    facts: Facts
    known: tuple
    kinds: list[tuple]
    result: Any
    results: list[Node]
    sources: list[Source]
    body: str = ""
    also: list[StandIn] = field(default_factory=list)

    def stand_in_for(self, others: Iterable[Trace]) -> None:
        """Note which of the traces before this one compute the same, but for a gradient of their input.

        The first layer's input needs none where embeddings are frozen, and its trace differs for that alone.
        """
        for other in others:
            try:
                moved = self.fit(other.module, other.arguments, other.state, gradients=False)
                places, own = {self.source: other.source}, dict(zip(other.sources, other.tensors, strict=True))
                tensors = [own[moved_source(source, places)] for source in self.sources]
                pairs = list(zip(self.results, other.results, strict=True))
            except (Differs, KeyError, ValueError) as reason:
                log.debug("%s does not stand in for %s: %s", self.source.name, other.source.name, reason)
                continue
            if all(kind_of_fake(value_of(one)) == kind_of_fake(value_of(two)) for one, two in pairs):
                self.also.append(StandIn(other, [moved.get(node, node) for node in self.given], tensors))

    def bind(self, module: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any], state: Any) -> Bound:
        """Return how another layer is called by this trace.  Raises Differs where it would be traced otherwise."""
        moved = self.fit(module.value, flatten(args, kwargs), state)
        if (cut := ddp.optimizer()) is not None and not ddp.is_whole(cut):
            raise Differs("torch cuts this graph")
        return Bound(self, module, tx, moved, self.facts.tensors_of(module.value))

    def fit(
        self, layer: Any, arguments: dict[tuple, Any], state: Any, *, gradients: bool = True
    ) -> dict[Node, Node]:  # fmt: skip
        """Return which node is another layer's argument in the place of this one's.  Raises Differs if it is not alike.

        gradients: whether arguments must need a gradient where this one's do.
        """
        if state != self.state:
            raise Differs("a mode, or an object that it may read, has changed in between")
        if arguments.keys() != self.arguments.keys():
            raise Differs("it takes other arguments")
        moved: dict[Node, Node] = {}
        for path, old in self.arguments.items():
            check_argument(path, old, arguments[path], moved, gradients=gradients)
        if len(set(moved.values())) < len(moved):
            raise Differs("two of its arguments are one")
        if not alike(self.known, self.facts.of(layer)):
            raise Differs("something in it is another")
        if kinds_of(self.facts.tensors_of(layer)) != self.kinds:
            raise Differs("a tensor of it is of another kind")
        return moved

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
class StandIn:
    """A trace that another's body may take the place of: with these nodes as what is given, and as the tensors."""

    trace: Trace
    given: list[Node]
    tensors: list[Node]


@dataclass
class LayerCall:
    """What a call's node has in its ``meta["layer_call"]``: its trace, and where its layer's tensors come from."""

    trace: Trace
    sources: list[Source]


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
        guard = trace.facts.guard(source, self.module.value)
        output.guards.add(guard, collect_debug_stack=False)
        tracer = output.current_tracer
        given = [Proxy(self.moved.get(node, node), tracer) for node in trace.given]
        tensors = self._own_tensors()
        with record_nn_module_stack(
            str(id(self.module.value)), self.module.get_nn_module_stack_source(), self.tx, self.module.value
        ):
            body = output.create_proxy("get_attr", trace.install(output), (), {})
            call = output.create_proxy("call_function", LAYER_CALL, (body, *given, tensors), {})
            fakes = [fresh(value_of(node), output.fake_mode) for node in trace.results]
            call.node.meta["example_value"] = tuple(fakes)
            places: dict[Source, Source] = {trace.source: source}
            sources = [moved_source(old, places) for old in trace.sources]
            call.node.meta["layer_call"] = LayerCall(trace, sources)
            made: dict[Node, Any] = {}
            for place, (node, fake) in enumerate(zip(trace.results, fakes, strict=True)):
                item = output.create_proxy("call_function", operator.getitem, (call, place), {})
                made[node] = wrap_fx_proxy(self.tx, item, example_value=fake)
        return like(trace.result, made)

    def _own_tensors(self) -> Proxy:
        """Make the layer's tensors an input of the graph."""
        output, old = self.tx.output, self.trace.tensors
        name = output.install_global_by_id("__tensors_of_layer", self.trace.facts.tensors_of)
        source = LayerTensors(self.module.source, name)
        fakes = tuple(fresh(value_of(node), output.fake_mode) for node in old)
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
        self.arguments = flatten(args, kwargs)
        self.last = next(iter(reversed(tx.output.graph.nodes)), None)

    def trace(self, result: Any) -> Trace:
        """Return the trace.  Raises Differs where it can serve no other layer."""
        if state_of(self.tx) != self.state:
            raise Differs("it changes a mode, or an object from outside")
        if flatten(self.args, self.kwargs).keys() != self.arguments.keys():
            raise Differs("it changes an argument")
        nodes = self._added()
        bodies = [self.tx.output.nn_modules[node.target].graph for node in nodes if node.op == "get_attr"]
        if len(nodes) + sum(len(body.nodes) for body in bodies) < LEAST_NODES:
            raise Differs("it is less than a layer")
        own = set(nodes)
        results = list(dict.fromkeys(tensors_of(result)))
        if not own.issuperset(results):
            raise Differs("it returns what it was given")
        given: list[Node] = []
        tensors: dict[Node, Source] = {}
        read = (value for node in nodes for value in node.all_input_nodes if value not in own)
        for node in dict.fromkeys(read):
            source = self._own_source(node)
            if source is None:
                given.append(node)
            else:
                tensors[node] = source
        check_memory([*given, *tensors], results)
        layer, values = self.module.source, values_of(self.tx)
        guards = [guard for guard in self.tx.output.guards if is_under(guard.originating_source, layer)]
        guarded = [guard.originating_source for guard in guards if guard.create_fn_name() == "TENSOR_MATCH"]
        facts = Facts(layer, guards, values, list(dict.fromkeys([*tensors.values(), *guarded])))
        module = self.module.value
        return Trace(
            module, layer, self.arguments, self.state, nodes, given, list(tensors), facts, facts.of(module),
            kinds_of(facts.tensors_of(module)), result, results, list(tensors.values()),
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

    def _own_source(self, node: Node) -> Source | None:
        """Return where a tensor of the layer's own comes from; None for an argument, and for what every layer reads."""
        variables = [item for item in self.arguments.values() if isinstance(item, (TensorVariable, SymNodeVariable))]
        if isinstance(value_of(node), torch.SymInt) or any(item.as_proxy().node is node for item in variables):
            return None
        source = getattr(node.meta.get("grapharg"), "source", None)
        if node.op != "placeholder" or source is None:
            raise Differs(f"it reads {node.name}, which is none of its arguments")
        if not is_under(source, self.module.source):
            return None
        if not isinstance(value_of(node), Tensor) or not all(isinstance(size, int) for size in value_of(node).shape):
            raise Differs(f"{source.name} is no tensor of fixed size")
        return source
