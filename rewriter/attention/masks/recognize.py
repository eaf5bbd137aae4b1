"""Recognise attention masks in a graph: what the attention op can be given in place of the mask itself.

A mask is read backwards, element by element (reader.py, pointwise.py, indexing.py), into a condition on a query and a
key (terms.py).  The condition is split into ranges of keys, keys that are padding and ids that must be equal
(intervals.py), and these are computed in the graph from what the mask was made of (emit.py).  No mask is recognised by
its name; what is not certain is declined with the reason.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.errors import describe
from fastft.reasons import Declined, Reason
from fastft.rewriter.attention.masks import indexing, pointwise
from fastft.rewriter.attention.masks.emit import Writer
from fastft.rewriter.attention.masks.intervals import Parts, take_apart
from fastft.rewriter.attention.masks.reader import Cases, Depends, Reader, Value, size_of, steady
from fastft.rewriter.attention.masks.terms import Condition, Leaf, Sum, atoms, every, extreme, variable, whole
from fastft.rewriter.fx.effects import may_alias, maybe_mutated_args, mutated_args
from fastft.rewriter.fx.metadata import name_of

_AXES = "bhqj"
_READ_BY = (pointwise, indexing)  # imported because they register handlers with the reader


@dataclass(frozen=True)
class Mask:
    """What a mask means.  kind: the names of its parts, for reports.

    alike: a row that is masked throughout gives all keys the same weight.
    """

    kind: str
    _node: Node
    _parts: Parts
    _queries: Sum
    _keys: Sum
    _alike: bool

    def arguments(self, before: Node, *, sinks: bool = False) -> dict[str, Any]:
        """Return start, end, query_ids, key_ids, causal and window of the attention op, as nodes put before ``before``.

        sinks: with attention sinks, a row that is masked throughout has no weight to give.  Raises Declined, and then
        removes the nodes it added.
        """
        write = Writer(before, value_of(self._node))
        try:
            return _Arguments(write, self._parts, self._queries, self._keys).all(self._alike and not sinks)
        except Exception:
            write.erase()
            raise


def recognize(mask: Node, rows: Any = None, columns: Any = None) -> Mask | str:
    """Return what a mask [B or 1, H or 1, S or 1, T or 1], or of its last axes, means; or why that is not known.

    rows, columns: numbers of queries and keys, if the mask does not have them: numbers, SymInts or nodes.
    """
    try:
        return _recognize(mask, rows, columns)
    except Declined as declined:
        return declined.reason
    except Exception as error:  # an unknown form must not cost the whole graph
        return f"it could not be read: {describe(error)}"


def _recognize(mask: Node, rows: Any, columns: Any) -> Mask:
    tensor = value_of(mask)
    if not isinstance(tensor, Tensor) or not 2 <= tensor.dim() <= 4:
        raise Declined("the mask has not 2 to 4 axes")
    names = _AXES[4 - tensor.dim() :]
    axes = [variable(name, size_of(length)) for name, length in zip(names, tensor.shape, strict=True)]
    queries, keys = _length(tensor.shape[-2], rows), _length(tensor.shape[-1], columns)
    reader = Reader()
    try:
        return _read(mask, tensor, axes, queries, keys, reader)
    except Exception:
        for node in reversed(reader.made):
            mask.graph.erase_node(node)
        raise


def _read(mask: Node, tensor: Tensor, axes: list[Sum], queries: Sum, keys: Sum, reader: Reader) -> Mask:
    condition, masked = _condition(reader, mask, reader.value(mask, axes), tensor.dtype)
    parts = take_apart(condition, queries, keys, axes[-2], axes[-1], reader)
    if reason := _disturbed(reader, mask, condition):
        raise Declined(reason)
    alike = "lowest" in masked and not parts.never_empty
    if alike and len(masked) > 1:
        raise Declined("rows may be masked throughout, by -inf and by a finite number")
    if alike and parts.ids is not None:
        raise Declined("rows may be masked throughout, among ids that are no ranges")
    return Mask(parts.kind, mask, parts, queries, keys, alike)


def _length(length: Any, expected: Any) -> Sum:
    """Return the number of queries or keys; an axis of size 1 may stand for any number.  Raises Declined."""
    if expected is None:
        return size_of(length)
    if not steady(length == 1) and not steady(length == value_of(expected)):
        raise Declined(f"the mask's size {length} is not {value_of(expected)}")
    return size_of(expected)


def _condition(reader: Reader, mask: Node, value: Value, dtype: torch.dtype) -> tuple[Condition, set[str]]:
    """Return when a query may attend to a key, and what masks others: ``lowest``, ``infinite``.  Raises Declined."""
    if isinstance(value, (Depends, Sum)):
        raise Declined(reader.unknown(mask) or Reason("it is data", "mask.data"))
    if not isinstance(value, Cases):
        return value, set()
    if not dtype.is_floating_point:
        raise Declined(f"a mask of {dtype}")
    conditions: dict[str, Condition] = {}
    for number, condition in value.numbers:
        kind = _KINDS.get(number) or ("lowest" if number == torch.finfo(dtype).min else "")
        if not kind:
            raise Declined(f"it adds {number}, which is not the lowest {dtype}")
        conditions[kind] = condition
    if "lowest" in conditions and dtype == torch.float16:
        raise Declined("the lowest float16 does not outweigh every score")
    return conditions.get("zero", False), conditions.keys() - {"zero"}


_KINDS = {0.0: "zero", float("-inf"): "infinite"}


def _disturbed(reader: Reader, mask: Node, condition: Condition) -> str | None:
    """Return why something that was read is mutated, or None.

    Tensors that the graph itself makes may be written to if they are only read afterwards.
    """
    leaves = {atom.node for atom in atoms(condition) if isinstance(atom, Leaf)}
    gm, explained = mask.graph.owning_module, set()
    for node in mask.graph.nodes:
        for target in maybe_mutated_args(node) if gm is None else mutated_args(gm, node):
            met = [visited for visited in reader.visited if may_alias(target, visited)]
            known = isinstance(target, Node) and node in reader.visited and _last_use(target, node)
            if met and (not known or not leaves.isdisjoint(met)):
                return f"{name_of(node.target)} writes to what it is made of"
            explained.update(met)
    for visited in reader.visited:
        if visited not in explained and any(map(fake_tensors.written_to, fake_tensors.tensors_in(value_of(visited)))):
            return Reason(f"{visited} is written to in place", "mutation")
    return None


def _last_use(target: Node, write: Node) -> bool:
    """Tell whether, after this write, a tensor made in this graph is read only through the write's result."""
    graph = write.graph
    for node in graph.nodes:
        if node is write:
            return True
        is_input = node.op in ("placeholder", "get_attr")
        if may_alias(node, target) and (is_input or any(user > write for user in node.users)):
            return False
    return False


