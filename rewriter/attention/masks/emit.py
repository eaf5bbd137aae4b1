"""Add the tensors that a recognised attention mask is made of to the graph as nodes."""

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
    """Adds nodes that compute terms of b and of q or j, as tensors [B or 1, S or T], before a node; each term once."""

    def __init__(self, before: Node, like: Tensor) -> None:
        self._before, self._like = before, like  # like: has the fake mode and the device
        self._known: dict[Any, Node] = {}
        self._written: list[Node] = []

    def erase(self) -> None:
        """Remove all nodes that were added."""
        for node in reversed(self._written):
            self._before.graph.erase_node(node)

    def call(self, function: Callable | str, *arguments: Any, **named: Any) -> Node:
        """Add a call of a function, or of a method of the first argument."""
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
        """Add a call that creates a tensor, on the device of the mask."""
        return self.call(function, *arguments, dtype=dtype, device=self._like.device)

    def size(self, term: Sum) -> Any:
        """Return a term of sizes as a number or as a node that computes it.  Raises Declined."""
        result: Any = term.constant or None
        for atom, times in term.parts:
            assert isinstance(atom, Size)
            node = self._size(atom)
            node = node if times == 1 else self.call(operator.mul, node, times)
            result = node if result is None else self.call(operator.add, node, result)
        return 0 if result is None else result

    def _size(self, size: Size) -> Node:
        if size not in self._known:
            self._known[size] = self._size_node(size)
        return self._known[size]

    def _size_node(self, size: Size) -> Node:
        """Return a node that computes a symbolic size: an existing one, or the size of an axis.  Raises Declined."""
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
        """Return a term of sizes as a tensor [1, 1]."""
        return self.factory(torch.full, (1, 1), self.size(term), dtype=dtype)

    def sum(self, term: Sum) -> Node:
        """Return a Sum as a tensor of two axes."""
        if term not in self._known:
            self._known[term] = self._sum(term)
        return self._known[term]

    def _sum(self, term: Sum) -> Node:
        sizes = [(atom, times) for atom, times in term.parts if isinstance(atom, Size)]
        number = Sum(tuple(sizes), term.constant)
        others = [(atom, times) for atom, times in term.parts if not isinstance(atom, Size)]
        if not others:
            return self.whole(term)
        result: Any = None
        for atom, times in sorted(others, key=lambda part: part[1] < 0):
            node = self._times(self.atom(atom), times if result is None else abs(times))
            joined = torch.add if times > 0 else torch.sub
            result = node if result is None else self.call(joined, result, node)
        if not number.parts and not number.constant:
            return result
        return self.call(torch.add, result, self.size(number))

    def _times(self, node: Node, times: int) -> Node:
        return node if times == 1 else self.call(torch.mul, node, times)

    def atom(self, atom: Atom) -> Node:
        """Return an atom as a tensor of two axes."""
        if atom not in self._known:
            self._known[atom] = self._atom(atom)
        return self._known[atom]

    def _atom(self, atom: Atom) -> Node:
        if isinstance(atom, Var):
            indices = self.factory(torch.arange, self.size(atom.size))
            return self.call("unsqueeze", indices, 1 if atom.name == "b" else 0)
        if isinstance(atom, Leaf):
            return self.leaf(atom)
        if isinstance(atom, Floor):
            return self.call(torch.floor_divide, self.sum(atom.term), atom.by)
        if isinstance(atom, Abs):
            return self.call(torch.abs, self.sum(atom.term))
        if isinstance(atom, Indicator):
            return self.call("to", self.condition(atom.condition), torch.int64)
        if isinstance(atom, Select):
            return self.call(torch.where, self.condition(atom.condition), self.sum(atom.then), self.sum(atom.otherwise))
        assert isinstance(atom, Extreme)
        return self.several(getattr(torch, atom.name), [self.sum(term) for term in atom.terms])

    def several(self, function: Callable, nodes: Sequence[Node]) -> Node:
        """Combine tensors by a binary function."""
        return reduce(lambda left, right: self.call(function, left, right), nodes)

    def leaf(self, leaf: Leaf) -> Node:
        """Return elements of a tensor: the tensor itself, a slice of it, or a gather.  Raises Declined."""
        value = value_of(leaf.node)
        if value.device != self._like.device:
            raise Declined(f"{leaf.node} is on {value.device}", "mask.data")
        variables = [self._axis(position, length) for position, length in zip(leaf.index, value.shape, strict=True)]
        simple = all(name or position.literal is not None for name, position in zip(variables, leaf.index, strict=True))
        names = [name for name in variables if name]
        if not simple or len(set(names)) < len(names):
            index: tuple[Any, ...] = tuple(
                position.literal if position.literal is not None else self.sum(position) for position in leaf.index
            )
            return self._of_two_axes(self.call(operator.getitem, leaf.node, index), ["b", "*"])
        if len(names) == value.dim():
            return self._of_two_axes(leaf.node, names)
        index = tuple(
            slice(None) if name else position.literal for name, position in zip(variables, leaf.index, strict=True)
        )
        return self._of_two_axes(self.call(operator.getitem, leaf.node, index), names)

    def _axis(self, position: Sum, length: Any) -> str:
        """Return the name of the variable that runs over all of an axis, or ""."""
        var = (
            position.parts[0][0]
            if len(position.parts) == 1 and position.parts[0][1] == 1 and not position.constant
            else None
        )
        if not isinstance(var, Var):
            return ""
        whole_axis = var.size.literal == length if isinstance(length, int) else _spelling(var.size) == str(length)
        return var.name if whole_axis else ""

    def _of_two_axes(self, node: Node, names: list[str]) -> Node:
        """Return a tensor with these axes as one of two: b first, then q or j."""
        rank = value_of(node).dim()
        if len(names) == 2 and rank == 2:
            return self.call("transpose", node, 0, 1) if names[1] == "b" else node
        for axis in range(2 - rank):
            node = self.call("unsqueeze", node, 1 if names == ["b"] and axis == 0 else 0)
        return node

    def condition(self, condition: Condition) -> Node:
        """Return a condition as a bool tensor of two axes."""
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
        return self.several(function, [self.condition(part) for part in condition.parts])

    def row(self, node: Node, length: Sum, dtype: torch.dtype = torch.int32) -> Node:
        """Return a tensor of two axes as an argument of the op: [B or 1, length], contiguous."""
        value = value_of(node)
        if value.dtype != dtype:
            node = self.call("to", node, dtype)
        if steady(value.shape[1] == 1) and length.literal != 1:
            node = self.call("expand", node, -1, self.size(length))
        return node if value_of(node).is_contiguous() else self.call("contiguous", node)


def _spelling(size: Sum) -> str:
    atom = size.parts[0][0] if len(size.parts) == 1 and size.parts[0][1] == 1 and not size.constant else None
    return atom.spelling if isinstance(atom, Size) else ""
