"""Decide whether a forward waits to be told how many rows of its batch are live, and how numbers come to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALL = 2**23  # elements of the hidden states of a batch: below it a step may be as short as what the host is ahead
WORTH = 0.8  # the share of a small batch's rows that is computed at the most, for the wait to pay
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
    """Decides whether to wait for what a batch holds.

    A wait costs what the host was ahead, which is much of a small step.  So small batches are not waited for once
    several in a row had nothing to leave out; one in a while is looked at all the same, and the answer taken later.
    """

    def __init__(self) -> None:
        self.quiet = 0  # batches in a row that had too little to leave out
        self.forwards = 0  # that did not wait
        self.noted: OnHost | None = None

    def is_small(self, hidden: Tensor) -> bool:
        """Return whether a wait would be felt."""
        return hidden.is_cuda and hidden.numel() <= SMALL

    def least_saving(self, hidden: Tensor) -> float:
        """Return the share of rows that has to be left over at the most."""
        return WORTH if self.is_small(hidden) else 1.0

    def waits(self, hidden: Tensor) -> bool:
        """Return whether to wait for this batch."""
        if not self.is_small(hidden) or self.quiet < QUIET:
            return True
        if self.noted is not None and self.noted.is_there:
            live, *_ = self.noted.result()
            self.noted = None
            if live < WORTH * hidden.shape[0] * hidden.shape[1]:
                self.quiet = 0
        return self.quiet < QUIET

    def is_due(self) -> bool:
        """Count a forward that does not wait, and return whether to look at its batch."""
        self.forwards += 1
        return self.forwards % EVERY == 0

    def note(self, facts: Tensor) -> None:
        """Have these numbers sent, to be read at a later forward."""
        self.noted = on_host(facts)
