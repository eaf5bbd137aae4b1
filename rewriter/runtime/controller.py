"""Plans at work: which layer runs in which way now, what a step was measured to take, and what is done about it."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastft.compat.symbolic import Sizes
from fastft.rewriter.memory import device_budget, planner
from fastft.rewriter.memory.describe import describe
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.memory.planner import BudgetError
from fastft.rewriter.memory.simulate import OUTSIDE_CUDA_GRAPHS, POOL, Facts, Plan, StageSequence
from fastft.rewriter.options import budget_of
from fastft.rewriter.report.plan import ERROR
from fastft.units import GIB, format_bytes

if TYPE_CHECKING:
    from fastft.rewriter.runtime.planned_graph import Planned

log = logging.getLogger("fastft")
# Calls after which the peak is read: compiled and captured by then, with the optimizer's state allocated.
CHECK_AFTER_STEPS = 3
MOST_CORRECTIONS = 2  # the second only of a plan that is above its budget
TOLERANCE = 0.02  # of the planned peak: less is not worth another plan
AFTER_OUT_OF_MEMORY = 0.9  # of what the plan took, or of what there is: the next has to do with that
MOST_PLANS = 64  # for sizes that were met
MOST_WAITING = 4  # forwards of one graph that are planned for together; what waits beyond is as planned for the last


class MemoryController:
    """The forwards whose activations are in memory together, in their order, and their one plan.

    forwards: a graph for each; more than once, if it runs again before its backward.  They are referred to weakly: a
    model that is deleted is not kept, with all that was compiled for it, by another that it once shared a step with.
    budget: as the user gave it.  A step is from one first forward to the next.
    """

    def __init__(self, forwards: list[Planned], facts: Facts, budget: Any) -> None:
        self.references, self.facts, self.budget = [weakref.ref(one) for one in forwards], facts, budget
        self.device = forwards[0].device
        self.limit_bytes = device_budget.budget_bytes(budget, self.device)
        self.sequences = [one.sequence for one in forwards]
        self.sequence = planner.concatenate(self.sequences)
        self.plans: dict[Any, Plan | None] = {}  # by sizes; None where rounded ones do not fit
        self.plan: Plan | None = None
        self.choices: list[tuple[Choice, ...]] = []  # of each forward
        self.seen, self.corrections = 0, 0
        self.peak_before, self.peak = 0, 0  # allocated before the steps that are measured, and in them
        self.sizes: Sizes = {}

    @property
    def forwards(self) -> list[Planned | None]:
        """The graph of each forward; None for one that is no more."""
        return [reference() for reference in self.references]

    @property
    def members(self) -> list[Planned]:
        """The graphs that still are, each once."""
        return [one for one in dict.fromkeys(self.forwards) if one is not None]

    def begin(self, member: Planned) -> None:
        """A forward begins; with the first graph's a step, so that the one before can be judged."""
        sizes: Sizes = {}
        members = self.members
        for one in members:
            sizes |= one.sizes
        if sizes != self.sizes:
            self.sizes = sizes
            self.replan()
        before = member.waiting()
        self._follow(member, before)
        if before or member is not members[0] or self.device.type != "cuda":
            return
        if self.seen == 0:
            self.peak_before, self.peak = torch.cuda.max_memory_allocated(self.device), 0
            ooms.setdefault(self.device.index, _count_of_ooms(self.device))
        elif self.measuring:
            self.sample_peak()
        self.seen += 1
        if _count_of_ooms(self.device) > ooms[self.device.index]:  # in backward, say, where nobody asks us
            self.replan_after_oom("the batch that failed may be repeated")
            torch.cuda.empty_cache()
        elif self.seen == CHECK_AFTER_STEPS + 1:
            self._check()

    @property
    def measuring(self) -> bool:
        """Whether a step is under way whose peak is to be compared with the plan's."""
        return self.device.type == "cuda" and 0 < self.seen <= CHECK_AFTER_STEPS

    def sample_peak(self) -> None:
        """Note the peak so far: who logs memory starts torch's count anew, where a step ends or begins."""
        self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))

    def replan(self, *, strict: bool = True) -> None:
        """Follow the plan for the sizes at hand, or for the least above them that there is a plan for.

        strict: raise BudgetError where bytes that the user named are too few; else do with the leanest plan.
        """
        rounded = {symbol: planner.rounded(size) for symbol, size in self.sizes.items()}
        key = tuple(rounded.values())
        if key not in self.plans:
            while len(self.plans) >= MOST_PLANS:
                del self.plans[next(iter(self.plans))]
            try:
                self.plans[key] = planner.plan(self.sequence, self.facts, self.limit_bytes, rounded)
            except BudgetError:
                self.plans[key] = None
        if self.plans[key] is None:
            key = tuple(self.sizes.values())
            self.plans[key] = self.plans.get(key) or self._exact(strict=strict)
        plan = self.plans[key]
        assert plan is not None
        self._follow_all(plan)

    def adopt(self, plan: Plan) -> None:
        """Follow a plan that was made for the sizes at hand."""
        self.plans[tuple(self.sizes.values())] = plan
        self._follow_all(plan)

    def _follow_all(self, plan: Plan) -> None:
        self.plan, done = plan, 0
        self.choices.clear()
        for sequence in self.sequences:
            end = done + len(sequence.stages)
            self.choices.append(self.plan.choices[done:end])
            done = end
        for one in self.members:
            self._follow(one, 0)
            describe(one.report, self.sequence, plan, self.budget, self.limit_bytes, self.device)

    def _exact(self, *, strict: bool) -> Plan:
        """Plan for just these sizes."""
        strict = strict and isinstance(self.budget, int)
        return plan_or_leanest(self.sequence, self.facts, self.limit_bytes, self.sizes, strict=strict)

    def _follow(self, member: Planned, before: int) -> None:
        """Let a graph do what the plan says for one of its forwards.  before: how many of them wait for backward."""
        assert self.plan is not None
        places = [at for at, one in enumerate(self.forwards) if one is member]
        member.follow(self.choices[places[min(before, len(places) - 1)]], graphs=self.plan.graphed)

    def _check(self) -> None:
        """Compare the plan with the peak of the steps so far, and plan again if it was wrong."""
        measured = self._measured()
        if measured is None:  # what came before took more: measure the steps from here on
            torch.cuda.reset_peak_memory_stats(self.device)
            self.peak_before, self.peak, self.seen = 0, 0, 1
            return
        assert self.plan is not None
        planned = self.plan.peak_bytes
        log.info("memory: planned %.2f GiB, measured %.2f", planned / GIB, measured / GIB)
        for one in self.members:
            one.report.measured_bytes = measured
        above = bool(self.limit_bytes) and measured > (self.limit_bytes or 0)
        wrong = abs(measured - planned) > TOLERANCE * planned
        if (self.corrections == 0 and wrong) or (self.corrections < MOST_CORRECTIONS and above):
            self.corrections, self.seen = self.corrections + 1, 0
            self._correct(measured - planned)

    def _correct(self, error_bytes: int) -> None:
        self.facts = planner.corrected(self.facts, error_bytes)
        self.plans.clear()
        try:
            self.replan()
        except BudgetError as error:
            warnings.warn(f"fastft: {error}", RuntimeWarning, stacklevel=2)
            self.replan(strict=False)
        for one in self.members:
            one.report.corrections += 1

    def _measured(self) -> int | None:
        """The most that was allocated since the first step; None if more was before.

        While CUDA graphs do not run, torch counts but the ends of what they hold.
        """
        assert self.plan is not None
        known = self.peak if self.peak > self.peak_before else None
        beside = next((moment for moment in self.plan.moments if moment.label == OUTSIDE_CUDA_GRAPHS), None)
        pool = sum(graphed.pool_bytes for one in self.members for graphed in one.graphed)
        if beside is None or not pool:
            return known
        return max(beside.bytes - beside.parts[POOL] - beside.parts[ERROR] + pool, known or 0)

    def replan_after_oom(self, then: str) -> bool:
        """Plan for less memory after it ran out; False if there is no leaner plan."""
        assert self.plan is not None
        ooms[self.device.index] = _count_of_ooms(self.device)
        before, had_graphs = self.plan.peak_bytes, self.sequence.graphed is not None
        within = min(before, device_budget.available_bytes(self.device))  # others may have taken some
        self.limit_bytes, self.sequence.graphed = int(AFTER_OUT_OF_MEMORY * within), None
        self.plans.clear()
        self.replan(strict=False)
        leaner = self.plan.peak_bytes < before or had_graphs
        if leaner:
            message = (
                f"fastft ran out of memory at a planned peak of {format_bytes(before)} and plans with "
                f"{format_bytes(self.plan.peak_bytes)} from now on; {then}."
            )
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return leaner


