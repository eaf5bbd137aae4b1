"""Read calls that move elements of an attention mask: shapes, indices, and sums and differences along an axis.

A handler takes the reader, the node, the index of the element and the call's arguments; see reader.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastft.compat.fake_tensors import value_of
from fastft.rewriter.attention.masks.reader import (
    INTEGERS,
    Index,
    Reader,
    Value,
    as_sum,
    call_name,
    depends,
    dtype_of,
    not_negative,
    reads,
    size_of,
    steady,
)
from fastft.rewriter.attention.masks.terms import Sum, variable, variables, whole


@reads("unsqueeze", form=lambda input, dim: ...)
def _unsqueeze(reader: Reader, node: Node, index: Index, source: Node, dim: int) -> Value:
    axis = dim % len(index)
    return reader.value(source, index[:axis] + index[axis + 1 :])


@reads("expand", "expand_as", "broadcast_to", form=lambda input, *size: ...)
def _expand(reader: Reader, node: Node, index: Index, source: Node, *_: Any) -> Value:
    return reader.operand(source, node, index)


@reads("view", "reshape", "squeeze", "flatten", "view_as", "reshape_as", form=lambda input, *size, dim=None: ...)
def _view(reader: Reader, node: Node, index: Index, source: Node, *size: Any, dim: Any = None) -> Value:
    """Read a view that only adds or removes axes of size 1; any other is data."""
    old, new = value_of(source).shape, value_of(node).shape
    if dtype_of(source) != dtype_of(node):
        return reader.data(node, index)
    kept = [position for length, position in zip(new, index, strict=True) if not steady(length == 1)]
    before = [axis for axis, length in enumerate(old) if not steady(length == 1)]
    after = [axis for axis, length in enumerate(new) if not steady(length == 1)]
    if len(before) != len(after) or not all(
        steady(old[left] == new[right])
        for left, right in zip(before, after)  # noqa: B905
    ):
        reader.strange[node] = f"{call_name(node)} that joins or parts axes"
        return reader.data(node, index)
    positions = dict(zip(before, kept, strict=True))
    return reader.value(source, [positions.get(axis, whole(0)) for axis in range(len(old))])


@reads("transpose", form=lambda input, dim0, dim1: ...)
def _transpose(reader: Reader, node: Node, index: Index, source: Node, dim0: int, dim1: int) -> Value:
    swapped = list(index)
    swapped[dim0], swapped[dim1] = swapped[dim1], swapped[dim0]
    return reader.value(source, swapped)


@reads("t", form=lambda input: ...)
def _t(reader: Reader, node: Node, index: Index, source: Node) -> Value:
    return reader.value(source, index[::-1])


@reads("getattr", form=lambda input, name: ...)
def _attribute(reader: Reader, node: Node, index: Index, source: Node, name: str) -> Value:
    """Read x.T of a matrix, or x.mT."""
    matrix = len(index) == 2 or (name == "mT" and len(index) > 2)
    if not isinstance(value_of(source), Tensor) or name not in ("T", "mT") or not matrix:
        return reader.data(node, index)
    return reader.value(source, (*index[:-2], index[-1], index[-2]))


@reads("permute", form=lambda input, *dims: ...)
def _permute(reader: Reader, node: Node, index: Index, source: Node, *dims: Any) -> Value:
    order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    positions = {axis % len(index): position for axis, position in zip(order, index, strict=True)}
    return reader.value(source, [positions[axis] for axis in range(len(index))])


@reads("repeat", "tile", form=lambda input, *times: ...)
def _repeat(reader: Reader, node: Node, index: Index, source: Node, *_: Any) -> Value:
    """Read a repeat that only repeats axes of size 1; any other is data."""
    old, new = value_of(source).shape, value_of(node).shape
    start = len(new) - len(old)
    if all(
        steady(old_size == 1) or steady(old_size == new_size)
        for old_size, new_size in zip(old, new[start:], strict=True)
    ):
        return reader.value(source, index[start:])
    return reader.data(node, index)


@reads("contiguous", "clone", "detach", "alias", form=lambda input, *, memory_format=None: ...)
def _same(reader: Reader, node: Node, index: Index, source: Node, *_: Any, **__: Any) -> Value:
    return reader.value(source, index)


def _along(node: Node, dim: int, index: Index) -> tuple[int, Sum, Callable[[Sum], Index]]:
    """Return an axis, a fresh variable along it, and a function that puts another position there into the index."""
    axis, known = dim % len(index), variables(*index)
    name = next(name for name in map("k{}".format, itertools.count()) if name not in known)  # of no other axis
    return (
        axis,
        variable(name, size_of(value_of(node).shape[axis])),
        lambda place: (*index[:axis], place, *index[axis + 1 :]),
    )


@reads("cumsum", form=lambda input, dim, *, dtype=None: ...)
def _cumsum(reader: Reader, node: Node, index: Index, source: Node, dim: int, dtype: Any = None) -> Value:
    if not index:
        return reader.data(node, index)
    axis, anywhere, placed = _along(node, dim, index)
    value = reader.value(source, placed(anywhere))
    term = as_sum(value)
    if term is not None and term.literal is not None and dtype_of(node) in INTEGERS:
        return (index[axis] + 1) * term.literal
    return reader.data(node, index, depends(value) | depends(index[axis]))


@reads("diff", form=lambda input, n=1, dim=-1, prepend=None, append=None: ...)
def _diff(reader: Reader, node: Node, index: Index, source: Node, n: Any, dim: int, prepend: Any, append: Any) -> Value:
    """Read differences that are the same number everywhere; others are data."""
    axis, anywhere, placed = _along(source, dim, index)
    here, before = (as_sum(reader.value(source, placed(anywhere - back))) for back in (0, 1))
    if n != 1 or append is not None or here is None or before is None or dtype_of(node) not in INTEGERS:
        return reader.data(node, index)
    change = (here - before).literal
    if prepend is not None and change is not None:
        if not isinstance(prepend, Node) or not steady(value_of(prepend).shape[axis] == 1):
            return reader.data(node, index)
        ahead = as_sum(reader.value(source, placed(whole(0))))
        behind = as_sum(reader.operand(prepend, node, placed(whole(0))))
        change = change if ahead is not None and behind is not None and (ahead - behind).literal == change else None
    return reader.data(node, index) if change is None else whole(change)


@reads("getitem", form=lambda input, index: ...)
def _getitem(reader: Reader, node: Node, index: Index, source: Node, chosen: Any) -> Value:
    if not isinstance(value_of(source), Tensor):
        return reader.data(node, index)
    where = _indexed(reader, node, index, source, chosen if isinstance(chosen, tuple) else (chosen,))
    if where is None:
        reader.strange[node] = "indexing"
        return reader.data(node, index)
    if isinstance(where, set):
        return reader.data(node, index, where)
    return reader.value(source, where)


def _indexed(reader: Reader, node: Node, index: Index, source: Node, chosen: tuple) -> Any:
    """Return the index into source, or None if it is not known.

    If that index may be negative, return the names of the variables that the element depends on.
    """
    shape = value_of(source).shape
    taken = sum(1 for item in chosen if item is not None and item is not Ellipsis)
    ellipsis = next((number for number, item in enumerate(chosen) if item is Ellipsis), len(chosen))
    full = (slice(None),) * (len(shape) - taken)
    chosen = (*chosen[:ellipsis], *full, *chosen[ellipsis + 1 :])
    tensors = [number for number, item in enumerate(chosen) if isinstance(value_of(item), Tensor)]
    if any(dtype_of(chosen[number]) not in INTEGERS for number in tensors):
        return None
    kept = [item for item in chosen if not _is_number(item) and not _is_place(item)]  # numbers remove their axis first
    places = [number for number, item in enumerate(kept) if isinstance(value_of(item), Tensor)]
    together = not places or places == list(range(places[0], places[-1] + 1))
    rank = max((value_of(chosen[number]).dim() for number in tensors), default=0)
    first = sum(1 for item in kept[: places[0]]) if places and together else 0
    lookup, rest = index[first : first + rank], list(index[:first] + index[first + rank :])
    return _sources(reader, node, shape, chosen, lookup, rest)


def _is_number(item: Any) -> bool:
    value = value_of(item)
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _is_place(item: Any) -> bool:
    """Tell whether an item of an index is a tensor of one number, which torch treats as that number."""
    value = value_of(item)
    return isinstance(value, Tensor) and value.dim() == 0


def _sources(reader: Reader, node: Node, shape: Any, chosen: tuple, lookup: Index, rest: list[Sum]) -> Any:
    """Translate each axis of the source in turn; returns what _indexed does."""
    result: list[Sum] = []
    maybe_negative, names = False, set()
    for item in chosen:
        size = size_of(shape[len(result)]) if item is not None and len(result) < len(shape) else whole(0)
        if item is None:
            rest.pop(0)
        elif _is_number(item):
            place = size_of(item)
            place = place + size if steady(value_of(item) < 0) else place
            if not not_negative(place):
                return None
            result.append(place)
        elif isinstance(item, slice):
            begin, step = _slice_start(item, size)
            if begin is None:
                return None
            result.append(begin + rest.pop(0) * step)
        elif isinstance(value_of(item), Tensor):
            value = as_sum(reader.value(item, lookup[len(lookup) - value_of(item).dim() :]))
            if value is None:
                return None
            maybe_negative |= not not_negative(value)
            names |= depends(value)
            result.append(value)
        else:
            return None
    if maybe_negative:
        return names | set().union(*map(depends, result))
    return result


def _slice_start(item: slice, size: Sum) -> tuple[Sum | None, int]:
    """Return the first index of a slice, or None if it is not known, and its step."""
    start, step = value_of(item.start), 1 if item.step is None else item.step
    if type(step) is not int or step < 1:
        return None, 1
    if start is None:
        return whole(0), step
    if isinstance(start, torch.SymInt):
        begin = size_of(item.start)
        return (begin if not_negative(begin) else None), step
    if type(start) is not int:
        return None, 1
    if start >= 0:
        return whole(start), step
    return (whole(max(size.literal + start, 0)), step) if size.literal is not None else (None, step)
