"""A report as tables of text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastft.rewriter.report.advice import with_advice
from fastft.rewriter.report.data import GraphReport, Lifted, NearMiss, ReportData, RuleRecord

BREAKS, FAILURES, MISSED = "Graph breaks", "Failures in fastft (these graphs run as they were)", "Not lifted"
LIFTED, FUSED = "Lifted", "Of these, fused"
MEMORY, FATES = "Memory", "What layers do with their activations"
LOADS = "Experts, over all layers and steps so far"
SLOWEST = 8  # rules that are shown
_NUMBERS = (
    "after",
    "tried",
    "matched",
    "applied",
    "ms",
    "graph",
    "times",
    "calls",
    "nodes",
    "seconds",
    "MiB",
    "µs",
)  # columns


def tables(report: ReportData) -> list[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Return title, columns and rows of all tables that have any."""
    graphs = report.graphs
    found: list[tuple[str, Sequence[str], list[Sequence[str]]]] = [
        (BREAKS, ("at", "reason"), breaks(report)),
        ("Compiled", ("graph", "of", "seconds", "changing sizes", "cache"), _compiled(graphs)),
        ("Compiled again", ("reason", "times"), _counted(graph.reason for graph in graphs)),
        ("Regions, each compiled once", *_regions(graphs)),
        ("Compiled whole", ("reason", "times"), _counted(graph.whole for graph in graphs)),
        (MEMORY, ("graph", "plan"), _plans(graphs)),
        ("Rows of padded batches", ("graph", "rows"), _rows(graphs)),
        (LOADS, ("experts a layer", "chosen by tokens", "busiest / mean", "never chosen"), _loads(report)),
        (FATES, ("layers", "tensor", "shape", "fate", "MiB", "µs"), _fates(graphs)),
        ("Checkpoints that gave way to the plan", ("module", "times"), _inlined(graphs)),
        (LIFTED, ("rule", "times", "modules"), _by_rule(report.lifted)),
        (FUSED, ("rule", "times", "modules"), _by_rule(report.fused)),
        ("Masks of attention", ("mask", "times", "modules"), _masks(report.masks)),
        ("Logits that are computed only when they are read", ("module", "read"), _deferred(graphs)),
        (MISSED, ("module", "times", "at", "reason"), _by_reason(report.near_misses)),
        (FAILURES, ("graph", "cause"), _failures(graphs)),
        ("What passes took", ("pass", "nodes", "after", "ms"), _passes(graphs)),
        (f"What rules took, the slowest {SLOWEST}", ("rule", "tried", "matched", "applied", "ms"), _rules(graphs)),
    ]
    return [table for table in found if table[2]]


def as_rich(report: ReportData) -> RenderableType:
    """Render the whole report for a terminal."""
    stopped = [Text(f"The model then failed with {report.stopped_by}", style="bold")] if report.stopped_by else []
    return Group(summary(report), *(as_table(*table) for table in tables(report)), *stopped, left_to_inductor(report))


def summary(report: ReportData) -> Text:
    """Count graphs, nodes and matches in one line."""
    before, after = (sum(getattr(graph, name) for graph in report.graphs) for name in ("nodes_before", "nodes_after"))
    seconds = sum(graph.seconds for graph in report.graphs)
    broken = f", {count(len(report.breaks), 'break')}"
    counts = count(len(report.graphs), "graph") + (f" compiled in {seconds:.1f} s" if seconds else broken)
    lifted = f"{len(report.lifted)} lifted, {count(len(report.near_misses), 'near miss', 'near misses')}"
    return Text(f"{counts}; {before} nodes, {after} after rewriting; {lifted}\n", style="bold")


def left_to_inductor(report: ReportData) -> Text:
    """Name the calls that no rule took, the most frequent first."""
    left = sum((graph.left for graph in report.graphs), Counter[str]())
    rest = Counter({name: times for name, times in left.items() if not name.startswith("fastft.")})
    if not rest:
        return Text("Nothing is left to Inductor.")
    shown = ", ".join(f"{times} {name}" for name, times in rest.most_common(12))
    return Text(f"Left to Inductor: {shown}" + (f", and {len(rest) - 12} more kinds" if len(rest) > 12 else ""))


def breaks(report: ReportData) -> list[Sequence[str]]:
    """List where graphs were broken, and why."""
    return [(short(at), with_advice(why)) for why, at in report.breaks]


