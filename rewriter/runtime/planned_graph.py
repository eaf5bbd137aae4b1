"""A graph that runs by a memory plan: each of its calls follows the plan's choice for its layer."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastft.compat import eager
from fastft.compat.symbolic import Sizes
from fastft.errors import describe
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.memory.simulate import Facts, Plan, StageSequence
from fastft.rewriter.report.plan import PlanReport
from fastft.rewriter.runtime import controller
from fastft.rewriter.runtime.cuda_graphs import Graphed
from fastft.rewriter.runtime.live_rows import LiveRun
from fastft.rewriter.runtime.offload import Offloader

log = logging.getLogger("fastft")


@dataclass(eq=False)
class Variants:
    """One kind of piece, compiled for each set of ops whose results it may keep for backward.

    build: compiles it for such a set.  places: returns the positions of the saved tensors that a choice offloads.
    """

    build: Callable[[tuple[str, ...]], Callable]
    places: Callable[[Choice], frozenset[int]]
    compiled: dict[tuple[str, ...], Callable] = field(default_factory=dict)
    offloads: dict[Choice, frozenset[int]] = field(default_factory=dict)

    def get(self, choice: Choice) -> Callable:
        """Return the function for a choice, compiled at its first use.

        If it cannot be compiled any more, the function that was compiled first takes its place; raise if there is none.
        """
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
        """Return the positions of the saved tensors that a choice offloads."""
        if choice.offloaded and choice not in self.offloads:
            self.offloads[choice] = self.places(choice)
        return self.offloads.get(choice, frozenset())


class Call:
    """A stage's call.  first, last: whether it is the first or last of the graph's calls, which may offload."""

    def __init__(self, variants: Variants, offloader: Offloader, choice: Choice, *, first: bool, last: bool) -> None:
        self.variants, self.offloader, self.first, self.last = variants, offloader, first, last
        self.choice = choice

    def prepare(self, choices: Sequence[Choice] = ()) -> None:
        """Compile the current choice, and further ``choices`` that may be needed when nothing can be compiled any more.

        Raises what the compiler raises if no choice has been compiled before.
        """
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

    plan: for the sizes of the example inputs.  run: calls the pieces one after another.  calls: the calls of the
    pieces, in order.  graphed: the CUDA graphs, if any.  sizes_of: returns the values of the graph's size symbols for
    given inputs.  again: whether a forward that runs out of memory may run again.  choices: the stages' active choices.
    """

    def __init__(
        self, sequence: StageSequence, facts: Facts, budget: Any, device: torch.device, plan: Plan, *,
        run: Callable, calls: Sequence[Call], graphed: Sequence[Graphed], offloader: Offloader,
        sizes_of: Callable[[Sequence[Any]], Sizes], again: bool = True,
    ) -> None:  # fmt: skip
        self.sequence, self.device = sequence, device
        self.run, self.calls, self.graphed, self.offloader = run, calls, graphed, offloader
        self.sizes_of, self.again = sizes_of, again
        self.report = PlanReport()
        self.sizes: Sizes = {}
        self.choices = plan.choices
        self.pending: list[weakref.ref[_PendingBackward]] = []
        self.watched = False
        self.controller = controller.MemoryController([self], facts, budget)
        self.controller.adopt(plan)
        controller.alive.add(self)

    def follow(self, choices: Sequence[Choice], *, graphs: bool) -> None:
        """Let every stage follow its choice.  graphs: whether to run CUDA graphs."""
        changed = self.choices != tuple(choices)
        self.choices = tuple(choices)
        for call, choice in zip(self.calls, choices, strict=True):
            call.choice = choice
        for graphed in self.graphed:
            graphed.in_parts = not any(choice.offloaded for choice in choices)  # copies go from one layer to the next
            if changed or graphed.enabled != graphs:
                graphed.reset(enabled=graphs)

    def waiting(self) -> int:
        """Return how many forwards have run whose backward is pending."""
        self.pending = [
            reference for reference in self.pending if (pending := reference()) is not None and not pending.closed
        ]
        return len(self.pending)

    def __call__(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled() or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return self.run(*inputs)
        self._watch(inputs)
        self.controller = controller.shared(self)
        self.sizes = self.sizes_of(inputs)
        again = run = functools.partial(self.run, *inputs)
        state = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        if isinstance(self.run, LiveRun):  # how much is computed is known before the layers
            started = self.run.begin(inputs)
            self.sizes |= self.run.sizes(started)
            run = functools.partial(self.run.finish, started)
        self.controller.begin(self)
        return self._opened(self._repeatedly(run, again, state))

    def _watch(self, inputs: Sequence[Any]) -> None:
        """Free memory when the model is deleted: Dynamo keeps its compiled code, and thereby this, until a reset."""
        if self.watched:
            return
        self.watched = True
        parameter = next((value for value in inputs if isinstance(value, torch.nn.Parameter)), None)
        if parameter is not None:
            weakref.finalize(parameter, _release, weakref.ref(self)).atexit = False

    def _repeatedly(self, run: Callable[[], Any], again: Callable[[], Any], state: Tensor | None) -> Any:
        """Run a forward, and once more, with less memory, where that runs out.

        state: of the device's random numbers, for the second; None not on a GPU.
        """
        try:
            return run()
        except torch.OutOfMemoryError:
            if state is None or not self.again or not self.controller.replan_after_oom("the step is run again"):
                raise
        torch.cuda.empty_cache()  # only here, where the failed run's tensors have been freed
        torch.cuda.set_rng_state(state, self.device)
        return again()

    def _opened(self, results: Any) -> Any:
        """Note that a backward is pending: until it begins, this graph's activations are in memory beside others'."""
        node: Any = next(
            (value.grad_fn for value in results if isinstance(value, torch.Tensor) and value.grad_fn is not None), None
        )
        if node is not None:
            pending = _PendingBackward()
            node.metadata["fastft"] = pending
            node.register_hook(lambda *_: self._close(pending))
            self.pending.append(weakref.ref(pending))
        return results

    def _close(self, pending: _PendingBackward) -> None:
        """Mark a forward as no longer pending: its backward has begun."""
        pending.closed = True
        if self.controller.measuring:
            eager.after_backward(self.controller.sample_peak)


def _release(reference: weakref.ref[Planned]) -> None:
    planned = reference()
    if planned is not None:
        planned.offloader.pool.shrink()
        for graphed in planned.graphed:
            graphed.reset(enabled=graphed.enabled)


class _PendingBackward:
    closed = False
