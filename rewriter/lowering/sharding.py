"""What sharding changes in lowering a graph: which parameters are gathered for which piece, and what that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fastft.compat import fsdp
from fastft.compat.fsdp import Home
from fastft.rewriter.lowering.region import RegionCompiler
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.memory.simulate import Kind, StageSequence
from fastft.rewriter.outline.partition import Piece
from fastft.rewriter.runtime.sharded import Unit, units


class Sharding:
    """Which parameters are gathered for which piece of a graph.

    inputs: the graph's.  homes: by their place among these.  The units are known once memory was planned: the choices
    of a plan may differ between processes, so all gather for backward what any choice reads.  Without a plan it is not
    known what backward reads, and all that a piece reads is gathered for its backward too.  taken: tells of which
    groups the graph is all that there is from forward to backward, so that it may let go of what FSDP2 has gathered.
    """

    def __init__(
        self, pieces: Sequence[Piece], inputs: Sequence[Node], homes: Mapping[int, Home],
        regions: Mapping[Any, RegionCompiler], taken: Callable[[Any], bool] = lambda home: False,
    ) -> None:  # fmt: skip
        self.taken = taken
        self.homes, self.place_of = homes, {node: place for place, node in enumerate(inputs)}
        self.pieces = pieces
        reads = [self._sharded(piece.inputs) for piece in pieces]
        trained = [regions[piece.key].trained for piece in pieces]
        self.units = units(reads, [read if any(trained) else [] for read in reads], homes, taken)
        self.reads = reads

    def _sharded(self, nodes: Sequence[Node]) -> list[int]:
        places = [self.place_of[node] for node in nodes if node in self.place_of]
        return [place for place in places if place in self.homes]

    def account(self, sequence: StageSequence, device: torch.device) -> int:
        """Add to a plan's stages what is gathered for them.

        Returns the bytes of whole parameters among those that are counted as held before the step: all that the graph
        reads on a CPU, where the graph's inputs are counted, else what FSDP2 has gathered so far.
        """
        self.count(sequence)
        for root in {home.root for home in self.homes.values()}:
            fsdp.begin(root)
        read = [self.homes[place] for place in {place for places in self.reads for place in places}]
        if device.type != "cuda":
            return sum(home.whole_bytes - home.own_bytes for home in read)
        return sum(home.whole_bytes for home in read if home.is_given and self.taken(home))

    def count(self, sequence: StageSequence) -> None:
        """Add to a plan's stages the bytes of what is gathered while they run: for them, and for the next on its way.

        Whole gradients are in memory until the stage before has run backward: once as they are made, once as they are
        sent.  A trained parameter's gradient stays as this process's part of it.  What FSDP2 has gathered before the
        graph stays until the last piece that reads it.
        """
        homes, stages = self.homes, sequence.stages
        for piece, stage in zip(self.pieces, stages, strict=True):
            self._leave_out_choices(piece, stage.kind)
        saves = [
            self._saved(piece, stage.kind, stage.kind.choices[0]) if stage.kind.joint is not None else read
            for piece, stage, read in zip(self.pieces, stages, self.reads, strict=True)
        ]
        self.units = units(self.reads, saves, homes, self.taken)
        whole = {unit: sum(homes[place].whole_bytes for place in unit.places) for unit in self.units}
        given = {unit for unit in self.units if all(homes[place].is_given for place in unit.places)}
        whole |= {unit: 0 for unit in given if not unit.taken}  # held before, and behind
        sent = [0] * (len(stages) + 1)
        for unit in self.units:
            for home in (homes[place] for place in unit.places if homes[place].trained):
                last = max(unit.forward)
                stages[last].gradient_bytes += home.own_gradient_bytes - home.whole_bytes
                sent[last] += home.whole_bytes
        come = {unit: 0 if unit in given else size for unit, size in whole.items()}
        for number, stage in enumerate(stages):
            there = sum(whole[unit] for unit in given if number <= max(unit.forward))
            stage.gathered_forward = there + self._most(come, lambda unit: unit.forward, number, number + 1)
            if number == 0:  # FSDP2 has them twice when it gathers them
                stage.gathered_forward = max(stage.gathered_forward, 2 * there)
            stage.gathered_backward = self._most(whole, lambda unit: unit.backward, number, number - 1)
            stage.gathered_backward += sent[number] + sent[number + 1]

    def moved(self, number: int) -> tuple[int, int]:
        """Return the whole bytes of what is gathered for a piece forward, and gathered and reduced for its backward."""
        sizes = {unit: sum(self.homes[place].whole_bytes for place in unit.places) for unit in self.units}
        forward = sum(size for unit, size in sizes.items() if number in unit.forward)
        backward = sum(size for unit, size in sizes.items() if number in unit.backward)
        trained = [self.homes[place] for unit in self.units if unit.trained == number for place in unit.places]
        return forward, backward + sum(home.whole_bytes for home in trained if home.trained)

    def _most(
        self, size: Mapping[Unit, int], readers: Callable[[Unit], frozenset[int]], now: int, then: int
    ) -> int:  # fmt: skip
        """Return the bytes of a piece's units: with those of the next, or twice, while they are put in place."""
        read = [unit for unit in self.units if now in readers(unit)]
        coming = [unit for unit in self.units if then in readers(unit) and unit not in read]
        twice = sum(size[unit] for unit in read if len(unit.places) > 1)
        return sum(size[unit] for unit in read) + max(twice, sum(size[unit] for unit in coming))

    def _saved(self, piece: Piece, kind: Kind, choice: Choice) -> list[int]:
        """Return the sharded inputs of the graph that a piece's backward reads with a choice."""
        assert kind.joint is not None
        return self._sharded([piece.inputs[place] for place in sorted(set(kind.joint.saved_inputs(choice.ops)))])

    def _leave_out_choices(self, piece: Piece, kind: Kind) -> None:
        """Leave out choices that compute again what needs parameters that backward does without, such as a head's."""
        if kind.joint is not None:
            needed = set(self._saved(piece, kind, kind.choices[0]))
            kind.choices = [choice for choice in kind.choices if needed.issuperset(self._saved(piece, kind, choice))]