def _compiled(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    return [
        (str(number), short(graph.place), f"{graph.seconds:.1f}", ", ".join(graph.dynamic), _cache(graph.cache))
        for number, graph in enumerate(graphs)
        if graph.seconds
    ]


def _cache(counts: Counter[str]) -> str:
    return ", ".join(f"{times} {name}" for name, times in counts.items() if times)


def _regions(graphs: Sequence[GraphReport]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return columns and rows; the graph only where there are several, seconds where anything was compiled."""
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


def _loads(report: ReportData) -> list[Sequence[str]]:
    """Tell how evenly tokens chose experts."""
    return [
        (str(load.experts), f"{load.tokens:,} times", f"{load.busiest:.2f}", str(load.idle)) for load in report.loads
    ]


def _rows(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    """Tell which rows are run of graphs that have layers."""
    asked = [(number, graph.rows) for number, graph in enumerate(graphs) if graph.rows is not None and graph.regions]
    return [(str(number), with_advice(rows.told) if rows.reason else rows.told) for number, rows in asked]


def _fates(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    return [row for graph in graphs if graph.plan is not None for row in graph.plan.rows()]


def _passes(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    """List the passes over all graphs, those that took less than a millisecond and changed nothing left out."""
    rows: dict[str, list[float]] = {}
    for graph in graphs:
        for record in graph.passes:
            sums = rows.setdefault(record.name, [0, 0, 0.0])
            sums[:] = sums[0] + record.nodes_before, sums[1] + record.nodes_after, sums[2] + record.seconds
    return [
        (name, str(before), str(after), f"{seconds * 1e3:,.0f}")
        for name, (before, after, seconds) in rows.items()
        if seconds >= 1e-3 or before != after
    ]


def _rules(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    """List the slowest rules: at how many anchors each was tried, matched and was applied."""
    sums: dict[str, RuleRecord] = {}
    for graph in graphs:
        for name, record in graph.rules.items():
            sums.setdefault(name, RuleRecord()).add(record)
    slowest = sorted(sums.items(), key=lambda pair: -pair[1].seconds)[:SLOWEST]
    return [
        (name, str(record.attempts), str(record.matches), str(record.applied), f"{record.seconds * 1e3:,.0f}")
        for name, record in slowest
    ]


def _inlined(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    modules = Counter(_layerless(module) for graph in graphs for module in graph.inlined)
    return [(module, str(times)) for module, times in modules.items()]


def _counted(reasons: Iterable[str]) -> list[Sequence[str]]:
    return [(short(with_advice(reason)), str(times)) for reason, times in Counter(filter(None, reasons)).items()]


def _failures(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    return [(str(number), graph.failure) for number, graph in enumerate(graphs) if graph.failure]


def _deferred(graphs: Sequence[GraphReport]) -> list[Sequence[str]]:
    return [
        (module, "\n".join(f"{times} times at {short(at)}" for at, times in graph.reads.items()) or "never")
        for graph in graphs
        for module in graph.deferred
    ]


def _by_rule(lifted: Iterable[Lifted]) -> list[Sequence[str]]:
    rules: dict[str, Counter[str]] = {}
    for one in lifted:
        rules.setdefault(one.rule, Counter())[_layerless(one.module)] += 1
    return [(rule, str(modules.total()), _times(modules)) for rule, modules in rules.items()]


def _masks(masks: Iterable[Lifted]) -> list[Sequence[str]]:
    return [(short(with_advice(mask)), times, modules) for mask, times, modules in _by_rule(masks)]


def _by_reason(misses: Iterable[NearMiss]) -> list[Sequence[str]]:
    kinds = Counter(
        (_layerless(miss.module), short(miss.source), f"{miss.rule}: {short(with_advice(miss.reason))}")
        for miss in misses
    )
    return [(module, str(times), at, reason) for (module, at, reason), times in kinds.items()]


def _times(modules: Counter[str]) -> str:
    return "\n".join(f"{name} ×{times}" if times > 1 else name for name, times in modules.items())


def _layerless(module: str) -> str:
    """Replace numbers in a path, so that layers share a line: ``layers.*.input_layernorm``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module) or "(the model itself)"


def short(text: str) -> str:
    """Cut paths down to their last two parts."""
    return re.sub(r"(?:[A-Za-z]:)?[\w.~\-+ ]*[/\\](?:[^/\\\s:]+[/\\])*([^/\\\s:]+[/\\][^/\\\s:]+:\d+)", r"\1", text)


def count(number: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun: ``1 graph``, ``2 graphs``."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def as_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Render one table for a terminal."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
