"""A report as one HTML page that needs nothing else: pictures and tables, every name escaped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

import torch

from fastft.kernels.core import dispatch
from fastft.kernels.core.registry import REGISTRY
from fastft.rewriter.report import tables as text
from fastft.rewriter.report.data import GraphReport, ReportData
from fastft.rewriter.report.graph_listing import Line
from fastft.rewriter.report.tables import BREAKS, FAILURES, FATES, FUSED, LIFTED, MEMORY, MISSED

DEEPEST = 2  # names below a layer: what is further inside a module is told as the module's
LAYER = re.compile(r"^(.*?\.?)(\d+)(?:\.|$)")  # the outermost number in a module's path
STYLE = """
:root{color-scheme:light dark;--line:#8883;--soft:#8881;--ours:#22883322;--mine:#1a6e2a}
@media(prefers-color-scheme:dark){:root{--mine:#7fd68f}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2.2rem 0 .5rem}
.big{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0}
.big div{border:1px solid var(--line);border-radius:.5rem;padding:.5rem .9rem}
.big b{display:block;font-size:1.35rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem}
td,th{border-bottom:1px solid var(--line);padding:.2rem .6rem;text-align:left;vertical-align:top}
td.c{text-align:center;padding:.2rem .3rem}td.hit{background:var(--ours)}
code{font-size:.85em}
.call{display:inline-block;background:var(--soft);border-radius:.3rem;padding:0 .35rem;margin:.08rem}
.call{font:.78rem monospace}
.ours{background:var(--ours);color:var(--mine);font-weight:600}
.advice{color:var(--mine)}details{margin:.4rem 0}img{max-width:100%}
summary{cursor:pointer}.soft{opacity:.7}
"""


def page(report: ReportData) -> str:
    """Return the whole page: what goes wrong, then pictures, then the tables that no picture stands for."""
    tables = {title: _table(columns, rows) for title, columns, rows in text.tables(report)}
    fates, graphs = tables.pop(FATES, ""), report.graphs
    for title in (MEMORY, LIFTED, FUSED):
        tables.pop(title, None)
    troubles = [(title, tables.pop(title, "")) for title in (BREAKS, FAILURES, MISSED)]
    pictures = [
        ("Matches by layer", _matrix(report)),
        ("A layer before and after", "".join(_before_and_after(graph) for graph in graphs)),
        ("Memory of a step", "".join(_memory(graph) for graph in graphs) + _folded(FATES, fates)),
        ("Kernels", _kernels(graphs)),
    ]
    sections = (*troubles, *pictures, *tables.items())
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    stopped = f"<p><b>The model then failed with {escape(report.stopped_by)}</b></p>" if report.stopped_by else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastft report</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>What fastft makes of this model</h1>{stopped}{_headline(report)}{body}"
        f'<section><h2>The rest</h2><p class="soft">{escape(str(text.left_to_inductor(report)))}</p></section>'
        "</body></html>"
    )


def _headline(report: ReportData) -> str:
    graphs = report.graphs
    before, after = (sum(getattr(graph, name) for graph in graphs) for name in ("nodes_before", "nodes_after"))
    seconds = sum(graph.seconds for graph in graphs)
    figures = [
        (f"{before:,} → {after:,}", "calls in the graph"),
        (str(len(report.lifted)), "lifted to fused ops"),
        (str(len(report.near_misses)), "near misses"),
        (str(len(graphs)), "graph" if len(graphs) == 1 else "graphs"),
        (str(len(report.breaks)), "graph breaks"),
        *([(f"{seconds:.1f} s", "to compile")] if seconds else []),
    ]
    return f'<div class="big">{"".join(f"<div><b>{figure}</b>{name}</div>" for figure, name in figures)}</div>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are escaped; line breaks stay."""
    lines = [f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>' if lines else ""


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>" if content else ""


def _text(cell: str) -> str:
    """Escaped; from an arrow at the beginning of a line on, it is advice."""
    lines = escape(cell).split("\n")
    return "<br>".join(f'<span class="advice">{line}</span>' if line.startswith("→") else line for line in lines)


def _matrix(report: ReportData) -> str:
    """Rules by layers: how often each applies in each."""
    counts: dict[str, Counter[int]] = {}
    for lifted in (*report.lifted, *report.fused, *report.masks):
        found = LAYER.match(lifted.module)
        counts.setdefault(lifted.rule, Counter())[int(found[2]) if found else -1] += 1
    layers = sorted({layer for row in counts.values() for layer in row})
    if not layers:
        return ""
    head = "".join(f'<th class="c">{"else" if layer < 0 else layer}</th>' for layer in layers)
    rows = "".join(
        f"<tr><td>{_text(rule)}</td>"
        + "".join(f'<td class="c hit">{row[at]}</td>' if row[at] else '<td class="c"></td>' for at in layers)
        + "</tr>"
        for rule, row in counts.items()
    )
    return f'<div class="scroll"><table><tr><th>rule or mask</th>{head}</tr>{rows}</table></div>'


def _before_and_after(graph: GraphReport) -> str:
    """Show one layer of each kind before and after, module by module; the rest of the graph folded up."""
    if not graph.before:
        return ""
    kinds = [region for region in graph.regions if region.module]
    parts = [
        f"<details{' open' if number == len(kinds) - 1 else ''}><summary><code>{escape(region.module)}</code>"
        f" ({region.calls} of its kind)</summary>{_side_by_side(graph, region.module)}</details>"
        for number, region in enumerate(kinds)
    ]
    rest = "outside layers" if kinds else "the whole graph"
    return "".join(parts) + f"<details><summary>{rest}</summary>{_side_by_side(graph, '')}</details>"


def _side_by_side(graph: GraphReport, layer: str) -> str:
    before, after = (_by_module(side, layer) for side in (graph.before, graph.after))
    rows = "".join(
        f"<tr><td><code>{escape(module or ('(the layer)' if layer else '(the model)'))}</code></td>"
        f"<td>{_calls(before.get(module, []))}</td><td>{_calls(after.get(module, []))}</td></tr>"
        for module in dict.fromkeys((*before, *after))
    )
    return f'<div class="scroll"><table><tr><th>module</th><th>before</th><th>after</th></tr>{rows}</table></div>'


def _by_module(lines: Sequence[Line], layer: str) -> dict[str, list[Line]]:
    """Group the lines inside a layer by module; those of no layer, if layer is ""."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        inside = line.module == layer or line.module.startswith(f"{layer}.") if layer else not LAYER.match(line.module)
        if inside:
            found.setdefault(_outer(line.module, layer), []).append(line)
    return found


def _outer(module: str, layer: str) -> str:
    names = module.removeprefix(layer).lstrip(".").split(".") if layer else module.split(".")
    return ".".join(filter(None, names[:DEEPEST])) if layer else module


def _calls(lines: Sequence[Line]) -> str:
    """Chips in order; the same call in a row is one with a number."""
    chips: list[tuple[Line, int]] = []
    for line in lines:
        if chips and chips[-1][0].call == line.call:
            chips[-1] = (chips[-1][0], chips[-1][1] + 1)
        else:
            chips.append((line, 1))
    return "".join(
        f'<span class="call{" ours" if line.ours else ""}" title="{escape(line.result)}">{escape(line.call)}'
        f"{f' ×{count}' if count > 1 else ''}</span>"
        for line, count in chips
    )


def _memory(graph: GraphReport) -> str:
    return f"<p>{escape(str(graph.plan))}</p>{graph.plan.html()}" if graph.plan is not None else ""


def _kernels(graphs: Sequence[GraphReport]) -> str:
    """List the ops, and what computes them on the device that the model is on."""
    rows = []
    for graph in graphs:
        counts = Counter(line.call for line in graph.after if line.ours)
        device = torch.device(graph.device or "cpu")
        dtypes = dispatch.triton_dtypes(device) if device.type != "cuda" or torch.cuda.is_available() else frozenset()
        for call, times in counts.items():
            name = call.removeprefix("fastft.")
            forward = REGISTRY.get(f"fastft::{name}")
            backward = REGISTRY.get(f"fastft::{name}_backward")
            here = "Triton, or a kernel of torch's where that is faster" if dtypes else f"plain PyTorch, on {device}"
            launches = " · ".join(entry.launches for entry in (forward, backward) if entry is not None)
            rows.append((f"fastft::{name}", str(times), launches, here))
    return _table(("op", "calls", "forward · backward, in kernels/", "computed here by"), rows)
