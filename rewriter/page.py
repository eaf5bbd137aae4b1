"""A report as one HTML page that needs nothing else: pictures and tables, every name escaped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import torch

from fastft.rewriter.advice import advice
from fastft.rewriter.listing import Line

if TYPE_CHECKING:
    from fastft.rewriter.report import GraphReport, Report

DEEPEST = 2  # names below a layer: what is further inside a module is told as the module's
LAYER = re.compile(r"^(.*?\.?)(\d+)(?:\.|$)")  # the outermost number in a module's path
STYLE = """
:root{color-scheme:light dark;--line:#8883;--soft:#8881;--ours:#22883322;--mine:#1a6e2a;--miss:#ee667733}
@media(prefers-color-scheme:dark){:root{--mine:#7fd68f}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2.2rem 0 .5rem}
.big{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0}
.big div{border:1px solid var(--line);border-radius:.5rem;padding:.5rem .9rem}
.big b{display:block;font-size:1.35rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem}
td,th{border-bottom:1px solid var(--line);padding:.2rem .6rem;text-align:left;vertical-align:top}
td.n{text-align:right}td.c{text-align:center;padding:.2rem .3rem}td.hit{background:var(--ours)}
code{font-size:.85em}
.call{display:inline-block;background:var(--soft);border-radius:.3rem;padding:0 .35rem;margin:.08rem}
.call{font:.78rem monospace}
.ours{background:var(--ours);color:var(--mine);font-weight:600}.many{opacity:.65}
.advice{color:var(--mine)}.missed td{background:var(--miss)}details{margin:.4rem 0}img{max-width:100%}
summary{cursor:pointer}.soft{opacity:.7}
"""


def page(report: Report) -> str:
    """The whole page."""
    from fastft.rewriter import report as text

    graphs = report.graphs
    columns, regions = text._regions(graphs)
    sections = [
        ("Where the graph breaks", _told([(text._short(at), why) for why, at in report.breaks], ("at", "reason"))),
        ("Failures in fastft: these graphs run as they were", _table(text._failures(graphs), ("graph", "cause"))),
        ("What is not fused, and what to change", _missed(report)),
        ("Matches by layer", _matrix(report)),
        ("A layer before and after", "".join(_before_and_after(graph) for graph in graphs)),
        ("Memory of a step", "".join(_memory(graph) for graph in graphs)),
        ("Kernels", _kernels(graphs)),
        ("Regions, each compiled once", _table(regions, columns)),
        ("Compiled", _table(text._compiled(graphs), ("graph", "of", "seconds", "changing sizes", "cache"))),
        ("Compiled again", _table(text._counted(graph.reason for graph in graphs), ("reason", "times"))),
        ("Compiled whole", _table(text._counted(graph.whole for graph in graphs), ("reason", "times"))),
        ("Logits that are computed only when they are read", _table(text._deferred(graphs), ("module", "read"))),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    stopped = f"<p><b>The model then failed with {escape(report.stopped_by)}</b></p>" if report.stopped_by else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastft report</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>What fastft makes of this model</h1>{stopped}{_headline(report)}{body}"
        f'<section><h2>The rest</h2><p class="soft">{escape(str(report._left()))}</p></section></body></html>'
    )


def _headline(report: Report) -> str:
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


def _table(rows: Iterable[Sequence[str]], columns: Sequence[str], kind: str = "") -> str:
    """Cells are escaped; line breaks stay."""
    lines = [f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    if not lines:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _text(cell: str) -> str:
    """Escaped; from an arrow at the beginning of a line on, it is advice."""
    lines = escape(cell).split("\n")
    return "<br>".join(f'<span class="advice">{line}</span>' if line.startswith("→") else line for line in lines)


def _told(rows: Sequence[tuple[str, str]], columns: Sequence[str]) -> str:
    return _table([(at, f"{why}\n→ {told}" if (told := advice(why)) else why) for at, why in rows], columns)


def _missed(report: Report) -> str:
    from fastft.rewriter import report as text

    dense = [mask for mask in report.masks if mask.rule.startswith("dense")]
    rows = [*text._by_reason(report.near_misses)]
    rows += [(modules, times, "", reason) for reason, times, modules in text._masks(dense)]
    return _table(rows, ("module", "times", "at", "reason"))


def _matrix(report: Report) -> str:
    """Rules by layers: how often each applies in each."""
    counts: dict[str, Counter[int]] = {}
    for one in (*report.lifted, *report.fused, *report.masks):
        found = LAYER.match(one.module)
        counts.setdefault(one.rule, Counter())[int(found[2]) if found else -1] += 1
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
    """For each kind of layer the calls of one, module by module; the rest of the graph folded up."""
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
    """Those inside a layer; of no layer, if layer is ""."""
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
    from fastft.rewriter.report import _FATES

    if graph.plan is None:
        return ""
    fates = _table(graph.plan.rows(), _FATES)
    return (
        f"<p>{escape(str(graph.plan))}</p>{graph.plan.html()}"
        f"<details><summary>what becomes of each tensor</summary>{fates}</details>"
    )


def _kernels(graphs: Sequence[GraphReport]) -> str:
    """Which ops there are, and what computes them on the device that the model is on."""
    from fastft.kernels import dispatch
    from fastft.kernels.registry import REGISTRY

    rows = []
    for graph in graphs:
        counts = Counter(line.call for line in graph.after if line.ours)
        device = torch.device(graph.device or "cpu")
        dtypes = dispatch.triton_dtypes(device) if device.type != "cuda" or torch.cuda.is_available() else frozenset()
        for call, times in counts.items():
            name = call.removeprefix("fastft.").removesuffix(".default")
            forward = REGISTRY.get(f"fastft::{name}")
            backward = REGISTRY.get(f"fastft::{name}_backward")
            here = "Triton, or a kernel of torch's where that is faster" if dtypes else f"plain PyTorch, on {device}"
            launches = " · ".join(one.launches for one in (forward, backward) if one is not None)
            rows.append((f"fastft::{name}", str(times), launches, here))
    return _table(rows, ("op", "calls", "forward · backward, in kernels/", "computed here by"))
