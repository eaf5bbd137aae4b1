"""Cut a graph into pieces that run one after another, so that pieces of the same structure are compiled once.

Everything that a piece reads is one of its inputs, parameters too, so that one compiled region serves every layer of
its kind.  PyTorch's DDPOptimizer splits graphs in the same way (torch/_dynamo/backends/distributed.py).
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.reasons import Declined
from fastft.rewriter.fx.bodies import size
from fastft.rewriter.fx.effects import closes_transform, mutated_args, opens_transform, switched
from fastft.rewriter.fx.metadata import layer_of, module_path
from fastft.rewriter.outline import layer_detection
from fastft.rewriter.report.data import GraphReport, Region

LEAST_SAVING = 0.1  # of the nodes: below it, cutting the graph costs more fusions than it saves compilation


@dataclass(eq=False)
class Piece:
    """A stretch of consecutive nodes that runs as one call.

    inputs: nodes of the graph that it reads, sizes included.  outputs: those of its nodes that others read.  layer:
    whether it is one of a stack of layers.  key: equal for pieces of the same structure.  name: its name in profiles.
    """

    nodes: list[Node]
    layer: bool
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    key: Any = None
    name: str = ""

    @property
    def passed_on(self) -> list[Node]:
        """Those of its outputs that other pieces read."""
        own = set(self.nodes)
        return [node for node in self.outputs if any(user.op != "output" and user not in own for user in node.users)]

    @property
    def module(self) -> str:
        """The path of the module that all of a layer's nodes are in; "" where that is the model, or for no layer."""
        return _common(filter(None, map(module_path, self.nodes))) if self.layer else ""


def outline(gm: GraphModule, report: GraphReport, *, always: bool = False) -> list[Piece]:
    """Cut a graph into pieces; return [] where compiling it as a whole is faster or safer.

    always: cut it also where that saves no compilation.  The report gets the regions, or the reason why the graph stays
    whole.
    """
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    report.whole = "nothing in it repeats"
    for stretches in layer_detection.proposals(nodes):
        try:
            pieces = _cut(gm, nodes, stretches)
        except Declined as declined:
            report.whole = declined.reason
            continue
        sizes = [size(gm, piece.nodes) for piece in pieces]
        once = dict(zip((piece.key for piece in pieces), sizes, strict=True))
        if always or sum(once.values()) <= (1 - LEAST_SAVING) * sum(sizes):
            report.whole, report.regions = "", _described(pieces, sizes)
            return pieces
    return []


def divide(gm: GraphModule, pieces: Sequence[Piece], node: Node, report: GraphReport) -> list[Piece]:
    """Divide the piece that a node is in, so that another begins with it.  The report gets the regions."""
    divided: list[Piece] = []
    for piece in pieces:
        at = piece.nodes.index(node) if node in piece.nodes else 0
        parts = [piece.nodes[:at], piece.nodes[at:]] if at else [piece.nodes]
        divided += [Piece(nodes, piece.layer, name=piece.name) for nodes in parts]
    _connect(gm, divided)
    for piece in divided:
        piece.key = _key(gm, piece)
    report.regions = _described(divided, [size(gm, piece.nodes) for piece in divided])
    return divided


def _cut(gm: GraphModule, nodes: Sequence[Node], stretches: Sequence[range]) -> list[Piece]:
    """Make pieces of the stretches and of the nodes before, between and after them.  Raises Declined."""
    pieces, done = [], 0
    for stretch in (*stretches, range(len(nodes), len(nodes))):
        if done < stretch.start:
            pieces.append(Piece(list(nodes[done : stretch.start]), layer=False))
        if stretch:
            pieces.append(Piece(list(nodes[stretch.start : stretch.stop]), layer=True))
        done = stretch.stop
    owner = {node: piece for piece in pieces for node in piece.nodes}
    _connect(gm, pieces)
    for piece in pieces:
        _check_modes(piece)
        _check_values(piece)
    _check_writes(gm, pieces, owner)
    for piece in pieces:
        piece.key = _key(gm, piece)
    _name(pieces)
    return pieces


def _name(pieces: Sequence[Piece]) -> None:
    """Name the layers by their modules, and the other pieces by their position relative to the layers."""
    layers = [index for index, piece in enumerate(pieces) if piece.layer] or [0]
    for index, piece in enumerate(pieces):
        if not piece.layer:
            place = "before" if index < layers[0] else "between" if index < layers[-1] else ""
            piece.name = f"({place} the layers)" if place else "(the rest)"
            continue
        # Leave out what the model does between two layers, which is part of the first layer's piece.
        paths = [path for node in piece.nodes if layer_of(path := module_path(node))]
        numbered = re.match(r"(?:.*\.)?\d+(?=\.|$)", _common(paths))
        piece.name = numbered.group() if numbered else f"(layer {layers.index(index)})"


def _common(paths: Iterable[str]) -> str:
    """Return the longest module path that all of these begin with."""
    common = takewhile(lambda names: len(set(names)) == 1, zip(*(path.split(".") for path in paths), strict=False))
    return ".".join(names[0] for names in common)


def _connect(gm: GraphModule, pieces: Sequence[Piece]) -> None:
    """Set the inputs and outputs of each piece."""
    sizes = symbolic.size_inputs(gm.graph)
    for piece in pieces:
        own = set(piece.nodes)
        reads = [
            argument
            for node in piece.nodes
            for argument in node.all_input_nodes
            if argument.op != "get_attr" and argument not in own
        ]
        symbols = [sizes[symbol] for node in reads for symbol in symbolic.symbols_of(value_of(node)) if symbol in sizes]
        piece.inputs = list(dict.fromkeys([*(node for node in symbols if node not in own), *reads]))
    needed = {node for piece in pieces for node in piece.inputs} | set(gm.graph.output_node().all_input_nodes)
    for piece in pieces:
        piece.outputs = [node for node in piece.nodes if node in needed]


