"""A report told by layers: what each kind of layer became, which layers share one region, and what was left."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from fastft.reasons import Reason
from fastft.rewriter.fx.metadata import layer_of
from fastft.rewriter.report.data import GraphReport, Lifted, NearMiss, Region

ELSEWHERE = "outside of layers"


def lifted_by_layer(graphs: Iterable[GraphReport]) -> list[tuple[str, str]]:
    """Tell what was lifted in the layers of each kind and outside of them: ``layers.* ×8``, ``2 rms_norm, attention``.

    Layers are of one kind if they are of one stack and the same was lifted in each; an op is its rule's first word.
    """
    layers: dict[str, Counter[str]] = {}
    for one in (one for graph in graphs for one in graph.lifted):
        layers.setdefault(layer_of(one.module), Counter())[op_of(one)] += 1
    kinds: Counter[tuple[str, str]] = Counter()
    for layer, ops in layers.items():
        kinds[_stack(layer) if layer else ELSEWHERE, counted(ops)] += 1
    return [(name if name == ELSEWHERE else f"{name} ×{times}", ops) for (name, ops), times in kinds.items()]


def regions_of(graph: GraphReport) -> str:
    """Tell which layers share a region, ``model.layers.0 ×8``; why the graph is whole if it has none."""
    shared = [f"{region.module or 'layers'} ×{region.calls}" for region in graph.regions if repeats(region)]
    return ", ".join(shared) or (f"whole: {plain(graph.whole)}" if graph.whole else "regions, none of them shared")


def repeats(region: Region) -> bool:
    """Tell whether several layers share this region."""
    return region.calls > 1


def left_by_reason(graphs: Iterable[GraphReport]) -> list[tuple[str, str, int]]:
    """Return op, reason and number of what was nearly lifted, the most frequent first; nodes are not told apart."""
    misses = Counter((op_of(miss), plain(miss.reason)) for graph in graphs for miss in graph.near_misses)
    return [(op, reason, times) for (op, reason), times in misses.most_common()]


def masks_of(graphs: Iterable[GraphReport]) -> list[tuple[str, int]]:
    """Return what the masks of attention mean, and of how many each."""
    return Counter(plain(mask.rule) for graph in graphs for mask in graph.masks).most_common()


def op_of(one: Lifted | NearMiss) -> str:
    """Return the op that a rule makes or looks for, by the first word of its name."""
    return one.rule.split(".")[0]


def counted(ops: Counter[str]) -> str:
    """List ops with their numbers: ``2 rms_norm, attention``."""
    return ", ".join(f"{times} {name}" if times > 1 else name for name, times in ops.items())


def plain(reason: str) -> str:
    """Return a reason without the numbers that tell a graph's nodes and symbols apart; its code stays."""
    text = re.sub(r"(?<=[A-Za-z])_\d+\b", "", reason)
    text = re.sub(r"\b[su]\d+\b", "s", text)
    return Reason(text, code=reason.code) if isinstance(reason, Reason) else text


def _stack(layer: str) -> str:
    return re.sub(r"\.\d+$", ".*", layer)
