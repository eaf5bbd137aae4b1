"""The four checks between a structural match and a rewrite.  Each returns the reason to decline, or None."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fastft.rewriter import autocast, compat, match, pattern
from fastft.rewriter.compat import value_of
from fastft.rewriter.graph import between, describe, is_transform, may_alias, name_of, switches_mode, written_by
from fastft.rewriter.match import Match
from fastft.rewriter.rule import Rule, shape_reason


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
            return rule.because
        if self._transformed:
            return "the graph holds a torch.func transform or forward-mode differentiation"
        try:
            return (
                used_outside(found)
                or disturbed(found, self._gm)
                or unplaced(found)
                or self._by_value(rule, values, found)
            )
        except Exception as error:  # one odd value must not cost the whole graph
            return f"it could not be checked: {describe(error)}"

    def _by_value(self, rule: Rule, values: dict[str, Any], found: Match) -> str | None:
        results = [value_of(root) for root in found.roots]
        key = (rule, autocast.state(), *map(_key, values.values()), *map(_key, results))
        if None in key or key not in self._verdicts:
            self._verdicts[key] = unfit(rule, values) or retraced(found, values) or replaced(rule, values, results)
        return self._verdicts[key]


def transformed(graph: Graph) -> bool:
    """Whether torch.func transforms or forward-mode differentiation are at work, of which the ops know nothing."""
    return compat.in_forward_mode() or any(is_transform(node.target) for node in graph.nodes)


def unfit(rule: Rule, values: dict[str, Any]) -> str | None:
    """The rule's own conditions: named dimensions, and what its op cannot do."""
    sizes = {name: values[name].shape for name in rule.shapes}
    equal = lambda left, right: compat.statically_known_true(left == right)  # noqa: E731
    return shape_reason(rule.shapes, sizes, equal) or rule.unless(**values)


def retraced(found: Match, values: dict[str, Any]) -> str | None:
    """The reference, traced again at the matched shapes and numbers, is the subgraph, node by node."""
    again = pattern.trace(found.rule, values)
    second = match.match(again, found.roots[0])
    if isinstance(second, match.Mismatch):
        return f"traced at these shapes the reference differs: {second.reason}"
    pairs = [pair for node, actual in second.calls.items() for pair in _tensors(node, actual)]
    for want, got, actual in pairs:
        if want.dtype != got.dtype or want.device != got.device or not same_sizes(want.shape, got.shape):
            return f"{name_of(actual.target)} gives {_describe(got)} where the reference gives {_describe(want)}"
    return None


def used_outside(found: Match) -> str | None:
    """No inner value is used outside the match, or it would have to be computed all the same."""
    calls = set(found.calls.values())
    for node in calls.difference(found.roots):
        for user in node.users:
            if user not in calls:
                line = compat.source_line(user)
                by = "the graph's output" if user.op == "output" else name_of(user.target)
                return f"{name_of(node.target)} is also used by {by}" + (f" ({line})" if line else "")
    return None


def disturbed(found: Match, gm: GraphModule) -> str | None:
    """Nothing in the graph writes to a value of the match, and no mode is switched between its first call and its root.

    Writes before the match would do no harm, nor would all of those after it; but where a write is cannot be told of
    every function, and one after the root may spoil what the op saves where the user's own code saved a copy.
    """
    values = [node for node in found.bindings.values() if isinstance(node, Node)]
    return disturbed_between(gm, values, min(found.calls.values()), max(found.roots), "match")


def disturbed_between(gm: GraphModule, values: Sequence[Node], first: Node, last: Node, whole: str) -> str | None:
    """The same of any values that calls from ``first`` to ``last`` are made of; whole: what they are together."""
    if reason := written_in_place(values):
        return reason
    for node in between(first, last):
        if switches_mode(node):
            return f"{name_of(node.target)} is called halfway"
        if any(may_alias(target, value) for target in written_by(gm, node) for value in values):
            return f"{name_of(node.target)} writes to a value of the {whole}"
    return None


def written_in_place(nodes: Iterable[Node]) -> str | None:
    """Which of these is written to anywhere in the graph."""
    for node in nodes:
        if any(map(compat.written_to, compat.tensors_in(value_of(node)))):
            return f"{node.name} is written to in place"
    return None


def place(found: Match) -> Node:
    """The node before which the replacement is put: the last root, or an earlier one's first use."""
    calls = set(found.calls.values())
    users = [user for root in found.roots for user in root.users if user not in calls]
    return min([max(found.roots), *users])


def unplaced(found: Match) -> str | None:
    """All that the replacement is given is known where it is put."""
    given = [value for value in found.arguments.values() if isinstance(value, Node)]
    if not set(found.calls.values()).isdisjoint(given):
        return "what is computed inside is also an argument"
    return None if max(given) < place(found) else "a result is used before all that the replacement needs is known"


def replaced(rule: Rule, values: dict[str, Any], expected: list[Tensor]) -> str | None:
    """The replacement gives what the roots gave, and a gradient to every input that needs one."""
    assert rule.replacement is not None
    with compat.fake_mode_of(values.values()), torch.enable_grad():
        inputs = {name: _detached(value) for name, value in values.items()}
        given = rule.replacement(**inputs)
        results = list(given) if isinstance(given, tuple) else [given]
        for result, one in zip(results, expected, strict=True):
            if not isinstance(result, Tensor) or result.dtype != one.dtype or result.device != one.device:
                return f"the replacement gives {_describe(result)}, not {_describe(one)}"
            if not same_sizes(result.shape, one.shape) or not _same_strides(result, one):
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


def same_kind(left: Tensor, right: Tensor) -> bool:
    """Whether two fake tensors have one dtype, device, shape and memory layout."""
    alike = left.dtype == right.dtype and left.device == right.device
    return alike and same_sizes(left.shape, right.shape) and _same_strides(left, right)


def _same_strides(left: Tensor, right: Tensor) -> bool:
    """But for axes of one element, which have none."""
    pairs = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(
        compat.statically_known_true(size == 1) or compat.statically_known_true(one == other)
        for size, one, other in pairs
    )


def _tensors(expected: Node, actual: Node) -> list[tuple[Tensor, Tensor, Node]]:
    """The tensors of two calls that should be the same, side by side, and the second call."""
    want, got = compat.tensors_in(value_of(expected)), compat.tensors_in(value_of(actual))
    return [(one, other, actual) for one, other in zip(want, got, strict=True)]


def _detached(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def same_sizes(left: Any, right: Any) -> bool:
    """Whether two shapes are known to be equal."""
    return len(left) == len(right) and all(
        compat.statically_known_true(one == other) for one, other in zip(left, right, strict=True)
    )


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