def _check_modes(piece: Piece) -> None:
    """Check that a piece leaves transforms, grad and autocast mode as it found them.  Raises Declined."""
    if sum(opens_transform(node.target) - closes_transform(node.target) for node in piece.nodes):
        raise Declined("a torch.func transform begins in one layer and ends in another")
    if not switched(piece.nodes).isdisjoint(piece.nodes[-1:]):
        raise Declined("autocast or gradients are switched on in one layer and off in another", "mode.switched")


def _check_values(piece: Piece) -> None:
    """Check that only plain tensors and sizes pass from piece to piece.  Raises Declined."""
    for node in piece.inputs:
        value = value_of(node)
        if node.op != "placeholder" and not fake_tensors.is_plain(value):
            raise Declined(f"{node.name}, a {type(value).__name__}, goes from one layer to another")


def _check_writes(gm: GraphModule, pieces: Sequence[Piece], owner: Mapping[Node, Piece]) -> None:
    """Check that a storage is mutated only by the piece that made it, before another reads it.  Raises Declined.

    Of the graph's inputs, what comes before the layers may write to those that it is the first to read.
    """
    made: dict[int, Any] = {}  # by storage: the piece in which it first occurs, None for the graph's inputs
    for node in gm.graph.nodes:
        for tensor in fake_tensors.tensors_in(value_of(node)):
            made.setdefault(fake_tensors.storage_key(tensor), owner.get(node))
    if pieces and not pieces[0].layer:
        read = [tensor for node in pieces[0].inputs for tensor in fake_tensors.tensors_in(value_of(node))]
        made |= {key: pieces[0] for key in map(fake_tensors.storage_key, read) if made[key] is None}
    counted = {
        fake_tensors.storage_key(tensor) for node in gm.graph.nodes for tensor in _written_values(gm, node, made, owner)
    }
    for piece in pieces:
        for node in piece.inputs:
            for tensor in fake_tensors.tensors_in(value_of(node)):
                if fake_tensors.written_to(tensor) and fake_tensors.storage_key(tensor) not in counted:
                    raise Declined(f"{node.name}, which layers share, is written to in place", "mutation")


def _written_values(gm: GraphModule, node: Node, made: Mapping[int, Any], owner: Mapping[Node, Piece]) -> list[Tensor]:
    """List the tensors that this node mutates.  Raises Declined where another piece made one of them."""
    tensors = [tensor for target in mutated_args(gm, node) for tensor in fake_tensors.tensors_in(value_of(target))]
    for tensor in tensors:
        if made.get(fake_tensors.storage_key(tensor)) is not owner.get(node):
            raise Declined(f"{node.name} writes in place to what another part of the graph made", "mutation")
    return tensors


def _key(gm: GraphModule, piece: Piece) -> tuple:
    """Return a key that is equal for pieces that compute the same, given the same kind of inputs."""
    numbers = {node: number for number, node in enumerate([*piece.inputs, *piece.nodes])}
    inputs = tuple(fake_tensors.kind_of_input(node) for node in piece.inputs)
    outputs = tuple(numbers[node] for node in piece.outputs)
    return piece.layer, inputs, _structure(gm, piece.nodes, numbers), outputs


def _structure(gm: GraphModule, nodes: Sequence[Node], numbers: dict[Node, int]) -> tuple:
    """Describe nodes by what they compute, with ``numbers`` in the place of nodes."""

    def spelled(argument: Any) -> Any:
        if isinstance(argument, Node):
            return _attribute(gm, argument) if argument.op == "get_attr" else ("node", numbers[argument])
        if isinstance(argument, (tuple, list)):
            return type(argument).__name__, *map(spelled, argument)
        if isinstance(argument, dict):
            return "dict", *((name, spelled(value)) for name, value in argument.items())
        if isinstance(argument, slice):
            return "slice", spelled(argument.start), spelled(argument.stop), spelled(argument.step)
        if isinstance(argument, (int, float, complex, str, type(None))):
            return type(argument), repr(argument)  # 1 is neither 1.0 nor True, and nan is nan
        return argument if isinstance(argument, (torch.dtype, torch.device, torch.layout)) else ("object", id(argument))

    return tuple((node.op, node.target, spelled(node.args), spelled(node.kwargs)) for node in nodes)


def _attribute(gm: GraphModule, node: Node) -> tuple:
    """Describe a nested graph by its structure, any other attribute by its identity."""
    attribute = operator.attrgetter(str(node.target))(gm)
    if not isinstance(attribute, GraphModule):
        return "object", id(attribute)
    nodes = [node for node in attribute.graph.nodes if node.op != "get_attr"]
    numbers = {node: number for number, node in enumerate(nodes)}
    inside = [node for node in nodes if node.op != "placeholder"]
    settings = tuple(
        (name, id(value)) for name, value in sorted(attribute.meta.items()) if name.startswith("_checkpoint")
    )
    return "graph", len(nodes) - len(inside), settings, _structure(attribute, inside, numbers)


def _described(pieces: Sequence[Piece], sizes: Sequence[int]) -> list[Region]:
    """Describe the regions for the report, in the order in which they are first called."""
    calls = Counter(piece.key for piece in pieces)
    first: dict[Any, Region] = {}
    for piece, nodes in zip(pieces, sizes, strict=True):
        first.setdefault(piece.key, Region(piece.module, calls[piece.key], nodes))
    return list(first.values())
