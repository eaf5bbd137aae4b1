"""Run memory plans: the active choice of each layer, the measured peak, re-planning."""

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
from fastft.rewriter.memory.simulate import OUTSIDE_CUDA_GRAPHS, POOL, Facts, Moment, Plan, StageSequence
from fastft.rewriter.options import budget_of
from fastft.rewriter.report.plan import ERROR
from fastft.units import GIB, format_bytes

if TYPE_CHECKING:
    from fastft.rewriter.runtime.planned_graph import Planned

log = logging.getLogger("fastft")
# Steps after which the peak is checked: all is compiled by then, and the optimizer's state allocated.  CUDA graphs may
# be captured later; what they hold is checked once they are.
CHECK_AFTER_STEPS = 3
MOST_CORRECTIONS = 2  # the second only for a plan that is above its budget
TOLERANCE = 0.02  # of the planned peak: a smaller error is not worth another plan
AFTER_OUT_OF_MEMORY = 0.9  # the next plan's limit: this share of the failed plan's peak, or of the available memory
MOST_PLANS = 64  # that are cached, by sizes
MOST_WAITING = 4  # pending forwards of one graph that are planned together; further ones follow the last one's choices


class MemoryController:
    """The forwards whose activations are in memory at the same time, in execution order, and one plan for all of them.

    forwards: the graph of each forward; a graph that runs again before its backward is listed more than once.  Graphs
    are held by weak references, so that a deleted model, with all that was compiled for it, is not kept alive by
    another that it once shared a step with.  budget: as the user gave it.  A step lasts from one first forward to the
    next.
    """

    def __init__(self, forwards: list[Planned], facts: Facts, budget: Any) -> None:
        self.references, self.facts, self.budget = [weakref.ref(graph) for graph in forwards], facts, budget
        self.device = forwards[0].device
        self.limit_bytes = device_budget.budget_bytes(budget, self.device)
        self.sequences = [graph.sequence for graph in forwards]
        self.sequence = planner.concatenate(self.sequences)
        self.plans: dict[Any, Plan | None] = {}  # by sizes; None where no plan fits the rounded sizes
        self.plan: Plan | None = None
        self.choices: list[tuple[Choice, ...]] = []  # of each forward
        self.seen, self.corrections = 0, 0
        self.peak_before, self.peak = 0, 0  # peak allocated bytes before the measured steps, and in them
        self.measured: list[Plan] = []  # of each measured step
        self.captured = False  # whether all CUDA graphs were captured where the last step began
        self.sizes: Sizes = {}

    @property
    def forwards(self) -> list[Planned | None]:
        """The graph of each forward; None for a graph that was deleted."""
        return [reference() for reference in self.references]

    @property
    def members(self) -> list[Planned]:
        """The graphs that are still alive, each once."""
        return [graph for graph in dict.fromkeys(self.forwards) if graph is not None]

    def begin(self, member: Planned) -> None:
        """Prepare for a forward of ``member``; the first graph's starts a step, and the previous step can be checked.

        Raises BudgetError where a number of bytes that the user named is too small for the new sizes.
        """
        members, before = self.members, member.waiting()
        starts = not before and member is members[0] and self.device.type == "cuda"
        if starts:
            self._end_step()
        sizes: Sizes = {}
        for graph in members:
            sizes |= graph.sizes
        if sizes != self.sizes:
            self.sizes = sizes
            self.replan()
        self._follow(member, before)
        if starts and self.measuring:
            assert self.plan is not None
            self.measured.append(self.plan)

    def _end_step(self) -> None:
        """Look at the step that ended, whose plan is still followed, and count the one that begins."""
        if self.seen == 0:
            self.peak_before, self.peak, self.measured = torch.cuda.max_memory_allocated(self.device), 0, []
            ooms.setdefault(self.device.index, _count_of_ooms(self.device))
        elif self.measuring:
            self.sample_peak()
        self.seen += 1
        if _count_of_ooms(self.device) > ooms[self.device.index]:  # e.g. in backward, where this code does not run
            self.replan_after_oom("the batch that failed may be repeated")
            torch.cuda.empty_cache()
        elif self.seen == CHECK_AFTER_STEPS + 1:
            self._check()
        elif self.seen > CHECK_AFTER_STEPS and self._is_captured() and not self.captured:
            self._check_pool()
        self.captured = self._is_captured()

    @property
    def measuring(self) -> bool:
        """Whether a step is running whose peak will be compared with the plan's."""
        return self.device.type == "cuda" and 0 < self.seen <= CHECK_AFTER_STEPS

    def sample_peak(self) -> None:
        """Record the peak so far: code that logs memory resets torch's peak counter where a step ends or begins."""
        self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))

    def replan(self, *, strict: bool = True) -> None:
        """Follow a plan for the current sizes rounded up; if none fits, follow a plan for exactly the current sizes.

        strict: raise BudgetError where a number of bytes that the user named is too small; otherwise follow the
        leanest plan.
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
        """Follow a plan that was made for the current sizes."""
        self.plans[tuple(self.sizes.values())] = plan
        self._follow_all(plan)

    def _follow_all(self, plan: Plan) -> None:
        self.plan, done = plan, 0
        self.choices.clear()
        for sequence in self.sequences:
            end = done + len(sequence.stages)
            self.choices.append(self.plan.choices[done:end])
            done = end
        for graph in self.members:
            self._follow(graph, 0)
            describe(graph.report, self.sequence, plan, self.budget, self.limit_bytes, self.device)

    def _exact(self, *, strict: bool) -> Plan:
        """Return a plan for exactly the current sizes."""
        strict = strict and isinstance(self.budget, int)
        return plan_or_leanest(self.sequence, self.facts, self.limit_bytes, self.sizes, strict=strict)

    def _follow(self, member: Planned, before: int) -> None:
        """Let a graph follow the plan for its next forward.  before: how many of its forwards wait for backward."""
        assert self.plan is not None
        positions = [position for position, graph in enumerate(self.forwards) if graph is member]
        member.follow(self.choices[positions[min(before, len(positions) - 1)]], graphs=self.plan.graphed)

    def _check(self) -> None:
        """Compare the planned peak with the measured one, and plan again if it was wrong.

        Not where sizes changed and CUDA graphs were captured for some of them: which step they are of is not known.
        """
        known = self.peak if self.peak > self.peak_before else 0
        plan = max(self.measured, key=lambda plan: plan.peak_bytes, default=None)
        if plan is None:
            return  # no plan was possible for any of these steps
        if self._pool_bytes() > 0:
            if self._is_captured() and plan.graphed and all(other is plan for other in self.measured):
                self._compare(plan.peak_bytes, max(self._with_pool(plan), known))
        elif known:
            self._compare(plan.uncaptured_bytes, known)
        else:  # more was allocated before the first step: measure from here on
            torch.cuda.reset_peak_memory_stats(self.device)
            self.peak_before, self.peak, self.seen, self.measured = 0, 0, 1, []

    def _check_pool(self) -> None:
        """Compare what CUDA graphs hold that were captured in the last step with what its plan says of them."""
        assert self.plan is not None
        if self.plan.graphed:
            self._compare(_beside(self.plan).bytes, self._with_pool(self.plan), self.peak)

    def _compare(self, planned: int, measured: int, peak: int = 0) -> None:
        """Plan again if a plan was wrong.  peak: what was measured at another moment."""
        log.info("memory: planned %.2f GiB, measured %.2f", planned / GIB, measured / GIB)
        for graph in self.members:
            graph.report.measured_bytes = max(measured, peak)
        above = bool(self.limit_bytes) and measured > (self.limit_bytes or 0)
        wrong = abs(measured - planned) > TOLERANCE * planned
        if (self.corrections == 0 and wrong) or (self.corrections < MOST_CORRECTIONS and above):
            self.corrections, self.seen = self.corrections + 1, 0
            self._correct(measured - planned)

    def _correct(self, error_bytes: int) -> None:
        """Plan again with a measured error: the bytes by which the measured peak exceeds the planned one."""
        self.facts = planner.corrected(self.facts, error_bytes)
        self.plans.clear()
        try:
            self.replan()
        except BudgetError as error:
            warnings.warn(f"fastft: {error}", RuntimeWarning, stacklevel=2)
            self.replan(strict=False)
        for graph in self.members:
            graph.report.corrections += 1

    def _with_pool(self, plan: Plan) -> int:
        """Return the plan's estimate beside CUDA graphs plus what they hold.

        Torch counts only the inputs and outputs of CUDA graphs as allocated, not the rest of their memory pool.
        """
        beside = _beside(plan)
        return beside.bytes - beside.parts[POOL] - beside.parts[ERROR] + self._pool_bytes()

    def _pool_bytes(self) -> int:
        return sum(graphed.pool_bytes for graph in self.members for graphed in graph.graphed)

    def _is_captured(self) -> bool:
        awaited = any(graphed.is_awaited for graph in self.members for graphed in graph.graphed)
        return self._pool_bytes() > 0 and not awaited

    def replan_after_oom(self, then: str) -> bool:
        """Plan for less memory after it ran out; return False if there is no leaner plan.

        then: what the warning says will happen next.
        """
        assert self.plan is not None
        ooms[self.device.index] = _count_of_ooms(self.device)
        before, had_graphs = self.plan.peak_bytes, self.sequence.graphed is not None
        within = min(before, device_budget.available_bytes(self.device))  # other processes may have taken some
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
    """Return a plan for these sizes; if none fits, raise BudgetError if strict, else return the leanest plan."""
    try:
        return planner.plan(sequence, facts, limit_bytes, sizes)
    except BudgetError as error:
        if strict:
            raise
        log.info("%s", error)
        return planner.plan(sequence, facts, 0, sizes)


def shared(member: Planned) -> MemoryController:
    """Return the one controller of a forward and of all forwards whose backward is pending; make it if need be.

    The strictest of their budgets applies.
    """
    waiting = Counter({graph: graph.waiting() for graph in alive if graph.device == member.device})
    waiting[member] += 1
    wanted = Counter({graph: min(count, MOST_WAITING) for graph, count in waiting.items()})
    forwards = member.controller.forwards
    known = Counter(graph for graph in forwards if graph is not None)
    if wanted <= known and None not in forwards:
        return member.controller
    others = [graph for graph in wanted if wanted[graph] and graph is not member]
    first = next((graph for graph in others if graph.controller.members[0] is graph), member)
    firsts = Counter(graph for graph in first.controller.forwards if graph is not None)
    together = list((firsts | Counter(others) | known | wanted).elements())
    before = [graph.controller for graph in together]
    strictest = min(before, key=lambda former: float("inf") if former.limit_bytes is None else former.limit_bytes)
    controller = MemoryController(
        together, max((former.facts for former in before), key=lambda facts: facts.before), strictest.budget
    )
    for graph in controller.members:
        graph.controller = controller
    controller.replan(strict=False)  # a part of this step has run already
    return controller


def set_memory_budget(budget: int | float | str | None) -> None:
    """Set the memory budget of all graphs that were compiled in this process, from their next step on.

    budget: as the option memory_budget.  Raises OptionsError for an invalid budget, and BudgetError for one that is
    too small.
    """
    parsed = budget_of(budget)
    for controller in {id(graph.controller): graph.controller for graph in alive}.values():
        controller.budget, controller.limit_bytes = parsed, device_budget.budget_bytes(parsed, controller.device)
        controller.seen = controller.corrections = 0
        controller.facts = replace(controller.facts, error=0)  # it was measured for another plan
        controller.plans.clear()
        controller.replan()


alive: weakref.WeakSet[Planned] = weakref.WeakSet()
ooms: dict[Any, int] = {}  # by device: how often memory ran out, as last read


def _beside(plan: Plan) -> Moment:
    return next(moment for moment in plan.moments if moment.label == OUTSIDE_CUDA_GRAPHS)


def _count_of_ooms(device: torch.device) -> int:
    return torch.cuda.memory_stats_as_nested_dict(device).get("num_ooms", 0)
