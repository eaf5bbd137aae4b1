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

import torch
from torch import Tensor, nn

from fastft.compat import dynamo
from fastft.compat.fake_tensors import tensors_in
from fastft.rewriter.attention import simplify
from fastft.rewriter.backend import fastft
from fastft.rewriter.explain import unchanged
from fastft.rewriter.loss import losses
from fastft.rewriter.options import Options
from fastft.rewriter.passes import rule_names
from fastft.rewriter.report import history
from fastft.rewriter.report.data import GraphReport
from fastft.rewriter.rows import live_rows

# Of a result's own norm: what sums in another order may change it by, in training of a few layers.
TOLERANCES = {torch.float16: 0.02, torch.bfloat16: 0.05, torch.float32: 1e-3, torch.float64: 1e-6}
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
class Difference:
    """The result that differs most from eager's, relative to its norm."""

    result: str
    error: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.result} differs by {self.error:.2g} of its norm, where {self.allowed:.2g} is allowed"


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
    trial = _Trial(model, args, batch, loss, tolerance)
    if (noise := trial.compare(trial.run(None))) is not None:
        raise ValueError(f"the model does not repeat itself in eager, so there is nothing to compare with: {noise}.")
    graphs: list[GraphReport] = []
    found = trial.with_options(chosen, graphs)
    say(f"with all rules: {found or 'as eager'}")
    if found is None:
        return None
    applications = list(_applications(graphs))
    rules = tuple(dict.fromkeys(application.rule for application in applications))

    @functools.cache  # the last trial is asked for again
    def difference(enabled: tuple[str, ...], without: tuple[str, ...] = ()) -> Difference | None:
        """Compare with these rules alone, without some of their applications."""
        disabled = [name for name in rule_names() if name not in enabled]
        result = trial.with_options(replace(chosen, disable=(*chosen.disable, *disabled, *without)))
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


class _Trial:
    """Runs a model forward and backward, and compares with eager's first run."""

    def __init__(
        self, model: Callable, args: Any, batch: Any, loss: Callable[[Any], Tensor] | None, tolerance: float | None
    ) -> None:
        self.model, self.args, self.batch, self.loss = model, args, batch, loss or _number
        module = getattr(model, "__self__", model)  # model.forward is as good as model
        self.parameters = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
        self.truth = self.run(None)
        self.allowed = tolerance or TOLERANCES[self._narrowest()]

    def with_options(self, options: Options, graphs: list[GraphReport] | None = None) -> Difference | None:
        """Compare the model as it is compiled with these options; the reports of its graphs are added to graphs."""
        with history.recorded() as reports:
            results = self.run(options)
        if graphs is not None:
            graphs += reports
        return self.compare(results)

    def run(self, options: Options | None) -> dict[str, Tensor]:
        """Return the loss and all gradients by name; options: None runs the model in eager."""
        model = self.model  # as a local, or the paths of modules would begin with its name
        call: Callable = lambda *args, **batch: model(*args, **batch)  # noqa: E731
        if options is not None:
            call = dynamo.compile_once(call, functools.partial(fastft, options=options))
        leaves = self._leaves()
        with unchanged(model), torch.enable_grad():
            torch.manual_seed(0)
            loss = self.loss(call(*self.args, **self.batch))
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if leaves else ()
        found = {"the loss": loss.detach()}
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                found[f"the gradient of {name}"] = gradient.detach()
        return found

    def _leaves(self) -> dict[str, Tensor]:
        """List the parameters and inputs that need a gradient, by name."""
        inputs = {f"input {number}": tensor for number, tensor in enumerate(tensors_in((self.args, self.batch)))}
        return {name: tensor for name, tensor in {**self.parameters, **inputs}.items() if tensor.requires_grad}

    def compare(self, results: Mapping[str, Tensor]) -> Difference | None:
        """Return the result that is farthest from eager's, None if all are within what is allowed.

        A gradient that is nearly nothing beside the largest is held to that one's scale: it is made of rounding alone.
        """
        norms = {name: value.double().norm().item() for name, value in self.truth.items()}
        largest = max((norm for name, norm in norms.items() if name != "the loss"), default=0.0)
        worst: Difference | None = None
        for name, value in self.truth.items():
            mine = results.get(name)
            scale = norms[name] if name == "the loss" else max(norms[name], 1e-4 * largest)
            error = float("inf") if mine is None else (mine.double() - value.double()).norm().item() / (scale or 1.0)
            if not error <= self.allowed and (worst is None or not error <= worst.error):  # NaN is never allowed
                worst = Difference(name, error, self.allowed)
        return worst

    def _narrowest(self) -> torch.dtype:
        """Find the dtype with the fewest bits among the model's floating-point parameters and results."""
        tensors = (*self.parameters.values(), *self.truth.values())
        dtypes = {tensor.dtype for tensor in tensors if tensor.dtype in TOLERANCES}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _number(result: Any) -> Tensor:
    """Make a number of a model's result: its loss, or a sum of all its floating-point tensors, each weighted anew."""
    if isinstance(loss := getattr(result, "loss", None), Tensor):
        return loss
    values = [value for value in tensors_in(result) if value.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(value.shape, generator=generator).to(value.device) for value in values]
    return torch.stack([(value.float() * weight).sum() for value, weight in zip(values, weights, strict=True)]).sum()
