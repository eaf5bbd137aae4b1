"""Decide whether a forward waits to be told how many rows of its batch are live, and for how many it then runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.rewriter.memory.device_rates import TYPICAL, rates
from fastft.rewriter.rows import selection
from fastft.rewriter.runtime.cuda_graphs import Graphed

# Of the hidden states of a batch, in elements on an H100; fewer on slower cards.
SMALL = 2**23  # below it a step may be as short as what the host is ahead
WORTH = 2**21  # as many must be left out of a small one for the wait to pay
PARTS = 8  # as many sizes has a batch where CUDA graphs are run, as each size is captured by itself
QUIET, EVERY = 4, 16  # small batches that had nothing to leave out, before only each so many is looked at


@dataclass
class OnHost:
    """A few numbers on their way to the host."""

    copy: Tensor
    ready: Any = None

    @property
    def is_there(self) -> bool:
        """Whether they have come."""
        return self.ready is None or self.ready.query()

    def result(self) -> list[int]:
        """Wait for them, and return them."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.copy.tolist()


def on_host(facts: Tensor) -> OnHost:
    """Copy a few numbers to the host, without waiting for them."""
    if facts.device.type != "cuda":
        return OnHost(facts)
    copy = torch.empty_like(facts, device="cpu", pin_memory=True).copy_(facts, non_blocking=True)
    return OnHost(copy, torch.cuda.current_stream(facts.device).record_event())


class Watch:
    """Decides whether to wait for what a batch holds, and how many rows to run for.

    A wait costs what the host was ahead, which is much of a small step.  So small batches are not waited for once
    several in a row had too little to leave out; one in a while is looked at all the same, and the answer taken later.

    graphed: the layers' CUDA graphs, if they may run as such.
    """

    def __init__(self, graphed: Graphed | None = None) -> None:
        self.graphed = graphed
        self.shape: tuple[int, ...] = ()  # of the last batch, and how often it came in a row
        self.row = 0
        self.quiet = 0  # batches in a row that had too little to leave out
        self.forwards = 0  # that did not wait
        self.noted: OnHost | None = None

    def is_small(self, hidden: Tensor) -> bool:
        """Return whether a wait would be felt."""
        return hidden.is_cuda and hidden.numel() <= _scaled(SMALL, hidden.device)

    @property
    def in_graphs(self) -> bool:
        """Whether the layers run as CUDA graphs for batches of the last one's shape."""
        return self.graphed is not None and self.graphed.enabled and self.row >= self.graphed.patience

    def meet(self, hidden: Tensor) -> None:
        """Count a batch."""
        shape = tuple(hidden.shape)
        self.row = self.row + 1 if shape == self.shape else 1
        self.shape = shape
        if self.graphed is not None:
            self.graphed.settled = self.in_graphs

    def size(self, hidden: Tensor, live: int) -> int:
        """Return for how many rows to run if so many are live: for all, where too few could be left out."""
        B, S, H = hidden.shape
        size, rows = selection.rounded(live), B * S
        if self.in_graphs:
            part = -(-rows // PARTS)
            size = -(-size // part) * part
        least = _scaled(WORTH, hidden.device) if self.is_small(hidden) else 1
        return size if (rows - size) * H >= least else rows

    def longest(self, hidden: Tensor, longest: int) -> int:
        """Return what attention is told for sequences of so many live rows at the most."""
        return hidden.shape[1] if self.in_graphs else selection.rounded(longest)

    def waits(self, hidden: Tensor) -> bool:
        """Return whether to wait for this batch."""
        if not self.is_small(hidden) or self.quiet < QUIET:
            return True
        if self.noted is not None and self.noted.is_there:
            facts = selection.Facts(*self.noted.result())
            self.noted = None
            live = min(facts.live, facts.unique or facts.live)
            if self.size(hidden, live) < hidden.shape[0] * hidden.shape[1]:
                self.quiet = 0
        return self.quiet < QUIET

    def is_due(self) -> bool:
        """Count a forward that does not wait, and return whether to look at its batch."""
        self.forwards += 1
        return self.forwards % EVERY == 0

    def note(self, facts: Tensor) -> None:
        """Have these numbers sent, to be read at a later forward."""
        self.noted = on_host(facts)


def _scaled(elements: int, device: torch.device) -> float:
    """Return how many elements take as long on a device as so many on an H100."""
    return elements * rates(device).flops / TYPICAL.flops
