"""Runs: stretches of neighbours that a tensor of ids numbers, such as the tokens of one image; all else has no number.

    begins = inside & ~previous        previous: inside, one place later
    ids = where(inside, cumsum(begins) - 1, -1)

Two tokens of one number then have none of another, and no other token, between them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fastft.compat.fake_tensors import value_of
from fastft.rewriter.attention.masks.reader import call_name
from fastft.rewriter.fx.editing import annotate_like


def flags_of(ids: Node) -> tuple[Node, Node] | None:
    """Return where ids number a run, and where runs begin, as bool tensors; None if ids are not made so."""
    if call_name(ids) != "where" or ids.op != "call_function" or len(ids.args) != 3 or ids.args[2] != -1:
        return None
    inside, numbers, _ = ids.args
    counted = _call(numbers, "sub", 1)
    summed = _source(counted, "cumsum")
    begins = _cast_of(summed) if counted is not None and _along_last(counted) else None
    flags = begins.args if begins is not None and call_name(begins) == "bitwise_and" else ()
    if begins is None or len(flags) != 2 or flags[0] is not inside or not isinstance(inside, Node):
        return None
    previous = _source(flags[1], "bitwise_not")
    later = previous is not None and _is_bool(inside) and _is_one_later(previous, inside)
    return (inside, begins) if later else None


def steps(ids: Node) -> dict[Node, None]:
    """Return the calls that make ids of where they number a run, and that: none of it may be written to later."""
    flags = flags_of(ids)
    found = dict.fromkeys([ids, *(flags or ())])
    for node in (waiting := [node for node in found if flags is None or node is not flags[0]]):
        new = [argument for argument in node.all_input_nodes if argument not in found]
        found |= dict.fromkeys(new)
        waiting += new
    return found


def lengths(ids: Node, made: list[Node]) -> tuple[Node, Node] | None:
    """Compute how many tokens of a token's run come before it and after it, 0 outside of runs; None if ids are no runs.

    Each is an int64 tensor like ids.  made: gets the nodes that were added to the graph behind ids.
    """
    flags = flags_of(ids)
    if flags is None:
        return None

    def call(function: Callable | str, *args: Any, **kwargs: Any) -> Node:
        kind = "call_method" if isinstance(function, str) else "call_function"
        with ids.graph.inserting_after(made[-1] if made else ids):
            made.append(ids.graph.create_node(kind, function, args, kwargs))
        annotate_like(made[-1], ids)
        return made[-1]

    inside, begins = flags
    goes_on = call(torch.logical_and, inside, call(torch.logical_not, begins))
    shifted = call(operator.getitem, call(F.pad, goes_on, (0, 1)), (Ellipsis, slice(1, None)))
    ends = call(torch.logical_and, inside, call(torch.logical_not, shifted))
    places = call(torch.sub, call(torch.cumsum, call(torch.ones_like, ids), -1), 1)

    def since(marks: Node) -> Node:
        """Count the places since the last mark."""
        last = call(operator.getitem, call(torch.cummax, call(torch.where, marks, places, 0), -1), 0)
        return call(torch.sub, places, last)

    before = call(torch.where, inside, since(begins), 0)
    turned = call(torch.flip, since(call(torch.flip, ends, (-1,))), (-1,))
    return before, call(torch.where, inside, turned, 0)


def _call(node: Any, name: str, *rest: Any) -> Node | None:
    """Return the first argument of a call of this name with these others, or None."""
    fits = isinstance(node, Node) and call_name(node) == name and tuple(node.args[1:]) == rest and not node.kwargs
    return node.args[0] if fits and isinstance(node.args[0], Node) else None


def _source(node: Any, name: str) -> Node | None:
    """Return the first argument of a call of this name, or None."""
    fits = isinstance(node, Node) and call_name(node) == name and node.args
    return node.args[0] if fits and isinstance(node.args[0], Node) else None


def _along_last(cumsum: Node) -> bool:
    dim = cumsum.args[1] if len(cumsum.args) > 1 else cumsum.kwargs.get("dim")
    rank = value_of(cumsum).dim()
    return isinstance(dim, int) and dim % rank == rank - 1 and set(cumsum.kwargs) <= {"dim"}


def _cast_of(node: Node | None) -> Node | None:
    """Return what a cast to integers is of."""
    return _source(node, "int") or _source(node, "long") if node is not None else None


def _is_bool(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(value_of(node), Tensor) and value_of(node).dtype == torch.bool


def _is_one_later(node: Node, inside: Node) -> bool:
    """Tell whether a tensor is another, moved by one place along the last axis, with False at the first."""
    if node.target is torch.select_scatter:
        return _is_rolled(node, inside)
    padded, index = (*node.args, None, None)[:2] if call_name(node) == "getitem" else (None, None)
    if not isinstance(padded, Node) or not _is_pad(padded) or padded.args[0] is not inside:
        return False
    *others, last = index if isinstance(index, tuple) else (index,)
    whole = len(others) == value_of(node).dim() - 1 and all(item == slice(None) for item in others)
    value = (*padded.args[2:], *padded.kwargs.values())
    zeros = all(item in ("constant", 0, False, None) for item in value)
    return whole and last == slice(None, -1, None) and padded.args[1] == (1, 0) and zeros


def _is_rolled(node: Node, inside: Node) -> bool:
    """Tell whether a tensor is another, rolled by one along the last axis, where the first place was set to False."""
    rolled, value, dim, place = (*node.args, None, None)[:4]
    last = value_of(node).dim() - 1
    if not isinstance(rolled, Node) or call_name(rolled) != "roll" or rolled.args[0] is not inside:
        return False
    shifts, dims = (*rolled.args[1:], *rolled.kwargs.values(), None, None)[:2]
    named = set(rolled.kwargs) <= {"shifts", "dims"} and list(rolled.kwargs) == sorted(rolled.kwargs, reverse=True)
    by_one = named and shifts in (1, (1,), [1]) and dims in (-1, last, (-1,), [-1], (last,), [last])
    cleared = isinstance(value, Node) and value.target is torch.full_like and value.args[1] in (False, 0)
    return bool(by_one and cleared and dim == last and place == 0)


def _is_pad(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "pad" and len(node.args) >= 2
