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

from fastft.compat import symbolic
from fastft.compat.fake_tensors import value_of
from fastft.compat.symbolic import Sizes
from fastft.reasons import Declined
from fastft.rewriter.report.data import RowsReport
from fastft.rewriter.rows import selection
from fastft.rewriter.rows.live_rows import LiveRows, Mask
from fastft.rewriter.rows.proof import RowSizes
from fastft.rewriter.rows.selection import Facts, Ranges, Selection
from fastft.rewriter.runtime.row_watch import Watch, on_host

Restore = Callable[[Any, Selection, tuple[int, int]], Any]
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
    is then to be run for all rows again, if anything.
    """

    def __init__(
        self, live: LiveRows, before: Part, among: Part, rest: Part | None, outputs: Sequence[Any], report: RowsReport
    ) -> None:
        self.live, self.report = live, report
        self.before, self.among, self.rest, self.outputs = before, among, rest, list(outputs)
        self.watch = Watch()
        self.unmasked = all(
            one is None for mask in live.masks
            for one in (mask.own_start, mask.own_end, mask.query_ids, mask.key_ids)
        )  # fmt: skip
        self.ends = [mask.end is not None for mask in live.masks]
        self.as_ranges: dict[Node | None, tuple[int, int]] = {}  # what becomes the start or end of which mask
        for number, mask in enumerate(live.masks):
            self.as_ranges |= {mask.start: (number, 0), mask.end: (number, 1)}
        self.takes: list[Callable[[Any, Selection], Any]] = []
        self.restores: dict[Node, Restore] = {}
        try:
            self.takes = [self._take(node) for node in among.taken]
            for node in among.made:
                if (restore := _restoring(value_of(node), live.sizes)) is not None:
                    self.restores[node] = restore
        except Declined as declined:
            self.report.reason = declined.reason

    def __call__(self, *inputs: Any) -> Any:
        return self.finish(self.begin(inputs))

    def begin(self, inputs: Sequence[Any]) -> Started:
        """Run what comes before the layers, and choose which rows go on."""
        values = dict(zip(self.before.taken, inputs, strict=True))
        values |= self.before(values)
        looks = not self.report.reason and torch.is_grad_enabled() and not _capturing(inputs)
        selected, max_seqlen = self._choose(values) if looks else (None, self._unlooked(values))
        return Started(values, selected, max_seqlen)

    def sizes(self, started: Started) -> Sizes:
        """Return the sizes that differ from those of the graph's inputs."""
        return {} if started.selected is None else _sizes_of(self.live.sizes, 1, started.selected.size)

    def finish(self, started: Started) -> tuple[Any, ...]:
        """Run the layers and what follows."""
        values, selected = started.values | {self.live.max_seqlen: started.max_seqlen}, started.selected
        given = values
        if selected is not None:
            pairs = zip(self.takes, self.among.taken, strict=True)
            given = {node: take(values[node], selected) for take, node in pairs}
        found = self.among(given)
        if selected is not None:
            B, S = values[self.live.hidden].shape[:2]
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
        if not self.watch.waits(hidden):
            if self.watch.is_due():
                self.watch.note(self._look(values, masks, hidden).facts)
            return None, self._unlooked(values)
        looked = self._look(values, masks, hidden)
        facts = Facts(*on_host(looked.facts).result())
        live = self._computed(facts, B * S)
        pays = selection.rounded(live) < B * S * self.watch.least_saving(hidden)
        pays = pays and self.live.guards.hold(_sizes_of(self.live.sizes, 1, selection.rounded(live)))
        self.watch.quiet = 0 if pays else self.watch.quiet + 1
        self.report.add(B * S, live if pays else B * S)
        if pays:
            chosen = selection.select(looked, facts, masks, self.ends)
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
        for labels, ignored in self.live.labels:
            counts = (values[labels] != ignored).view(B, S)
            counted = counts if counted is None else counted | counts
        return selection.look(counted, masks, hidden.device, B, S, by_labels=self.live.by_labels)

    def _computed(self, facts: Facts, rows: int) -> int:
        """Return how many rows have to be computed: all where live ones are restricted by what ranges cannot tell."""
        return rows if facts.strange or not facts.live else facts.live

    def _take(self, node: Node) -> Callable[[Any, Selection], Any]:
        """Return how a value of the whole batch becomes one of live rows.  Raises Declined."""
        value, sizes = value_of(node), self.live.sizes
        if node is self.live.max_seqlen:
            return lambda given, selected: selected.max_seqlen
        if node in self.as_ranges:
            number, place = self.as_ranges[node]
            return lambda given, selected: selected.ranges[number][place]
        if isinstance(value, torch.SymInt):
            return _take_size(symbolic.expression(value), sizes)
        ignored = dict(self.live.labels).get(node)
        if ignored is not None:
            flat = "bs" in sizes.axes(value) or value.dim() == 1
            return lambda given, selected: _take_labels(given, selected, ignored, flat=flat)
        if not isinstance(value, Tensor):
            return lambda given, selected: given
        axes = sizes.axes(value)
        one_sequence = sizes.batch == 1 and axes[:2] == ["", "s"] and symbolic.expression(value.shape[0]) == 1
        by_rows = axes[:2] == ["b", "s"] or one_sequence or axes[:1] == ["bs"]
        if by_rows and (any(axes[2:]) or axes[1:2] == ["bs"] or not value.is_contiguous()):
            raise Declined(f"{node.name} is laid out in another way than by rows")
        if axes[:2] == ["b", "s"] or one_sequence:
            return lambda given, selected: _Taken.apply(given.flatten(0, 1), selected.rows, selected.live)[None]
        if axes[:1] == ["bs"]:
            return lambda given, selected: _Taken.apply(given, selected.rows, selected.live)
        if "b" not in axes and "bs" not in axes:
            if axes.count("s") == 1 and not value.requires_grad:
                return _take_places(value, axes.index("s"))
            if "s" not in axes:
                return lambda given, selected: given
        raise Declined(f"{node.name} has rows in axes of its own")


