"""``fastft.bisect``: find the rule, and then the application, by which a model differs from eager.

A match that is declined is always legal, so any set of applications can be switched off (options={"disable": ...}).
The model is compiled with the first half of what was applied, then with half of the half at fault; first by rules, in
the order of the passes, then by applications of the rule at fault, in the order of the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastft.rewriter.attention import simplify
from fastft.rewriter.loss import losses
from fastft.rewriter.options import Options
from fastft.rewriter.passes import rule_names
from fastft.rewriter.report import history
from fastft.rewriter.report.data import GraphReport
from fastft.rewriter.rows import live_rows
from fastft.rewriter.trial import Difference, Trial, compiled

NOT_A_RULE = "what is left without any rule: regions, the memory plan or the compiler"


@dataclass(frozen=True)
class Application:
    """A place where a rule was applied: the module and the line that made what it took."""

    rule: str
    module: str
    source: str

    @property
    def name(self) -> str:
        """The name that ``options={"disable": ...}`` takes."""
        return f"{self.rule}@{self.module}"


@dataclass(frozen=True)
class Culprit:
    """What makes a model differ from eager.

    rule: its name, or NOT_A_RULE.  application: the first that suffices.  of: how many applications of the rule there
    are.  difference: how far the results are apart with it.
    """

    rule: str
    application: Application | None
    of: int
    difference: Difference

    def __str__(self) -> str:
        if self.application is None:
            return f"{self.rule}: {self.difference}"
        others = f", the first of {self.of} that suffices" if self.of > 1 else ""
        return (
            f"{self.rule} in {self.application.module or 'the model itself'} ({self.application.source}){others}: "
            f"{self.difference}.\nWithout it: options={{'disable': ['{self.rule}']}}"
        )


def bisect(
    model: Callable,
    /,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    tolerance: float | None = None,
    say: Callable[[str], None] = lambda text: None,
    **batch: Any,
) -> Culprit | None:
    """Find what makes ``model(*args, **batch)`` or its gradients differ from eager; None where nothing does.

    The model runs forward and backward a dozen times, each time from the same random state and buffers; its gradients
    (``.grad``) are not touched.

    options: of the backend; without any the rewritten graph runs without Inductor, which is quicker.  loss: makes a
    number of the model's result; without it its ``.loss`` is taken, or a weighted sum of all its tensors.  tolerance:
    how far a result may be from eager's, as a share of its norm; by dtype if it is None.  say: told of each trial.
    Raises ValueError for a model that does not repeat itself in eager.
    """
    chosen = replace(Options.parse({"lower": "eager"} | dict(options or {})), strict=True)
    trial = Trial(model, args, batch, loss, tolerance)
    if (noise := trial.compare(trial.run(model))) is not None:
        raise ValueError(f"the model does not repeat itself in eager, so there is nothing to compare with: {noise}.")
    graphs: list[GraphReport] = []
    found = _with_options(trial, chosen, graphs)
    say(f"with all rules: {found or 'as eager'}")
    if found is None:
        return None
    applications = list(_applications(graphs))
    rules = tuple(dict.fromkeys(application.rule for application in applications))

    @functools.cache  # the last trial is asked for again
    def difference(enabled: tuple[str, ...], without: tuple[str, ...] = ()) -> Difference | None:
        """Compare with these rules alone, without some of their applications."""
        disabled = [name for name in rule_names() if name not in enabled]
        result = _with_options(trial, replace(chosen, disable=(*chosen.disable, *disabled, *without)))
        say(f"with {len(enabled)} of {len(rules)} rules, {len(without)} applications left out: {result or 'as eager'}")
        return result

    if (bare := difference(())) is not None:
        return Culprit(NOT_A_RULE, None, 0, bare)
    count = _first(len(rules), lambda count: difference(rules[:count]) is not None)
    places = [application for application in applications if application.rule == rules[count - 1]]
    names = tuple(dict.fromkeys(application.name for application in places))
    first = _first(len(names), lambda first: difference(rules[:count], names[first:]) is not None)
    application = next(application for application in places if application.name == names[first - 1])
    return Culprit(application.rule, application, len(places), difference(rules[:count], names[first:]) or found)


def _with_options(trial: Trial, options: Options, graphs: list[GraphReport] | None = None) -> Difference | None:
    """Compare the model as it is compiled with these options; the reports of its graphs are added to graphs."""
    with history.recorded() as reports, compiled(trial.model, options) as call:
        results = trial.run(call)
    if graphs is not None:
        graphs += reports
    return trial.compare(results)


def _first(length: int, bad: Callable[[int], bool]) -> int:
    """Find the least count from 1 to length that is bad, where length is known to be and 0 is known not to be."""
    good, least = 0, length
    while least - good > 1:
        middle = (good + least) // 2
        good, least = (good, middle) if bad(middle) else (middle, least)
    return least


def _applications(graphs: Sequence[GraphReport]) -> Iterator[Application]:
    """Iterate over what was applied to these graphs: what others are made of comes before them."""
    for kind in ("lifted", "fused"):
        for lifted in (lifted for graph in graphs for lifted in getattr(graph, kind)):
            yield Application(lifted.rule, lifted.module, lifted.source)
    for graph in graphs:
        for mask in graph.masks:
            yield Application(simplify.RULE, mask.module, mask.source)
        for module in graph.deferred:
            yield Application(losses.LAZY, module, "its logits are computed when they are read")
        if graph.rows is not None and not graph.rows.reason:
            yield Application(live_rows.RULE, "", str(graph.rows))
