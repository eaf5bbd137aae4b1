"""Make the planner's stages from a graph's pieces: the values between them, and the choices of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.memory import cost_model, device_rates, joint_graph, pareto
from fastft.rewriter.memory.partitioner import JointGraphCapture
from fastft.rewriter.memory.simulate import Kind, Name, Stage, StageSequence, Value
from fastft.rewriter.outline.partition import Piece


def read(
    gm: GraphModule, pieces: Sequence[Piece], probes: Mapping[Any, JointGraphCapture | None], rate: device_rates.Rates
) -> StageSequence:
    """Return the stages of a graph.  probes: the joint graph of each kind of piece, by key; None without backward."""
    kinds: dict[Any, Kind] = {}
    number_of = {node: number for number, piece in enumerate(pieces) for node in piece.outputs}
    last_layer = max((number for number, piece in enumerate(pieces) if piece.layer), default=-1)
    sequence = StageSequence([], {}, {})
    for number, piece in enumerate(pieces):
        offload = piece.layer and number != last_layer  # the last layer's activations are needed at once
        key = piece.key, offload
        if key not in kinds:
            kinds[key] = _kind(piece, probes[piece.key], rate, offload)
            joint = kinds[key].joint
            sequence.hints |= joint.hints if joint is not None else {}
        inputs: dict[int, Name] = {place: id(node) for place, node in enumerate(piece.inputs) if node in number_of}
        sequence.stages.append(Stage(kinds[key], _name(piece, number, len(pieces)), inputs))
        for node in piece.outputs:
            for tensor in fake_tensors.tensors_in(value_of(node)):
                sequence.values[id(node)] = Value(symbolic.expression(cost_model.tensor_bytes(tensor)), number)
                sequence.hints |= symbolic.hints_of(tensor)
    _lifetimes(gm, pieces, sequence)
    _gradients(pieces, sequence)
    return sequence


def _kind(piece: Piece, probe: JointGraphCapture | None, rate: device_rates.Rates, offload: bool) -> Kind:
    if probe is None or probe.joint is None:
        return Kind(piece.module, None, [pareto.Choice(())])
    joint = joint_graph.read(probe.joint.graph, probe.forward_outputs, rate)
    inside = set(piece.nodes)
    made = {place for place, node in enumerate(piece.inputs) if node.op != "placeholder"}
    private = {place for place in made if inside.issuperset(piece.inputs[place].users)}
    return Kind(piece.module, joint, pareto.choices(joint, rate, private, offload=offload))


def _name(piece: Piece, number: int, count: int) -> str:
    if piece.layer:
        return piece.module or f"piece {number}"
    return (
        "what comes before the layers" if number == 0 else "head and loss" if number == count - 1 else f"piece {number}"
    )


def _lifetimes(gm: GraphModule, pieces: Sequence[Piece], sequence: StageSequence) -> None:
    for number, piece in enumerate(pieces):
        for node in piece.inputs:
            if id(node) in sequence.values:
                sequence.last[id(node)] = number
    for node in gm.graph.output_node().all_input_nodes:
        if id(node) in sequence.values:
            sequence.last[id(node)] = len(pieces)
    for name, value in sequence.values.items():
        sequence.last.setdefault(name, value.made)


def _gradients(pieces: Sequence[Piece], sequence: StageSequence) -> None:
    """Assign each parameter's gradient to the last stage that reads it: backward starts with the last stage."""
    seen: set[Node] = set()
    for piece, stage in reversed(list(zip(pieces, sequence.stages, strict=True))):
        for node in piece.inputs:
            value = value_of(node)
            if node.op == "placeholder" and isinstance(value, Tensor) and value.requires_grad and node not in seen:
                seen.add(node)
                stage.gradient_bytes += symbolic.hint(cost_model.tensor_bytes(value))


def device_of(gm: GraphModule) -> torch.device:
    """Return the device of most of a graph's inputs."""
    values = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    devices = Counter(value.device for value in values if isinstance(value, Tensor))
    return devices.most_common(1)[0][0] if devices else torch.device("cpu")


def input_bytes(gm: GraphModule) -> int:
    """Count the bytes of a graph's inputs."""
    values = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    return sum(symbolic.hint(cost_model.tensor_bytes(value)) for value in values if isinstance(value, Tensor))
