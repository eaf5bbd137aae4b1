"""A region: one kind of piece as a graph of its own, traced for a plan and compiled in the variants that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import aot, dynamo, fake_tensors, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.lowering.inductor import compile_graph
from fastft.rewriter.memory.joint_graph import Joint
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.memory.partitioner import JointGraphCapture, Partitioner
from fastft.rewriter.options import Options
from fastft.rewriter.outline import stitch
from fastft.rewriter.outline.partition import Piece


class RegionCompiler:
    """Compiles one kind of piece, even after Dynamo has dropped the graph that it is from.

    given: Dynamo's example inputs by the graph's placeholders.
    """

    def __init__(self, gm: GraphModule, piece: Piece, given: Mapping[Node, Any], options: Options) -> None:
        self.options, self.name = options, piece.module or "the rest"
        self.part = stitch.extract(gm, piece)
        with aot.isolated_tracing_context(given.values()) as mode:
            self.inputs = stitch.example_inputs(piece, given, mode)
        values = [tensor for node in piece.outputs for tensor in fake_tensors.tensors_in(value_of(node))]
        asked = [tensor for tensor in self.inputs if isinstance(tensor, Tensor) and tensor.requires_grad]
        self.exact_strides = any(map(_may_be_padded, piece.passed_on))
        self.trained = bool(asked) and any(value.requires_grad for value in values)
        self.capture: JointGraphCapture | None = None

    def trace(self) -> None:
        """Capture the joint graph of forward and backward, if a result needs a gradient."""
        if self.trained:
            capture = JointGraphCapture()
            try:
                self._compile(capture)
            except Exception:  # the capture ends the compilation by raising
                if capture.joint is None:
                    raise
            self.capture = capture

    def compile(self, kept: tuple[str, ...] = ()) -> Callable:
        """Compile a function of the piece's inputs.

        kept: the ops whose results forward saves for backward; without a joint graph, torch's partitioner decides.
        """
        return self._compile(Partitioner(kept) if self.capture is not None else None)

    def _compile(self, partitioner: aot.CustomPartitionerFn | None) -> Callable:
        part = GraphModule(self.part, dynamo.copy_graph(self.part.graph))
        with aot.isolated_tracing_context(self.inputs):
            return compile_graph(
                dynamo.inherit_capture_metadata(part, self.part), self.inputs, self.options, partitioner,
                exact_strides=self.exact_strides,
            )  # fmt: skip

    def saved_places(self, joint: Joint | None) -> Callable[[Choice], frozenset[int]]:
        """Return a function that gives the positions of a choice's offloaded tensors among all that autograd saves."""

        def find(choice: Choice) -> frozenset[int]:
            assert self.capture is not None
            assert joint is not None
            going = [number for number, storage in enumerate(joint.storages) if storage.name in choice.offloaded]
            names = {joint.nodes[number] for number in going if number in joint.nodes}
            return frozenset(place for place, name in enumerate(self.capture.saved(choice.kept)) if name in names)

        return find


def _may_be_padded(node: Node) -> bool:
    """Tell whether Inductor may compute this with wider rows: those of products that are no multiple of 16 bytes."""
    value = value_of(node)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
        return False
    return not symbolic.statically_known_true(value.shape[-1] * value.dtype.itemsize % 16 == 0)


def by_kind(pieces: Sequence[Piece]) -> dict[Any, list[Piece]]:
    """Group pieces by kind, kinds in the order in which they first occur."""
    kinds: dict[Any, list[Piece]] = {}
    for piece in pieces:
        kinds.setdefault(piece.key, []).append(piece)
    return kinds
