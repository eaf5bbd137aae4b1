"""Merge projections of one input, with their adapters, into one ``fastft::lora_linear`` each group.

A projection is a 4-bit one (quantized.py) or a linear layer, and the LoRA layers that are added to it (patterns/lora.py).
The siblings of a group read the same input: q, k and v; gate and up.  A linear layer without an adapter is left alone
unless a sibling has one.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fastft.kernels.lora_linear import Group
from fastft.kernels.registry import wide
from fastft.rewriter import autocast, compat
from fastft.rewriter.autocast import dtype_at
from fastft.rewriter.compat import value_of
from fastft.rewriter.graph import between, describe, may_alias, name_of, only_reads, switches_mode, written
from fastft.rewriter.layers import layer_of
from fastft.rewriter.report import GraphReport, Lifted, NearMiss

RULE = "lora_linear.group"
_CASTS = ("to", "float", "half", "bfloat16", "type")
_LISTS = ("weights", "absmax", "absmax_8bit", "absmax_code", "absmax_offset")


@dataclass
class Adapter:
    """A LoRA layer: what it reads, its factors and its scale."""

    x: Node
    a: Node
    b: Node
    scale: float


@dataclass
class Projection:
    """A linear layer and what is added to its result.

    root: where its value is, without adapters; end: with them.  inner: the nodes from root to end, but for end.
    """

    root: Node
    x: Node
    weights: list[list[Node]]
    bias: Node | None
    features: int
    blocksize: int
    quant_type: str
    end: Node
    adapters: list[Adapter] = field(default_factory=list)
    inner: list[Node] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Of its result without adapters, and of the products."""
        return value_of(self.root).dtype

    def cast_to(self, dtype: torch.dtype) -> bool:
        """Take in a cast of the result, if there are no adapters and it is all that the result is for."""
        users = list(self.end.users)
        if self.adapters or len(users) != 1 or not _keeps_value(users[0], self.end, self.dtype):
            return False
        if value_of(users[0]).dtype != dtype:
            return False
        self.inner.append(self.end)
        self.end = users[0]
        return True


class DeclinedError(Exception):
    """Why projections are not merged."""


def group(gm: GraphModule, report: GraphReport) -> None:
    """Merge all projections of one graph; those that stay apart for a reason go into ``report``."""
    groups: dict[Any, list[Projection]] = {}
    for projection in _projections(gm.graph, report):
        groups.setdefault(_key(projection), []).append(projection)
    for siblings in itertools.chain.from_iterable(map(_of_one_dtype, groups.values())):
        if not any(one.adapters for one in siblings) and (len(siblings) == 1 or not siblings[0].quant_type):
            continue
        for part in _try(gm, siblings, report):
            places = compat.module_path(part[0].end), compat.source_line(part[0].end)
            report.fused.append(Lifted(RULE, *places))


def _of_one_dtype(siblings: Sequence[Projection]) -> Iterator[list[Projection]]:
    """Those whose results have one dtype, with their adapters: some may have float32 sums."""
    left = list(siblings)
    for dtype in dict.fromkeys(value_of(one.end).dtype for one in siblings if one.adapters):
        part = [one for one in left if value_of(one.end).dtype == dtype or one.cast_to(dtype)]
        left = [one for one in left if one not in part]
        yield part
    if left:
        yield left


def _try(gm: GraphModule, siblings: list[Projection], report: GraphReport) -> Iterator[list[Projection]]:
    """Merge siblings, or where that is not possible each by itself; what was merged."""
    try:
        _merge(gm, siblings)
        yield siblings
    except DeclinedError as declined:
        _miss(report, siblings[0].end, str(declined))
        if len(siblings) > 1:
            for one in siblings:
                if one.adapters:
                    yield from _try(gm, [one], report)


def _miss(report: GraphReport, node: Node, reason: str) -> None:
    report.near_misses.append(NearMiss(RULE, compat.module_path(node), compat.source_line(node), reason))


def _key(projection: Projection) -> Any:
    """Equal for siblings."""
    layer = layer_of(compat.module_path(projection.root))
    kind = (projection.blocksize, projection.quant_type, *map(len, projection.weights))
    return (source_of(projection.x), value_of(projection.x).dtype, layer, *kind, projection.dtype)


