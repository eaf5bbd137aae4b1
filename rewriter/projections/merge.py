"""Merge projections of one input: one call of ``fastft::lora_linear``, and a slice of its columns for each sibling."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fastft.compat import fake_tensors, operators
from fastft.compat.fake_tensors import value_of
from fastft.errors import describe
from fastft.reasons import Declined
from fastft.rewriter.context import Context
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.editing import annotate_like, between
from fastft.rewriter.fx.effects import (
    UNDER_TRANSFORM,
    check_effects_between,
    check_mutation,
    may_alias,
    may_use_rng,
    maybe_mutated_args,
    transformed,
)
from fastft.rewriter.fx.metadata import module_path, name_of, place_of
from fastft.rewriter.projections.siblings import LISTS, RULE, Origin, Projection, find, miss
from fastft.rewriter.report.data import GraphReport, Lifted

_OF_LAYOUT = frozenset(
    [
        "as_strided",
        "as_strided_",
        "stride",
        "storage_offset",
        "storage",
        "untyped_storage",
        "set_",
        "data_ptr",
        "is_contiguous",
        "resize_",
        "numpy",
    ]
)
_OF_TORCH = ("aten", "prims", "fastft", "bitsandbytes")


def group(gm: GraphModule, context: Context) -> None:
    """Merge the projections of one graph; near misses go into the report with the reason.

    A linear layer without an adapter is left alone unless a sibling has one.
    """
    became: dict[Node, Node] = {}
    report, under_transforms = context.report, transformed(gm.graph)
    for siblings in itertools.chain.from_iterable(map(_of_one_dtype, find(gm.graph, report))):
        if not any(sibling.adapters for sibling in siblings) and (len(siblings) == 1 or not siblings[0].quant_type):
            continue
        if refusal := context.refusal(RULE, module_path(siblings[0].end), "lora_linear"):
            miss(report, siblings[0].end, refusal)
            continue
        if any(sibling.end in under_transforms for sibling in siblings):
            miss(report, siblings[0].end, UNDER_TRANSFORM)
            continue
        for part in _try(gm, siblings, became, report):
            report.fused.append(Lifted(RULE, *place_of(part[0].end)))


def _of_one_dtype(siblings: Sequence[Projection]) -> Iterator[list[Projection]]:
    """Group siblings whose results, with adapters, have the same dtype: some may have float32 sums."""
    left = list(siblings)
    for dtype in dict.fromkeys(value_of(sibling.end).dtype for sibling in siblings if sibling.adapters):
        part = [sibling for sibling in left if value_of(sibling.end).dtype == dtype or sibling.cast_to(dtype)]
        left = [sibling for sibling in left if sibling not in part]
        yield part
    if left:
        yield left


def _try(
    gm: GraphModule, siblings: list[Projection], became: dict[Node, Node], report: GraphReport
) -> Iterator[list[Projection]]:
    """Merge siblings, or where that fails each by itself; iterate over what was merged."""
    try:
        for sibling in siblings:
            sibling.follow(became)
        became.update(_merge(gm, siblings))
        yield siblings
    except Declined as declined:
        miss(report, siblings[0].end, declined.reason)
        if len(siblings) > 1:
            for sibling in siblings:
                if sibling.adapters:
                    yield from _try(gm, [sibling], became, report)


def _merge(gm: GraphModule, siblings: Sequence[Projection]) -> dict[Node, Node]:
    """Insert one call at the first sibling; return what each result became.  Raises Declined, the graph unchanged."""
    _check(gm, siblings)
    graph, first = gm.graph, min(sibling.root if not sibling.quant_type else sibling.inner[0] for sibling in siblings)
    for node in _hoisted(siblings, first):
        first.prepend(node)
    made: list[Node] = []
    parts: list[Node] = []
    before: dict[Node, Any] = {}
    try:
        with graph.inserting_before(first):
            parts += _calls(graph, siblings, made)
        for sibling, part in zip(siblings, parts, strict=True):
            sibling.end.replace_all_uses_with(part)
        _spread([pair for pair in zip(siblings, parts, strict=True) if _moved(*pair)], before)
    except Exception as error:  # an unknown form must not cost the whole graph
        for sibling, part in zip(siblings, parts, strict=bool(parts)):
            part.replace_all_uses_with(sibling.end)
        for node, value in before.items():
            fake_tensors.set_value(node, value)
        for node in reversed(made):
            graph.erase_node(node)
        if isinstance(error, Declined):
            raise
        raise Declined(f"columns of one result do not serve: {describe(error)}") from error
    for sibling in siblings:
        for node in (sibling.end, *reversed(sibling.inner), sibling.root):
            _erase(graph, node)
    return {sibling.end: part for sibling, part in zip(siblings, parts, strict=True)}


def _check(gm: GraphModule, siblings: Sequence[Projection]) -> None:
    """Check that nothing read is mutated and no mode is switched between the siblings.  Raises Declined."""
    ends = [node for sibling in siblings for node in (sibling.root, *sibling.inner, sibling.end)]
    nodes = ends + [node for sibling in siblings for argument in sibling.given for node in Origin.of(argument).nodes]
    if reason := check_effects_between(gm, nodes, min(ends), max(ends), "group"):
        raise Declined(reason)


def _hoisted(siblings: Sequence[Projection], first: Node) -> list[Node]:
    """List, in graph order, the nodes to move before ``first``: what adapters of later siblings read.

    Raises Declined where a node cannot be moved.
    """
    inside = {node for sibling in siblings for node in (sibling.root, *sibling.inner, sibling.end)}
    needed: set[Node] = set()
    waiting = [node for sibling in siblings for node in sibling.given]
    while waiting:
        node = waiting.pop()
        if node < first or node in needed:
            continue
        if node in inside or node.op not in ("call_function", "call_method") or maybe_mutated_args(node):
            raise Declined(f"{node.name} is only known later")
        if reason := check_mutation(node.all_input_nodes):  # they are read earlier now
            raise Declined(reason)
        needed.add(node)
        waiting += node.all_input_nodes
    last = max((node for node in needed if may_use_rng(node)), default=first)
    if overtaken := [node for node in between(first, last) if may_use_rng(node) and node not in needed]:
        raise Declined(f"{name_of(overtaken[0].target)} would take its random numbers later")
    return sorted(needed)


def _calls(graph: Graph, siblings: Sequence[Projection], made: list[Node]) -> list[Node]:
    """Add the call and each sibling's columns of its result; the nodes that are added go into ``made``."""
    first = siblings[0].end

    def add(node: Node, like: Any = None) -> Node:
        made.append(node)
        annotate_like(node, first)
        if like is not None:  # it needs a gradient where that does
            fake_tensors.set_value(node, value_of(node).detach().requires_grad_(value_of(like).requires_grad))
        return node

    arguments = _arguments(graph, siblings, add)
    call = add(graph.call_function(torch.ops.fastft.lora_linear, arguments))
    whole = add(graph.call_function(operator.getitem, (call, 0)), first)
    if value_of(whole).dtype != value_of(first).dtype:  # under autocast: a sum in the products' dtype
        whole = add(graph.call_method("to", (whole, value_of(first).dtype)), first)
    if len(siblings) == 1:
        parts = [whole]
    else:
        ends = itertools.accumulate(sibling.features for sibling in siblings)
        cuts: list[Any] = [
            (..., slice(end - sibling.features or None, end)) for sibling, end in zip(siblings, ends, strict=True)
        ]
        cuts[-1] = (..., slice(cuts[-1][1].start, None))
        parts = [
            add(graph.call_function(operator.getitem, (whole, cut)), sibling.end)
            for sibling, cut in zip(siblings, cuts, strict=True)
        ]
        parts = [
            add(graph.call_method("contiguous", (part,)), sibling.end) if _is_exposed(sibling.end) else part
            for sibling, part in zip(siblings, parts, strict=True)
        ]
    for sibling, part in zip(siblings, parts, strict=True):
        mine, other = value_of(part), value_of(sibling.end)
        if (mine.shape, mine.dtype, mine.device) != (other.shape, other.dtype, other.device):
            raise Declined("its result is of another kind")
    return parts


