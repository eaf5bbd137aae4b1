"""Finish ``fastft::linear_token_statistics`` that stands in a graph: which rows count, what forward computes.

Where results are masked afterwards, rows under the mask need no logits: they are labelled ignore_index, which gives the
zeros that the mask puts there.  The op then takes hidden states and labels [B, S] as the model has them, and a shift
between the two, hidden[:, :-1], becomes labels that do not count in the last places.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fastft.compat import fake_tensors, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.kernels import REGISTRY
from fastft.kernels.head_call import DIFFERENTIABLE
from fastft.rewriter.context import Context
from fastft.rewriter.fx.editing import annotate_like, between
from fastft.rewriter.fx.effects import check_mutation, may_alias, mutated_args, switches_mode, transformed
from fastft.rewriter.fx.metadata import name_of, place_of, same_sizes
from fastft.rewriter.loss.logits import CASTS, ahead
from fastft.rewriter.report.data import Lifted

RULE = "linear_token_statistics"
IGNORED = -100
_OP = torch.ops.fastft.linear_token_statistics
_PARAMETERS = REGISTRY[f"fastft::{RULE}"].parameters
_RESHAPES = ("reshape", "view", "flatten")
_NEGATIONS = ("invert", "bitwise_not", "logical_not", "__invert__")


@dataclass
class _Masked:
    """Results of one op that are all masked alike.

    hidden: [B, S, H] before casts, which are to be made again, and before the last ``left_out`` places of each sequence
    were left out.  labels: [B, S - left_out].  mask: of rows that count, or, if not kept, of those that do not.
    results: what each becomes, with its number among the op's.  values: all that is read and replaced.
    """

    hidden: Node
    labels: Node
    mask: Node
    kept: bool
    casts: list[Node] = field(default_factory=list)
    left_out: int = 0
    results: list[tuple[Node, int]] = field(default_factory=list)
    values: list[Node] = field(default_factory=list)


def lift(gm: GraphModule, context: Context) -> None:
    """Finish the ops of one graph."""
    under_transforms = transformed(gm.graph)
    for node in gm.graph.find_nodes(op="call_function", target=_OP):
        context.report.lifted.append(Lifted(RULE, *place_of(node)))
        if node in under_transforms:
            continue
        call: dict[str, Any] = dict(zip(_PARAMETERS, node.args, strict=True))
        call["chunk_bytes"] = context.options.logits_bytes
        call["grads_in_forward"] = ahead(_trained(node, call), by_row=True)
        masked = _masked(node, call)
        if masked is not None and _stays(gm, node, masked):
            _skip(node, call, masked)
        else:
            _replace(node, call)


def _trained(node: Node, call: dict[str, Any]) -> tuple[bool, ...]:
    """Tell which of the differentiable arguments require grad."""
    if not any(tensor.requires_grad for user in node.users for tensor in fake_tensors.tensors_in(value_of(user))):
        return (False,) * len(DIFFERENTIABLE)
    values = [value_of(call[name]) for name in DIFFERENTIABLE]
    return tuple(isinstance(value, Tensor) and value.requires_grad for value in values)


def _masked(node: Node, call: dict[str, Any]) -> _Masked | None:
    """Return what masks the op's results, None if they are used otherwise."""
    labels = call["labels"]
    flattened = _flattened(labels, 1)
    if flattened is None or call["lora_s"] is not None:
        return None
    shape = value_of(flattened).shape
    found: list[tuple[Node, int]] = []
    masks: set[tuple[Node, bool]] = set()
    values: list[Node] = [labels, flattened, *node.users]
    for result in node.users:
        number = result.args[1] if result.target is operator.getitem else None
        for view in result.users:
            values += [view, *view.users]
            if type(number) is not int or name_of(view.target) not in _RESHAPES or view.args[:1] != (result,):
                return None
            if not same_sizes(value_of(view).shape, shape):
                return None
            for user in view.users:
                if (by := _filled(user, view)) is None:
                    return None
                masks.add(by)
                found.append((user, number))
                values.append(user.args[1])  # type: ignore[arg-type]  # a mask, or its negation
    if len(masks) != 1:
        return None
    ((mask, kept),) = masks
    masked = _Masked(call["hidden"], flattened, mask, kept, results=found, values=[*values, mask])
    value = value_of(mask)
    fits = isinstance(value, Tensor) and value.dtype == torch.bool and same_sizes(value.shape, shape)
    return masked if fits and _unflattened(masked, shape) else None


def _flattened(node: Any, rank: int) -> Node | None:
    """Return the argument of a reshape that merges its first two axes, of which ``rank`` are left; else None."""
    if not isinstance(node, Node) or name_of(node.target) not in _RESHAPES or not node.args:
        return None
    before, after = value_of(node.args[0]), value_of(node)
    if not isinstance(before, Tensor) or before.dim() != rank + 1 or after.dim() != rank:
        return None
    return node.args[0] if same_sizes(before.shape[2:], after.shape[1:]) else None  # type: ignore[return-value]


def _filled(node: Node, masked: Node) -> tuple[Node, bool] | None:
    """Return by which mask a call puts zeros into a tensor, and whether by its negation; else None."""
    if name_of(node.target) != "masked_fill" or node.kwargs or len(node.args) != 3 or node.args[0] is not masked:
        return None
    _, mask, fill = node.args
    before, after = value_of(masked), value_of(node)
    if not isinstance(mask, Node) or isinstance(fill, Node) or fill != 0:
        return None
    if before.dtype != after.dtype or not after.is_contiguous():
        return None
    if name_of(mask.target) in _NEGATIONS and isinstance(mask.args[0], Node):
        return mask.args[0], True
    return mask, False


