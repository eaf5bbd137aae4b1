"""Six checks before a match is rewritten: conditions, retrace, escapes, side effects, placement, replacement.

Each check returns the reason to decline, or None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fastft.compat import fake_tensors, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.errors import describe
from fastft.reasons import Reason
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.effects import UNDER_TRANSFORM, check_effects_between, transformed
from fastft.rewriter.fx.metadata import name_of, same_sizes, same_strides, source_line
from fastft.rewriter.matching import matcher, pattern
from fastft.rewriter.matching.matcher import Match
from fastft.rewriter.matching.rule import Rule, shape_reason


class Verifier:
    """Runs the checks; caches the verdicts that depend on shapes, dtypes and numbers alone."""

    def __init__(self, gm: GraphModule, graph: Graph) -> None:
        self._gm = gm  # holds the nested graphs that nodes of ``graph``, a normalised copy, run
        self._verdicts: dict[Any, str | None] = {}
        self._transformed = transformed(graph)

    def reason(self, match: Match) -> str | None:
        """Return why this match may not be rewritten, or None."""
        rule, values = match.rule, {name: value_of(node) for name, node in match.arguments.items()}
        if rule.replacement is None:
            return rule.decline_reason
        if not self._transformed.isdisjoint((*match.calls.values(), placement(match))):
            return UNDER_TRANSFORM
        try:
            return (
                check_escapes(match)
                or check_side_effects(match, self._gm)
                or check_placement(match)
                or self._by_value(rule, values, match)
            )
        except Exception as error:  # one odd value must not cost the whole graph
            return f"it could not be checked: {describe(error)}"

    def _by_value(self, rule: Rule, values: dict[str, Any], match: Match) -> str | None:
        """Run, or look up, the checks that depend on the match's values alone."""
        results = [value_of(root) for root in match.roots]
        key = (rule, autocast.state(), *map(_key, values.values()), *map(_key, results))
        if None in key or key not in self._verdicts:
            self._verdicts[key] = (
                check_conditions(rule, values)
                or check_retrace(match, values)
                or check_replacement(rule, values, results)
            )
        return self._verdicts[key]


def check_conditions(rule: Rule, values: dict[str, Any]) -> str | None:
    """Check the rule's own conditions: named dimensions, and what its op does not support."""
    sizes = {name: values[name].shape for name in rule.shapes}
    equal = lambda left, right: symbolic.statically_known_true(left == right)  # noqa: E731
    return shape_reason(rule.shapes, sizes, equal) or rule.decline_if(**values)


def check_retrace(match: Match, values: dict[str, Any]) -> str | None:
    """Check that the reference, traced at the matched shapes and numbers, is the subgraph, node by node."""
    retraced = pattern.trace(match.rule, values)
    second = matcher.match(retraced, match.roots[0])
    if isinstance(second, matcher.Mismatch):
        return f"traced at these shapes the reference differs: {second.reason}"
    pairs = [pair for node, actual in second.calls.items() for pair in _tensors(node, actual)]
    for want, got, actual in pairs:
        if want.dtype != got.dtype or want.device != got.device or not same_sizes(want.shape, got.shape):
            return f"{name_of(actual.target)} gives {_describe(got)} where the reference gives {_describe(want)}"
    return None


def check_escapes(match: Match) -> str | None:
    """Check that no inner value is used outside the match: it would have to be computed all the same."""
    calls = set(match.calls.values())
    for node in calls.difference(match.roots):
        for user in node.users:
            if user not in calls:
                line = source_line(user)
                by = "the graph's output" if user.op == "output" else name_of(user.target)
                reason = f"{name_of(node.target)} is also used by {by}" + (f" ({line})" if line else "")
                return Reason(reason, "match.returned") if user.op == "output" else reason
    return None


def check_side_effects(match: Match, gm: GraphModule) -> str | None:
    """Check that no value of the match is mutated, and no mode is switched between its first call and its root.

    Writes before the match would do no harm, nor would most of those after it; but not every function shows where it
    writes, and a write after the root may change what the op saves for backward where the user's own code saved a copy.
    """
    values = [node for node in match.bindings.values() if isinstance(node, Node)]
    return check_effects_between(gm, values, min(match.calls.values()), max(match.roots), "match")


def placement(match: Match) -> Node:
    """Return the node before which the replacement is inserted: the last root, or an earlier one's first use."""
    calls = set(match.calls.values())
    users = [user for root in match.roots for user in root.users if user not in calls]
    return min([max(match.roots), *users])


def check_placement(match: Match) -> str | None:
    """Check that all arguments of the replacement are computed before it."""
    inputs = [value for value in match.arguments.values() if isinstance(value, Node)]
    if not set(match.calls.values()).isdisjoint(inputs):
        return "what is computed inside is also an argument"
    return None if max(inputs) < placement(match) else "a result is used before all that the replacement needs is known"


def check_replacement(rule: Rule, values: dict[str, Any], expected: list[Tensor]) -> str | None:
    """Check that the replacement returns tensors like the roots', and a gradient for every input that needs one."""
    assert rule.replacement is not None
    with fake_tensors.fake_mode_of(values.values()), torch.enable_grad():
        inputs = {name: _detached(value) for name, value in values.items()}
        returned = rule.replacement(**inputs)
        results = list(returned) if isinstance(returned, tuple) else [returned]
        for result, root in zip(results, expected, strict=True):
            if not isinstance(result, Tensor) or result.dtype != root.dtype or result.device != root.device:
                return f"the replacement gives {_describe(result)}, not {_describe(root)}"
            if not same_sizes(result.shape, root.shape) or not same_strides(result, root):
                return f"the replacement is laid out as {_describe(result)}, not {_describe(root)}"
        wanted = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
        return _without_gradient(results, wanted) if any(root.requires_grad for root in expected) else None


def _without_gradient(results: list[Tensor], inputs: dict[str, Tensor]) -> str | None:
    """Return which input gets no gradient of its own shape and dtype, or None."""
    ones = [torch.ones_like(result) for result in results]
    gradients = torch.autograd.grad(results, list(inputs.values()), ones, allow_unused=True)
    for (name, value), gradient in zip(inputs.items(), gradients, strict=True):
        if gradient is None or gradient.dtype != value.dtype or not same_sizes(gradient.shape, value.shape):
            return f"the replacement gives {name} no gradient of its own shape and dtype"
    return None


def _tensors(expected: Node, actual: Node) -> list[tuple[Tensor, Tensor, Node]]:
    """Pair the tensors of two calls that should be the same, each pair with the second call."""
    want, got = fake_tensors.tensors_in(value_of(expected)), fake_tensors.tensors_in(value_of(actual))
    return [(left, right, actual) for left, right in zip(want, got, strict=True)]


def _detached(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(type(value).__name__)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} strides {list(value.stride())}"


def _key(value: Any) -> Any:
    """Return a key that is equal for values the checks cannot tell apart; None if there is none (symbolic sizes)."""
    if not isinstance(value, Tensor):
        return (type(value), value)
    sizes = (*value.shape, *value.stride())
    if not all(type(size) is int for size in sizes):
        return None
    return (value.dtype, str(value.device), tuple(value.shape), tuple(value.stride()), value.requires_grad)
