"""Decide which pieces run as CUDA graphs, and replace them by one piece that does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import ddp, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.outline import stitch
from fastft.rewriter.outline.partition import Piece
from fastft.rewriter.rows import by_expert
from fastft.rewriter.runtime import profiling
from fastft.rewriter.runtime.cuda_graphs import Graphed, log
from fastft.rewriter.runtime.offload import Offloader
from fastft.rewriter.runtime.part import Part

# Elements of a hidden state, or of a token's row for each expert that it chose; see docs/performance.md for what graphs
# gain on either side of it.
SMALL = 2**24
PARTS = 8  # of backward, where each part's gradients are sent to other devices while the next is computed
PATIENCE = 4  # calls with the same sizes in a row, where sizes may change, before graphs for them pay unasked


def capturable(gm: GraphModule, pieces: Sequence[Piece], asked: bool | None, *, sharded: bool = False) -> range | None:
    """Return the range of the pieces from the first layer to the last if they should and can run as CUDA graphs.

    Returns None otherwise.  asked: the user's option; None uses CUDA graphs where sizes are small and stay the same.
    sharded: whether parameters are gathered while they run: each time elsewhere in memory, and by collectives that
    would have to be captured by all processes alike.
    """
    layers = [number for number, piece in enumerate(pieces) if piece.layer]
    if asked is False or not layers:
        return None
    if sharded:
        if asked:
            log.warning("no CUDA graphs: FSDP2 gathers the layers' weights, each time elsewhere in memory")
        return None
    stack = stitch.join(pieces[layers[0] : layers[-1] + 1])
    values = [value_of(node) for node in stack.inputs]
    devices = {value.device for value in values if isinstance(value, Tensor)}
    if len(devices) != 1 or devices.pop().type != "cuda":
        if asked:
            log.info("no CUDA graphs: the layers do not run on one CUDA device")
        return None
    moving = [values[place] for place in moving_inputs(stack) if not isinstance(values[place], torch.SymInt)]
    if asked is None and not (all(map(_is_small, moving)) and max(by_expert.elements(gm), default=0) <= SMALL):
        return None
    return range(layers[0], layers[-1] + 1)


def graph_layers(
    pieces: Sequence[Piece], calls: dict[Piece, Callable], layers: range, asked: bool | None,
    offloader: Offloader | None = None,
) -> list[Piece]:  # fmt: skip
    """Return the pieces with these layers joined to one that runs as CUDA graphs, and add its call to ``calls``.

    asked: the user's option.  offloader: the one that the layers use, if any.
    """
    inside = pieces[layers.start : layers.stop]
    stack = stitch.join(inside)
    named = profiling.named(inside, calls)
    call = stitch.chain(inside, named, stack.inputs, tuple(stack.outputs))
    waits = asked is None and any(isinstance(value_of(node), torch.SymInt) for node in stack.inputs)
    name = profiling.span(inside[0].name, inside[-1].name)
    calls[stack] = Graphed(
        call, stack.outputs, moving_inputs(stack), offloader, name, patience=PATIENCE if waits else 2,
        parts=parts_of(inside, stack.inputs, named, PARTS) if ddp.is_active() else (),
    )  # fmt: skip
    return [*pieces[: layers.start], stack, *pieces[layers.stop :]]


def parts_of(
    pieces: Sequence[Piece], inputs: Sequence[Node], calls: Mapping[Piece, Callable], most: int
) -> list[Part]:  # fmt: skip
    """Divide pieces into parts of about as many layers.  inputs: of all pieces, which are named by their positions."""
    each = -(-len(pieces) // most)
    names: dict[Node, Any] = {node: place for place, node in enumerate(inputs)}
    parts = []
    for start in range(0, len(pieces), each):
        inside = pieces[start : start + each]
        part = stitch.join(inside)
        call = stitch.chain(inside, calls, part.inputs, tuple(part.outputs))
        parts.append(Part(call, [names.get(node, node) for node in part.inputs], part.outputs))
    return parts


def moving_inputs(stack: Piece) -> list[int]:
    """Return the positions of the inputs that are not inputs of the whole graph, or are not tensors."""
    return [
        place for place, node in enumerate(stack.inputs)
        if node.op != "placeholder" or not isinstance(value_of(node), Tensor)
    ]  # fmt: skip


def _is_small(value: Any) -> bool:
    """Return whether a value, if a hidden state, is so small in the example that launch overhead matters."""
    return isinstance(value, Tensor) and (not value.is_floating_point() or symbolic.hint(value.numel()) <= SMALL)
