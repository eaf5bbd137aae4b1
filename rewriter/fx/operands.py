"""What a body is given by the calls that run it: followed outwards, added, taken away.

Only of bodies that are given their operands as they are: checkpoints, and layers that were traced once.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors, operators
from fastft.compat.fake_tensors import value_of
from fastft.reasons import Declined
from fastft.rewriter.fx.bodies import bodies, nested_graphs, runs_bodies

Level = tuple[GraphModule, list[Node]]  # a body and all its calls


class Calls:
    """The calls of each body of a graph."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.around: dict[int, list[tuple[GraphModule, Node]]] = {}  # by body: the graph that calls it, and the call
        for graph in bodies(gm):
            for node in graph.graph.nodes:
                for body in nested_graphs(graph, node) if runs_bodies(node) else ():
                    self.around.setdefault(id(body), []).append((graph, node))

    def levels(self, body: GraphModule) -> list[Level]:
        """List a body and those around it, the innermost first, with all calls of each.  Raises Declined."""
        found: list[Level] = []
        while body is not self.gm:
            around = self.around.get(id(body), [])
            if len({id(graph) for graph, _ in around}) != 1:
                raise Declined("a layer's body is called from several others")
            found.append((body, [call for _, call in around]))
            body = around[0][0]
        return found

    def outside(self, body: GraphModule, node: Node) -> tuple[Node, list[Level]]:
        """Follow a body's input to the node that all its calls pass in, through all bodies around it.

        Returns the node, and the bodies that were left on the way, the innermost first.
        """
        levels: list[Level] = []
        while node.op == "placeholder" and body is not self.gm:
            around = self.around.get(id(body), [])
            calls = [call for _, call in around]
            place = list(body.graph.find_nodes(op="placeholder")).index(node)
            operands = {_operand(call, place) for call in calls}
            operand = next(iter(operands)) if len(operands) == 1 else None
            if operand is None or len({id(graph) for graph, _ in around}) != 1:
                break
            levels.append((body, calls))
            node, body = operand, around[0][0]
        return node, levels


def _operand(call: Node, place: int) -> Node | None:
    """Return what a call passes to a body's input; None for no node, or where a call passes more than operands."""
    # A checkpoint's named arguments are its settings.
    plain = call.target is operators.CHECKPOINT or (call.target is operators.LAYER_CALL and not call.kwargs)
    operand = call.args[1 + place] if plain and len(call.args) > 1 + place else None
    return operand if isinstance(operand, Node) else None


def pass_in(levels: list[Level], value: Any) -> Any:
    """Return the input by which the innermost body reads a node from outside all, adding inputs where need be."""
    if not isinstance(value, Node):
        return value
    for body, calls in reversed(levels):
        placeholders = list(body.graph.find_nodes(op="placeholder"))
        known = [place for place in range(len(placeholders)) if all(call.args[1 + place] is value for call in calls)]
        if known:
            value = placeholders[known[0]]
            continue
        with body.graph.inserting_after(placeholders[-1]):
            placeholder = body.graph.placeholder(f"{value.name}_of_mask")
        fake_tensors.set_value(placeholder, value_of(value))
        for call in calls:
            call.args = (*call.args, value)
        value = placeholder
    return value


def take_out(levels: list[Level], node: Node) -> bool:
    """Remove an input that the innermost body does not use, and those by which it came in.

    Returns whether it was removed at all levels: not where a body around uses it too.
    """
    for body, calls in levels:
        if node.users:
            return False
        place = 1 + list(body.graph.find_nodes(op="placeholder")).index(node)
        outer = calls[0].args[place]
        body.graph.erase_node(node)
        for call in calls:
            call.args = (*call.args[:place], *call.args[place + 1 :])
        assert isinstance(outer, Node)
        node = outer
    return True