def _arguments(graph: Graph, siblings: Sequence[Projection], add: Any) -> tuple[Any, ...]:
    """Return the call's arguments, with autocast's casts written out."""
    first, dtype = siblings[0], siblings[0].dtype

    @functools.cache
    def cast(node: Node, wanted: torch.dtype | None) -> Node:
        if wanted is None or value_of(node).dtype == wanted:
            return node
        return add(graph.call_method("to", (node, wanted)), node)

    x = cast(first.x, dtype)
    weights = [[weight for sibling in siblings for weight in sibling.weights[index]] for index in range(len(LISTS))]
    if not first.quant_type:
        weights[0] = [cast(weight, dtype) for weight in weights[0]]
    biased = [
        (number, cast(sibling.bias, dtype)) for number, sibling in enumerate(siblings) if sibling.bias is not None
    ]
    owned = [(number, adapter) for number, sibling in enumerate(siblings) for adapter in sibling.adapters]
    automatic = _automatic(first)
    # Casts of adapters alone are left to the op: fourteen small launches a layer, and as many of their gradients.
    # Not in float16, where GradScaler waits for gradients that overflow.
    rounded = automatic == value_of(x).dtype == torch.bfloat16 and not _is_widened(siblings)
    factors = [(own.a, own.b) if rounded else (cast(own.a, automatic), cast(own.b, automatic)) for _, own in owned]
    apart = any(not _reads(adapter.x, x, automatic) for _, adapter in owned)
    inputs = [cast(adapter.x, automatic) for _, adapter in owned] if apart else []
    inputs = inputs[:1] if len(set(inputs)) == 1 else inputs
    return (
        x, *weights, [bias for _, bias in biased], [a for a, _ in factors], [b for _, b in factors], inputs,
        [sibling.features for sibling in siblings], [number for number, _ in biased], [number for number, _ in owned],
        [float(own.scale) for _, own in owned], first.blocksize, first.quant_type, _is_widened(siblings),
        rounded and bool(owned),
    )  # fmt: skip


