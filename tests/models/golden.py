"""What explain() says of tiny models of the families, as text that is kept: python tests/models/golden.py [--write]

golden/<family>.txt has what is matched and what is not: rules by module, what was fused, masks, near misses with their
reasons, regions, and which logits are deferred.  A change of the rewriter that matches anything otherwise shows as a
difference of these files.  Left out is what hangs on versions of torch, transformers and others: lines of code, numbers
of nodes, functions that were not lifted, the plan of memory.

Without --write the differences are printed, and the exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

import fastft  # noqa: E402
from fastft.rewriter.report.data import Lifted, NearMiss, ReportData  # noqa: E402
from models.families import FAMILIES, OTHERS, Family, batch, build  # noqa: E402

FOLDER = HERE / "golden"
DEPTH = 3  # a first layer, and several of one kind
# Windows that are shorter than the batch, which those of the configurations are not; layers of two kinds in gemma3.
WINDOW = {"sliding_window": 8}
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": WINDOW,
    "gemma2": WINDOW,
    "gemma3": {**WINDOW, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
}
OTHERS_KEPT = (
    "olmo2",  # norms behind blocks
    "glm4",  # packed gates, pairs of neighbours
    "cohere",  # attention and MLP beside each other, a LayerNorm written out
    "gpt_neox",  # nothing gated
    "falcon",  # one key head
)
KEPT = (*FAMILIES, *(family for family in OTHERS if family.name in OTHERS_KEPT))
WRITE = "python tests/models/golden.py --write"


def has_adapters(family: Family) -> bool:
    """Whether this family is kept with LoRA on 4-bit weights; the others are trained whole."""
    return family in FAMILIES


def explained(family: Family) -> ReportData:
    """What explain() reports; without the plan of memory, which takes as long as the rest and is not kept."""
    torch._dynamo.reset()
    adapted = has_adapters(family)
    family = replace(family, sizes={**family.sizes, **WINDOWED.get(family.name, {})})
    model = build(family, nf4=adapted, checkpoint=False, train_norms=False, layers=DEPTH, lora=adapted)
    with mock.patch("fastft.rewriter.explain._planned", return_value=None):
        return fastft.explain(model, **batch(padded=True))


def text_of(family: Family, report: ReportData) -> str:
    """The report as it is kept."""
    how = "LoRA on NF4 weights" if has_adapters(family) else "trained whole"
    regions = [region for graph in report.graphs for region in graph.regions]
    parts = {
        "lifted": _counted(f"{one.rule}  {_place(one)}" for one in report.lifted),
        "fused": _counted(f"{one.rule}  {_place(one)}" for one in report.fused),
        "masks": _counted(f"{one.rule}  {_place(one)}" for one in report.masks),
        "near misses": _counted(f"{one.rule}  {_place(one)}  {_reason(one.reason)}" for one in report.near_misses),
        "regions": [f"{region.calls:4}  {region.module or '(the rest)'}" for region in regions],
        "compiled whole": _counted(_reason(graph.whole) for graph in report.graphs if graph.whole),
        "logits deferred": _counted(module for graph in report.graphs for module in graph.deferred),
        "failures": _counted(graph.failure for graph in report.graphs if graph.failure),
    }
    lines = [f"{family.name}, {how}, {DEPTH} layers, a padded batch; {len(report.graphs)} graph(s)"]
    for title, found in parts.items():
        lines += ["", title, *(found or ["   -"])]
    return "\n".join(lines) + "\n"


def _counted(texts: Iterable[str]) -> list[str]:
    """Each text once, behind its number."""
    return [f"{times:4}  {text}" for text, times in sorted(Counter(texts).items())]


def _place(one: Lifted | NearMiss) -> str:
    """The module, that of all layers alike."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", one.module) or "(the model)"


def _reason(text: str) -> str:
    """A reason without the lines of code that it names."""
    return re.sub(r" \([^()]*\.py:\d+\)", "", text)


def path_of(family: Family) -> Path:
    return FOLDER / f"{family.name}.txt"


def difference(family: Family, text: str) -> str:
    """What is no more as it is kept, as a diff; "" if nothing is."""
    path = path_of(family)
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    name = f"tests/models/golden/{path.name}"
    return "\n".join(difflib.unified_diff(kept.splitlines(), text.splitlines(), name, "now", lineterm=""))


def main() -> int:
    """Write the files, or print what has changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="renew the files")
    write, changed = parser.parse_args().write, False
    for family in KEPT:
        text = text_of(family, explained(family))
        if found := difference(family, text):
            changed = True
            print(found)
        if write:
            path_of(family).write_text(text, encoding="utf-8")
    return int(changed and not write)


if __name__ == "__main__":
    sys.exit(main())