def _unflattened(masked: _Masked, shape: Sequence[Any]) -> bool:
    """Walk from the op's hidden states [N, H] back to [B, S, H]; return whether they are such."""
    node, whole = masked.hidden, False
    while isinstance(node, Node):
        masked.values.append(node)
        value, name = value_of(node), name_of(node.target)
        if not whole and (flattened := _flattened(node, 2)) is not None:
            node, whole = flattened, True
        elif name in CASTS and node.args and _same_place(node, value):
            masked.casts.insert(0, node)
            node = node.args[0]  # type: ignore[assignment]
        elif whole and name == "contiguous" and len(node.args) == 1:
            node = node.args[0]  # type: ignore[assignment]
        elif whole and not masked.left_out and (left_out := _left_out(node)):
            masked.left_out, node = left_out, node.args[0]  # type: ignore[assignment]
        else:
            break
    if not whole or not isinstance(value_of(node), Tensor):
        return False
    masked.hidden = node
    B, S = value_of(node).shape[:2]
    pairs = zip((B, S - masked.left_out), shape, strict=True)
    return all(symbolic.made_equal(one, other) for one, other in pairs)  # as the op asks of them, flattened


def _same_place(node: Node, value: Tensor) -> bool:
    """Tell whether a cast reads one tensor, on the same device: so it is the same of each element."""
    source = value_of(node.args[0])
    return isinstance(source, Tensor) and source.device == value.device and len(node.all_input_nodes) == 1


def _left_out(node: Node) -> int:
    """Return how many places x[:, :-n] leaves out; 0 for another call."""
    index: Any = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or len(index) < 2 or not isinstance(index[1], slice):
        return 0
    stop = index[1].stop
    if type(stop) is not int or stop >= 0 or value_of(node.args[0]).dim() != 3:
        return 0
    return -stop if [*index, slice(None)][:3] == [slice(None), slice(None, stop), slice(None)] else 0


def _stays(gm: GraphModule, node: Node, masked: _Masked) -> bool:
    """Tell whether the op may read what it is to read, and stand for what is masked."""
    nodes = {one: number for number, one in enumerate(gm.graph.nodes)}
    values = dict.fromkeys([*masked.values, masked.hidden, *(result for result, _ in masked.results)])
    if nodes[masked.mask] > nodes[node] or check_mutation(values) is not None:
        return False
    first, last = min(values, key=nodes.__getitem__), max(values, key=nodes.__getitem__)
    for one in between(first, last):
        if switches_mode(one) and "autocast" not in name_of(one.target):
            return False
        if any(may_alias(target, value) for target in mutated_args(gm, one) for value in values):
            return False
    return True


def _skip(node: Node, call: dict[str, Any], masked: _Masked) -> None:
    """Label rows that are masked as such, and let the op's results stand for the masked ones."""
    add = _adder(node)
    labels = (
        add(torch.where, masked.mask, masked.labels, IGNORED)
        if masked.kept
        else add(torch.masked_fill, masked.labels, masked.mask, IGNORED)
    )
    call["labels"] = add(F.pad, labels, (0, masked.left_out), value=IGNORED) if masked.left_out else labels
    call["ignore_index"] = IGNORED
    hidden = masked.hidden
    for cast in masked.casts:
        with node.graph.inserting_before(node):
            again = node.graph.create_node(cast.op, cast.target, (hidden, *cast.args[1:]), dict(cast.kwargs))
        annotate_like(again, cast)
        _require(again, value_of(cast).requires_grad)
        hidden = again
    call["hidden"] = hidden
    new, selected = add(_OP, *call.values()), {}
    for result, number in masked.results:  # one behind the other, so that all that follows can be run by itself
        if number not in selected:
            selected[number] = add(operator.getitem, new, number, requires_grad=value_of(result).requires_grad)
    for result, number in masked.results:
        required, value = value_of(result).requires_grad, selected[number]
        add = _adder(result)
        if masked.left_out:
            value = add(operator.getitem, value, (slice(None), slice(None, -masked.left_out)), requires_grad=required)
            value = add("contiguous", value, requires_grad=required)
        result.replace_all_uses_with(value)
    _erase_unused(node.graph, {*masked.values, *(result for result, _ in masked.results), node})


def _replace(node: Node, call: dict[str, Any]) -> None:
    """Put a call with these arguments in the place of the op's, for all that select its results."""
    node.replace_all_uses_with(_adder(node)(_OP, *call.values()))
    node.graph.erase_node(node)


def _adder(before: Node) -> Callable[..., Node]:
    """Return what adds a call before a node."""

    def add(function: Callable | str, *args: Any, requires_grad: bool = False, **kwargs: Any) -> Node:
        kind = "call_method" if isinstance(function, str) else "call_function"
        with before.graph.inserting_before(before):
            node = before.graph.create_node(kind, function, args, kwargs)
        annotate_like(node, before)
        _require(node, requires_grad)
        return node

    return add


def _require(node: Node, requires_grad: bool) -> None:
    if requires_grad:
        fake_tensors.set_value(node, value_of(node).detach().requires_grad_())


def _erase_unused(graph: Graph, nodes: set[Node]) -> None:
    for node in reversed(graph.nodes):
        if node in nodes and not node.users and node.op != "placeholder":
            graph.erase_node(node)
