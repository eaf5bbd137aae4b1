"""The four checks between a structural match and a rewrite.  Each returns the reason to decline, or None."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fastft.rewriter import compat, match, pattern
from fastft.rewriter.compat import value_of
from fastft.rewriter.graph import between, may_alias, name_of, switches_mode, written
from fastft.rewriter.match import Match
from fastft.rewriter.rule import Rule, shape_reason


class Verifier:
    """Runs the checks; remembers the verdicts that depend on shapes, dtypes and numbers alone."""

    def __init__(self, graph: Graph) -> None:
        self._verdicts: dict[Any, str | None] = {}
        transforms = [node for node in graph.nodes if compat.is_transform(node.target)]
        self._transformed = bool(transforms) or compat.in_forward_mode()

    def reason(self, found: Match) -> str | None:
        """Why this match may not be rewritten; None if it may."""
        rule, values = found.rule, {name: value_of(node) for name, node in found.arguments.items()}
        if rule.replacement is None:
            return rule.because
        if self._transformed:
            return "the graph holds a torch.func transform or forward-mode differentiation"
        try:
            return used_outside(found) or disturbed(found) or self._by_value(rule, values, found)
        except Exception as error:  # one odd value must not cost the whole graph
            return f"it could not be checked: {type(error).__name__}: {error}"

    def _by_value(self, rule: Rule, values: dict[str, Any], found: Match) -> str | None:
        key = (rule, *map(_key, values.values()), _key(value_of(found.root)))
        if None in key or key not in self._verdicts:
            self._verdicts[key] = unfit(rule, values) or retraced(found, values) or replaced(rule, values, found.root)
        return self._verdicts[key]


def unfit(rule: Rule, values: dict[str, Any]) -> str | None:
    """The rule's own conditions: named dimensions, and what its op cannot do."""
    sizes = {name: values[name].shape for name in rule.shapes}
    equal = lambda left, right: compat.statically_known_true(left == right)  # noqa: E731
    return shape_reason(rule.shapes, sizes, equal) or rule.unless(**values)


def retraced(found: Match, values: dict[str, Any]) -> str | None:
    """The reference, traced again at the matched shapes and numbers, is the subgraph, node by node."""
    again = pattern.trace(found.rule, values)
    second = match.match(again, found.root)
    if isinstance(second, match.Mismatch):
        return f"traced at these shapes the reference differs: {second.reason}"
    for node, actual in second.calls.items():
        want, got = value_of(node), value_of(actual)
        if want.dtype != got.dtype or want.device != got.device or not _same_sizes(want.shape, got.shape):
            return f"{name_of(actual.target)} gives {_describe(got)} where the reference gives {_describe(want)}"
    return None


def used_outside(found: Match) -> str | None:
    """No inner value is used outside the match, or it would have to be computed all the same."""
    inner = set(found.calls.values()) - {found.root}
    for node in inner:
        for user in node.users:
            if user not in inner and user is not found.root:
                line = compat.source_line(user)
                by = "the graph's output" if user.op == "output" else name_of(user.target)
                return f"{name_of(node.target)} is also used by {by}" + (f" ({line})" if line else "")
    return None


def disturbed(found: Match) -> str | None:
    """Nothing in the graph writes to a value of the match, and no mode is switched between its first call and its root.

    Writes before the match would do no harm, nor would all of those after it; but where a write is cannot be told of
    every function, and one after the root may spoil what the op saves where the user's own code saved a copy.
    """
    values = [node for node in found.bindings.values() if isinstance(node, Node)]
    for node in values:
        if compat.written_to(value_of(node)):
            return f"{node.name} is written to in place"
    for node in between(min(found.calls.values()), found.root):
        if switches_mode(node):
            return f"{name_of(node.target)} is called halfway"
        if any(may_alias(target, value) for target in written(node) for value in values):
            return f"{name_of(node.target)} writes to a value of the match"
    return None


def replaced(rule: Rule, values: dict[str, Any], root: Node) -> str | None:
    """The replacement gives what the root gave, and a gradient to every input that needs one."""
    assert rule.replacement is not None
    expected = value_of(root)
    with compat.fake_mode_of(values.values()), torch.enable_grad():
        inputs = {name: _detached(value) for name, value in values.items()}
        result = rule.replacement(**inputs)
        if not isinstance(result, Tensor) or result.dtype != expected.dtype or result.device != expected.device:
            return f"the replacement gives {_describe(result)}, not {_describe(expected)}"
        if not _same_sizes(result.shape, expected.shape) or not _same_sizes(result.stride(), expected.stride()):
            return f"the replacement is laid out as {_describe(result)}, not {_describe(expected)}"
        wanted = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
        return _without_gradient(result, wanted) if expected.requires_grad else None


def _without_gradient(result: Tensor, inputs: dict[str, Tensor]) -> str | None:
    gradients = torch.autograd.grad(result, list(inputs.values()), torch.ones_like(result), allow_unused=True)
    for (name, value), gradient in zip(inputs.items(), gradients, strict=True):
        if gradient is None or gradient.dtype != value.dtype or not _same_sizes(gradient.shape, value.shape):
            return f"the replacement gives {name} no gradient of its own shape and dtype"
    return None


def _detached(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _same_sizes(left: Any, right: Any) -> bool:
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