def plan_or_leanest(
    sequence: StageSequence, facts: Facts, limit_bytes: int | None, sizes: Sizes, *, strict: bool
) -> Plan:
    """Plan for these sizes; if none fits, raise BudgetError where that is strict, else take the leanest of all."""
    try:
        return planner.plan(sequence, facts, limit_bytes, sizes)
    except BudgetError as error:
        if strict:
            raise
        log.info("%s", error)
        return planner.plan(sequence, facts, 0, sizes)


def shared(member: Planned) -> MemoryController:
    """The controller of a forward and of all whose backward is still to come: the strictest of their budgets rules."""
    waiting = Counter({one: one.waiting() for one in alive if one.device == member.device})
    waiting[member] += 1
    wanted = Counter({one: min(count, MOST_WAITING) for one, count in waiting.items()})
    forwards = member.controller.forwards
    known = Counter(one for one in forwards if one is not None)
    if wanted <= known and None not in forwards:
        return member.controller
    others = [one for one in wanted if wanted[one] and one is not member]
    first = next((one for one in others if one.controller.members[0] is one), member)
    firsts = Counter(one for one in first.controller.forwards if one is not None)
    together = list((firsts | Counter(others) | known | wanted).elements())
    before = [one.controller for one in together]
    strictest = min(before, key=lambda one: float("inf") if one.limit_bytes is None else one.limit_bytes)
    controller = MemoryController(
        together, max((one.facts for one in before), key=lambda facts: facts.before), strictest.budget
    )
    for one in controller.members:
        one.controller = controller
    controller.replan(strict=False)  # of this step a part has run already
    return controller


def set_memory_budget(budget: int | float | str | None) -> None:
    """Let all graphs that were compiled in this process keep to another budget from their next step on.

    budget: as the option memory_budget.  Raises OptionsError for what is none, and BudgetError for too little.
    """
    parsed = budget_of(budget)
    for controller in {id(one.controller): one.controller for one in alive}.values():
        controller.budget, controller.limit_bytes = parsed, device_budget.budget_bytes(parsed, controller.device)
        controller.seen = controller.corrections = 0
        controller.facts = replace(controller.facts, error=0)  # it was that of another plan
        controller.plans.clear()
        controller.replan()


alive: weakref.WeakSet[Planned] = weakref.WeakSet()
ooms: dict[Any, int] = {}  # by device: how often memory ran out, as far as was looked at


def _count_of_ooms(device: torch.device) -> int:
    return torch.cuda.memory_stats_as_nested_dict(device).get("num_ooms", 0)
