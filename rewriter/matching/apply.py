"""Lift: pieces of the graph become the ops that the rules name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.capture.normalize import splits, view
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.editing import annotate_like, between, infer_requires_grad
from fastft.rewriter.fx.metadata import layer_of, module_path, source_line
from fastft.rewriter.matching.checks import Verifier, placement
from fastft.rewriter.matching.matcher import Match, Mismatch, find
from fastft.rewriter.matching.pattern import fold, templates
from fastft.rewriter.matching.rule import Rule
from fastft.rewriter.report.data import GraphReport, Lifted, NearMiss

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})  # what a reference is traced at


def lift(gm: GraphModule, rules: Sequence[Rule], report: GraphReport) -> None:
    """Apply ``rules`` to one graph; what matched and what nearly did goes into ``report``."""
    report.lifted += _Lifting(gm, rules, report.near_misses).run()


def fuse(gm: GraphModule, rules: Sequence[Rule], report: GraphReport, *, across_layers: bool) -> None:
    """Apply ``rules``, which merge what was lifted.  What stays apart is nothing missed.

    across_layers: or else all that is merged belongs to one layer.
    """
    report.fused += _Lifting(gm, rules, [], across_layers).run()


class _Lifting:
    """Matches are found in a normalised view and carried out in the graph itself."""

    def __init__(self, gm: GraphModule, rules: Sequence[Rule], near_misses: list[NearMiss], across_layers: bool = True):
        self.rules, self.near_misses, self.across_layers = rules, near_misses, across_layers
        graph = self.graph = gm.graph
        self.view, self.originals = view(graph)
        self.casts = set(graph.nodes) - set(self.originals.values())  # what returns its input, as the view saw
        self.replaced: set[Node] = set()  # of the view
        self.unused: list[Node] = []  # of the graph
        self.lifted: list[Lifted] = []
        self.verifier = Verifier(gm, self.view)
        values = [value_of(node) for node in graph.nodes]
        self.dtypes = frozenset(value.dtype for value in values if isinstance(value, Tensor)) & DTYPES

    def run(self) -> list[Lifted]:
        for anchor in self.view.nodes:
            rules = [rule for rule in self.rules if anchor.target == rule.anchor]
            if rules and anchor not in self.replaced:
                with autocast.at(anchor):
                    self._lift_at(anchor, rules)
        for cast in self.casts:
            cast.replace_all_uses_with(cast.args[0])
        unused = self.casts.union(self.unused)
        for node in reversed(list(self.graph.nodes)):
            if node in unused or (not node.users and splits(node)):  # whose parts were matched as slices
                self.graph.erase_node(node)
        return self.lifted

    def _lift_at(self, anchor: Node, rules: Sequence[Rule]) -> None:
        """Apply the rule that explains most of the graph around this anchor, or keep the nearest's reason.

        Of two that match, the larger is the more specific: a norm and its cast, not the norm with the cast left over.
        """
        attempts = [find(pattern, anchor) for rule in rules for pattern in templates(rule, self.dtypes)]
        found = sorted((one for one in attempts if isinstance(one, Match)), key=lambda match: -len(match.calls))
        refusals = []
        for match in found:
            refusal = self._refusal(match)
            if refusal is None:
                self.lifted.append(Lifted(match.rule.name, *_place(match.roots[0])))
                self._replace(match)
                return
            refusals.append((match.rule, refusal))
            if match.rule.replacement is None:
                break
        missed = [one for one in attempts if isinstance(one, Mismatch) and one.reason and one.rule.report_misses]
        if not refusals and missed:
            nearest = max(missed, key=lambda mismatch: (mismatch.matched, mismatch.rule.replacement is not None))
            refusals.append((nearest.rule, nearest.reason))
        if refusals:
            rule, reason = refusals[0]
            self.near_misses.append(NearMiss(rule.name, *_place(anchor), reason))

    def _refusal(self, match: Match) -> str | None:
        calls = match.calls.values()
        if not self.replaced.isdisjoint(calls):
            return "a part of it is part of another match"
        if not self.across_layers and len({layer_of(module_path(node)) for node in calls}) > 1:
            return "it spans layers"
        return self.verifier.reason(match)

    def _replace(self, found: Match) -> None:
        """Put the replacement's calls where all they need is known, and take the matched nodes out."""
        assert found.rule.replacement is not None
        roots = [self.originals[root] for root in found.roots]
        at, tracer = self.originals[placement(found)], GraphAppendingTracer(self.graph)
        arguments = {
            name: Proxy(self.originals[bound], tracer) if isinstance(bound, Node) else bound
            for name, bound in found.arguments.items()
        }
        previous = at.prev
        with self.graph.inserting_before(at):
            given = found.rule.replacement(**arguments)
        results = [one.node for one in (given if isinstance(given, tuple) else (given,))]
        latest = max(roots)
        made = list(between(previous, at))
        for node in made:
            annotate_like(node, latest)
            infer_requires_grad(node)
        fold(self.graph, made)  # a dtype that the replacement asks for
        self.replaced.update(found.calls.values())
        self.unused += [self.originals[node] for node in found.calls.values()]
        for view_root, root, result in zip(found.roots, roots, results, strict=True):
            fake_tensors.set_value(result, value_of(root))
            root.replace_all_uses_with(result)
            self.originals[view_root] = result


def _place(node: Node) -> tuple[str, str]:
    return module_path(node), source_line(node)
