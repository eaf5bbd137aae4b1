"""``fastft.check``: does a model train as in eager, and what does fastft make of it?"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text
from torch import Tensor

from fastft.errors import describe
from fastft.rewriter.options import Options
from fastft.rewriter.report import by_layer, history, tables
from fastft.rewriter.report.advice import with_advice
from fastft.rewriter.report.data import GraphReport
from fastft.rewriter.report.graph_breaks import record_breaks
from fastft.rewriter.report.report import Report
from fastft.rewriter.trial import LOSS, TOLERANCES, WHOLE, Difference, Trial, compiled, farthest

log = logging.getLogger("fastft")
Batch = Mapping[str, Any] | Sequence[Any]  # a model's named arguments, or those without names
ALLOWED = TOLERANCES | {torch.float32: 1e-4}  # of a gradient


@dataclass
class Check:
    """A model's training step through fastft beside eager's.

    differences: of the loss and of each gradient, over all batches.  report: of all graphs, with the graph breaks, and
    the error that the model ended with.  first: how many of the graphs the first batch took.
    """

    differences: list[Difference]
    report: Report = field(repr=False)
    first: int

    @property
    def loss(self) -> Difference:
        """The loss that is farthest from eager's."""
        return _worst(one for one in self.differences if one.result == LOSS)

    @property
    def gradient(self) -> Difference:
        """The gradient that is farthest from eager's, with the parameter's name."""
        return _worst(one for one in self.differences if one.result != LOSS)

    @property
    def loss_difference(self) -> float:
        """How far the loss is from eager's, relative to it."""
        return self.loss.error

    @property
    def gradient_difference(self) -> float:
        """How far the farthest gradient is from eager's, relative to its norm."""
        return self.gradient.error

    @property
    def graphs(self) -> list[GraphReport]:
        """The graphs of the first batch."""
        return self.report.graphs[: self.first]

    @property
    def again(self) -> list[GraphReport]:
        """The graphs that other batches took besides."""
        return self.report.graphs[self.first :]

    @property
    def breaks(self) -> list[tuple[str, str]]:
        """Why Dynamo broke a graph, and at which ``file:line``."""
        return self.report.breaks

    @property
    def layers(self) -> list[tuple[str, str]]:
        """What was lifted in layers of each kind, and outside of them."""
        return by_layer.lifted_by_layer(self.graphs)

    @property
    def left(self) -> list[tuple[str, str, int]]:
        """What was nearly lifted: the op, the reason why it was not, and how often."""
        return by_layer.left_by_reason(self.graphs)

    @property
    def failures(self) -> list[str]:
        """What went wrong in fastft, in graphs that ran as they were."""
        return [graph.failure for graph in self.report.graphs if graph.failure]

    @property
    def right(self) -> bool:
        """Whether all is within what is allowed, and nothing failed."""
        return all(one.within for one in self.differences) and not self.failures and not self.report.stopped_by

    def __rich__(self) -> RenderableType:
        lines = (Text(line, no_wrap=True, overflow="ignore") for line in self._headline())  # a parameter's name is long
        return Group(*lines, *(tables.as_table(*table) for table in self.tables()))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue()

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=140, record=True)
        console.print(self)
        return console.export_html(inline_styles=True)

    def _headline(self) -> list[str]:
        again = f", and {len(self.again)} more for other lengths" if self.again else ""
        lines = [
            "Loss and gradients are as in eager." if self.right else "This is NOT as in eager.",
            f"  {self.loss}",
            f"  {self.gradient}",
            f"{tables.count(len(self.graphs), 'graph')}{again}, {tables.count(len(self.breaks), 'graph break')}\n",
        ]
        stopped = self.report.stopped_by
        return [*lines, f"The model failed with {stopped}\n"] if stopped else lines

    def tables(self) -> list[tuple[str, Sequence[str], list[Sequence[str]]]]:
        """Return title, columns and rows of all tables that have any."""
        graphs = self.graphs
        found: list[tuple[str, Sequence[str], list[Sequence[str]]]] = [
            (tables.BREAKS, ("at", "reason"), tables.breaks(self.report)),
            (tables.FAILURES, ("cause",), [(failure,) for failure in self.failures]),
            ("Graphs", ("graph", "of", "layers that share a region"), [
                (str(number), _place(graph), by_layer.regions_of(graph)) for number, graph in enumerate(graphs)
            ]),
            ("Lifted", ("layers", "ops"), [list(row) for row in self.layers]),
            ("Masks of attention", ("mask", "times"), [
                (tables.short(with_advice(mask)), str(times)) for mask, times in by_layer.masks_of(graphs)
            ]),
            ("Left as it was", ("op", "times", "reason"), [
                (op, str(times), tables.short(with_advice(reason))) for op, reason, times in self.left
            ]),
        ]  # fmt: skip
        return [table for table in found if table[2]]


def _place(graph: GraphReport) -> str:
    """Name the code that a graph is of, but for the function around the model."""
    return "the model" if graph.place.startswith(WHOLE) else tables.short(graph.place)


def check(
    model: Callable,
    /,
    *args: Any,
    then: Sequence[Batch] = (),
    options: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    tolerance: float | None = None,
    **batch: Any,
) -> Check:
    """Compare the loss and all gradients of ``model(*args, **batch)`` with eager's, and report what became of it.

    The model runs forward and backward from the same random state and buffers, in eager, in eager with weights a
    rounding apart, and through fastft; its gradients (``.grad``) are not touched.

    then: more batches, which the same compiled model is given; those of another length tell whether one graph serves
    for all.  options: of the backend; without any the rewritten graph runs without Inductor, which is quicker.  loss:
    makes a number of the model's result; without it its ``.loss`` is taken, or a weighted sum of all its tensors.
    tolerance: how far a gradient may be from eager's, as a share of its norm, and the loss by a tenth of that; in
    float32 it is 1e-4 if it is None, and what bisect allows in other dtypes.
    """
    batches = [(args, batch), *(((), one) if isinstance(one, Mapping) else (tuple(one), {}) for one in then)]
    trials = [Trial(model, *one, loss, tolerance, ALLOWED) for one in batches]
    chosen = Options.parse({"lower": "eager"} | dict(options or {}))
    differences: list[Difference] = []
    report, first = Report(), 0
    with history.recorded() as report.graphs, record_breaks(report.breaks), compiled(model, chosen) as call:
        for trial in trials:
            try:
                results = trial.run(call)
            except Exception as error:
                log.info("the compiled model failed", exc_info=True)
                report.stopped_by = describe(error)
                results = {}
            first = first or len(report.graphs)
            differences += _stricter_loss(trial.differences(results), trial.dtype)
    return Check(differences, report, first)


def _stricter_loss(differences: Sequence[Difference], dtype: torch.dtype) -> list[Difference]:
    """Allow the loss, a sum of all there is, a tenth of what gradients may differ by; not where it has 16 bits."""
    share = 1.0 if dtype.itemsize == 2 else 0.1
    return [replace(one, allowed=one.allowed * share) if one.result == LOSS else one for one in differences]


def _worst(differences: Iterable[Difference]) -> Difference:
    return farthest(list(differences)) or Difference("no gradient", 0.0, 0.0)
