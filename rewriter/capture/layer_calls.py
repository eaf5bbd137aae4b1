"""Calls of a layer that was traced once: as Dynamo's graph has them, and as the passes take them.

Dynamo's graph holds the layer that was traced in full, and calls of a body, a copy of it, for the others of its kind.
Their tensors are one input each, a tuple, made for speed (fastft/compat/layer_reuse.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import dynamo, fake_tensors, fsdp
from fastft.compat.fake_tensors import set_value, value_of
from fastft.compat.layer_arguments import fresh
from fastft.compat.layer_reuse import LayerCall, Trace
from fastft.compat.operators import LAYER_CALL
from fastft.rewriter.fx.effects import is_pure


def take_apart(
    gm: GraphModule, example_inputs: Sequence[Any]
) -> tuple[GraphModule, list[Any], Callable[[Callable], Callable]]:
    """Make each tensor of a layer an input of its own, and the layer that was traced a call like the others.

    Returns a graph that was changed so, as Dynamo still needs its own; its example inputs; and a function that makes of
    one that takes these inputs one that takes the old.
    """
    if not any("layer_call" in node.meta for node in gm.graph.nodes):
        return gm, list(example_inputs), lambda compiled: compiled
    copy = dynamo.inherit_capture_metadata(GraphModule(gm, dynamo.copy_graph(gm.graph)), gm)
    now = dict(zip(gm.graph.nodes, copy.graph.nodes, strict=True))
    calls = {node: node.meta.pop("layer_call") for node in copy.graph.nodes if "layer_call" in node.meta}
    tuples = {node.args[-1] for node in calls}
    placeholders = list(copy.graph.find_nodes(op="placeholder"))
    whole = [node in tuples for node in placeholders]
    traces = {id(call.trace): (call.trace, node) for node, call in reversed(calls.items())}
    for trace, call in traces.values():
        _flatten_body(getattr(copy, trace.body))
        _fold(copy, trace, call, now, trace.body, (*trace.given, *trace.tensors), trace.given)
        for other in trace.also:
            _fold(copy, other.trace, call, now, trace.body, (*other.given, *other.tensors), trace.given)
    for node, call in calls.items():
        _flatten_call(copy, node, call)
    for trace, _ in traces.values():
        _return_what_is_read(copy, trace.body)
    copy.graph.lint()
    copy.recompile()

    def flat(inputs: Sequence[Any]) -> list[Any]:
        values: list[Any] = []
        for value, apart in zip(inputs, whole, strict=True):
            values.extend(value) if apart else values.append(value)
        return values

    pairs = zip(placeholders, example_inputs, strict=True)
    examples = [list(map(_example, value_of(node), given)) if node in tuples else given for node, given in pairs]
    return copy, flat(examples), lambda compiled: lambda *inputs: compiled(*flat(inputs))


def _example(fake: Any, real: Any) -> Any:
    """Return the example of a layer's tensor: of real ones AOTAutograd would make fakes of any size.

    Of a sharded parameter it never makes one, and the real one tells where it is kept.
    """
    return real if fsdp.is_sharded(real) else fake


def _flatten_body(body: GraphModule) -> None:
    """Give a body a placeholder for each tensor, in the place of one for the tuple of all."""
    tensors = list(body.graph.find_nodes(op="placeholder"))[-1]
    with body.graph.inserting_before(tensors):
        for item in sorted(tensors.users, key=lambda user: user.args[1]):
            placeholder = body.graph.placeholder(f"tensor_{item.args[1]}")
            placeholder.target = placeholder.name  # the code takes it by its target: a layer has names of its own
            set_value(placeholder, value_of(item))
            item.replace_all_uses_with(placeholder)
            body.graph.erase_node(item)
    body.graph.erase_node(tensors)
    for node in reversed(list(body.graph.nodes)):
        if node.target is operator.getitem and not node.users:  # Dynamo too removes results that nobody reads
            body.graph.erase_node(node)
    body.recompile()


def _flatten_call(gm: GraphModule, node: Node, call: LayerCall) -> None:
    """Give the graph an input for each tensor of a layer, in the place of the tuple of all."""
    *rest, tensors = node.args
    assert isinstance(tensors, Node)
    inputs: list[Node] = []
    with gm.graph.inserting_before(tensors):
        for old, source, fake in zip(call.trace.tensors, call.sources, value_of(tensors), strict=True):
            placeholder = gm.graph.placeholder(f"{tensors.name}_{len(inputs)}")
            placeholder.target = placeholder.name  # the code takes it by its target: two stacks of layers
            set_value(placeholder, fake)
            placeholder.meta["tensor_dict"] = dict(old.meta.get("tensor_dict") or {})
            placeholder._dynamo_source = source
            inputs.append(placeholder)
    node.args = (*rest, *inputs)
    gm.graph.erase_node(tensors)


def _fold(
    gm: GraphModule, trace: Trace, like: Node, now: dict[Node, Node], body_name: str, given: Sequence[Node],
    wanted: Sequence[Node],
) -> None:  # fmt: skip
    """Replace a layer that was traced by a call, unless something of it is read that a call does not return.

    like: a call of another layer of its kind.  now: the graph's nodes by Dynamo's, which this keeps true.
    given: what the body is called with; wanted: what it was traced with, in the same order.
    """
    if any(node not in now for node in (*given, *trace.results)):
        return
    nodes = [now[node] for node in trace.nodes if node in now]
    results = [now[node] for node in trace.results]
    own = set(nodes)
    if any(user not in own for node in own.difference(results) for user in node.users):
        return
    with gm.graph.inserting_after(nodes[-1]):
        body = gm.graph.get_attr(body_name)
    with gm.graph.inserting_before(nodes[0]):
        inputs = [_as_trained(gm, now[node], value_of(old)) for node, old in zip(given, wanted, strict=False)]
        inputs += [now[node] for node in given[len(inputs) :]]
    with gm.graph.inserting_after(body):
        place = call = gm.graph.call_function(LAYER_CALL, (body, *inputs))
    call.meta = like.meta | {"nn_module_stack": _around(results[0], like)}
    set_value(call, tuple(map(value_of, results)))
    for number, (old, node) in enumerate(zip(trace.results, results, strict=True)):
        with gm.graph.inserting_after(place):
            place = gm.graph.call_function(operator.getitem, (call, number))
        place.meta = dict(call.meta)
        set_value(place, value_of(node))
        now[old] = place
        for user in [user for user in node.users if user not in own]:
            user.replace_input_with(node, place)
    for node in reversed(nodes):
        gm.graph.erase_node(node)


def _return_what_is_read(gm: GraphModule, name: str) -> None:
    """Let a body return only what some call of it reads, such as no attention weights that the model drops.

    What is returned cannot be fused with what it is computed from.
    """
    body = getattr(gm, name)
    calls = [node for node in gm.graph.find_nodes(op="call_function", target=LAYER_CALL) if node.args[0].target == name]
    items = [user for call in calls for user in call.users]
    (returned,) = body.graph.output_node().args
    read = sorted({item.args[1] for item in items if item.target is operator.getitem and item.users})
    if any(item.target is not operator.getitem for item in items) or len(read) in (0, len(returned)):
        return
    body.graph.output_node().args = (tuple(returned[place] for place in read),)
    for node in reversed(body.graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users and is_pure(node):
            body.graph.erase_node(node)
    body.recompile()
    for call in calls:
        if (values := value_of(call)) is not None:  # Dynamo gives its own calls none
            set_value(call, tuple(values[place] for place in read))
    for item in items:
        if item.users:
            item.args = (item.args[0], read.index(item.args[1]))
        else:
            gm.graph.erase_node(item)


def _as_trained(gm: GraphModule, node: Node, wanted: Any) -> Node:
    """Return an input of a layer, as if a gradient of it were needed where that of other layers needs one.

    So the first layer is of the same kind as the others.  Its backward then computes a gradient that nobody reads,
    a thousandth of a step's work; another kind of layer would be another tenth of the wait for the first step.
    """
    value = value_of(node)
    if not isinstance(value, Tensor) or value.requires_grad or not wanted.requires_grad:
        return node
    result = gm.graph.call_method("clone", (node,))
    result.meta = dict(node.meta)
    set_value(result, fresh(wanted, fake_tensors.mode_of([wanted])))
    return result


def _around(node: Node, like: Node) -> dict[str, Any]:
    """Return the modules around the layer that a node is in, which has as many around it as that of another call."""
    stack, depth = node.meta.get("nn_module_stack") or {}, len(like.meta.get("nn_module_stack") or {})
    return dict(list(stack.items())[:depth])
