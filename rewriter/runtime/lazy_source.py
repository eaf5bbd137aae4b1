"""What lazy logits are computed from, what they share with those derived from them, and what they became."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastft.rewriter.loss.head import Logits
from fastft.rewriter.runtime.logits_computation import STALE, Computation, changed
from fastft.rewriter.runtime.row_programs import Program, program_of

if TYPE_CHECKING:
    from fastft.rewriter.runtime.lazy_logits import LazyLogits


@dataclass(eq=False)
class Family:
    """What logits share with those that are derived from them.

    nodes: of programs, by what they compute.  passed: whether gradients of one will reach the head by no tensor.
    """

    nodes: dict[Any, Any] = field(default_factory=dict)
    passed: bool = False


@dataclass(eq=False)
class Source:
    """What some logits are computed from, and the tensor that they became.

    logits: their tensors are in the autograd graph, or detached where no gradient is wanted.  versions: the tensors
    with their version counters at that time.  base, view: the logits that these share memory with, and the call that
    made these from those.  scales: what was done to these logits in place before anybody read them, behind what
    ``computation`` computes.
    """

    logits: Logits | Program
    computation: Computation
    chunk_bytes: int
    reads: Counter[str]
    versions: list[tuple[Tensor, int]]
    base: LazyLogits | None = None
    view: Callable[[Tensor], Tensor] | None = None
    views: list[weakref.ref[LazyLogits]] = field(default_factory=list)
    family: Family = field(default_factory=Family)
    scales: list[tuple[str, float]] = field(default_factory=list)
    values: Tensor | None = None  # detached
    read: Tensor | None = None  # the tensor that every reader gets
    written: bool = False

    def numbers(self) -> Tensor:
        """Return the values of the logits, detached; compute them at the first call and count the read.

        Raises RuntimeError where a tensor that they are computed from has changed.
        """
        if self.values is None:
            self.check()
            self.reads[_reader()] += 1
            values = self.computation.run(self.logits.values)
            for name, number in self.scales:
                values = getattr(values, name)(number)
            self.values = values
        return self.values.detach()

    @property
    def program(self) -> Program:
        """What computes the logits, as a program."""
        return self.logits if isinstance(self.logits, Program) else program_of(self.logits, self.family.nodes)

    def check(self) -> None:
        """Raise RuntimeError where a tensor has been written to since the model's forward."""
        self.computation.check()
        if changed(self.versions):
            raise RuntimeError(STALE)


def _reader() -> str:
    """Return ``file:line`` of the code that reads: the innermost frame that is in neither torch nor this package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "").split(".")[0]
        if name not in ("torch", "fastft", "triton", "contextlib", "functools"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"
