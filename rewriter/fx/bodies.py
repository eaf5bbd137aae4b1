"""The graphs nested in a graph (its bodies), and a snapshot that restores all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import GraphModule, Node

from fastft.compat import dynamo, operators

# Higher-order operators that run a body as an ordinary graph: a rewrite that is valid inside is valid outside.
_BODIES = ("tag_activation_checkpoint", "autograd_function_apply", "invoke_subgraph", "wrap")


def bodies(gm: GraphModule) -> list[GraphModule]:
    """List ``gm`` and every nested graph that may be rewritten: checkpointed regions, autograd.Functions."""
    by_id = {id(gm): gm}
    for node in gm.graph.nodes:
        if runs_bodies(node):
            for body in nested_graphs(gm, node):
                by_id.update((id(inner), inner) for inner in bodies(body))
    return list(by_id.values())


def calls_of(gm: GraphModule, body: GraphModule) -> list[Node]:
    """List the nodes that run this body, from outermost to innermost: the call in gm, then the call inside its body,
    and so on; empty for gm itself.
    """
    for node in gm.graph.nodes if body is not gm else ():
        if runs_bodies(node):
            for inner in nested_graphs(gm, node):
                if inner is body or (deeper := calls_of(inner, body)):
                    return [node] if inner is body else [node, *deeper]
    return []


def body_of(gm: GraphModule, node: Node) -> GraphModule | None:
    """Return the graph that a node runs, or None; for an autograd.Function, its forward."""
    return next(iter(nested_graphs(gm, node)), None) if runs_bodies(node) else None


def nested_graphs(gm: GraphModule, node: Node) -> list[GraphModule]:
    """List the graphs among a node's arguments."""
    attributes = [
        getattr(gm, str(argument.target), None) for argument in node.all_input_nodes if argument.op == "get_attr"
    ]
    return [attribute for attribute in attributes if isinstance(attribute, GraphModule)]


def size(gm: GraphModule, nodes: Iterable[Node]) -> int:
    """Count these nodes and those of the graphs that they run."""
    return sum(1 + sum(size(body, body.graph.nodes) for body in nested_graphs(gm, node)) for node in nodes)


class Snapshot:
    """The graphs of ``gm`` and its bodies as they are now; ``restore`` puts them back and may be called once."""

    def __init__(self, gm: GraphModule):
        self._saved = [(body, dynamo.copy_graph(body.graph)) for body in bodies(gm)]

    def restore(self) -> None:
        """Put the saved graphs back."""
        for body, graph in self._saved:
            body.graph = graph


def runs_bodies(node: Node) -> bool:
    """Tell whether this node is a higher-order operator whose body is run as an ordinary graph."""
    target: Any = node.target
    return node.op == "call_function" and operators.is_higher_order(target) and target.name() in _BODIES
