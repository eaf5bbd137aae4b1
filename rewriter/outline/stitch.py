"""Turn pieces of a graph into graphs and calls: extract a piece, join several, run all in order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fastft.compat import dynamo, fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.outline.partition import Piece


def stitch(gm: GraphModule, pieces: Sequence[Piece], calls: Mapping[Piece, Callable]) -> Callable:
    """Return a function of the graph's inputs that runs the whole graph by the calls of its pieces."""
    return chain(pieces, calls, gm.graph.find_nodes(op="placeholder"), gm.graph.output_node().args[0])


def join(pieces: Sequence[Piece]) -> Piece:
    """Join consecutive pieces to one."""
    joined = Piece([node for piece in pieces for node in piece.nodes], layer=False, key=tuple(map(id, pieces)))
    inside = set(joined.nodes)
    joined.inputs = [
        node for node in dict.fromkeys(value for piece in pieces for value in piece.inputs) if node not in inside
    ]
    candidates = [node for piece in pieces for node in piece.outputs]
    joined.outputs = [node for node in candidates if not inside.issuperset(node.users)]
    return joined


def chain(pieces: Sequence[Piece], calls: Mapping[Piece, Callable], inputs: Sequence[Node], outputs: Any) -> Callable:
    """Return a function of ``inputs`` that calls the pieces in order and frees each value after its last use."""
    graph, root = Graph(), nn.Module()
    values = {node: graph.placeholder(node.name) for node in inputs}
    names: dict[int, str] = {}
    for piece in pieces:
        function = calls[piece]
        if id(function) not in names:
            names[id(function)] = f"region_{len(names)}"
            root.add_module(names[id(function)], _Call(function))
        args = tuple(values[node] for node in piece.inputs)
        call = graph.create_node("call_module", names[id(function)], args, name=piece.name or None)  # for tracebacks
        for place, node in enumerate(piece.outputs):
            values[node] = graph.call_function(operator.getitem, (call, place))
    graph.output(map_arg(outputs, values.__getitem__))
    return GraphModule(root, graph, class_name="Stitched").forward


class _Call(nn.Module):
    """Wraps a function as the module that a call_module node needs."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.forward = function


def extract(gm: GraphModule, piece: Piece) -> GraphModule:
    """Copy a piece to a graph of its own, which returns a tuple."""
    graph, values = Graph(), {}
    for node in piece.inputs:
        values[node] = graph.placeholder(node.name)
        dynamo.describe_input(values[node], node)
    for node in piece.nodes:
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and argument not in values:
                values[argument] = graph.node_copy(argument)
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in piece.outputs))
    return dynamo.inherit_capture_metadata(GraphModule(gm, graph), gm)


def example_inputs(piece: Piece, given: Mapping[Node, Any], mode: Any) -> list[Any]:
    """Make a piece's example inputs: empty fake tensors, and Dynamo's own example where an input is no plain tensor.

    given: Dynamo's example inputs by the graph's placeholders.  mode: the empty tensors' FakeTensorMode.
    """
    return [
        fake_tensors.empty_like_fake(value, mode) if fake_tensors.is_plain(value := value_of(node)) else given[node]
        for node in piece.inputs
    ]
