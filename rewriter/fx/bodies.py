"""Graphs that are nested in a graph, and how to take back what was done to all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import GraphModule, Node

from fastft.compat import dynamo, operators

# Operators whose body is an ordinary graph run in place of a call: what is equal inside is equal outside.
_BODIES = ("tag_activation_checkpoint", "autograd_function_apply", "invoke_subgraph", "wrap")


def bodies(gm: GraphModule) -> list[GraphModule]:
    """``gm`` and every graph nested in it that may be rewritten: checkpointed regions, autograd.Functions."""
    found = {id(gm): gm}
    for node in gm.graph.nodes:
        if runs_bodies(node):
            for body in nested_graphs(gm, node):
                found.update((id(inner), inner) for inner in bodies(body))
    return list(found.values())


def calls_of(gm: GraphModule, body: GraphModule) -> list[Node]:
    """The nodes that run this body: one of gm, then one of the body that it runs, and so on; none for gm itself."""
    for node in gm.graph.nodes if body is not gm else ():
        if runs_bodies(node):
            for inner in nested_graphs(gm, node):
                if inner is body or (deeper := calls_of(inner, body)):
                    return [node] if inner is body else [node, *deeper]
    return []


def body_of(gm: GraphModule, node: Node) -> GraphModule | None:
    """The graph that a node runs in place of a call: of an autograd.Function, its forward."""
    return next(iter(nested_graphs(gm, node)), None) if runs_bodies(node) else None


def nested_graphs(gm: GraphModule, node: Node) -> list[GraphModule]:
    """The graphs that a node is given."""
    attributes = [getattr(gm, str(one.target), None) for one in node.all_input_nodes if one.op == "get_attr"]
    return [attribute for attribute in attributes if isinstance(attribute, GraphModule)]


def size(gm: GraphModule, nodes: Iterable[Node]) -> int:
    """How many nodes these are with those of the graphs that they run."""
    return sum(1 + sum(size(body, body.graph.nodes) for body in nested_graphs(gm, node)) for node in nodes)


class Snapshot:
    """The graphs of ``gm`` and its bodies as they are now; ``restore`` puts them back, once."""

    def __init__(self, gm: GraphModule):
        self._saved = [(body, dynamo.copy_graph(body.graph)) for body in bodies(gm)]

    def restore(self) -> None:
        for body, graph in self._saved:
            body.graph = graph


def runs_bodies(node: Node) -> bool:
    target: Any = node.target
    return node.op == "call_function" and operators.is_higher_order(target) and target.name() in _BODIES
