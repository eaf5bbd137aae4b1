"""What sharding changes in lowering a graph: which parameters are gathered for which piece, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fastft.compat import fsdp
from fastft.compat.fsdp import Home
from fastft.rewriter.lowering.region import RegionCompiler
from fastft.rewriter.memory.simulate import StageSequence
from fastft.rewriter.outline.partition import Piece
from fastft.rewriter.runtime.sharded import Unit, units


class Sharding:
    """Which parameters are gathered for which piece of a graph.

    inputs: the graph's.  homes: by their place among these.  The units are known once memory was planned: the choices
    of a plan may differ between processes, so all gather for backward what any choice reads.  Without a plan it is not
    known what backward reads, and all that a piece reads is gathered for its backward too.
    """

    def __init__(
        self, pieces: Sequence[Piece], inputs: Sequence[Node], homes: Mapping[int, Home],
        regions: Mapping[Any, RegionCompiler],
    ) -> None:  # fmt: skip
        self.homes, self.place_of = homes, {node: place for place, node in enumerate(inputs)}
        self.pieces = pieces
        reads = [self._sharded(piece.inputs) for piece in pieces]
        trained = [regions[piece.key].trained for piece in pieces]
        self.units = units(reads, [read if any(trained) else [] for read in reads], homes)
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
        return sum(home.whole_bytes for home in read if home.is_given)

    def count(self, sequence: StageSequence) -> None:
        """Add to a plan's stages the bytes of what is gathered while they run: for them, and for the next on its way.

        Whole gradients are in memory until the stage before has run backward: once as they are made, once as they are
        sent.  A trained parameter's gradient stays as this process's part of it.  What FSDP2 has gathered before the
        graph stays until the last piece that reads it.
        """
        homes, stages = self.homes, sequence.stages
        saves = []
        for piece, stage in zip(self.pieces, stages, strict=True):
            joint = stage.kind.joint
            kept = {place for choice in stage.kind.choices for place in joint.saved_inputs(choice.ops)} if joint else ()
            saves.append(self._sharded([piece.inputs[place] for place in sorted(kept)]))
        self.units = units(self.reads, saves, homes)
        whole = {unit: sum(homes[place].whole_bytes for place in unit.places) for unit in self.units}
        given = {unit for unit in self.units if all(homes[place].is_given for place in unit.places)}
        sent = [0] * (len(stages) + 1)
        for unit in self.units:
            for home in (homes[place] for place in unit.places if homes[place].trained):
                last = max(unit.forward)
                stages[last].gradient_bytes += home.own_gradient_bytes - home.whole_bytes
                sent[last] += home.whole_bytes
        for number, stage in enumerate(stages):
            held = [
                unit for unit in self.units
                if not unit.forward.isdisjoint((number, number + 1)) or (unit in given and number < max(unit.forward))
            ]  # fmt: skip
            stage.gathered_forward = sum(whole[unit] for unit in held)
            if number == 0:  # FSDP2 has them twice when it gathers them
                stage.gathered_forward = max(stage.gathered_forward, 2 * sum(whole[unit] for unit in given))
            held = [unit for unit in self.units if not unit.backward.isdisjoint((number, number - 1))]
            stage.gathered_backward = sum(whole[unit] for unit in held) + sent[number] + sent[number + 1]
