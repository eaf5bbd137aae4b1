"""A part of a graph that runs by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A function of the values of ``taken`` that returns those of ``made``; both are names, such as nodes."""

    run: Callable
    taken: Sequence[Any]
    made: Sequence[Any]

    def __call__(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Run it on these values, and return what it makes."""
        return dict(zip(self.made, self.run(*map(values.__getitem__, self.taken)), strict=True))
