"""Find a pattern in a graph by its structure; commuting operands may come in either order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastft.compat import symbolic
from fastft.compat.fake_tensors import value_of
from fastft.reasons import Reason
from fastft.rewriter.capture.normalize import COMMUTATIVE
from fastft.rewriter.fx.metadata import name_of, source_line
from fastft.rewriter.matching.pattern import ANY_SIZE, Pattern
from fastft.rewriter.matching.rule import Rule, rank_fits

Bindings = dict[Node, Any]  # a pattern's node -> the graph's node or literal


@dataclass(frozen=True)
class Match:
    """Where each node of the pattern was found."""

    pattern: Pattern
    bindings: Bindings

    @property
    def rule(self) -> Rule:
        """The rule whose reference this is."""
        return self.pattern.rule

    @property
    def roots(self) -> list[Node]:
        """The nodes whose values the reference returns."""
        return [self.bindings[root] for root in self.pattern.roots]

    @property
    def arguments(self) -> dict[str, Any]:
        """The nodes and numbers bound to the reference's parameters."""
        return {name: self.bindings[node] for name, node in self.pattern.parameters.items()}

    @property
    def calls(self) -> dict[Node, Node]:
        """The pattern's calls and the graph's."""
        return {node: self.bindings[node] for node in self.pattern.calls}


@dataclass(frozen=True)
class Mismatch:
    """How far the best attempt came, and what stopped it."""

    rule: Rule
    matched: int
    reason: str = ""


def find(pattern: Pattern, anchor: Node) -> Match | Mismatch:
    """Return the match in which ``anchor`` is the pattern's anchor, or why there is none."""
    if anchor.target != pattern.anchor.target or not _literals_agree(pattern.anchor, anchor):
        return Mismatch(pattern.rule, 0)
    unreached = f"the result of {name_of(anchor.target)} does not reach {name_of(pattern.roots[0].target)}"
    best = Mismatch(pattern.rule, 0, unreached)
    for root in _roots(pattern, anchor):
        attempt = match(pattern, root)
        if isinstance(attempt, Match):
            if attempt.bindings[pattern.anchor] is anchor:
                return attempt
        elif attempt.matched > best.matched:
            best = attempt
    return best


def match(pattern: Pattern, root: Node) -> Match | Mismatch:
    """Match the pattern top-down from ``root``, the first of its roots."""
    matcher = _Matcher(pattern)
    bindings = next(matcher.unify_roots([root]), None)
    if bindings is not None:
        return Match(pattern, bindings)
    return Mismatch(pattern.rule, matcher.matched, matcher.reason)


def _roots(pattern: Pattern, anchor: Node) -> Iterator[Node]:
    """Iterate over the nodes above ``anchor`` that could be the pattern's root, nearest first."""
    reach = pattern.height + 1  # one further than needed, so that a near miss with an extra call is still explained
    queue, seen = deque([(anchor, 0)]), {anchor}
    while queue:
        node, distance = queue.popleft()
        if (node.op, node.target) == (pattern.roots[0].op, pattern.roots[0].target):
            yield node
        for user in node.users if distance < reach else ():
            if user not in seen:
                seen.add(user)
                queue.append((user, distance + 1))


def _literals_agree(expected: Node, actual: Node) -> bool:
    """Tell whether the arguments that are literals in the pattern are the same in the graph."""
    return len(expected.args) == len(actual.args) and all(
        isinstance(want, Node) or _same(want, got) for want, got in zip(expected.args, actual.args, strict=True)
    )


def _same(expected: Any, actual: Any) -> bool:
    """Tell whether two literals are the same; a node that holds a size counts as that size."""
    actual = value_of(actual)
    if isinstance(expected, slice) and isinstance(actual, slice):
        return all(_same(getattr(expected, name), getattr(actual, name)) for name in ("start", "stop", "step"))
    if expected is ANY_SIZE:
        return isinstance(actual, (int, torch.SymInt)) and not isinstance(actual, bool)
    if isinstance(expected, dict) and isinstance(actual, dict):
        return expected.keys() == actual.keys() and all(_same(expected[key], actual[key]) for key in expected)
    if isinstance(expected, (tuple, list)) and isinstance(actual, (tuple, list)):
        return len(expected) == len(actual) and all(map(_same, expected, actual))
    if isinstance(expected, torch.SymInt) or isinstance(actual, torch.SymInt):
        integers = all(isinstance(value, (int, torch.SymInt)) for value in (expected, actual))
        return integers and symbolic.statically_known_true(expected == actual)
    return type(expected) is type(actual) and expected == actual


