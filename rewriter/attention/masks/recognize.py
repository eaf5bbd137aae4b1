"""Attention masks recognised in a graph: what of a mask the attention op can be told without the mask itself.

A mask is read backwards, element by element (mask_values.py, mask_calls.py, mask_indexing.py), into a condition on a
query and a key (mask_terms.py).  The condition is taken apart into ranges of keys, keys that are padding and ids that
must be equal (mask_ranges.py), and these are computed in the graph from what the mask was made of (mask_nodes.py).
Nothing is known by its name; what is not certain is declined with the reason.
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
_READ_BY = (pointwise, indexing)  # imported for what they tell the reader


@dataclass(frozen=True)
class Mask:
    """What a mask says.  kind: for reports, the parts that were found, by name.

    alike: a row that is masked throughout gives all keys the same weight.
    """

    kind: str
    _node: Node
    _parts: Parts
    _queries: Sum
    _keys: Sum
    _alike: bool

    def arguments(self, before: Node, *, sinks: bool = False) -> dict[str, Any]:
        """start, end, query_ids, key_ids, causal and window of the attention op; nodes are put before ``before``.

        sinks: beside one a row that is masked throughout has no weight to give.
        """
        write = Writer(before, value_of(self._node))
        try:
            return _Arguments(write, self._parts, self._queries, self._keys).all(self._alike and not sinks)
        except Exception:
            write.erase()
            raise


def recognize(mask: Node, rows: Any = None, columns: Any = None) -> Mask | str:
    """What a mask [B or 1, H or 1, S or 1, T or 1], or of its last axes, says; or why that is not known.

    rows, columns: how many queries and keys there are, if the mask does not tell: numbers, SymInts or nodes.
    """
    try:
        return _recognize(mask, rows, columns)
    except Declined as declined:
        return declined.reason
    except Exception as error:  # a spelling that is not known must not cost the whole graph
        return f"it could not be read: {describe(error)}"


def _recognize(mask: Node, rows: Any, columns: Any) -> Mask:
    tensor = value_of(mask)
    if not isinstance(tensor, Tensor) or not 2 <= tensor.dim() <= 4:
        raise Declined("the mask has not 2 to 4 axes")
    names = _AXES[4 - tensor.dim() :]
    axes = [variable(name, size_of(length)) for name, length in zip(names, tensor.shape, strict=True)]
    queries, keys = _length(tensor.shape[-2], rows), _length(tensor.shape[-1], columns)
    reader = Reader()
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


def _length(length: Any, given: Any) -> Sum:
    """How many queries or keys there are: an axis of size 1 may stand for any number."""
    if given is None:
        return size_of(length)
    if not steady(length == 1) and not steady(length == value_of(given)):
        raise Declined(f"the mask's size {length} is not {value_of(given)}")
    return size_of(given)


def _condition(reader: Reader, mask: Node, value: Value, dtype: torch.dtype) -> tuple[Condition, set[str]]:
    """Under which a query may attend to a key, and what the others are masked by: ``lowest``, ``infinite``."""
    if isinstance(value, (Depends, Sum)):
        raise Declined(reader.unknown(mask) or Reason("it is data", "mask.data"))
    if not isinstance(value, Cases):
        return value, set()
    if not dtype.is_floating_point:
        raise Declined(f"a mask of {dtype}")
    found: dict[str, Condition] = {}
    for number, condition in value.numbers:
        kind = _KINDS.get(number) or ("lowest" if number == torch.finfo(dtype).min else "")
        if not kind:
            raise Declined(f"it adds {number}, which is not the lowest {dtype}")
        found[kind] = condition
    if "lowest" in found and dtype == torch.float16:
        raise Declined("the lowest float16 does not outweigh every score")
    return found.get("zero", False), found.keys() - {"zero"}


_KINDS = {0.0: "zero", float("-inf"): "infinite"}


def _disturbed(reader: Reader, mask: Node, condition: Condition) -> str | None:
    """Whether anything that was read is written to, but for tensors of the graph's own that are only read after it."""
    leaves = {one.node for one in atoms(condition) if isinstance(one, Leaf)}
    gm, explained = mask.graph.owning_module, set()
    for node in mask.graph.nodes:
        for target in maybe_mutated_args(node) if gm is None else mutated_args(gm, node):
            met = [one for one in reader.visited if may_alias(target, one)]
            known = isinstance(target, Node) and node in reader.visited and _last_use(target, node)
            if met and (not known or not leaves.isdisjoint(met)):
                return f"{name_of(node.target)} writes to what it is made of"
            explained.update(met)
    for one in reader.visited:
        if one not in explained and any(map(fake_tensors.written_to, fake_tensors.tensors_in(value_of(one)))):
            return Reason(f"{one} is written to in place", "mutation")
    return None


def _last_use(target: Node, write: Node) -> bool:
    """Whether nothing reads a tensor of this graph's own after it was written to, but through the write."""
    graph = write.graph
    for node in graph.nodes:
        if node is write:
            return True
        given = node.op in ("placeholder", "get_attr")
        if may_alias(node, target) and (given or any(user > write for user in node.users)):
            return False
    return False


class _Arguments:
    """Writes what the op takes of one mask."""

    def __init__(self, write: Writer, parts: Parts, queries: Sum, keys: Sum) -> None:
        self.write, self.parts, self.queries, self.keys = write, parts, queries, keys

    def all(self, alike: bool) -> dict[str, Any]:
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
            ids = [self._contiguous(one) for one in (at_key, at_query)]
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
        """A bound that fits 32 bits, where data may be larger, or less."""
        if not any(isinstance(one, Leaf) for one in atoms(term)):
            return term
        return extreme("maximum", [whole(0), extreme("minimum", [term, self.keys])])

    def _contiguous(self, leaf: Leaf) -> Node:
        node = self.write.atom(leaf)
        return node if value_of(node).is_contiguous() else self.write.call("contiguous", node)

    def _alike(self, start: Node | None, end: Node | None) -> tuple[Node, Node | None]:
        """Rows without a key start at -1 and end with the last."""
        write, last = self.write, self.write.whole(self.keys)
        empty = self._empty(start, end)
        none = write.whole(whole(-1))
        start = write.call(torch.where, empty, none, write.whole(whole(0)) if start is None else start)
        return start, None if end is None else write.call(torch.where, empty, last, end)

    def _empty(self, start: Node | None, end: Node | None) -> Node:
        """Which rows have no key, [B or 1, S or 1]."""
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
        """Where no key counts of those from first, not negative, to last, not beyond the end."""
        write = self.write
        counts = write.row(write.condition(every(self.parts.keys)), self.keys, torch.int64)
        before = write.call(torch.nn.functional.pad, write.call(torch.cumsum, counts, -1), (1, 0))
        first = write.call(torch.minimum, first, write.whole(self.keys))
        last = write.call(torch.maximum, last, first)
        batch = value_of(before).shape[0]
        rows: Any = 0 if steady(batch == 1) else self._batch(before)
        found = [write.call(operator.getitem, before, (rows, one)) for one in (first, last)]
        return write.call(torch.eq, *found)

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
            write.row(write.sum(one), length, torch.int64)
            for one, length in zip(parts.ids, (self.queries, self.keys), strict=True)
        )
        if kept is not None:  # keys that are padding are odd, and all queries are even
            query, key = (write.call(torch.mul, one, 2) for one in (query, key))
            key = write.call(torch.add, key, write.call(torch.sub, 1, kept))
        return query, key
