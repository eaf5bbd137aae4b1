"""Find projections that merge.py can merge into one ``fastft::lora_linear``: those of one input, with their adapters.

A projection is a 4-bit one (bnb4bit.py) or a linear layer, and the LoRA layers (patterns/lora.py) added to it.
Siblings read the same input: q, k and v; gate and up.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from fastft.compat import fake_tensors, operators
from fastft.compat.fake_tensors import value_of
from fastft.kernels.core.registry import wide
from fastft.kernels.lora_group import Group
from fastft.rewriter.capture.normalize import arguments_of, cast_dtype
from fastft.rewriter.fx.effects import maybe_mutated_args
from fastft.rewriter.fx.metadata import (
    FLOATING,
    layer_of,
    module_path,
    name_of,
    place_of,
    represents_exactly,
)
from fastft.rewriter.report.data import GraphReport, NearMiss

RULE = "lora_linear.group"
LISTS = ("weights", "absmax", "absmax_8bit", "absmax_code", "absmax_offset")


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

    root: the node of its value without adapters; end: with them.  inner: the nodes from root to end, without end.
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
        """The dtype of its result without adapters, and of the products."""
        return value_of(self.root).dtype

    @property
    def given(self) -> list[Node]:
        """All nodes that it reads."""
        own = [self.x, *itertools.chain(*self.weights), *([] if self.bias is None else [self.bias])]
        return own + [node for adapter in self.adapters for node in (adapter.x, adapter.a, adapter.b)]

    def follow(self, became: Mapping[Node, Node]) -> None:
        """Replace the results of groups that have been merged by what they became."""
        self.x = became.get(self.x, self.x)
        self.weights = [[became.get(weight, weight) for weight in weights] for weights in self.weights]
        self.bias = became.get(self.bias, self.bias) if self.bias is not None else None
        for adapter in self.adapters:
            adapter.x, adapter.a, adapter.b = (became.get(node, node) for node in (adapter.x, adapter.a, adapter.b))

    def cast_to(self, dtype: torch.dtype) -> bool:
        """Take in a cast of the result to ``dtype`` if there are no adapters and it is the only user."""
        users = list(self.end.users)
        if self.adapters or len(users) != 1 or not _keeps_value(users[0], self.end, self.dtype):
            return False
        if value_of(users[0]).dtype != dtype:
            return False
        self.inner.append(self.end)
        self.end = users[0]
        return True


def find(graph: Graph, report: GraphReport) -> list[list[Projection]]:
    """Find all projections of a graph, siblings together; adapters that they cannot take go into ``report``."""
    groups: dict[Any, list[Projection]] = {}
    for projection in _projections(graph, report):
        groups.setdefault(_key(projection), []).append(projection)
    return list(groups.values())


def miss(report: GraphReport, node: Node, reason: str) -> None:
    """Report why this node is not merged."""
    report.near_misses.append(NearMiss(RULE, *place_of(node), reason))


def _key(projection: Projection) -> Any:
    """Return a key that is equal for siblings; one that needs no gradient must not get one from another."""
    x, end = value_of(projection.x), value_of(projection.end)
    kind = (projection.blocksize, projection.quant_type, *map(len, projection.weights), projection.dtype)
    layer = layer_of(module_path(projection.root))
    return (Origin.of(projection.x).source, x.dtype, x.device, layer, *kind, end.device, end.requires_grad)


@dataclass(frozen=True)
class Origin:
    """A node and the nodes that it is a chain of casts of, as long as no value was rounded more than once."""

    nodes: tuple[Node, ...]

    @property
    def source(self) -> Node:
        """The last node of the chain."""
        return self.nodes[-1]

    @property
    def exact(self) -> bool:
        """Whether the node has exactly the value of its source."""
        return represents_exactly(value_of(self.nodes[0]).dtype, value_of(self.source).dtype)

    @classmethod
    def of(cls, node: Node) -> Origin:
        """Follow casts; a rounding only as the last step, since a wider dtype after it hides it."""
        nodes, rounded, widened = [node], False, False
        while (source := _cast_of(nodes[-1])) is not None:
            outer, inner = value_of(nodes[-1]).dtype, value_of(source).dtype
            if not represents_exactly(outer, inner) and (rounded or widened):
                break
            rounded |= not represents_exactly(outer, inner)
            widened |= represents_exactly(outer, inner) and outer != inner
            nodes.append(source)
        return cls(tuple(nodes))


def _cast_of(node: Node) -> Node | None:
    """Return what this casts from one floating-point dtype to another with its gradient, or None."""
    if cast_dtype(node) is None or not isinstance(source := node.args[0], Node):
        return None
    before, after = value_of(source), value_of(node)
    plain = {before.dtype, after.dtype} <= FLOATING and before.requires_grad == after.requires_grad
    return source if plain else None


def _projections(graph: Graph, report: GraphReport) -> Iterator[Projection]:
    """Iterate over projections in graph order, each with its adapters, whose results may need a gradient."""
    teaching = _reaching_a_gradient(graph)
    for node in graph.nodes:
        projection = _four_bit(node) or _plain(node)
        if projection is not None:
            _add_adapters(projection, report)
            if projection.end in teaching:
                yield projection


def _reaching_a_gradient(graph: Graph) -> set[Node]:
    """Return the nodes that a result may send a gradient to; for others torch gives None, but a group zeros."""
    reaching: set[Node] = set()
    for node in reversed(graph.nodes):
        ends = node.op == "output" or maybe_mutated_args(node) or operators.is_higher_order(node.target)
        if ends or any(user in reaching and name_of(user.target) != "detach" for user in node.users):
            reaching.add(node)
    return reaching


def _four_bit(node: Node) -> Projection | None:
    """Return the projection of a lora_linear as bnb4bit.py makes it, or None."""
    if node.target is not operator.getitem or not isinstance(node.args[0], Node):
        return None
    call = node.args[0]
    if call.target is not torch.ops.fastft.lora_linear or node.args[1] != 0:
        return None
    group: Any = Group(*call.args)  # type: ignore[arg-type]  # nodes in the places of tensors
    weights = [list(getattr(group, name)) for name in LISTS]
    bias = next(iter(group.biases), None)
    return Projection(
        node, group.x, weights, bias, group.features[0], group.blocksize, group.quant_type, node, inner=[call]
    )


def _plain(node: Node) -> Projection | None:
    """Return the projection of a linear layer of plain tensors, or None."""
    bound = arguments_of(node) if node.target is F.linear else None
    if bound is None or bound[1]:
        return None
    x, weight, bias = [*bound[0], None][:3]
    values = [value_of(operand) for operand in (x, weight, node)]
    if (
        not all(type(value) is Tensor or fake_tensors.is_plain(value) for value in values)
        or values[0].dtype not in FLOATING
    ):
        return None
    features = values[1].shape[0]
    if values[1].dim() != 2 or (bias is not None and value_of(bias).shape != (features,)):
        return None
    return Projection(node, x, [[weight], [], [], [], []], bias, features, 0, "", node)


def _add_adapters(projection: Projection, report: GraphReport) -> None:
    """Take in the adapters added to the projection's result, up to the last value that the op can return."""
    current, chain, adapters, ends = projection.root, [projection.root], [], [(0, 0)]
    own, summed = projection.dtype, projection.dtype
    while len(current.users) == 1:
        (user,) = current.users
        if user.target is torch.ops.fastft.lora_add and user.args[0] is current:
            _, x, a, b, scale = user.args
            adapters.append(Adapter(x, a, b, scale))  # type: ignore[arg-type]
            summed = value_of(user).dtype
        elif not _keeps_value(user, current, own):
            break
        current = user
        chain.append(user)
        if adapters and value_of(current).dtype in {own, summed} & {own, wide(own)}:
            ends.append((len(chain) - 1, len(adapters)))
    last, taken = ends[-1]
    if taken:
        projection.adapters, projection.end = adapters[:taken], chain[last]
        projection.inner += chain[:last]
    for node in chain[last + 1 :]:
        if node.target is torch.ops.fastft.lora_add:
            miss(report, node, f"its result is {value_of(node).dtype} beside a layer in {own}")


def _keeps_value(node: Node, source: Node, dtype: torch.dtype) -> bool:
    """Tell whether this is a copy of ``source``, or a cast to a layer's dtype or that of its sums."""
    copied = node.op == "call_method" and node.target == "clone" and node.args == (source,) and not node.kwargs
    return (copied or _cast_of(node) is source) and value_of(node).dtype in (dtype, wide(dtype))
