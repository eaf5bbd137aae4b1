"""The passes, in order, over a captured graph and the graphs nested in it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule

import fastft.kernels  # noqa: F401  (registers the ops)
from fastft import patterns
from fastft.rewriter.compat import value_of
from fastft.rewriter.graph import bodies, name_of
from fastft.rewriter.lift import lift
from fastft.rewriter.report import GraphReport
from fastft.rewriter.rule import Rule

log = logging.getLogger("fastft")


def rewrite(gm: GraphModule, rules: Sequence[Rule] | None = None) -> GraphReport:
    """Rewrite ``gm`` and its bodies in place.  Raises what a pass raises."""
    report = GraphReport()
    chosen = patterns.RULES if rules is None else rules
    report.nodes_before = _size(gm)
    for body in bodies(gm):
        lift(body, chosen, report)
        body.graph.lint()
        body.recompile()
        report.left.update(_computed(body))
    report.nodes_after = _size(gm)
    log.debug("%d nodes, then %d", report.nodes_before, report.nodes_after)
    return report


def _size(gm: GraphModule) -> int:
    return sum(len(body.graph.nodes) for body in bodies(gm))


def _computed(gm: GraphModule) -> Counter[str]:
    """How often each function that computes a tensor occurs."""
    return Counter(
        name_of(node.target)
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_method") and isinstance(value_of(node), Tensor)
    )
