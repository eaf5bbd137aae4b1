"""Run a graph's layers with the live rows of a batch alone, where some are not: rows/live_rows.py prepared it for that.

What comes before the layers runs for the whole batch.  Then the batch is looked at (rows/selection.py), and a few
numbers are copied to the host: the one wait of a step.  Rows that are not live are left out of everything that follows,
and are zeros in what leaves the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastft.compat.fake_tensors import value_of
from fastft.compat.symbolic import Sizes
from fastft.rewriter.report.data import RowsReport
from fastft.rewriter.rows import moves, selection
from fastft.rewriter.rows.live_rows import LiveRows, Mask
from fastft.rewriter.rows.moves import Take
from fastft.rewriter.rows.selection import Facts, Ranges, Selection
from fastft.rewriter.runtime.cuda_graphs import Graphed
from fastft.rewriter.runtime.row_watch import Watch, on_host

AS_GIVEN = 0  # max_seqlen that has attention read all ranges and ids


@dataclass
class Started:
    """A forward up to the first layer.  values: by node.  selected: the live rows; None where all are run."""

    values: dict[Node, Any]
    selected: Selection | None
    max_seqlen: int


@dataclass(frozen=True)
class Part:
    """A part of the graph: a function of the values of ``taken`` that returns those of ``made``."""

    run: Callable
    taken: Sequence[Node]
    made: Sequence[Node]

    def __call__(self, values: dict[Node, Any]) -> dict[Node, Any]:
        """Run it on these values, and return what it makes."""
        return dict(zip(self.made, self.run(*map(values.__getitem__, self.taken)), strict=True))


class LiveRun:
    """A function of the graph's inputs, that of the user.

    before: runs what comes before the layers, for all rows.  among: runs the layers and what follows.  rest: runs what
    is then to be run for all rows again, if anything.  graphed: the layers' CUDA graphs, if any.
    """

    def __init__(
        self, live: LiveRows, before: Part, among: Part, rest: Part | None, outputs: Sequence[Any], report: RowsReport,
        graphed: Graphed | None = None,
    ) -> None:  # fmt: skip
        self.live, self.report = live, report
        self.before, self.among, self.rest, self.outputs = before, among, rest, list(outputs)
        read = (*self.outputs, *(rest.taken if rest is not None else ()))
        self.read_later = {one for one in read if isinstance(one, Node)}
        self.watch = Watch(graphed)
        self.unmasked = all(
            one is None for mask in live.masks
            for one in (mask.own_start, mask.own_end, mask.query_ids, mask.key_ids)
        )  # fmt: skip
        self.ends = [mask.end is not None for mask in live.masks]
        self.as_ranges: dict[Node | None, tuple[int, int]] = {}  # what becomes the start or end of which mask
        for number, mask in enumerate(live.masks):
            self.as_ranges |= {mask.start: (number, 0), mask.end: (number, 1)}
        self.takes = [self._taker(node) for node in among.taken]
        restores = {node: moves.restorer(value_of(node), live.sizes) for node in among.made}
        self.restores = {node: restore for node, restore in restores.items() if restore is not None}

    def __call__(self, *inputs: Any) -> Any:
        return self.finish(self.begin(inputs))

    def begin(self, inputs: Sequence[Any]) -> Started:
        """Run what comes before the layers, and choose which rows go on."""
        values = dict(zip(self.before.taken, inputs, strict=True))
        values |= self.before(values)
        looks = torch.is_grad_enabled() and not _capturing(inputs)
        selected, max_seqlen = self._choose(values) if looks else (None, self._unlooked(values))
        return Started(values, selected, max_seqlen)

    def sizes(self, started: Started) -> Sizes:
        """Return the sizes that differ from those of the graph's inputs."""
        return {} if started.selected is None else moves.of_shape(self.live.sizes, 1, started.selected.size)

    def finish(self, started: Started) -> tuple[Any, ...]:
        """Run the layers and what follows, once, as values that only they need are let go of where rows are taken."""
        values, selected = started.values | {self.live.max_seqlen: started.max_seqlen}, started.selected
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
            values |= self.rest(values | {self.live.max_seqlen: AS_GIVEN})
        return tuple(values[one] if isinstance(one, Node) else one for one in self.outputs)

    def _unlooked(self, values: dict[Node, Any]) -> int:
        """Return max_seqlen for a batch of which nothing is known."""
        return values[self.live.hidden].shape[1] if self.unmasked else AS_GIVEN

    @torch.no_grad()
    def _choose(self, values: dict[Node, Any]) -> tuple[Selection | None, int]:
        """Return the live rows to go on with, None for all, and max_seqlen."""
        hidden = values[self.live.hidden]
        B, S = hidden.shape[:2]
        masks = [self._ranges(mask, values) for mask in self.live.masks]
        self.watch.meet(hidden)
        if not self.watch.waits(hidden):
            if self.watch.is_due():
                self.watch.note(self._look(values, masks, hidden).facts)
            return None, self._unlooked(values)
        looked = self._look(values, masks, hidden)
        facts = Facts(*on_host(looked.facts).result())
        live = self._computed(facts, B * S)
        size = self.watch.size(hidden, live)
        pays = size < B * S and self.live.guards.hold(moves.of_shape(self.live.sizes, 1, size))
        self.watch.quiet = 0 if pays else self.watch.quiet + 1
        self.report.add(B * S, live if pays else B * S)
        if pays:
            longest = self.watch.longest(hidden, facts.longest)
            chosen = selection.select(looked, facts, masks, self.ends, size, longest)
            return chosen, chosen.max_seqlen
        plain = facts.plain(B * S, causal=all(mask.causal for mask in masks)) and not self.watch.is_small(hidden)
        return None, S if plain else self._unlooked(values)

    def _ranges(self, mask: Mask, values: dict[Node, Any]) -> Ranges:
        """Return what the model itself restricts an attention by."""
        given = lambda own, node: None if own is None else values[node]  # noqa: E731
        return Ranges(
            given(mask.own_start, mask.start), given(mask.own_end, mask.end), given(mask.query_ids, mask.query_ids),
            given(mask.key_ids, mask.key_ids), mask.causal, mask.window,
        )  # fmt: skip

    def _look(self, values: dict[Node, Any], masks: Sequence[Ranges], hidden: Tensor) -> selection.Look:
        B, S = hidden.shape[:2]
        counted = None
        for labels, ignored in self.live.labels.items():
            counts = (values[labels] != ignored).view(B, S)
            counted = counts if counted is None else counted | counts
        return selection.look(counted, masks, hidden.device, B, S, by_labels=self.live.by_labels)

    def _computed(self, facts: Facts, rows: int) -> int:
        """Return how many rows have to be computed: all where live ones are restricted by what ranges cannot tell."""
        return rows if facts.strange or not facts.live else facts.live

    def _taker(self, node: Node) -> Take:
        """Return how what the layers read becomes what they read of live rows."""
        if node is self.live.max_seqlen:
            return lambda given, selected: selected.max_seqlen
        if node in self.as_ranges:
            number, place = self.as_ranges[node]
            return lambda given, selected: selected.ranges[number][place]
        return moves.taker(node, self.live.sizes, self.live.labels)


def _capturing(inputs: Sequence[Any]) -> bool:
    on_gpu = any(isinstance(value, Tensor) and value.device.type == "cuda" for value in inputs)
    return on_gpu and torch.cuda.is_current_stream_capturing()
