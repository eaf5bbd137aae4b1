"""Lift: pieces of the graph become the ops that the rules name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fastft.rewriter import compat
from fastft.rewriter.compat import value_of
from fastft.rewriter.graph import between
from fastft.rewriter.match import Match, Mismatch, find
from fastft.rewriter.normalize import view
from fastft.rewriter.pattern import templates
from fastft.rewriter.report import GraphReport, Lifted, NearMiss
from fastft.rewriter.rule import Rule
from fastft.rewriter.verify import Verifier

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})  # what a reference is traced at


def lift(gm: GraphModule, rules: Sequence[Rule], report: GraphReport) -> None:
    """Apply ``rules`` to one graph; what matched and what nearly did goes into ``report``."""
    _Lifting(gm.graph, rules, report).run()


class _Lifting:
    """Matches are found in a normalised view and carried out in the graph itself."""

    def __init__(self, graph: Graph, rules: Sequence[Rule], report: GraphReport):
        self.graph, self.rules, self.report = graph, rules, report
        self.view, self.originals = view(graph)
        self.casts = set(graph.nodes) - set(self.originals.values())  # those that return their input, as the view saw
        self.replaced: list[Node] = []
        self.verifier = Verifier(self.view)
        values = [value_of(node) for node in graph.nodes]
        self.dtypes = frozenset(value.dtype for value in values if isinstance(value, Tensor)) & DTYPES

    def run(self) -> None:
        for anchor in self.view.nodes:
            rules = [rule for rule in self.rules if anchor.target == rule.anchor]
            if rules:
                self._lift_at(anchor, rules)
        for cast in self.casts:
            cast.replace_all_uses_with(cast.args[0])
        unused = self.casts | set(self.replaced)
        for node in reversed([node for node in self.graph.nodes if node in unused]):
            self.graph.erase_node(node)

    def _lift_at(self, anchor: Node, rules: Sequence[Rule]) -> None:
        """Apply the rule that explains most of the graph around this anchor, or keep the nearest's reason.

        Of two that match, the larger is the more specific: a norm and its cast, not the norm with the cast left over.
        """
        attempts = [find(pattern, anchor) for rule in rules for pattern in templates(rule, self.dtypes)]
        found = sorted((one for one in attempts if isinstance(one, Match)), key=lambda match: -len(match.calls))
        refusals = []
        for match in found:
            refusal = self.verifier.reason(match)
            if refusal is None:
                self.report.lifted.append(Lifted(match.rule.name, *_place(match.root)))
                self._replace(match)
                return
            refusals.append((match.rule, refusal))
            if match.rule.replacement is None:
                break
        missed = [one for one in attempts if isinstance(one, Mismatch) and one.reason]
        if not refusals and missed:
            nearest = max(missed, key=lambda mismatch: (mismatch.matched, mismatch.rule.replacement is not None))
            refusals.append((nearest.rule, nearest.reason))
        if refusals:
            rule, reason = refusals[0]
            self.report.near_misses.append(NearMiss(rule.name, *_place(anchor), reason))

    def _replace(self, found: Match) -> None:
        """Put the replacement's calls where the root was, and take the matched nodes out."""
        assert found.rule.replacement is not None
        root, tracer = self.originals[found.root], GraphAppendingTracer(self.graph)
        arguments = {
            name: Proxy(self.originals[bound], tracer) if isinstance(bound, Node) else bound
            for name, bound in found.arguments.items()
        }
        previous = root.prev
        with self.graph.inserting_before(root):
            result = found.rule.replacement(**arguments).node
        for node in between(previous, root):
            node.meta = {key: value for key, value in root.meta.items() if key != "example_value"}
        compat.set_value(result, value_of(root))
        root.replace_all_uses_with(result)
        self.replaced += [self.originals[node] for node in found.calls.values()]
        self.originals[found.root] = result


def _place(node: Node) -> tuple[str, str]:
    return compat.module_path(node), compat.source_line(node)
