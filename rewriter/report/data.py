"""What the rewriter did and did not do to each graph, as text and numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastft.reasons import with_prefix
from fastft.rewriter.report.graph_listing import Line
from fastft.rewriter.report.plan import PlanReport


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


@dataclass(frozen=True)
class PassRecord:
    """What a pass did to a graph: seconds, nodes before and after, and how many more of each call there are."""

    name: str
    seconds: float = field(compare=False)
    nodes_before: int
    nodes_after: int
    changes: Mapping[str, int]

    def __str__(self) -> str:
        changes = ", ".join(f"{number:+} {name}" for name, number in self.changes.items()) or "nothing changed"
        return f"{self.name}: {self.nodes_before} → {self.nodes_after} nodes in {self.seconds:.3f} s; {changes}"


@dataclass
class RuleRecord:
    """How often a rule was tried at a call of its anchor, how often its pattern was there, how often it was applied.

    seconds: that all this took, checks included.
    """

    attempts: int = 0
    matches: int = 0
    applied: int = 0
    seconds: float = field(default=0.0, compare=False)

    def add(self, other: RuleRecord) -> None:
        """Add another graph's counts."""
        self.attempts, self.matches = self.attempts + other.attempts, self.matches + other.matches
        self.applied, self.seconds = self.applied + other.applied, self.seconds + other.seconds


@dataclass
class Region:
    """A part of a graph that is compiled by itself: its module, how often it is called, its nodes, seconds to compile.

    The backward of a region is compiled when it is first needed, and not in ``seconds``.
    """

    module: str
    calls: int
    nodes: int
    seconds: float = 0.0

    def __str__(self) -> str:
        return (self.module or "(the rest)") + (f" ({self.calls} layers)" if self.calls > 1 else "")


@dataclass
class RowsReport:
    """Which rows of its batches a graph's layers were run for.

    reason: why always for all, "" where rows that nobody reads are left out.  forwards: that were looked at.  rows,
    live: how many they had, and how many were run; last: those of the last one.  unshared: why rows that are the same
    in several sequences are run for each, where they should be shared.
    """

    reason: str = ""
    unshared: str = ""
    forwards: int = 0
    rows: int = 0
    live: int = 0
    last: tuple[int, int] = (0, 0)

    def add(self, rows: int, live: int) -> None:
        """Count a forward."""
        self.forwards += 1
        self.rows += rows
        self.live += live
        self.last = rows, live

    def __str__(self) -> str:
        return self.told

    @property
    def told(self) -> str:
        """What is run, with the code of the reason by which advice is found."""
        if self.reason:
            return with_prefix("every row of a batch is run: ", self.reason)
        if self.unshared:
            return with_prefix("rows of common beginnings are run for each sequence: ", self.unshared)
        if not self.rows:
            return "rows that nobody reads are left out"
        dropped, last = self.rows - self.live, self.last[0] - self.last[1]
        return (
            f"rows that nobody reads are left out: {last} of {self.last[0]} in the last step, {dropped} of {self.rows} "
            f"({dropped / self.rows:.0%}) so far"
        )


@dataclass(frozen=True)
class ExpertLoad:
    """What experts of layers with so many of them got: how often tokens chose one, the most of one, how many none."""

    experts: int
    tokens: int
    most: int
    idle: int

    @property
    def busiest(self) -> float:
        """How many times the mean the busiest expert got."""
        return self.most * self.experts / max(1, self.tokens)


@dataclass
class GraphReport:
    """One graph that Dynamo captured.

    nodes_before, nodes_after: its size with its nested bodies.  fused: what was made of several things lifted.  masks:
    what the mask of each attention means, in place of a rule; "dense: " and a reason if it is not known.  left: how
    often each function that was not lifted occurs.  regions: the parts that it is compiled in; if there are none, whole
    says why.  inlined: modules whose activation checkpoints gave way to the plan; plan: of memory.
    rows: which rows of a batch are run, if it was asked.
    before, after: its calls, where they were asked for; device: where most of its inputs are.
    passes: what each pass did; rules: what each rule that was tried did, by name.
    deferred: modules whose logits are computed when they are read; reads: how often that was, by
    ``file:line``.  failure: what went wrong in fastft, in which case the graph runs as the user wrote it.  repro: a
    Python file that compiles the graph again, of what was explained and what failed; see ``Report.save_repro``.

    Known of graphs that were compiled: place, the code that it was captured from.  reason: why Dynamo compiled that
    code again ("" for a first time, "unknown" where Dynamo does not tell).  seconds: what the backend took.  dynamic:
    sizes of inputs that may change.  cache: hits, misses and bypasses of AOTAutograd's cache.
    """

    nodes_before: int = 0
    nodes_after: int = 0
    lifted: list[Lifted] = field(default_factory=list)
    fused: list[Lifted] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    masks: list[Lifted] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    whole: str = ""
    inlined: list[str] = field(default_factory=list)
    plan: PlanReport | None = None
    rows: RowsReport | None = None
    passes: list[PassRecord] = field(default_factory=list)
    rules: dict[str, RuleRecord] = field(default_factory=dict)
    deferred: list[str] = field(default_factory=list)
    reads: Counter[str] = field(default_factory=Counter)
    before: list[Line] = field(default_factory=list)
    after: list[Line] = field(default_factory=list)
    device: str = ""
    failure: str = ""
    place: str = ""
    reason: str = ""
    seconds: float = 0.0
    dynamic: list[str] = field(default_factory=list)
    cache: Counter[str] = field(default_factory=Counter)
    repro: str = field(default="", repr=False)


@dataclass
class ReportData:
    """What fastft makes of a model; report.py prints, shows and saves it.

    breaks: where Dynamo could not go on with a graph, as (reason, ``file:line``).  stopped_by: the error with which
    the model ended, if it did.  loads: of experts, over all layers and steps of the process.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    breaks: list[tuple[str, str]] = field(default_factory=list)
    stopped_by: str = ""
    loads: list[ExpertLoad] = field(default_factory=list)

    @property
    def lifted(self) -> list[Lifted]:
        """Everything that became an op, over all graphs."""
        return [lifted for graph in self.graphs for lifted in graph.lifted]

    @property
    def fused(self) -> list[Lifted]:
        """What was made of several lifted things, over all graphs."""
        return [fused for graph in self.graphs for fused in graph.fused]

    @property
    def masks(self) -> list[Lifted]:
        """What the mask of each attention means, over all graphs."""
        return [mask for graph in self.graphs for mask in graph.masks]

    @property
    def near_misses(self) -> list[NearMiss]:
        """Everything that nearly did, over all graphs."""
        return [miss for graph in self.graphs for miss in graph.near_misses]
