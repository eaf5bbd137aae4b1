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


@dataclass
class GraphReport:
    """One graph that Dynamo captured.

    nodes_before, nodes_after: its size with its nested bodies.  left: how often each function that was not lifted
    occurs.  regions: the parts that it is compiled in; if there are none, whole says why.  failure: what went wrong in
    fastft, in which case the graph runs as the user wrote it.
    """

    nodes_before: int = 0
    nodes_after: int = 0
    lifted: list[Lifted] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    regions: list[Region] = field(default_factory=list)
    whole: str = ""
    failure: str = ""


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
    def near_misses(self) -> list[NearMiss]:
        """Everything that nearly did, over all graphs."""
        return [miss for graph in self.graphs for miss in graph.near_misses]

    def print(self, console: Console | None = None) -> None:
        """Print to the terminal, in colour where it has any."""
        (console or Console()).print(self)

    def save(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML page."""
        Path(path).write_text(self._repr_html_(), encoding="utf-8")

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._summary()]
        if self.breaks:
            parts.append(_table("Graph breaks", ("at", "reason"), [(_short(at), why) for why, at in self.breaks]))
        if self.lifted:
            parts.append(_table("Lifted", ("rule", "times", "modules"), _by_rule(self.lifted)))
        if self.near_misses:
            parts.append(_table("Not lifted", ("module", "times", "at", "reason"), _by_reason(self.near_misses)))
        if failures := [(str(number), graph.failure) for number, graph in enumerate(self.graphs) if graph.failure]:
            parts.append(_table("Failures in fastft (these graphs run as they were)", ("graph", "cause"), failures))
        if self.stopped_by:
            parts.append(Text(f"The model then failed with {self.stopped_by}", style="bold"))
        parts.append(self._left())
        return Group(*parts)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue()

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), record=True, width=140)
        console.print(self)
        return console.export_html()

    def _summary(self) -> Text:
        before, after = (sum(getattr(graph, name) for graph in self.graphs) for name in ("nodes_before", "nodes_after"))
        counts = f"{_count(len(self.graphs), 'graph')}, {_count(len(self.breaks), 'break')}"
        lifted = f"{len(self.lifted)} lifted, {_count(len(self.near_misses), 'near miss', 'near misses')}"
        return Text(f"{counts}; {before} nodes, {after} after rewriting; {lifted}\n", style="bold")

    def _left(self) -> Text:
        left = sum((graph.left for graph in self.graphs), Counter[str]())
        rest = Counter({name: times for name, times in left.items() if not name.startswith("fastft.")})
        if not rest:
            return Text("Nothing is left to Inductor.")
        shown = ", ".join(f"{times} {name}" for name, times in rest.most_common(12))
        return Text(f"Left to Inductor: {shown}" + (f", and {len(rest) - 12} more kinds" if len(rest) > 12 else ""))


def _by_rule(lifted: Iterable[Lifted]) -> list[Sequence[str]]:
    rules: dict[str, Counter[str]] = {}
    for one in lifted:
        rules.setdefault(one.rule, Counter())[_layerless(one.module)] += 1
    return [(rule, str(modules.total()), _times(modules)) for rule, modules in rules.items()]


def _by_reason(misses: Iterable[NearMiss]) -> list[Sequence[str]]:
    kinds = Counter((_layerless(miss.module), _short(miss.source), f"{miss.rule}: {miss.reason}") for miss in misses)
    return [(module, str(times), at, _short(reason)) for (module, at, reason), times in kinds.items()]


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
        table.add_column(column, justify="right" if column == "times" else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
