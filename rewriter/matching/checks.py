"""The four checks between a structural match and a rewrite.  Each returns the reason to decline, or None."""

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
from fastft.rewriter.fx.effects import check_effects_between, transformed
from fastft.rewriter.fx.metadata import name_of, same_sizes, same_strides, source_line
from fastft.rewriter.matching import matcher, pattern
from fastft.rewriter.matching.matcher import Match
from fastft.rewriter.matching.rule import Rule, shape_reason


class Verifier:
    """Runs the checks; remembers the verdicts that depend on shapes, dtypes and numbers alone."""

    def __init__(self, gm: GraphModule, graph: Graph) -> None:
        self._gm = gm  # holds the bodies that nodes of graph, which is a view of its own, run
        self._verdicts: dict[Any, str | None] = {}
        self._transformed = transformed(graph)

    def reason(self, found: Match) -> str | None:
        """Why this match may not be rewritten; None if it may."""
        rule, values = found.rule, {name: value_of(node) for name, node in found.arguments.items()}
        if rule.replacement is None:
            return rule.decline_reason
        if self._transformed:
            return "the graph holds a torch.func transform or forward-mode differentiation"
        try:
            return (
                check_escapes(found)
                or check_side_effects(found, self._gm)
                or check_placement(found)
                or self._by_value(rule, values, found)
            )
        except Exception as error:  # one odd value must not cost the whole graph
            return f"it could not be checked: {describe(error)}"

    def _by_value(self, rule: Rule, values: dict[str, Any], found: Match) -> str | None:
        results = [value_of(root) for root in found.roots]
        key = (rule, autocast.state(), *map(_key, values.values()), *map(_key, results))
        if None in key or key not in self._verdicts:
            self._verdicts[key] = (
                check_conditions(rule, values)
                or check_retrace(found, values)
                or check_replacement(rule, values, results)
            )
        return self._verdicts[key]


def check_conditions(rule: Rule, values: dict[str, Any]) -> str | None:
    """The rule's own conditions: named dimensions, and what its op cannot do."""
    sizes = {name: values[name].shape for name in rule.shapes}
    equal = lambda left, right: symbolic.statically_known_true(left == right)  # noqa: E731
    return shape_reason(rule.shapes, sizes, equal) or rule.decline_if(**values)


def check_retrace(found: Match, values: dict[str, Any]) -> str | None:
    """The reference, traced again at the matched shapes and numbers, is the subgraph, node by node."""
    again = pattern.trace(found.rule, values)
    second = matcher.match(again, found.roots[0])
    if isinstance(second, matcher.Mismatch):
        return f"traced at these shapes the reference differs: {second.reason}"
    pairs = [pair for node, actual in second.calls.items() for pair in _tensors(node, actual)]
    for want, got, actual in pairs:
        if want.dtype != got.dtype or want.device != got.device or not same_sizes(want.shape, got.shape):
            return f"{name_of(actual.target)} gives {_describe(got)} where the reference gives {_describe(want)}"
    return None


def check_escapes(found: Match) -> str | None:
    """No inner value is used outside the match, or it would have to be computed all the same."""
    calls = set(found.calls.values())
    for node in calls.difference(found.roots):
        for user in node.users:
            if user not in calls:
                line = source_line(user)
                by = "the graph's output" if user.op == "output" else name_of(user.target)
                reason = f"{name_of(node.target)} is also used by {by}" + (f" ({line})" if line else "")
                return Reason(reason, "match.returned") if user.op == "output" else reason
    return None


def check_side_effects(found: Match, gm: GraphModule) -> str | None:
    """Nothing in the graph writes to a value of the match, and no mode is switched between its first call and its root.

    Writes before the match would do no harm, nor would all of those after it; but where a write is cannot be told of
    every function, and one after the root may spoil what the op saves where the user's own code saved a copy.
    """
    values = [node for node in found.bindings.values() if isinstance(node, Node)]
    return check_effects_between(gm, values, min(found.calls.values()), max(found.roots), "match")


def placement(found: Match) -> Node:
    """The node before which the replacement is put: the last root, or an earlier one's first use."""
    calls = set(found.calls.values())
    users = [user for root in found.roots for user in root.users if user not in calls]
    return min([max(found.roots), *users])


def check_placement(found: Match) -> str | None:
    """All that the replacement is given is known where it is put."""
    given = [value for value in found.arguments.values() if isinstance(value, Node)]
    if not set(found.calls.values()).isdisjoint(given):
        return "what is computed inside is also an argument"
    return None if max(given) < placement(found) else "a result is used before all that the replacement needs is known"


def check_replacement(rule: Rule, values: dict[str, Any], expected: list[Tensor]) -> str | None:
    """The replacement gives what the roots gave, and a gradient to every input that needs one."""
    assert rule.replacement is not None
    with fake_tensors.fake_mode_of(values.values()), torch.enable_grad():
        inputs = {name: _detached(value) for name, value in values.items()}
        given = rule.replacement(**inputs)
        results = list(given) if isinstance(given, tuple) else [given]
        for result, one in zip(results, expected, strict=True):
            if not isinstance(result, Tensor) or result.dtype != one.dtype or result.device != one.device:
                return f"the replacement gives {_describe(result)}, not {_describe(one)}"
            if not same_sizes(result.shape, one.shape) or not same_strides(result, one):
                return f"the replacement is laid out as {_describe(result)}, not {_describe(one)}"
        wanted = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
        return _without_gradient(results, wanted) if any(one.requires_grad for one in expected) else None


def _without_gradient(results: list[Tensor], inputs: dict[str, Tensor]) -> str | None:
    ones = [torch.ones_like(result) for result in results]
    gradients = torch.autograd.grad(results, list(inputs.values()), ones, allow_unused=True)
    for (name, value), gradient in zip(inputs.items(), gradients, strict=True):
        if gradient is None or gradient.dtype != value.dtype or not same_sizes(gradient.shape, value.shape):
            return f"the replacement gives {name} no gradient of its own shape and dtype"
    return None


def _tensors(expected: Node, actual: Node) -> list[tuple[Tensor, Tensor, Node]]:
    """The tensors of two calls that should be the same, side by side, and the second call."""
    want, got = fake_tensors.tensors_in(value_of(expected)), fake_tensors.tensors_in(value_of(actual))
    return [(one, other, actual) for one, other in zip(want, got, strict=True)]


def _detached(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(type(value).__name__)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} strides {list(value.stride())}"


def _key(value: Any) -> Any:
    """A key that is equal for values the checks cannot tell apart; None if there is none (symbolic sizes)."""
    if not isinstance(value, Tensor):
        return (type(value), value)
    sizes = (*value.shape, *value.stride())
    if not all(type(size) is int for size in sizes):
        return None
    return (value.dtype, str(value.device), tuple(value.shape), tuple(value.stride()), value.requires_grad)
