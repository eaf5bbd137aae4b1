"""Inline the user's activation checkpoints into the graph around them, so that the memory budget decides instead.

A checkpoint computes what its body computes, once.  What is saved of it for backward is the planner's decision, as for
any other layer (memory/planner.py).
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fastft.compat import operators
from fastft.rewriter.context import Context
from fastft.rewriter.fx.bodies import body_of
from fastft.rewriter.fx.metadata import is_result_of_many, module_path


def inline(gm: GraphModule, context: Context) -> None:
    """Replace a graph's checkpoint calls by their bodies, if the plan is to decide; report the modules around them.

    A checkpoint with a context_fn, which decides itself what is saved, stays as it is, and so does one that is not
    understood.
    """
    modules = context.report.inlined
    if not context.inline_checkpoints:
        return
    layers = [body_of(gm, node) for node in gm.graph.find_nodes(op="call_function", target=operators.LAYER_CALL)]
    for graph in (gm, *{id(layer): layer for layer in layers if layer is not None}.values()):
        before = len(modules)
        while call := next((node for node in graph.graph.nodes if _body(graph, node) is not None), None):
            modules.append(module_path(call))
            body = _body(graph, call)
            assert body is not None
            _inline(graph, call, body)
        if len(modules) > before:
            graph.graph.lint()
            graph.recompile()


def _body(gm: GraphModule, node: Node) -> GraphModule | None:
    """Return the body of a checkpoint that can be inlined, or None."""
    if node.target is not operators.CHECKPOINT or not isinstance(node.args[0], Node) or node.args[0].op != "get_attr":
        return None
    body = getattr(gm, str(node.args[0].target), None)
    if not isinstance(body, GraphModule) or any(name.startswith("_checkpoint") for name in body.meta):
        return None
    inputs = body.graph.find_nodes(op="placeholder")
    results = body.graph.output_node().args[0]
    taken = all(is_result_of_many(user) for user in node.users)
    return body if len(inputs) == len(node.args) - 1 and isinstance(results, (tuple, list)) and taken else None


def _inline(gm: GraphModule, call: Node, body: GraphModule) -> None:
    inputs = body.graph.find_nodes(op="placeholder")
    values: dict[Node, Any] = dict(zip(inputs, call.args[1:], strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            values[node] = gm.graph.node_copy(node, values.__getitem__)
            if node.op == "get_attr":
                values[node].target = _attribute(gm, body, str(node.target))
    results: Any = map_arg(body.graph.output_node().args[0], values.__getitem__)
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    attribute = call.args[0]
    gm.graph.erase_node(call)
    if isinstance(attribute, Node) and not attribute.users:
        gm.graph.erase_node(attribute)


def _attribute(gm: GraphModule, body: GraphModule, name: str) -> str:
    """Return the name under which ``gm`` has what the body calls ``name``, after adding it if need be."""
    owner: Any = body
    for part in name.split("."):
        owner = getattr(owner, part)
    number = 0
    while hasattr(gm, f"inlined_{number}"):
        if getattr(gm, f"inlined_{number}") is owner:
            return f"inlined_{number}"
        number += 1
    setattr(gm, f"inlined_{number}", owner)
    return f"inlined_{number}"