def source_of(node: Node) -> Node:
    """What this is a cast of."""
    return _sources(node)[-1]


def _sources(node: Node) -> list[Node]:
    """The node, and what it is a cast of, and so on."""
    found = [node]
    while node.op == "call_method" and node.target in _CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
        found.append(node)
    return found


def _projections(graph: Graph, report: GraphReport) -> Iterator[Projection]:
    """In graph order, each with the adapters that it can take."""
    for node in graph.nodes:
        found = _four_bit(node) or _plain(node)
        if found is not None:
            _follow(found, report)
            yield found


def _four_bit(node: Node) -> Projection | None:
    """A lora_linear as quantized.py makes them."""
    if node.target is not operator.getitem or not isinstance(node.args[0], Node):
        return None
    call = node.args[0]
    if call.target is not torch.ops.fastft.lora_linear or node.args[1] != 0:
        return None
    given = Group(*call.args)
    weights = [list(getattr(given, name)) for name in _LISTS]
    bias = next(iter(given.biases), None)
    return Projection(
        node, given.x, weights, bias, given.features[0], given.blocksize, given.quant_type, node, inner=[call]
    )  # type: ignore[arg-type]


def _plain(node: Node) -> Projection | None:
    """A linear layer; of the weights that the graph is given, as others may be anything."""
    if node.target is not F.linear:
        return None
    x, weight, bias = [*node.args, node.kwargs.get("weight"), node.kwargs.get("bias"), None][:3]
    given = [value_of(one) for one in (x, weight, node)]
    if not all(isinstance(one, Tensor) and one.is_floating_point() for one in given) or given[1].dim() != 2:
        return None
    if isinstance(bias, Node) and value_of(bias).dim() != 1:
        return None
    return Projection(node, x, [[weight], [], [], [], []], bias, given[1].shape[0], 0, "", node)


def _follow(projection: Projection, report: GraphReport) -> None:
    """Take in the adapters that are added to the projection's result, up to the last value that the op can give."""
    at, chain, adapters, ends = projection.root, [projection.root], [], [(0, 0)]
    own, summed = projection.dtype, projection.dtype
    while len(at.users) == 1:
        (user,) = at.users
        if user.target is torch.ops.fastft.lora_add and user.args[0] is at:
            _, x, a, b, scale = user.args
            adapters.append(Adapter(x, a, b, scale))  # type: ignore[arg-type]
            summed = value_of(user).dtype
        elif not _keeps_value(user, at, own):
            break
        at = user
        chain.append(user)
        if adapters and value_of(at).dtype in {own, summed} & {own, wide(own)}:
            ends.append((len(chain) - 1, len(adapters)))
    last, taken = ends[-1]
    if taken:
        projection.adapters, projection.end = adapters[:taken], chain[last]
        projection.inner += chain[:last]
    for one in chain[last + 1 :]:
        if one.target is torch.ops.fastft.lora_add:
            _miss(report, one, f"its result is {value_of(one).dtype} beside a layer in {own}")


def _keeps_value(node: Node, given: Node, dtype: torch.dtype) -> bool:
    """Whether this is a copy of ``given``, or a cast of it to a layer's dtype or the one that its sums may have."""
    method = node.op == "call_method" and node.args[0] is given and node.target in (*_CASTS, "clone")
    return method and value_of(node).dtype in (dtype, wide(dtype))


def _merge(gm: GraphModule, siblings: Sequence[Projection]) -> None:
    """Put one call where the first of them is."""
    first = siblings[0]
    _check(gm, siblings)
    graph, at = gm.graph, min(one.root if not one.quant_type else one.inner[0] for one in siblings)
    new: list[Node] = []
    moved = _hoist([adapter for one in siblings for adapter in one.adapters], siblings, at)
    with graph.inserting_before(at):
        for node in moved:
            at.prepend(node)
        call = graph.call_function(torch.ops.fastft.lora_linear, _arguments(graph, siblings, new))
        y = graph.call_function(operator.getitem, (call, 0))
        wanted = value_of(first.end).dtype
        narrow = wanted != first.dtype and not _widened(siblings)
        whole = graph.call_method("to", (y, wanted)) if narrow else y
        parts = _parts(graph, siblings, whole)
    made = list(dict.fromkeys([*new, call, y, whole, *parts]))
    for node in made:
        node.meta |= {key: value for key, value in first.end.meta.items() if key != "example_value"}
        compat.propagate(node)
    trained = [one for one in siblings if value_of(one.end).requires_grad] or siblings
    for node in (y, whole):
        _as_before(node, value_of(trained[0].end))
    _exchange(graph, siblings, parts, made)


