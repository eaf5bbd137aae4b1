"""What the rewriter did and did not do to each graph, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Lifted:
    """One piece of a graph that became an op: by which rule, in which module, from which line."""

    rule: str
    module: str
    source: str


@dataclass(frozen=True)
class NearMiss:
    """One call that a rule looks for and did not take, and the reason."""

    rule: str
    module: str
    source: str
    reason: str


@dataclass
class GraphReport:
    """One graph that Dynamo captured."""

    nodes_before: int = 0
    nodes_after: int = 0
    lifted: list[Lifted] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    broken_by: tuple[str, str] | None = None
    failure: str = ""
