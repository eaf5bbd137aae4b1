"""Calls that move elements of an attention mask: shapes, indices, and sums and differences along an axis.

A handler gets the reader, the node, the index of the element and the call's arguments; see mask_values.py.
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
    at = dim % len(index)
    return reader.value(source, index[:at] + index[at + 1 :])


@reads("expand", "expand_as", "broadcast_to", form=lambda input, *size: ...)
def _expand(reader: Reader, node: Node, index: Index, source: Node, *_: Any) -> Value:
    return reader.operand(source, node, index)


@reads("view", "reshape", "squeeze", "flatten", "view_as", "reshape_as", form=lambda input, *size, dim=None: ...)
def _view(reader: Reader, node: Node, index: Index, source: Node, *size: Any, dim: Any = None) -> Value:
    """Axes of size 1 come or go; the others are as they were."""
    old, new = value_of(source).shape, value_of(node).shape
    if dtype_of(source) != dtype_of(node):
        return reader.data(node, index)
    kept = [one for length, one in zip(new, index, strict=True) if not steady(length == 1)]
    before = [at for at, length in enumerate(old) if not steady(length == 1)]
    after = [at for at, length in enumerate(new) if not steady(length == 1)]
    if len(before) != len(after) or not all(steady(old[one] == new[two]) for one, two in zip(before, after)):  # noqa: B905
        reader.strange[node] = f"{call_name(node)} that joins or parts axes"
        return reader.data(node, index)
    found = dict(zip(before, kept, strict=True))
    return reader.value(source, [found.get(at, whole(0)) for at in range(len(old))])


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
    """x.T of a matrix, x.mT."""
    matrix = len(index) == 2 or (name == "mT" and len(index) > 2)
    if not isinstance(value_of(source), Tensor) or name not in ("T", "mT") or not matrix:
        return reader.data(node, index)
    return reader.value(source, (*index[:-2], index[-1], index[-2]))


@reads("permute", form=lambda input, *dims: ...)
def _permute(reader: Reader, node: Node, index: Index, source: Node, *dims: Any) -> Value:
    order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    found = {axis % len(index): one for axis, one in zip(order, index, strict=True)}
    return reader.value(source, [found[axis] for axis in range(len(index))])


@reads("repeat", "tile", form=lambda input, *times: ...)
def _repeat(reader: Reader, node: Node, index: Index, source: Node, *_: Any) -> Value:
    """Axes of size 1 are repeated and others are not."""
    old, new = value_of(source).shape, value_of(node).shape
    start = len(new) - len(old)
    if all(steady(one == 1) or steady(one == two) for one, two in zip(old, new[start:], strict=True)):
        return reader.value(source, index[start:])
    return reader.data(node, index)


@reads("contiguous", "clone", "detach", "alias", form=lambda input, *, memory_format=None: ...)
def _same(reader: Reader, node: Node, index: Index, source: Node, *_: Any, **__: Any) -> Value:
    return reader.value(source, index)


def _along(node: Node, dim: int, index: Index) -> tuple[int, Sum, Callable[[Sum], Index]]:
    """An axis, a variable for any place on it, and the index with another place on it."""
    at, known = dim % len(index), variables(*index)
    name = next(name for name in map("k{}".format, itertools.count()) if name not in known)  # another axis may have one
    return at, variable(name, size_of(value_of(node).shape[at])), lambda place: (*index[:at], place, *index[at + 1 :])


@reads("cumsum", form=lambda input, dim, *, dtype=None: ...)
def _cumsum(reader: Reader, node: Node, index: Index, source: Node, dim: int, dtype: Any = None) -> Value:
    if not index:
        return reader.data(node, index)
    at, anywhere, placed = _along(node, dim, index)
    value = reader.value(source, placed(anywhere))
    term = as_sum(value)
    if term is not None and term.literal is not None and dtype_of(node) in INTEGERS:
        return (index[at] + 1) * term.literal
    return reader.data(node, index, depends(value) | depends(index[at]))


@reads("diff", form=lambda input, n=1, dim=-1, prepend=None, append=None: ...)
def _diff(reader: Reader, node: Node, index: Index, source: Node, n: Any, dim: int, prepend: Any, append: Any) -> Value:
    """Known where all differences are the same number."""
    at, anywhere, placed = _along(source, dim, index)
    here, before = (as_sum(reader.value(source, placed(anywhere - back))) for back in (0, 1))
    if n != 1 or append is not None or here is None or before is None or dtype_of(node) not in INTEGERS:
        return reader.data(node, index)
    change = (here - before).literal
    if prepend is not None and change is not None:
        if not isinstance(prepend, Node) or not steady(value_of(prepend).shape[at] == 1):
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
    """The index into source; names that the element depends on where that may be negative; None if it is not known."""
    shape = value_of(source).shape
    taken = sum(1 for one in chosen if one is not None and one is not Ellipsis)
    at = next((at for at, one in enumerate(chosen) if one is Ellipsis), len(chosen))
    full = (slice(None),) * (len(shape) - taken)
    chosen = (*chosen[:at], *full, *chosen[at + 1 :])
    tensors = [at for at, one in enumerate(chosen) if isinstance(value_of(one), Tensor)]
    if any(dtype_of(chosen[one]) not in INTEGERS for one in tensors):
        return None
    kept = [one for one in chosen if not _is_number(one) and not _is_place(one)]  # whose axis goes before tensors look
    places = [at for at, one in enumerate(kept) if isinstance(value_of(one), Tensor)]
    together = not places or places == list(range(places[0], places[-1] + 1))
    rank = max((value_of(chosen[one]).dim() for one in tensors), default=0)
    first = sum(1 for one in kept[: places[0]]) if places and together else 0
    lookup, rest = index[first : first + rank], list(index[:first] + index[first + rank :])
    return _sources(reader, node, shape, chosen, lookup, rest)


def _is_number(one: Any) -> bool:
    value = value_of(one)
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _is_place(one: Any) -> bool:
    """Whether a part of an index is a tensor of one number, which torch takes for that number."""
    value = value_of(one)
    return isinstance(value, Tensor) and value.dim() == 0


def _sources(reader: Reader, node: Node, shape: Any, chosen: tuple, lookup: Index, rest: list[Sum]) -> Any:
    """Each axis of the source in turn."""
    result: list[Sum] = []
    maybe_negative, names = False, set()
    for one in chosen:
        size = size_of(shape[len(result)]) if one is not None and len(result) < len(shape) else whole(0)
        if one is None:
            rest.pop(0)
        elif _is_number(one):
            place = size_of(one)
            place = place + size if steady(value_of(one) < 0) else place
            if not not_negative(place):
                return None
            result.append(place)
        elif isinstance(one, slice):
            begin, step = _slice_start(one, size)
            if begin is None:
                return None
            result.append(begin + rest.pop(0) * step)
        elif isinstance(value_of(one), Tensor):
            value = as_sum(reader.value(one, lookup[len(lookup) - value_of(one).dim() :]))
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


def _slice_start(one: slice, size: Sum) -> tuple[Sum | None, int]:
    start, step = value_of(one.start), 1 if one.step is None else one.step
    if type(step) is not int or step < 1:
        return None, 1
    if start is None:
        return whole(0), step
    if isinstance(start, torch.SymInt):
        begin = size_of(one.start)
        return (begin if not_negative(begin) else None), step
    if type(start) is not int:
        return None, 1
    if start >= 0:
        return whole(start), step
    return (whole(max(size.literal + start, 0)), step) if size.literal is not None else (None, step)