def _automatic(projection: Projection) -> torch.dtype | None:
    """Return the dtype to which autocast casts the operands of products, or None; it leaves float64 alone."""
    return autocast.dtype_at(projection.root) if projection.dtype != torch.float64 else None


def _is_widened(siblings: Sequence[Projection]) -> bool:
    """Tell whether the sum with the adapters needs a wider dtype than the layers' own.

    Under autocast bfloat16 is enough: all products are rounded to it, and it has float32's range.
    """
    first, adapted = siblings[0], any(sibling.adapters for sibling in siblings)
    kept = _automatic(first) is not None and first.dtype == torch.bfloat16
    return adapted and value_of(first.end).dtype != first.dtype and not kept


def _reads(node: Node, x: Node, automatic: torch.dtype | None) -> bool:
    """Tell whether an adapter reads the group's input: itself, or a cast of it that loses nothing.

    automatic: the dtype to which autocast casts both, if it is on.
    """
    own, other = Origin.of(node), Origin.of(x)
    if own.source is not other.source:
        return False
    dtypes = value_of(node).dtype, value_of(x).dtype
    if automatic is not None:
        return dtypes[1] == automatic and (own.exact or dtypes[0] == automatic)
    return dtypes[0] == dtypes[1] or (own.exact and other.exact)


def _is_exposed(end: Node) -> bool:
    """Tell whether a result's strides may be seen, or that it shares its storage with others.

    That is so where it leaves the graph, is passed to a nested one, is written to, is read by a call that asks for
    strides or by a custom op, which may expect the layout that it was written for.
    """
    seen, waiting = {end}, [end]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.op == "output" or node in maybe_mutated_args(user) or _looks(user):
                return True
            if user not in seen and any(may_alias(tensor, end) for tensor in fake_tensors.tensors_in(value_of(user))):
                seen.add(user)
                waiting.append(user)
    return False


def _looks(user: Node) -> bool:
    """Tell whether this call may depend on the strides or the storage of its arguments."""
    target: Any = user.target
    if operators.is_higher_order(target) or name_of(target) in _OF_LAYOUT:
        return True
    if operators.is_operator(target):
        return name_of(target).split(".")[0] not in _OF_TORCH
    return any(isinstance(argument, torch.dtype) for argument in user.args) and name_of(target) == "view"


def _moved(projection: Projection, part: Node) -> bool:
    return value_of(part).stride() != value_of(projection.end).stride()


def _spread(changed: Iterable[tuple[Projection, Node]], before: dict[Node, Any]) -> None:
    """Infer the example values of what depends on these columns, as far as strides change.  Raises Declined."""
    waiting = {user for _, part in changed for user in part.users}
    while waiting:
        node = min(waiting)
        waiting.remove(node)
        before[node] = old = value_of(node)
        with autocast.at(node):
            fake_tensors.infer_example_value(node)
        new = value_of(node)
        if not isinstance(new, Tensor) or not isinstance(old, Tensor):
            waiting.update(node.users)
            continue
        if new.is_floating_point():
            fake_tensors.set_value(node, new.detach().requires_grad_(old.requires_grad))
        if new.shape != old.shape or new.dtype != old.dtype:
            raise Declined(f"{name_of(node.target)} gives something else then")
        if new.stride() != old.stride():
            if any(user.op == "output" for user in node.users):
                raise Declined(f"{name_of(node.target)} would be returned in another layout")
            waiting.update(node.users)


def _erase(graph: Graph, node: Node) -> None:
    if not node.users and node in set(graph.find_nodes(op=node.op, target=node.target)):
        graph.erase_node(node)
