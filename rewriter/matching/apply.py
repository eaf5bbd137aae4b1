"""Lift parts of the graph: replace them by the ops that the rules name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.fx import GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.kernels import REGISTRY
from fastft.rewriter.capture.normalize import splits, view
from fastft.rewriter.context import Context
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.editing import annotate_like, between, infer_requires_grad
from fastft.rewriter.fx.metadata import FLOATING, layer_of, module_path, name_of, place_of
from fastft.rewriter.matching.checks import Verifier, placement
from fastft.rewriter.matching.matcher import Match, Mismatch, find
from fastft.rewriter.matching.pattern import fold, templates
from fastft.rewriter.matching.rule import Rule
from fastft.rewriter.report.data import Lifted, NearMiss, RuleRecord

_SHARED = frozenset({"neg", "view_as_real", "movedim", "contiguous", "unsqueeze", "getitem"})


def lift(gm: GraphModule, context: Context) -> None:
    """Apply the rules for PyTorch code to one graph; the report gets what was lifted and the near misses."""
    context.report.lifted += _Application(gm, context.rules, context, context.report.near_misses).run()


def fuse(gm: GraphModule, context: Context) -> None:
    """Apply the rules that merge lifted ops to one graph.  What stays unmerged is not reported as a near miss.

    A rule that spans layers is applied only where the graph is compiled as a whole: otherwise two tensors instead of
    one would pass from layer to layer, and the first and the last layer would each be a kind of its own.
    """
    across_layers = not context.options.outline
    context.report.fused += _Application(gm, context.merging, context, [], across_layers=across_layers).run()


class _Application:
    """Applies rules to one graph: matches are found in a normalised view and carried out in the graph itself."""

    def __init__(
        self, gm: GraphModule, rules: Sequence[Rule], context: Context, near_misses: list[NearMiss],
        across_layers: bool = True,
    ) -> None:  # fmt: skip
        self.rules, self.context, self.near_misses, self.across_layers = rules, context, near_misses, across_layers
        graph = self.graph = gm.graph
        self.view, self.originals = view(graph)
        self.casts = set(graph.nodes) - set(self.originals.values())  # no-ops, which the view leaves out
        self.replaced: set[Node] = set()  # of the view
        self.unused: list[Node] = []  # of the graph
        self.applied: list[Lifted] = []
        self.shared: dict[tuple[object, ...], Node] = {}  # what replacements computed beside their ops
        self.verifier = Verifier(gm, self.view)
        values = [value_of(node) for node in graph.nodes]
        self.dtypes = (
            frozenset(value.dtype for value in values if isinstance(value, Tensor)) & FLOATING
        )  # what a reference is traced at

    def run(self) -> list[Lifted]:
        """Apply the rules at each anchor, in graph order; return what was applied."""
        for anchor in self.view.nodes:
            rules = [rule for rule in self.rules if anchor.target == rule.anchor]
            if rules and anchor not in self.replaced:
                with autocast.at(anchor):
                    self._apply_at(anchor, rules)
        for cast in self.casts:
            cast.replace_all_uses_with(cast.args[0])
        unused = self.casts.union(self.unused)
        for node in reversed(list(self.graph.nodes)):
            if node in unused or (not node.users and splits(node)):  # whose parts were matched as slices
                self.graph.erase_node(node)
        return self.applied

    def _apply_at(self, anchor: Node, rules: Sequence[Rule]) -> None:
        """Apply the largest match at this anchor that is not refused; if there is none, record a near miss.

        Of two matches, the larger is the more specific: a norm and its cast, not the norm with the cast left over.
        """
        attempts = [attempt for rule in rules for attempt in self._attempts(anchor, rule)]
        matches = [attempt for attempt in attempts if isinstance(attempt, Match)]
        refusals = []
        for match in sorted(matches, key=lambda match: -len(match.calls)):
            refusal = self._refusal(match)
            if refusal is None:
                self._replace(match)
                return
            refusals.append((match.rule, refusal))
            if match.rule.replacement is None:
                break
        missed = [
            attempt for attempt in attempts
            if isinstance(attempt, Mismatch) and attempt.reason and attempt.rule.report_misses
        ]  # fmt: skip
        value = value_of(anchor)
        if not refusals and missed and not (isinstance(value, Tensor) and not value.ndim):  # such as minus a loss
            nearest = max(missed, key=lambda mismatch: (mismatch.matched, mismatch.rule.replacement is not None))
            refusals.append((nearest.rule, nearest.reason))
        if refusals:
            rule, reason = refusals[0]
            self.near_misses.append(NearMiss(rule.name, *place_of(anchor), reason))

    def _attempts(self, anchor: Node, rule: Rule) -> list[Match | Mismatch]:
        """Look for the rule's pattern around its anchor, traced at each assignment of the graph's dtypes."""
        with self._timed(rule) as record:
            attempts = [find(pattern, anchor) for pattern in templates(rule, self.dtypes)]
            record.attempts += 1
            record.matches += any(isinstance(attempt, Match) for attempt in attempts)
        return attempts

    @contextmanager
    def _timed(self, rule: Rule) -> Iterator[RuleRecord]:
        record, began = self.context.report.rules.setdefault(rule.name, RuleRecord()), time.perf_counter()
        yield record
        record.seconds += time.perf_counter() - began

    def _refusal(self, match: Match) -> str | None:
        """Return why a match may not be replaced, or None if it may."""
        calls, module = match.calls.values(), module_path(match.roots[0])
        if reason := self.context.refusal(match.rule.name, module, *_ops(match.rule)):
            return reason
        if not self.replaced.isdisjoint(calls):
            return "a part of it is part of another match"
        if not self.across_layers and len({layer_of(module_path(node)) for node in calls}) > 1:
            return "it spans layers"
        with self._timed(match.rule):
            return self.verifier.reason(match)

    def _replace(self, match: Match) -> None:
        """Insert the replacement's calls where all their arguments are computed, and drop the matched nodes."""
        assert match.rule.replacement is not None
        self.applied.append(Lifted(match.rule.name, *place_of(match.roots[0])))
        self.context.report.rules[match.rule.name].applied += 1
        roots = [self.originals[root] for root in match.roots]
        successor, tracer = self.originals[placement(match)], GraphAppendingTracer(self.graph)
        arguments = {
            name: Proxy(self.originals[bound], tracer) if isinstance(bound, Node) else bound
            for name, bound in match.arguments.items()
        }
        previous = successor.prev
        with self.graph.inserting_before(successor):
            returned = match.rule.replacement(**arguments)
        results = [proxy.node for proxy in (returned if isinstance(returned, tuple) else (returned,))]
        latest = max(roots)
        made = list(between(previous, successor))
        for node in made:
            annotate_like(node, latest)
            infer_requires_grad(node)
        fold(self.graph, made)  # a dtype that the replacement asks for
        self._share(list(between(previous, successor)))
        self.replaced.update(match.calls.values())
        self.unused += [self.originals[node] for node in match.calls.values()]
        for view_root, root, result in zip(match.roots, roots, results, strict=True):
            fake_tensors.set_value(result, value_of(root))
            root.replace_all_uses_with(result)
            self.originals[view_root] = result

    def _share(self, made: Sequence[Node]) -> None:
        """Use what a replacement of the same layer computed of the same tensors: angles of queries, for its keys too.

        What a match reads is written to nowhere, so the first result is the second's.
        """
        for node in made:
            if name_of(node.target) not in _SHARED:
                continue
            key = (layer_of(module_path(node)), name_of(node.target), str(node.args), str(node.kwargs))
            first = self.shared.setdefault(key, node)
            if first is not node and first < node:
                node.replace_all_uses_with(first)
                self.graph.erase_node(node)


def _ops(rule: Rule) -> set[str]:
    """Return the names of the ops that a rule's replacement calls."""
    function = getattr(rule.replacement, "func", rule.replacement)  # a partial's own function
    return {name for name in function.__code__.co_names if f"fastft::{name}" in REGISTRY} if function else set()