def _check(gm: GraphModule, siblings: Sequence[Projection]) -> None:
    """Nothing that is read is written to, and no mode is switched on the way."""
    nodes = [node for one in siblings for node in (*_sources(one.x), *one.inner, one.end, *sum(one.weights, []))]
    adapters = [adapter for one in siblings for adapter in one.adapters]
    nodes += [node for one in adapters for node in (*_sources(one.x), one.a, one.b)]
    for node in nodes:
        if any(map(compat.written_to, compat.tensors_in(value_of(node)))):
            raise DeclinedError(f"{node.name} is written to in place")
    ends = [node for one in siblings for node in (one.root, *one.inner, one.end)]
    for node in between(min(ends), max(ends)):
        if switches_mode(node):
            raise DeclinedError(f"{name_of(node.target)} is called halfway")
        if not only_reads(gm, node) and any(may_alias(target, one) for target in written(node) for one in nodes):
            raise DeclinedError(f"{name_of(node.target)} writes to a value of the group")


def _hoist(adapters: Sequence[Adapter], siblings: Sequence[Projection], at: Node) -> list[Node]:
    """What has to be computed before ``at`` and is not yet, in graph order: what adapters of later siblings read."""
    inside = {node for one in siblings for node in (one.root, *one.inner, one.end)}
    needed: set[Node] = set()
    waiting = [node for one in adapters for node in (one.x, one.a, one.b)]
    waiting += [node for one in siblings for node in (one.x, *sum(one.weights, []), *([one.bias] if one.bias else []))]
    while waiting:
        node = waiting.pop()
        if node < at or node in needed:
            continue
        if node in inside or node.op not in ("call_function", "call_method") or written(node):
            raise DeclinedError(f"{node.name} is only known later")
        for one in node.all_input_nodes:  # they are read earlier now
            if any(map(compat.written_to, compat.tensors_in(value_of(one)))):
                raise DeclinedError(f"{one.name} is written to in place")
        needed.add(node)
        waiting += node.all_input_nodes
    return sorted(needed)


def _arguments(graph: Graph, siblings: Sequence[Projection], new: list[Node]) -> tuple[Any, ...]:
    """Of the call; casts that autocast makes are written out."""
    dtype = siblings[0].dtype

    @functools.cache
    def cast(node: Node, wanted: torch.dtype) -> Node:
        if value_of(node).dtype == wanted:
            return node
        new.append(graph.call_method("to", (node, wanted)))
        return new[-1]

    x = cast(siblings[0].x, dtype)
    weights = [[one for sibling in siblings for one in sibling.weights[at]] for at in range(len(_LISTS))]
    if not siblings[0].quant_type:
        weights[0] = [cast(one, dtype) for one in weights[0]]
    biased = [(at, cast(one.bias, dtype)) for at, one in enumerate(siblings) if one.bias is not None]
    owned = [(at, adapter) for at, one in enumerate(siblings) for adapter in one.adapters]
    automatic = dtype_at(siblings[0].root)
    factors = [[one if automatic is None else cast(one, automatic) for one in (own.a, own.b)] for _, own in owned]
    apart = any(not _reads(adapter.x, x, siblings) for _, adapter in owned)
    inputs = [adapter.x if automatic is None else cast(adapter.x, automatic) for _, adapter in owned] if apart else []
    inputs = inputs[:1] if len(set(inputs)) == 1 else inputs
    return (
        x, *weights, [bias for _, bias in biased], [a for a, _ in factors], [b for _, b in factors], inputs,
        [one.features for one in siblings], [at for at, _ in biased], [at for at, _ in owned],
        [float(own.scale) for _, own in owned], siblings[0].blocksize, siblings[0].quant_type,
        _widened(siblings),
    )  # fmt: skip


