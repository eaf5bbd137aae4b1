"""Plans at work: which layer runs in which way now, what a step was measured to take, and what is done about it."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastft.rewriter import planner
from fastft.rewriter.costs import Sizes
from fastft.rewriter.cuda_graphs import Graphed
from fastft.rewriter.frontier import Choice
from fastft.rewriter.graph import describe
from fastft.rewriter.offload import Offloader
from fastft.rewriter.plan_report import PlanReport
from fastft.rewriter.planner import BESIDE, GIB, POOL, BudgetError, Facts, Plan, Row

log = logging.getLogger("fastft")
CHECKED = 3  # calls after which the peak is read: compiled and captured by then, with the optimizer's state allocated
TOLERANCE = 0.02  # of the planned peak: less is not worth another plan
AFTER_OUT_OF_MEMORY = 0.9  # of what the plan took: the next has to do with that


@dataclass(eq=False)
class Variants:
    """A kind of piece, compiled for each set of ops that it may keep.

    build: compiles it.  places: which of the tensors that it saves go to the host.
    """

    build: Callable[[tuple[str, ...]], Callable]
    places: Callable[[Choice], frozenset[int]]
    compiled: dict[tuple[str, ...], Callable] = field(default_factory=dict)
    offloads: dict[Choice, frozenset[int]] = field(default_factory=dict)

    def get(self, choice: Choice) -> Callable:
        """What runs this choice; where it cannot be compiled any more, what was compiled first."""
        if choice.kept not in self.compiled:
            try:
                self.compiled[choice.kept] = self.build(choice.kept)
            except Exception as error:
                if not self.compiled:
                    raise
                log.warning("a plan is not followed: %s", describe(error))
                self.compiled[choice.kept] = next(iter(self.compiled.values()))
        return self.compiled[choice.kept]

    def offloaded(self, choice: Choice) -> frozenset[int]:
        if choice.offloaded and choice not in self.offloads:
            self.offloads[choice] = self.places(choice)
        return self.offloads.get(choice, frozenset())


class Call:
    """A stage's call.  first, last: whether it is the graph's first or last that may offload."""

    def __init__(self, variants: Variants, offloader: Offloader, choice: Choice, *, first: bool, last: bool) -> None:
        self.variants, self.offloader, self.first, self.last = variants, offloader, first, last
        self.choice = choice

    def prepare(self, choices: Sequence[Choice] = ()) -> None:
        """Compile what is wanted now, and what may be later where nothing can be compiled then."""
        for choice in (self.choice, *choices):
            self.variants.get(choice)

    def __call__(self, *inputs: Any) -> Any:
        if self.first:
            self.offloader.begin()
        function = self.variants.get(self.choice)
        if not torch.is_grad_enabled():
            return function(*inputs)
        results = self.offloader.call(function, inputs, self.variants.offloaded(self.choice))
        if self.last:
            self.offloader.wait()
        return results


class Planned:
    """A graph that runs by a plan: a function of the graph's inputs.

    budget: as the user gave it.  graphed: its CUDA graphs, if it has any.  sizes_of: its symbols' values by inputs.
    """

    def __init__(self, row: Row, facts: Facts, budget: Any, device: torch.device, limit_bytes: int | None) -> None:
        self.row, self.facts, self.budget, self.device, self.limit_bytes = row, facts, budget, device, limit_bytes
        self.offloader = Offloader(device, facts.host)
        self.calls: list[Call] = []
        self.graphed: list[Graphed] = []
        self.run: Callable = lambda *inputs: None
        self.sizes_of: Callable[[Sequence[Any]], Sizes] = lambda inputs: {}
        self.seen = 0
        self.corrections = 0
        self.peak_before = 0
        self.measured_bytes: int | None = None
        self.sizes: Sizes = {}
        self.plans: dict[Any, Plan] = {}
        self.report = PlanReport(str(budget) if budget is not None else "whatever is free", limit_bytes)
        self.plan = self.planned({})
        _alive.add(self)

    def planned(self, sizes: Sizes) -> Plan:
        """For these sizes, or the least above them that there is a plan for."""
        rounded = {symbol: _rounded(size) for symbol, size in sizes.items()}
        key = tuple(rounded.values())
        if key not in self.plans:
            try:
                self.plans[key] = planner.plan(self.row, self.facts, self.limit_bytes, rounded)
            except BudgetError as error:
                if isinstance(self.budget, int):
                    raise
                self.plans[key] = planner.plan(self.row, self.facts, 0, rounded)
                log.info("%s", error)
        return self.plans[key]

    def follow(self, plan: Plan) -> None:
        """Let every stage do what the plan says."""
        changed = [call.choice for call in self.calls] != list(plan.choices)
        self.plan = plan
        self.report.limit_bytes = self.limit_bytes
        self.report.follow(self.row, plan)
        for call, choice in zip(self.calls, plan.choices, strict=True):
            call.choice = choice
        for graphed in self.graphed:
            if changed or graphed.enabled != plan.graphed:
                graphed.reset(enabled=plan.graphed)

    def __call__(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run(*inputs)
        self._begin(self.sizes_of(inputs))
        if self.device.type != "cuda":
            return self.run(*inputs)
        state = torch.cuda.get_rng_state(self.device)
        try:
            return self.run(*inputs)
        except torch.OutOfMemoryError as error:
            if not self._give_way(str(error)):
                raise
        torch.cuda.set_rng_state(state, self.device)
        return self.run(*inputs)

    def _begin(self, sizes: Sizes) -> None:
        """A step begins: the one before can be judged by now."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        if self.seen == 0 and self.device.type == "cuda":
            self.peak_before = torch.cuda.max_memory_allocated(self.device)
            _ooms[self.device.index] = _count_of_ooms(self.device)
        self.seen += 1
        self._after_trouble()
        if sizes != self.sizes:
            self.sizes = sizes
            self.follow(self.planned(sizes))
        elif self.seen == CHECKED + 1 and self.device.type == "cuda":
            self._check()

    def _check(self) -> None:
        """Compare the plan with the peak of the steps so far, and plan again, once, if it was wrong."""
        self.measured_bytes = self._measured()
        if self.measured_bytes is None:  # what came before took more: measure the steps from here on
            torch.cuda.reset_peak_memory_stats(self.device)
            self.peak_before, self.seen = 0, 1
            return
        self.report.measured_bytes = self.measured_bytes
        planned = self.plan.peak_bytes
        error = self.measured_bytes - planned
        log.info("memory: planned %.2f GiB, measured %.2f", planned / GIB, self.measured_bytes / GIB)
        above = self.limit_bytes not in (None, 0) and self.measured_bytes > (self.limit_bytes or 0)
        if self.corrections == 0 and (above or abs(error) > TOLERANCE * planned):
            self.corrections += 1
            self.report.corrections += 1
            self._replan(planner.corrected(self.facts, error))
            self.seen = 0

    def _measured(self) -> int | None:
        """The most that was allocated since the first step; None if more was before.

        While CUDA graphs do not run, torch counts but the ends of what they hold.
        """
        peak = torch.cuda.max_memory_allocated(self.device)
        beside = next((moment for moment in self.plan.moments if moment.label == BESIDE), None)
        if beside is not None and self.graphed:
            pool = sum(graphed.pool_bytes for graphed in self.graphed)
            return max(beside.bytes - beside.parts[POOL] + pool, peak if peak > self.peak_before else 0)
        return peak if peak > self.peak_before else None

    def _replan(self, facts: Facts) -> None:
        self.facts = facts
        self.plans.clear()
        try:
            self.follow(self.planned(self.sizes))
        except BudgetError as error:
            self.follow(planner.plan(self.row, self.facts, 0, self.sizes))
            warnings.warn(f"fastft: {error}", RuntimeWarning, stacklevel=2)

    def _after_trouble(self) -> None:
        """Whether memory ran out since the last call, in backward or elsewhere, where nobody asks us."""
        if self.device.type != "cuda":
            return
        count = _count_of_ooms(self.device)
        if count > _ooms.get(self.device.index, 0):
            _ooms[self.device.index] = count
            self._give_way("")

    def _give_way(self, error: str) -> bool:
        """Plan for less memory after it ran out; False if there is no leaner plan."""
        before = self.plan
        self.limit_bytes = int(AFTER_OUT_OF_MEMORY * before.peak_bytes)
        self.row.graphed = None
        self.plans.clear()
        try:
            self.follow(planner.plan(self.row, self.facts, self.limit_bytes, self.sizes))
        except BudgetError:
            self.follow(planner.plan(self.row, self.facts, 0, self.sizes))
        _ooms[self.device.index] = _count_of_ooms(self.device)
        torch.cuda.empty_cache()
        again = "the step is run again" if error else "the batch that failed may be repeated"
        message = (
            f"fastft ran out of memory at a planned peak of {before.peak_bytes / GIB:.2f} GiB and plans with "
            f"{self.plan.peak_bytes / GIB:.2f} GiB from now on; {again}."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return self.plan.peak_bytes < before.peak_bytes


_alive: weakref.WeakSet[Planned] = weakref.WeakSet()
_ooms: dict[Any, int] = {}  # by device: how often memory ran out, as far as was looked at


def _count_of_ooms(device: torch.device) -> int:
    return torch.cuda.memory_stats_as_nested_dict(device).get("num_ooms", 0)


def _rounded(size: int) -> int:
    """Up to one of eight steps in each doubling, so that a plan serves many lengths."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step
