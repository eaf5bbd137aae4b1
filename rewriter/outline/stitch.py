"""Pieces of a graph as graphs and calls: extract one, join several, run all one after another."""

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
    """The graph as calls of its compiled pieces, one function of the graph's inputs."""
    return chain(pieces, calls, gm.graph.find_nodes(op="placeholder"), gm.graph.output_node().args[0])


def join(pieces: Sequence[Piece]) -> Piece:
    """Consecutive pieces as one."""
    joined = Piece([node for piece in pieces for node in piece.nodes], layer=False, key=tuple(map(id, pieces)))
    inside = set(joined.nodes)
    joined.inputs = [
        node for node in dict.fromkeys(one for piece in pieces for one in piece.inputs) if node not in inside
    ]
    candidates = [node for piece in pieces for node in piece.outputs]
    joined.outputs = [node for node in candidates if not inside.issuperset(node.users)]
    return joined


def chain(pieces: Sequence[Piece], calls: Mapping[Piece, Callable], inputs: Sequence[Node], outputs: Any) -> Callable:
    """A function of ``inputs`` that calls the pieces one after another and lets go of what is no longer needed."""
    graph, root = Graph(), nn.Module()
    values = {node: graph.placeholder(node.name) for node in inputs}
    names: dict[int, str] = {}
    for piece in pieces:
        function = calls[piece]
        if id(function) not in names:
            names[id(function)] = f"region_{len(names)}"
            root.add_module(names[id(function)], _Call(function))
        given = tuple(values[node] for node in piece.inputs)
        call = graph.create_node("call_module", names[id(function)], given, name=piece.name or None)  # for tracebacks
        for place, node in enumerate(piece.outputs):
            values[node] = graph.call_function(operator.getitem, (call, place))
    graph.output(map_arg(outputs, values.__getitem__))
    return GraphModule(root, graph, class_name="Stitched").forward


class _Call(nn.Module):
    """A function where FX wants a module."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.forward = function


def extract(gm: GraphModule, piece: Piece) -> GraphModule:
    """The piece as a graph of its own, which returns a tuple."""
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
    """Empty tensors like those that Dynamo saw; what it gave itself for inputs that are no plain tensors.

    mode: the one that the empty tensors are fakes of.
    """
    return [
        fake_tensors.empty_like_fake(value, mode) if fake_tensors.is_plain(value := value_of(node)) else given[node]
        for node in piece.inputs
    ]
