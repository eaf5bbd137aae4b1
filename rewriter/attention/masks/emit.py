"""The tensors that a recognised attention mask is made of, written into the graph as nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.reasons import Declined
from fastft.rewriter.attention.masks.reader import steady
from fastft.rewriter.attention.masks.terms import (
    Abs,
    And,
    Atom,
    Condition,
    Extreme,
    Floor,
    Indicator,
    Leaf,
    NonNegative,
    Not,
    Or,
    Select,
    Size,
    Sum,
    Truth,
    Var,
    Zero,
)
from fastft.rewriter.fx.editing import annotate_like


class Writer:
    """Writes terms of b and one of q and j as tensors [B or 1, S or T] before a node; each term once."""

    def __init__(self, before: Node, like: Tensor) -> None:
        self._before, self._like = before, like  # like: of the fake mode and on the device
        self._known: dict[Any, Node] = {}
        self._written: list[Node] = []

    def erase(self) -> None:
        """Take out all that was written."""
        for node in reversed(self._written):
            self._before.graph.erase_node(node)

    def call(self, function: Callable | str, *arguments: Any, **named: Any) -> Node:
        """A function or a method of the first argument."""
        graph = self._before.graph
        with graph.inserting_before(self._before):
            if isinstance(function, str):
                node = graph.call_method(function, arguments, named)
            else:
                node = graph.call_function(function, arguments, named)
        self._written.append(node)
        with fake_tensors.fake_mode_of([self._like]):
            annotate_like(node, self._before)
        return node

    def factory(self, function: Callable, *arguments: Any, dtype: torch.dtype = torch.int64) -> Node:
        return self.call(function, *arguments, dtype=dtype, device=self._like.device)

    def size(self, term: Sum) -> Any:
        """A number or a node that computes it."""
        result: Any = term.constant or None
        for one, times in term.parts:
            assert isinstance(one, Size)
            node = self._size(one)
            node = node if times == 1 else self.call(operator.mul, node, times)
            result = node if result is None else self.call(operator.add, node, result)
        return 0 if result is None else result

    def _size(self, size: Size) -> Node:
        if size not in self._known:
            self._known[size] = self._size_node(size)
        return self._known[size]

    def _size_node(self, size: Size) -> Node:
        """A node that computes a symbolic size: one that is there, or the size of an axis of one."""
        with_axis: tuple[Node, int] | None = None
        for node in self._before.graph.nodes:
            value = value_of(node)
            if node is self._before:
                break
            if isinstance(value, torch.SymInt) and str(value) == size.spelling:
                return node
            if isinstance(value, Tensor) and with_axis is None:
                axes = [axis for axis, length in enumerate(value.shape) if str(length) == size.spelling]
                with_axis = (node, axes[0]) if axes else None
        if with_axis is None:
            raise Declined(f"nothing has the size {size.spelling}")
        return self.call("size", *with_axis)

    def whole(self, term: Sum, dtype: torch.dtype = torch.int64) -> Node:
        """A number as a tensor [1, 1]."""
        return self.factory(torch.full, (1, 1), self.size(term), dtype=dtype)

    def sum(self, term: Sum) -> Node:
        """A tensor of two axes."""
        if term not in self._known:
            self._known[term] = self._sum(term)
        return self._known[term]

    def _sum(self, term: Sum) -> Node:
        sizes = [(one, times) for one, times in term.parts if isinstance(one, Size)]
        number = Sum(tuple(sizes), term.constant)
        others = [(one, times) for one, times in term.parts if not isinstance(one, Size)]
        if not others:
            return self.whole(term)
        result: Any = None
        for one, times in sorted(others, key=lambda part: part[1] < 0):
            node = self._times(self.atom(one), times if result is None else abs(times))
            joined = torch.add if times > 0 else torch.sub
            result = node if result is None else self.call(joined, result, node)
        if not number.parts and not number.constant:
            return result
        return self.call(torch.add, result, self.size(number))

    def _times(self, node: Node, times: int) -> Node:
        return node if times == 1 else self.call(torch.mul, node, times)

    def atom(self, one: Atom) -> Node:
        if one not in self._known:
            self._known[one] = self._atom(one)
        return self._known[one]

    def _atom(self, one: Atom) -> Node:
        if isinstance(one, Var):
            indices = self.factory(torch.arange, self.size(one.size))
            return self.call("unsqueeze", indices, 1 if one.name == "b" else 0)
        if isinstance(one, Leaf):
            return self.leaf(one)
        if isinstance(one, Floor):
            return self.call(torch.floor_divide, self.sum(one.term), one.by)
        if isinstance(one, Abs):
            return self.call(torch.abs, self.sum(one.term))
        if isinstance(one, Indicator):
            return self.call("to", self.condition(one.condition), torch.int64)
        if isinstance(one, Select):
            return self.call(torch.where, self.condition(one.condition), self.sum(one.then), self.sum(one.otherwise))
        assert isinstance(one, Extreme)
        return self.several(getattr(torch, one.name), [self.sum(term) for term in one.terms])

    def several(self, function: Callable, nodes: Sequence[Node]) -> Node:
        return reduce(lambda left, right: self.call(function, left, right), nodes)

    def leaf(self, leaf: Leaf) -> Node:
        """Elements of a tensor: the tensor itself, a part of it, or what is gathered from it."""
        value = value_of(leaf.node)
        if value.device != self._like.device:
            raise Declined(f"{leaf.node} is on {value.device}", "mask.data")
        variables = [self._axis(one, length) for one, length in zip(leaf.index, value.shape, strict=True)]
        simple = all(name or one.literal is not None for name, one in zip(variables, leaf.index, strict=True))
        names = [name for name in variables if name]
        if not simple or len(set(names)) < len(names):
            index: tuple[Any, ...] = tuple(
                one.literal if one.literal is not None else self.sum(one) for one in leaf.index
            )
            return self._of_two_axes(self.call(operator.getitem, leaf.node, index), ["b", "*"])
        if len(names) == value.dim():
            return self._of_two_axes(leaf.node, names)
        index = tuple(slice(None) if name else one.literal for name, one in zip(variables, leaf.index, strict=True))
        return self._of_two_axes(self.call(operator.getitem, leaf.node, index), names)

    def _axis(self, one: Sum, length: Any) -> str:
        """The variable that an index is, if it runs over all of an axis."""
        var = one.parts[0][0] if len(one.parts) == 1 and one.parts[0][1] == 1 and not one.constant else None
        if not isinstance(var, Var):
            return ""
        whole_axis = var.size.literal == length if isinstance(length, int) else _spelling(var.size) == str(length)
        return var.name if whole_axis else ""

    def _of_two_axes(self, node: Node, names: list[str]) -> Node:
        """b first, then q or j, of a tensor with these axes."""
        rank = value_of(node).dim()
        if len(names) == 2 and rank == 2:
            return self.call("transpose", node, 0, 1) if names[1] == "b" else node
        for axis in range(2 - rank):
            node = self.call("unsqueeze", node, 1 if names == ["b"] and axis == 0 else 0)
        return node

    def condition(self, condition: Condition) -> Node:
        """A bool tensor of two axes."""
        if ("is", condition) not in self._known:
            self._known["is", condition] = self._condition(condition)
        return self._known["is", condition]

    def _condition(self, condition: Condition) -> Node:
        if isinstance(condition, bool):
            return self.factory(torch.full, (1, 1), condition, dtype=torch.bool)
        if isinstance(condition, NonNegative):
            return self.call(torch.ge, self.sum(condition.term), 0)
        if isinstance(condition, Zero):
            return self.call(torch.eq, self.sum(condition.term), 0)
        if isinstance(condition, Truth):
            return self.atom(condition.leaf)
        if isinstance(condition, Not):
            return self.call(torch.logical_not, self.condition(condition.condition))
        function = torch.logical_and if isinstance(condition, And) else torch.logical_or
        assert isinstance(condition, (And, Or))
        return self.several(function, [self.condition(one) for one in condition.parts])

    def row(self, node: Node, length: Sum, dtype: torch.dtype = torch.int32) -> Node:
        """A tensor of two axes as an argument of the op: [B or 1, length], contiguous."""
        value = value_of(node)
        if value.dtype != dtype:
            node = self.call("to", node, dtype)
        if steady(value.shape[1] == 1) and length.literal != 1:
            node = self.call("expand", node, -1, self.size(length))
        return node if value_of(node).is_contiguous() else self.call("contiguous", node)


def _spelling(size: Sum) -> str:
    one = size.parts[0][0] if len(size.parts) == 1 and size.parts[0][1] == 1 and not size.constant else None
    return one.spelling if isinstance(one, Size) else ""
