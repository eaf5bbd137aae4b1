"""What the rewriter did and did not do to each graph, and why; as text, in a notebook, and as HTML."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastft.rewriter.advice import advised
from fastft.rewriter.listing import Line
from fastft.rewriter.plan_report import PlanReport

BREAKS, FAILURES, MISSED = "Graph breaks", "Failures in fastft (these graphs run as they were)", "Not lifted"
LIFTED, FUSED = "Lifted", "Of these, fused"
MEMORY, FATES = "Memory", "What layers do with their activations"
_NUMBERS = ("graph", "times", "calls", "nodes", "seconds", "MiB", "µs")  # columns


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
class GraphReport:
    """One graph that Dynamo captured.

    nodes_before, nodes_after: its size with its nested bodies.  fused: what was made of several things lifted.  masks:
    what the mask of each attention means, in place of a rule; "dense: " and a reason if it is not known.  left: how
    often each function that was not lifted occurs.  regions: the parts that it is compiled in; if there are none, whole
    says why.  inlined: modules whose activation checkpoints gave way to the plan; plan: of memory.
    before, after: its calls, where they were asked for; device: where most of its inputs are.
    deferred: modules whose logits are computed when they are read; reads: how often that was, by
    ``file:line``.  failure: what went wrong in fastft, in which case the graph runs as the user wrote it.

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


@dataclass
class Report:
    """What fastft makes of a model: printed, shown in a notebook, or saved as HTML.

    breaks: where Dynamo could not go on with a graph, as (reason, ``file:line``).  stopped_by: the error with which
    the model ended, if it did.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    breaks: list[tuple[str, str]] = field(default_factory=list)
    stopped_by: str = ""

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

    def print(self, console: Console | None = None) -> None:
        """Print to the terminal, in colour where it has any."""
        (console or Console()).print(self)

    def save(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML page."""
        Path(path).write_text(self._repr_html_(), encoding="utf-8")

    def tables(self) -> list[tuple[str, Sequence[str], list[Sequence[str]]]]:
        """Title, columns and rows of all that there is to tell."""
        graphs = self.graphs
        tables: list[tuple[str, Sequence[str], list[Sequence[str]]]] = [
            (BREAKS, ("at", "reason"), [(_short(at), advised(why)) for why, at in self.breaks]),
            ("Compiled", ("graph", "of", "seconds", "changing sizes", "cache"), _compiled(graphs)),
            ("Compiled again", ("reason", "times"), _counted(graph.reason for graph in graphs)),
            ("Regions, each compiled once", *_regions(graphs)),
            ("Compiled whole", ("reason", "times"), _counted(graph.whole for graph in graphs)),
            (MEMORY, ("graph", "plan"), _plans(graphs)),
            (FATES, ("layers", "tensor", "shape", "fate", "MiB", "µs"), _fates(graphs)),
            ("Checkpoints that gave way to the plan", ("module", "times"), _inlined(graphs)),
            (LIFTED, ("rule", "times", "modules"), _by_rule(self.lifted)),
            (FUSED, ("rule", "times", "modules"), _by_rule(self.fused)),
            ("Masks of attention", ("mask", "times", "modules"), _masks(self.masks)),
            ("Logits that are computed only when they are read", ("module", "read"), _deferred(graphs)),
            (MISSED, ("module", "times", "at", "reason"), _by_reason(self.near_misses)),
            (FAILURES, ("graph", "cause"), _failures(graphs)),
        ]
        return [table for table in tables if table[2]]

    def __rich__(self) -> RenderableType:
        stopped = [Text(f"The model then failed with {self.stopped_by}", style="bold")] if self.stopped_by else []
        return Group(self._summary(), *(_table(*table) for table in self.tables()), *stopped, self._left())

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue()

    def _repr_html_(self) -> str:
        from fastft.rewriter.page import page

        return page(self)

    def _summary(self) -> Text:
        before, after = (sum(getattr(graph, name) for graph in self.graphs) for name in ("nodes_before", "nodes_after"))
        seconds = sum(graph.seconds for graph in self.graphs)
        breaks = f", {_count(len(self.breaks), 'break')}"
        counts = _count(len(self.graphs), "graph") + (f" compiled in {seconds:.1f} s" if seconds else breaks)
        lifted = f"{len(self.lifted)} lifted, {_count(len(self.near_misses), 'near miss', 'near misses')}"
        return Text(f"{counts}; {before} nodes, {after} after rewriting; {lifted}\n", style="bold")

    def _left(self) -> Text:
        left = sum((graph.left for graph in self.graphs), Counter[str]())
        rest = Counter({name: times for name, times in left.items() if not name.startswith("fastft.")})
        if not rest:
            return Text("Nothing is left to Inductor.")
        shown = ", ".join(f"{times} {name}" for name, times in rest.most_common(12))
        return Text(f"Left to Inductor: {shown}" + (f", and {len(rest) - 12} more kinds" if len(rest) > 12 else ""))