class _Matcher:
    def __init__(self, pattern: Pattern):
        self.pattern = pattern
        self.names = {node: name for name, node in pattern.parameters.items()}
        self.matched, self.reason = -1, ""

    def unify_roots(self, actual: list[Node]) -> Iterator[Bindings]:
        """Iterate over bindings of all roots; those beyond ``actual`` are searched for among users of bound nodes."""
        pending: list[tuple[int, Bindings]] = [(0, {})]
        while pending:
            position, bound = pending.pop()
            if position == len(self.pattern.roots):
                yield bound
                return
            root = self.pattern.roots[position]
            candidates = [actual[position]] if position < len(actual) else self._candidates(root, bound)
            extensions = [extended for node in candidates for extended in self.unify(root, node, bound)]
            pending += [(position + 1, extended) for extended in reversed(extensions)]

    def _candidates(self, root: Node, bound: Bindings) -> list[Node]:
        """List what another root may be: its node if already bound, else later calls that share an argument."""
        if root in bound:
            return [bound[root]]
        shared = [bound[argument] for argument in root.all_input_nodes if argument in bound]
        first = bound[self.pattern.roots[0]]
        return sorted(user for user in shared[0].users if user > first) if shared else []

    def unify(self, expected: Any, actual: Any, bound: Bindings) -> Iterator[Bindings]:
        """Iterate over the extensions of ``bound`` under which ``expected`` is ``actual``."""
        reason = self._differs(expected, actual, bound)
        if reason:
            self._note(bound, reason, actual)
        elif not isinstance(expected, Node) or expected in bound:
            yield bound
        elif expected.op == "placeholder":
            yield {**bound, expected: actual}
        else:
            yield from self._unify_call(expected, actual, {**bound, expected: actual})

    def _unify_call(self, expected: Node, actual: Node, bound: Bindings) -> Iterator[Bindings]:
        orders = [actual.args]
        if expected.target in COMMUTATIVE and all(isinstance(argument, Node) for argument in actual.args):
            orders.append(actual.args[::-1])
        for order in orders:
            pairs = list(zip(expected.args, order, strict=True))
            pairs.sort(key=lambda pair: isinstance(pair[0], Node) and pair[0] in self.names)
            yield from self._unify_all(pairs, bound)  # parameters last: they fit nearly anything, and explain little

    def _unify_all(self, pairs: list[tuple[Any, Any]], bound: Bindings) -> Iterator[Bindings]:
        if not pairs:
            yield bound
            return
        for extended in self.unify(*pairs[0], bound):
            yield from self._unify_all(pairs[1:], extended)

    def _differs(self, expected: Any, actual: Any, bound: Bindings) -> str:
        """Return why ``actual`` cannot be ``expected``, its operands aside, or ""."""
        if not isinstance(expected, Node):
            return "" if _same(expected, actual) else f"expected {_literal(expected)}, found {_show(actual)}"
        if expected in bound:
            same = bound[expected] is actual or (not isinstance(actual, Node) and _same(bound[expected], actual))
            return (
                "" if same else f"two values where the reference has one: {_show(bound[expected])} and {_show(actual)}"
            )
        if expected.op == "placeholder":
            return self._not_parameter(expected, actual)
        if not isinstance(actual, Node) or actual.op != expected.op or actual.target != expected.target:
            return f"expected {self._spell(expected)}, found {_show(actual)}"
        if not _literals_agree(expected, actual) or not _same(dict(expected.kwargs), dict(actual.kwargs)):
            return f"expected {self._spell(expected)}, found {_show(actual)}"
        return ""

    def _not_parameter(self, expected: Node, actual: Any) -> str:
        """Return why ``actual`` cannot be bound to this parameter of the reference, or ""."""
        name, example, value = self.names[expected], value_of(expected), value_of(actual)
        if isinstance(example, bool):
            return "" if isinstance(actual, bool) else f"{name} is not a bool but {_show(actual)}"
        if isinstance(example, str):
            return "" if isinstance(actual, str) else f"{name} is not a word but {_show(actual)}"
        if not isinstance(example, Tensor):
            number = isinstance(actual, (int, float)) and not isinstance(actual, bool)
            return "" if number else _no_number(name, actual)
        if not isinstance(actual, Node) or not isinstance(value, Tensor):
            return f"{name} is not a tensor but {_show(actual)}"
        spec = self.pattern.rule.shapes[name]
        if not rank_fits(spec, value.dim()):
            return f"{name} has {value.dim()} dimensions, not '{spec}': {_show(actual)}"
        fixed = (*self.pattern.rule.dtype_from, *self.pattern.rule.booleans)
        of_dtype = name not in fixed or value.dtype == example.dtype
        return "" if of_dtype else f"{name} is {value.dtype}, not {example.dtype}: {_show(actual)}"

    def _spell(self, node: Node) -> str:
        """Format the pattern's call with the reference's parameter names, one level deep."""
        return f"{name_of(node.target)}({', '.join(map(self._spell_argument, node.args))})"

    def _spell_argument(self, argument: Any) -> str:
        if not isinstance(argument, Node):
            return _literal(argument)
        return self.names.get(argument) or f"{name_of(argument.target)}(…)"

    def _note(self, bound: Bindings, reason: str, actual: Any) -> None:
        """Remember why the attempt that matched the most nodes so far failed."""
        if len(bound) > self.matched:
            line = source_line(actual) if isinstance(actual, Node) else ""
            self.matched, self.reason = len(bound), reason + (f" ({line})" if line else "")


def _no_number(name: str, actual: Any) -> str:
    reason = f"{name} is not a number but {_show(actual)}"
    taken = isinstance(actual, Node) and actual.target == "item"
    return Reason(reason, "number.item") if taken else reason


def _literal(expected: Any) -> str:
    """Format a pattern's literal; n stands for an open size."""
    if isinstance(expected, slice):
        parts = (expected.start, expected.stop, expected.step)
        return ":".join("" if part is None else _literal(part) for part in parts)
    if isinstance(expected, (tuple, list)):
        return f"({', '.join(map(_literal, expected))})"
    return "n" if expected is ANY_SIZE else "..." if expected is Ellipsis else str(expected)


def _show(value: Any) -> str:
    """Format a node of the user's graph: its call, one level deep."""
    if not isinstance(value, Node):
        return str(value)
    if value.op in ("placeholder", "get_attr"):
        return value.name
    return f"{name_of(value.target)}({', '.join(a.name if isinstance(a, Node) else str(a) for a in value.args)})"
