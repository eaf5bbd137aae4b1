"""Choose with which rows of a batch a graph's layers run, and what attention is told of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fastft.compat import fake_tensors, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.compat.symbolic import Sizes
from fastft.kernels.attention_engines import AS_GIVEN, NO_RANGES
from fastft.rewriter.fx.effects import is_pure
from fastft.rewriter.report.data import RowsReport
from fastft.rewriter.rows import moves, prefixes, selection
from fastft.rewriter.rows.live_rows import LiveRows, Mask
from fastft.rewriter.rows.selection import Facts, Look, Ranges, Selection
from fastft.rewriter.runtime.cuda_graphs import Graphed
from fastft.rewriter.runtime.row_watch import Watch, on_host


class RowChoice:
    """Chooses the rows of one graph's batches.  graphed: the layers' CUDA graphs, if any."""

    def __init__(self, live: LiveRows, report: RowsReport, graphed: Graphed | None = None) -> None:
        self.live, self.report, self.watch = live, report, Watch(graphed)
        self.ranged = any(one is not None for mask in live.masks for one in (mask.own_start, mask.own_end))
        identified = any(one is not None for mask in live.masks for one in (mask.query_ids, mask.key_ids))
        self.unmasked = not self.ranged and not identified
        self.ends = [mask.end is not None for mask in live.masks]

    @torch.no_grad()
    def of(self, values: Mapping[Node, Any]) -> tuple[Selection | None, int]:
        """Return the live rows to go on with, None for all, and max_seqlen.  values: what is before the layers."""
        hidden = values[self.live.hidden]
        self.watch.meet(hidden)
        if not self.watch.waits(hidden):
            if self.watch.is_due():
                self.watch.note(self._look(values, hidden)[0].facts)
            return None, self.unlooked(hidden.shape[1])
        selected, max_seqlen = self._looked(values, hidden)
        rows = hidden.shape[0] * hidden.shape[1]
        self.watch.quiet = 0 if selected is not None else self.watch.quiet + 1
        self.report.add(rows, rows if selected is None else selected.live)
        return selected, max_seqlen

    def unlooked(self, length: int) -> int:
        """Return max_seqlen for a batch of sequences of this length of which nothing is known."""
        if self.unmasked:
            return length
        return AS_GIVEN if self.ranged else NO_RANGES

    def sizes(self, selected: Selection | None) -> Sizes:
        """Return the sizes that the layers meet, where they are not those of the batch."""
        if selected is None:
            return self._copied(0)
        copies = 0 if selected.copies is None else len(selected.copies)
        return moves.of_shape(self.live.sizes, 1, selected.size) | self._copied(copies)

    def _copied(self, count: int) -> Sizes:
        """Return the size of the copies that attention is given, where there may be any."""
        if self.live.copies is None:
            return {}
        return {symbolic.expression(value_of(self.live.copies).shape[0]): count}

    def _looked(self, values: Mapping[Node, Any], hidden: Tensor) -> tuple[Selection | None, int]:
        """Wait for what the batch holds, and choose."""
        B, S = hidden.shape[:2]
        looked, masks, owner = self._look(values, hidden)
        facts = Facts(*on_host(looked.facts).result())
        # All, where live rows are restricted by what ranges cannot tell.
        live = B * S if facts.strange or not facts.live else facts.live
        size = self.watch.size(hidden, live)
        if owner is not None and not facts.strange and 0 < facts.unique < facts.live:
            shared = self.watch.size(hidden, facts.unique)
            size = B * S if self.watch.in_graphs else size  # so that one size changes, and not two
            if shared < size and self.live.guards.hold(moves.of_shape(self.live.sizes, 1, shared) | self._copied(size)):
                longest = self.watch.longest(hidden, facts.longest)
                whole = selection.select(looked, facts, masks, self.ends, size, longest)
                chosen = prefixes.share(whole, looked, owner, facts, shared)
                return chosen, chosen.max_seqlen
        if size < B * S and self.live.guards.hold(moves.of_shape(self.live.sizes, 1, size)):
            longest = self.watch.longest(hidden, facts.longest)
            chosen = selection.select(looked, facts, masks, self.ends, size, longest)
            return chosen, chosen.max_seqlen
        plain = facts.plain(B * S, causal=all(mask.causal for mask in masks)) and not self.watch.is_small(hidden)
        return None, S if plain else self.unlooked(S)

    def _look(self, values: Mapping[Node, Any], hidden: Tensor) -> tuple[Look, list[Ranges], Tensor | None]:
        """Look at a batch; return its masks, and which sequence's rows are computed where rows may be shared."""
        B, S = hidden.shape[:2]
        masks = [_ranges(mask, values.__getitem__) for mask in self.live.masks]
        counted = None
        for labels, ignored in self.live.labels.items():
            counts = (values[labels] != ignored).view(B, S)
            counted = counts if counted is None else counted | counts
        looked = selection.look(counted, masks, hidden.device, B, S, by_labels=self.live.by_labels)
        if self.live.copies is None or not all(node in values for node in self.live.read):
            return looked, masks, None
        owner = prefixes.owners(looked, counted, masks, [values[node] for node in self.live.read])
        looked.facts = torch.cat((looked.facts, prefixes.unique(looked, owner).sum()[None]))
        return looked, masks, owner

    @torch.no_grad()
    def expected(self, gm: GraphModule, given: Mapping[Node, Any]) -> Sizes:
        """Return the sizes that the layers will meet in a first batch, as far as they are not those of the batch.

        given: the batch, by the graph's inputs.  Nothing is returned where it takes more than to read it.
        """
        read: list[Any] = [one for mask in self.live.masks for one in _ranges(mask, lambda node: node)]
        values = _computed(gm, [*(one for one in read if isinstance(one, Node)), *self.live.labels], given)
        if values is None:
            return {}
        example = value_of(self.live.hidden)
        shape = [symbolic.hint(size) for size in example.shape]
        hidden = torch.empty(1, device=example.device).expand(shape)  # no more is asked of it than shape and device
        selected, max_seqlen = self._looked(values, hidden)
        return self.sizes(selected) | {symbolic.expression(value_of(self.live.max_seqlen)): max_seqlen}


def _ranges(mask: Mask, value: Callable[[Any], Any]) -> Ranges:
    """Return what the model itself restricts an attention by.  value: returns that of a node."""
    given = lambda own, node: None if own is None else value(node)  # noqa: E731
    return Ranges(
        given(mask.own_start, mask.start), given(mask.own_end, mask.end), given(mask.query_ids, mask.query_ids),
        given(mask.key_ids, mask.key_ids), mask.causal, mask.window,
    )  # fmt: skip


def _computed(gm: GraphModule, wanted: Sequence[Node], given: Mapping[Node, Any]) -> dict[Node, Any] | None:
    """Compute some values of a graph, or return None where that would write, draw, or read what is not known."""
    needed: set[Node] = set()
    ahead = list(wanted)
    while ahead:
        if (node := ahead.pop()) not in needed:
            needed.add(node)
            ahead += node.all_input_nodes
    run = Interpreter(gm)
    for node in (one for one in gm.graph.nodes if one in needed):
        if node.op == "placeholder":
            if node not in given or fake_tensors.is_fake(given[node]):
                return None
            run.env[node] = symbolic.number(given[node]) if symbolic.is_symbolic(given[node]) else given[node]
        elif is_pure(node):
            run.env[node] = run.run_node(node)
        else:
            return None
    return run.env