def _sizes_of(sizes: RowSizes, *shape: int) -> Sizes:
    """Return the values of the symbols of a batch's sizes for such a batch."""
    return {symbol: number for symbol, number in zip(sizes, shape, strict=True) if symbol != 1}


def _take_size(expression: Any, sizes: RowSizes) -> Callable[[Any, Selection], Any]:
    if not sizes.depends(expression):
        return lambda given, selected: given

    def size(given: int, selected: Selection) -> int:
        return symbolic.evaluate(expression, _sizes_of(sizes, 1, selected.size))

    return size


def _take_labels(labels: Tensor, selected: Selection, ignored: int, *, flat: bool) -> Tensor:
    """Take labels, and none for the copies that were added: [N], or [1, N] where these are not flat."""
    taken = labels.flatten().index_select(0, selected.rows)
    taken[selected.live :] = ignored
    return taken if flat else taken[None]


def _take_places(value: Tensor, axis: int) -> Callable[[Any, Selection], Any]:
    """Return how what is the same for all sequences is taken, laid out in memory as it was.  Raises Declined."""
    strides = [symbolic.hint(stride) for stride in value.stride()]
    if any(stride == 0 and symbolic.hint(size) > 1 for stride, size in zip(strides, value.shape, strict=True)):
        raise Declined("what is the same for all sequences is repeated in memory")
    order = sorted(range(value.dim()), key=lambda dim: -strides[dim])
    back = sorted(range(value.dim()), key=order.__getitem__)
    place = order.index(axis)
    return lambda given, selected: given.permute(order).index_select(place, selected.places).permute(back)


def _restoring(value: Any, sizes: RowSizes) -> Restore | None:
    """Return how what was computed of live rows becomes what it is of the whole batch; None for what is the same.

    Raises Declined.
    """
    if isinstance(value, torch.SymInt) and sizes.depends(expression := symbolic.expression(value)):
        return lambda part, selected, shape: symbolic.evaluate(expression, _sizes_of(sizes, *shape))
    if not isinstance(value, Tensor) or not any(axes := sizes.axes(value)):
        return None

    def whole(part: Tensor, selected: Selection, shape: tuple[int, int]) -> Tensor:
        return _Restored.apply(part, selected.rows, selected.live, shape[0] * shape[1])

    first = ["b"] if sizes.batch != 1 else [""]
    one = sizes.batch != 1 or symbolic.expression(value.shape[0]) == 1
    if axes[0] == "bs" and not any(axes[1:]) and value.is_contiguous():
        return whole
    if one and axes[:2] == [*first, "s"] and not any(axes[2:]) and value.is_contiguous():
        return lambda part, selected, shape: whole(part[0], selected, shape).unflatten(0, shape)
    if one and axes == [*first, "", "s", ""]:  # keys and values, by heads
        turned = lambda tensor: tensor.transpose(1, 2)  # noqa: E731
        return lambda part, selected, shape: turned(whole(turned(part)[0], selected, shape).unflatten(0, shape))
    raise Declined("what leaves the graph has rows in axes of its own")


class _Taken(torch.autograd.Function):
    """Take rows [M, ...] of which the first ``live`` are all different, and the others not to be trained."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, rows: Tensor, live: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.live, ctx.shape = live, whole.shape
        return whole.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy(0, rows[: ctx.live], grad[: ctx.live]), None, None


class _Restored(torch.autograd.Function):
    """Put the first ``live`` rows back into their places of M, beside zeros."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: Tensor, live: int, M: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.live = live
        return part.new_zeros(M, *part.shape[1:]).index_copy_(0, rows[:live], part[:live])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        taken = grad.index_select(0, rows)
        added = torch.arange(len(rows), device=rows.device) >= ctx.live
        return taken.masked_fill(added.view(-1, *[1] * (grad.dim() - 1)), 0.0), None, None, None


def _capturing(inputs: Sequence[Any]) -> bool:
    on_gpu = any(isinstance(value, Tensor) and value.device.type == "cuda" for value in inputs)
    return on_gpu and torch.cuda.is_current_stream_capturing()