def _compiled(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    return [
        (str(number), _short(graph.place), f"{graph.seconds:.1f}", ", ".join(graph.dynamic), _cache(graph.cache))
        for number, graph in enumerate(graphs)
        if graph.seconds
    ]


def _cache(counts: Counter[str]) -> str:
    return ", ".join(f"{times} {name}" for name, times in counts.items() if times)


def _regions(graphs: Sequence[GraphReport]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Columns and rows; the graph only where there are several, and seconds where anything was compiled."""
    rows = [(number, graph.seconds > 0, region) for number, graph in enumerate(graphs) for region in graph.regions]
    cells = [
        {
            "graph": str(number) if len(graphs) > 1 else "",
            "module": region.module or "(the rest)",
            "calls": f"×{region.calls}",
            "nodes": str(region.nodes),
            "seconds": f"{region.seconds:.1f}" if timed else "",
        }
        for number, timed, region in rows
    ]
    columns = [name for name in (cells[0] if cells else ()) if any(row[name] for row in cells)]
    return columns, [[row[name] for name in columns] for row in cells]


def _plans(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    return [(str(number), str(graph.plan)) for number, graph in enumerate(graphs) if graph.plan is not None]


def _fates(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    return [row for graph in graphs if graph.plan is not None for row in graph.plan.rows()]


def _inlined(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    modules = Counter(_layerless(module) for graph in graphs for module in graph.inlined)
    return [(module, str(times)) for module, times in modules.items()]


def _counted(reasons: Iterable[str]) -> list[Sequence[str]]:
    return [(_short(advised(reason)), str(times)) for reason, times in Counter(filter(None, reasons)).items()]


def _failures(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    return [(str(number), graph.failure) for number, graph in enumerate(graphs) if graph.failure]


def _deferred(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    return [
        (module, "\n".join(f"{times} times at {_short(at)}" for at, times in graph.reads.items()) or "never")
        for graph in graphs
        for module in graph.deferred
    ]


def _by_rule(lifted: Iterable[Lifted]) -> list[Sequence[str]]:
    rules: dict[str, Counter[str]] = {}
    for one in lifted:
        rules.setdefault(one.rule, Counter())[_layerless(one.module)] += 1
    return [(rule, str(modules.total()), _times(modules)) for rule, modules in rules.items()]


def _masks(masks: Iterable[Lifted]) -> list[Sequence[str]]:
    return [(_short(advised(mask)), times, modules) for mask, times, modules in _by_rule(masks)]


def _by_reason(misses: Iterable[NearMiss]) -> list[Sequence[str]]:
    kinds = Counter(
        (_layerless(miss.module), _short(miss.source), f"{miss.rule}: {_short(advised(miss.reason))}")
        for miss in misses
    )
    return [(module, str(times), at, reason) for (module, at, reason), times in kinds.items()]


def _times(modules: Counter[str]) -> str:
    return "\n".join(f"{name} ×{times}" if times > 1 else name for name, times in modules.items())


def _layerless(module: str) -> str:
    """Layers told apart only by their number are one line: ``layers.*.input_layernorm``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module) or "(the model itself)"


def _short(text: str) -> str:
    """Paths cut down to their last two parts."""
    return re.sub(r"(?:[A-Za-z]:)?[\w.~\-+ ]*[/\\](?:[^/\\\s:]+[/\\])*([^/\\\s:]+[/\\][^/\\\s:]+:\d+)", r"\1", text)


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