class _Arguments:
    """Computes the op's arguments for one mask."""

    def __init__(self, write: Writer, parts: Parts, queries: Sum, keys: Sum) -> None:
        self.write, self.parts, self.queries, self.keys = write, parts, queries, keys

    def all(self, alike: bool) -> dict[str, Any]:
        """Return the op's arguments; alike: rows without a key give all keys the same weight."""
        start, end = self._ranges()
        if alike:
            start, end = self._alike(start, end)
        query_ids, key_ids = self._ids()
        row = lambda node: None if node is None else self.write.row(node, self.queries)  # noqa: E731
        return {
            "start": row(start), "end": row(end), "query_ids": query_ids, "key_ids": key_ids,
            "causal": self.parts.causal, "window": self.parts.window,
        }  # fmt: skip

    def _ranges(self) -> tuple[Node | None, Node | None]:
        write, parts = self.write, self.parts
        first = self._at_most_all(extreme("maximum", [whole(0), *parts.starts]))
        starts = [] if first.literal == 0 else [write.sum(first)]
        ends = [write.sum(self._at_most_all(extreme("minimum", parts.ends)))] if parts.ends else []
        for at_query, at_key in parts.documents:
            ids = [self._contiguous(leaf) for leaf in (at_key, at_query)]
            starts.append(write.call(torch.searchsorted, *ids, out_int32=True))
            if not (parts.causal and parts.reached):
                ends.append(write.call(torch.searchsorted, *ids, out_int32=True, right=True))
        start = write.several(torch.maximum, starts) if starts else None
        end = write.several(torch.minimum, ends) if ends else None
        if parts.rows:
            kept = write.condition(every(parts.rows))
            end = write.call(torch.where, kept, write.whole(self.keys) if end is None else end, write.whole(whole(0)))
        return start, end

    def _at_most_all(self, term: Sum) -> Sum:
        """Clamp a bound to 0 ... the number of keys where it depends on data, which may exceed 32 bits."""
        if not any(isinstance(atom, Leaf) for atom in atoms(term)):
            return term
        return extreme("maximum", [whole(0), extreme("minimum", [term, self.keys])])

    def _contiguous(self, leaf: Leaf) -> Node:
        node = self.write.atom(leaf)
        return node if value_of(node).is_contiguous() else self.write.call("contiguous", node)

    def _alike(self, start: Node | None, end: Node | None) -> tuple[Node, Node | None]:
        """Let rows without a key start at -1 and end with the last key."""
        write, last = self.write, self.write.whole(self.keys)
        empty = self._empty(start, end)
        none = write.whole(whole(-1))
        start = write.call(torch.where, empty, none, write.whole(whole(0)) if start is None else start)
        return start, None if end is None else write.call(torch.where, empty, last, end)

    def _empty(self, start: Node | None, end: Node | None) -> Node:
        """Return which rows have no key, [B or 1, S or 1]."""
        write, parts = self.write, self.parts
        low = [write.sum(whole(0)) if start is None else start]
        high = [write.whole(self.keys), *([] if end is None else [end])]
        if parts.window:
            low.append(write.sum(parts.q - parts.window + 1))
        if parts.causal:
            high.append(write.sum(parts.q + 1))
        first, last = write.several(torch.maximum, low), write.several(torch.minimum, high)
        if not parts.keys:
            return write.call(torch.le, last, first)
        return self._none_between(first, last)

    def _none_between(self, first: Node, last: Node) -> Node:
        """Return where no key counts from ``first``, not negative, to ``last``, at most the number of keys."""
        write = self.write
        counts = write.row(write.condition(every(self.parts.keys)), self.keys, torch.int64)
        before = write.call(torch.nn.functional.pad, write.call(torch.cumsum, counts, -1), (1, 0))
        first = write.call(torch.minimum, first, write.whole(self.keys))
        last = write.call(torch.maximum, last, first)
        batch = value_of(before).shape[0]
        rows: Any = 0 if steady(batch == 1) else self._batch(before)
        sums = [write.call(operator.getitem, before, (rows, bound)) for bound in (first, last)]
        return write.call(torch.eq, *sums)

    def _batch(self, node: Node) -> Node:
        size = size_of(value_of(node).shape[0])
        return self.write.sum(variable("b", size))

    def _ids(self) -> tuple[Node | None, Node | None]:
        write, parts = self.write, self.parts
        kept = write.row(write.condition(every(parts.keys)), self.keys) if parts.keys else None
        if parts.ids is None:
            if kept is None:
                return None, None
            queries = write.factory(torch.zeros, (1, write.size(self.queries)), dtype=torch.int32)
            return queries, write.call(torch.sub, kept, 1)
        query, key = (
            write.row(write.sum(ids), length, torch.int64)
            for ids, length in zip(parts.ids, (self.queries, self.keys), strict=True)
        )
        if kept is not None:  # keys that are padding are odd, and all queries are even
            query, key = (write.call(torch.mul, ids, 2) for ids in (query, key))
            key = write.call(torch.add, key, write.call(torch.sub, 1, kept))
        return query, key
