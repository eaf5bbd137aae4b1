"""Run a graph's layers with the live rows of a batch alone, where some are not: rows/live_rows.py prepared it for that.

What comes before the layers runs for the whole batch.  Then the batch is looked at (rows/selection.py), and a few
numbers are copied to the host: the one wait of a step.  Rows that are not live are left out of everything that follows,
and are zeros in what leaves the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastft.compat.fake_tensors import value_of
from fastft.compat.symbolic import Sizes
from fastft.rewriter.rows import moves
from fastft.rewriter.rows.moves import Take
from fastft.rewriter.rows.selection import Selection
from fastft.rewriter.runtime.part import Part
from fastft.rewriter.runtime.row_choice import RowChoice


@dataclass
class Started:
    """A forward up to the first layer.  values: by node.  selected: the live rows; None where all are run."""

    values: dict[Node, Any]
    selected: Selection | None
    max_seqlen: int


class LiveRun:
    """A function of the graph's inputs, that of the user.

    before: runs what comes before the layers, for all rows.  among: runs the layers and what follows.  rest: runs what
    is then to be run for all rows again, if anything.
    """

    def __init__(self, choice: RowChoice, before: Part, among: Part, rest: Part | None, outputs: Sequence[Any]) -> None:
        self.choice, self.live = choice, choice.live
        self.before, self.among, self.rest, self.outputs = before, among, rest, list(outputs)
        read = (*self.outputs, *(rest.taken if rest is not None else ()))
        self.read_later = {one for one in read if isinstance(one, Node)}
        self.as_ranges: dict[Node | None, tuple[int, int]] = {}  # what becomes the start or end of which mask
        for number, mask in enumerate(self.live.masks):
            self.as_ranges |= {mask.start: (number, 0), mask.end: (number, 1)}
        self.takes = [self._taker(node) for node in among.taken]
        restores = {node: moves.restorer(value_of(node), self.live.sizes) for node in among.made}
        self.restores = {node: restore for node, restore in restores.items() if restore is not None}

    def __call__(self, *inputs: Any) -> Any:
        return self.finish(self.begin(inputs))

    def begin(self, inputs: Sequence[Any]) -> Started:
        """Run what comes before the layers, and choose which rows go on."""
        values = dict(zip(self.before.taken, inputs, strict=True))
        values |= self.before(values)
        if not _capturing(inputs):
            return Started(values, *self.choice.of(values))
        return Started(values, None, self.choice.unlooked(values[self.live.hidden].shape[1]))

    def sizes(self, started: Started) -> Sizes:
        """Return the sizes that differ from those of the graph's inputs."""
        return self.choice.sizes(started.selected)

    def finish(self, started: Started) -> tuple[Any, ...]:
        """Run the layers and what follows, once, as values that only they need are let go of where rows are taken."""
        values, selected = started.values | {self.live.max_seqlen: started.max_seqlen}, started.selected
        if self.live.copies is not None:
            values[self.live.copies] = self.live.no_copies()[0]
        given = values
        B, S = values[self.live.hidden].shape[:2]
        if selected is not None:
            pairs = zip(self.takes, self.among.taken, strict=True)
            given = {node: take(values[node], selected) for take, node in pairs}
            started.values.clear()
            values = {node: value for node, value in values.items() if node in self.read_later}
        found = self.among(given)
        if selected is not None:
            found |= {node: restore(found[node], selected, (B, S)) for node, restore in self.restores.items()}
        values = values | found
        if self.rest is not None:
            values |= self.rest(values | {self.live.max_seqlen: self.choice.unlooked(S)})
        return tuple(values[one] if isinstance(one, Node) else one for one in self.outputs)

    def _taker(self, node: Node) -> Take:
        """Return how what the layers read becomes what they read of live rows."""
        if node is self.live.max_seqlen:
            return lambda given, selected: selected.max_seqlen
        if node is self.live.copies:
            return lambda given, selected: given if selected.copies is None else selected.copies
        if node in self.as_ranges:
            number, place = self.as_ranges[node]
            return lambda given, selected: selected.ranges[number][place]
        return moves.taker(node, self.live.sizes, self.live.labels)


def _capturing(inputs: Sequence[Any]) -> bool:
    on_gpu = any(isinstance(value, Tensor) and value.device.type == "cuda" for value in inputs)
    return on_gpu and torch.cuda.is_current_stream_capturing()
