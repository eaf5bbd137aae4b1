"""The part of docs/compatibility.md that is about models: tests/models/breadth*.py, checked one after the other."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
SECTIONS = {
    "DECODERS": "Decoders", "ADAPTERS": "Adapters, on a Llama", "BASES": "Base models in fewer bits, LoRA on a Llama",
    "PICTURES": "Pictures and sound", "HEADS": "Encoders and heads",
}  # fmt: skip
SHOWN = 4  # reasons in a cell
INTRODUCTION = """## Models

Each is a small model of that architecture with random weights, in float32, compiled whole and trained for a step on two
batches of two lengths; the same are tests (`tests/models/test_breadth.py`). *Loss* and *gradients* are how far the loss
and the farthest gradient are from eager's, relative to their norms; 1e-5 and 1e-4 are allowed (a gradient that is made
of rounding may differ by what a rounding of the weights moves it by). *Graphs*: of the first batch, + those that
another length takes besides. *Regions*: which layers share one, compiled once. *Left*: what a rule nearly took, or
where torch broke the graph, and why; what no rule knows is not in it.

`fastft check MODEL` does the same for any hub id, folder or script:

```text
fastft check Qwen/Qwen3-8B --adapter dora --quantization nf4
```

"""


def rows(only: str | None, device: str) -> Iterator[Row]:
    """The row of each model, those that need what is not installed left out."""
    from models import breadth, breadth_adapters, breadth_decoders, breadth_heads, breadth_pictures

    logging.disable(logging.NOTSET)  # what Dynamo logs tells where graphs break
    for section, title in SECTIONS.items():
        found = (
            getattr(one, section, ()) for one in (breadth_adapters, breadth_decoders, breadth_heads, breadth_pictures)
        )
        for case in (case for cases in found for case in cases):
            if only and only not in case.name:
                continue
            row = {"group": "models", "section": title, "name": case.name, "title": case.name, "error": ""}
            if missing := case.missing():
                print(f"{case.name}: {missing} is not installed", file=sys.stderr)
                continue
            try:
                yield row | told(breadth.run(case, device))
            except Exception as error:
                yield row | {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}


def told(found: Any) -> Row:
    """What a row says of a check."""
    return {
        "difference": found.gradient_difference, "allowed": found.gradient.allowed, "loss": found.loss_difference,
        "right": found.right, "lifted": dict(Counter(one.rule.split(".")[0] for one in found.report.lifted)),
        "graphs": len(found.graphs), "again": len(found.again), "regions": regions(found), "layers": layers(found),
        "whole": [graph.whole for graph in found.graphs if graph.whole], "left": found.left, "breaks": found.breaks,
    }  # fmt: skip


def regions(found: Any) -> str:
    """Which layers share a region, over all graphs; why there is none."""
    from fastft.rewriter.report import by_layer

    shared = [by_layer.regions_of(graph) for graph in found.graphs if any(map(by_layer.repeats, graph.regions))]
    whole = {by_layer.plain(graph.whole) for graph in found.graphs if graph.whole}
    return ", ".join(short_path(one) for one in shared) or f"none: {'; '.join(sorted(whole))}"


def layers(found: Any) -> str:
    """What was lifted in layers of each kind."""
    from fastft.rewriter.report import by_layer

    return (
        "; ".join(f"{short_path(name)}: {ops}" for name, ops in found.layers if name != by_layer.ELSEWHERE) or "nothing"
    )


def left(row: Row) -> str:
    """What was not lifted, and where graphs broke, the most frequent first."""
    reasons = Counter({f"{op}: {plain(reason)}": times for op, reason, times in row["left"]})
    broken = Counter(f"graph break at {at.rsplit('/', 1)[-1]}: {plain(reason)}" for reason, at in row["breaks"])
    cells = [f"{text} ×{times}" if times > 1 else text for text, times in (*broken.items(), *reasons.most_common())]
    more = len(cells) - SHOWN
    return "<br>".join([*cells[:SHOWN], *([f"and {more} more"] if more > 0 else [])])


def plain(reason: str) -> str:
    """A reason without the places of the library that it names."""
    text = re.sub(r"\s*\([^()]*\.py:\d+\)", "", reason).rstrip(".")
    return re.sub(r"laid out as .*", "laid out otherwise", text)[:160]


def short_path(text: str) -> str:
    """``base_model.model.model.layers.0`` as ``layers.0``, ``vision.encoder.layers.*`` as ``encoder.layers.*``."""
    text = re.sub(r"\b(?:base_model\.model\.)?(?:model\.)+", "", text)
    return re.sub(r"\b(?:\w+\.)+(\w+\.\w+\.(?:\d+|\*))", r"\1", text)


def section(mine: list[Row]) -> str:
    """The part of the page."""
    text = [INTRODUCTION]
    for row in {row["device"]: row for row in mine}.values():
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
        text.append(f"**{row['device']}**: commit {row['commit']}; {versions}.\n\n")
    for title in SECTIONS.values():
        there = [row for row in mine if row["section"] == title]
        if not there:
            continue
        text.append(
            f"### {title}\n\n| what | device | loss | gradients | graphs | regions | lifted in each layer "
            "| left, and why |\n"
        )
        text.append("|---|---|---|---|---|---|---|---|\n")
        text += [line(row) for row in there]
        text.append("\n")
    return "".join([*text, *whole(mine)])


def whole(mine: list[Row]) -> Iterator[str]:
    """The table of what keeps graphs from being divided into regions, without which none is planned."""
    kept: Counter[str] = Counter()
    for row in (row for row in mine if not row["error"]):
        reasons = {f"torch breaks the graph: {plain(reason)}" for reason, _ in row["breaks"]}
        if row["again"]:
            reasons.add("one graph is not for all lengths")
        if row["regions"].startswith("none"):
            reasons |= {f"no regions: {plain(reason)}" for reason in row["whole"]}
        kept.update(reasons)
    free = sum(not row["error"] and not row["regions"].startswith("none") for row in mine)
    alone = sum(not row["error"] and row["graphs"] == 1 and not row["again"] for row in mine)
    yield "### What keeps a model from being one graph with regions\n\n"
    yield f"Of {len(mine)} cases, {free} have regions that layers share; {alone} are one graph for both lengths.\n\n"
    yield "| reason | cases | share |\n|---|---|---|\n"
    for reason, cases in kept.most_common():
        yield f"| {escaped(reason)} | {cases} | {cases / len(mine):.0%} |\n"
    yield "\n"


def line(row: Row) -> str:
    """One line of a table."""
    if row["error"]:
        return f"| {row['title']} | {row['device']} | **{escaped(row['error'])}** | | | | | |\n"
    graphs = f"{row['graphs']} + {row['again']}" if row["again"] else str(row["graphs"])
    right = "" if row["right"] else "**wrong** "
    cells = [row["title"], row["device"], f"{right}{row['loss']:.1e}", f"{row['difference']:.1e}", graphs]
    return " ".join(f"| {escaped(cell)}" for cell in (*cells, row["regions"], row["layers"], left(row))) + " |\n"


def escaped(cell: str) -> str:
    """Text that ends no cell and marks nothing up."""
    return re.sub(r"([|*])", r"\\\1", cell) if "**" not in cell else cell
