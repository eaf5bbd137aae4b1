"""Lift: pieces of the graph become the ops that the rules name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fastft.rewriter import compat
from fastft.rewriter.compat import value_of
from fastft.rewriter.match import Match, Mismatch, find
from fastft.rewriter.pattern import templates
from fastft.rewriter.report import GraphReport, Lifted, NearMiss
from fastft.rewriter.rule import Rule
from fastft.rewriter.verify import Verifier


def lift(gm: GraphModule, rules: Sequence[Rule], report: GraphReport) -> None:
    """Apply ``rules`` to one graph; what matched and what nearly did goes into ``report``."""
    dtypes = frozenset(
        value.dtype
        for node in gm.graph.nodes
        if isinstance(value := value_of(node), Tensor) and value.is_floating_point()
    )
    verifier = Verifier()
    for anchor in list(gm.graph.nodes):
        candidates = [rule for rule in rules if anchor.target == rule.anchor]
        if candidates:
            _lift_at(anchor, candidates, dtypes, verifier, report)


def _lift_at(
    anchor: Node, rules: Sequence[Rule], dtypes: frozenset[torch.dtype], verifier: Verifier, report: GraphReport
) -> None:
    """Apply the rule that explains most of the graph around this anchor; if none applies, keep the nearest's reason.

    Of two that match, the larger is the more specific: a norm and its cast, not the norm with the cast left over.
    """
    attempts = [find(pattern, anchor) for rule in rules for pattern in templates(rule, dtypes)]
    found = sorted((one for one in attempts if isinstance(one, Match)), key=lambda match: -len(match.calls))
    reason = rule = None
    for match in found:
        refusal = verifier.reason(match)
        if refusal is None:
            report.lifted.append(
                Lifted(match.rule.name, compat.module_path(match.root), compat.source_line(match.root))
            )
            _replace(match)
            return
        if reason is None:
            rule, reason = match.rule, refusal
        if match.rule.replacement is None:
            break
    if reason is None:
        missed = [one for one in attempts if isinstance(one, Mismatch) and one.reason]
        if not missed:
            return
        nearest = max(missed, key=lambda mismatch: (mismatch.matched, mismatch.rule.replacement is not None))
        rule, reason = nearest.rule, nearest.reason
    assert rule is not None
    report.near_misses.append(NearMiss(rule.name, compat.module_path(anchor), compat.source_line(anchor), reason))


def _replace(found: Match) -> None:
    """Put the replacement's calls where the root was, and take the matched nodes out."""
    root, rule = found.root, found.rule
    assert rule.replacement is not None
    graph: Graph = root.graph
    tracer = GraphAppendingTracer(graph)
    arguments = {
        name: Proxy(bound, tracer) if isinstance(bound, Node) else bound for name, bound in found.arguments.items()
    }
    before = set(graph.nodes)
    with graph.inserting_before(root):
        result = rule.replacement(**arguments)
    for node in graph.nodes:
        if node not in before:
            node.meta = {key: value for key, value in root.meta.items() if key != "example_value"}
    compat.set_value(result.node, value_of(root))
    root.replace_all_uses_with(result.node)
    for node in reversed(list(found.calls.values())):
        if not node.users:
            graph.erase_node(node)