def _widened(siblings: Sequence[Projection]) -> bool:
    """Whether the sum with the adapters needs more than the layers' own dtype.

    Under autocast bfloat16 will do: the products are all rounded to it, and it has float32's range.
    """
    first, adapted = siblings[0], any(one.adapters for one in siblings)
    kept = dtype_at(first.root) is not None and first.dtype == torch.bfloat16
    return adapted and value_of(first.end).dtype != first.dtype and not kept


def _reads(node: Node, x: Node, siblings: Sequence[Projection]) -> bool:
    """Whether an adapter reads the group's input: itself, or in a dtype that holds all of it."""
    if source_of(node) is not source_of(x):
        return False
    if (automatic := dtype_at(siblings[0].root)) is not None:
        return automatic == siblings[0].dtype  # to which all are cast
    steps, at = [], node
    while at is not source_of(x):
        steps.append(value_of(at).dtype)
        at = at.args[0]  # type: ignore[assignment]
    dtype = value_of(x).dtype
    exact = value_of(source_of(x)).dtype == dtype
    return exact and all(torch.promote_types(step, dtype) == step for step in steps)


def _parts(graph: Graph, siblings: Sequence[Projection], whole: Node) -> list[Node]:
    """Each sibling's columns."""
    if len(siblings) == 1:
        return [whole]
    ends = [sum(one.features for one in siblings[: at + 1]) for at in range(len(siblings))]
    cuts = [slice(end - one.features or None, end) for one, end in zip(siblings, ends, strict=True)]
    cuts[-1] = slice(cuts[-1].start, None)
    return [graph.call_function(operator.getitem, (whole, (Ellipsis, cut))) for cut in cuts]


def _exchange(graph: Graph, siblings: Sequence[Projection], parts: Sequence[Node], made: list[Node]) -> None:
    """Let the users of the siblings' results take the columns; as it was, if they cannot."""
    before: dict[Node, Any] = {}
    for one, part in zip(siblings, parts, strict=True):
        _as_before(part, value_of(one.end))
    try:
        for one, part in zip(siblings, parts, strict=True):
            if value_of(part).shape != value_of(one.end).shape or value_of(part).dtype != value_of(one.end).dtype:
                raise DeclinedError("its result is of another kind")
        for one, part in zip(siblings, parts, strict=True):
            one.end.replace_all_uses_with(part)
        _spread(parts, before)
    except Exception as error:
        for one, part in zip(siblings, parts, strict=True):
            part.replace_all_uses_with(one.end)
        for node, value in before.items():
            compat.set_value(node, value)
        for node in reversed(made):
            if not node.users:
                graph.erase_node(node)
        if isinstance(error, DeclinedError):
            raise
        raise DeclinedError(f"columns of one result do not serve: {describe(error)}") from error
    for one in siblings:
        for node in (one.end, *reversed(one.inner), one.root):
            _erase(graph, node)


def _erase(graph: Graph, node: Node) -> None:
    if not node.users and node in set(graph.find_nodes(op=node.op, target=node.target)):
        graph.erase_node(node)


def _as_before(node: Node, old: Any) -> None:
    """The node's value needs a gradient where the old one did."""
    value = value_of(node)
    if isinstance(value, Tensor) and isinstance(old, Tensor) and value.is_floating_point():
        compat.set_value(node, value.detach().requires_grad_(old.requires_grad))


def _spread(changed: Sequence[Node], before: dict[Node, Any]) -> None:
    """Compute again what depends on these nodes, as far as the memory layout changes."""
    waiting = {user for node in changed for user in node.users}
    while waiting:
        node = min(waiting)
        waiting.remove(node)
        if node.op == "output":
            continue
        before[node] = old = value_of(node)
        with autocast.at(node):
            compat.propagate(node)
        _as_before(node, old)
        new = value_of(node)
        if not isinstance(new, Tensor) or not isinstance(old, Tensor):
            waiting.update(node.users)
        elif new.shape != old.shape or new.dtype != old.dtype:
            raise DeclinedError(f"{name_of(node.target)} gives something else then")
        elif new.stride() != old.stride():
            waiting.update(node.users)
