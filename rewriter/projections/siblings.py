"""Find projections that merge.py can make one ``fastft::lora_linear`` of: those of one input, with their adapters.

A projection is a 4-bit one (quantized.py) or a linear layer, and the LoRA layers (patterns/lora.py) added to it.
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
from fastft.rewriter.fx.metadata import layer_of, module_path, name_of, represents_exactly, source_line
from fastft.rewriter.report.data import GraphReport, NearMiss

RULE = "lora_linear.group"
LISTS = ("weights", "absmax", "absmax_8bit", "absmax_code", "absmax_offset")
_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


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

    @property
    def given(self) -> list[Node]:
        """All that it reads."""
        own = [self.x, *itertools.chain(*self.weights), *([] if self.bias is None else [self.bias])]
        return own + [node for one in self.adapters for node in (one.x, one.a, one.b)]

    def follow(self, became: Mapping[Node, Node]) -> None:
        """Read what the results of groups that are merged by now became."""
        self.x = became.get(self.x, self.x)
        self.weights = [[became.get(one, one) for one in some] for some in self.weights]
        self.bias = became.get(self.bias, self.bias) if self.bias is not None else None
        for one in self.adapters:
            one.x, one.a, one.b = (became.get(node, node) for node in (one.x, one.a, one.b))

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


def find(graph: Graph, report: GraphReport) -> list[list[Projection]]:
    """All projections of a graph, siblings together; adapters that they cannot take go into ``report``."""
    groups: dict[Any, list[Projection]] = {}
    for projection in _projections(graph, report):
        groups.setdefault(_key(projection), []).append(projection)
    return list(groups.values())


def miss(report: GraphReport, node: Node, reason: str) -> None:
    """Say why this node stays apart."""
    report.near_misses.append(NearMiss(RULE, module_path(node), source_line(node), reason))


def _key(projection: Projection) -> Any:
    """Equal for siblings.  One that needs no gradient must not get one from another."""
    x, end = value_of(projection.x), value_of(projection.end)
    kind = (projection.blocksize, projection.quant_type, *map(len, projection.weights), projection.dtype)
    layer = layer_of(module_path(projection.root))
    return (Origin.of(projection.x).source, x.dtype, x.device, layer, *kind, end.device, end.requires_grad)


@dataclass(frozen=True)
class Origin:
    """What a node is a cast of, and so on: from the node itself to what all that was rounded at most once."""

    nodes: tuple[Node, ...]

    @property
    def source(self) -> Node:
        """The last one."""
        return self.nodes[-1]

    @property
    def exact(self) -> bool:
        """Whether the first has the value of the last."""
        return represents_exactly(value_of(self.nodes[0]).dtype, value_of(self.source).dtype)

    @classmethod
    def of(cls, node: Node) -> Origin:
        """Only a rounding that is the last step is looked through: a wider dtype after it hides it."""
        nodes, rounded, widened = [node], False, False
        while (given := _cast_of(nodes[-1])) is not None:
            outer, inner = value_of(nodes[-1]).dtype, value_of(given).dtype
            if not represents_exactly(outer, inner) and (rounded or widened):
                break
            rounded |= not represents_exactly(outer, inner)
            widened |= represents_exactly(outer, inner) and outer != inner
            nodes.append(given)
        return cls(tuple(nodes))


def _cast_of(node: Node) -> Node | None:
    """What this casts from one floating-point dtype to another, gradients and all."""
    if cast_dtype(node) is None or not isinstance(given := node.args[0], Node):
        return None
    before, after = value_of(given), value_of(node)
    plain = {before.dtype, after.dtype} <= _FLOATING and before.requires_grad == after.requires_grad
    return given if plain else None


def _projections(graph: Graph, report: GraphReport) -> Iterator[Projection]:
    """In graph order, each with the adapters that it can take; none whose result nothing learns from."""
    teaching = _reaching_a_gradient(graph)
    for node in graph.nodes:
        found = _four_bit(node) or _plain(node)
        if found is not None:
            _add_adapters(found, report)
            if found.end in teaching:
                yield found


def _reaching_a_gradient(graph: Graph) -> set[Node]:
    """What a result of the graph may owe a gradient to; for the rest torch gives None and a group would give zeros."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        ends = node.op == "output" or maybe_mutated_args(node) or operators.is_higher_order(node.target)
        if ends or any(user in found and name_of(user.target) != "detach" for user in node.users):
            found.add(node)
    return found


def _four_bit(node: Node) -> Projection | None:
    """A lora_linear as quantized.py makes them."""
    if node.target is not operator.getitem or not isinstance(node.args[0], Node):
        return None
    call = node.args[0]
    if call.target is not torch.ops.fastft.lora_linear or node.args[1] != 0:
        return None
    given: Any = Group(*call.args)  # type: ignore[arg-type]  # nodes in the places of tensors
    weights = [list(getattr(given, name)) for name in LISTS]
    bias = next(iter(given.biases), None)
    return Projection(
        node, given.x, weights, bias, given.features[0], given.blocksize, given.quant_type, node, inner=[call]
    )


def _plain(node: Node) -> Projection | None:
    """A linear layer of plain tensors."""
    bound = arguments_of(node) if node.target is F.linear else None
    if bound is None or bound[1]:
        return None
    x, weight, bias = [*bound[0], None][:3]
    given = [value_of(one) for one in (x, weight, node)]
    if not all(type(one) is Tensor or fake_tensors.is_plain(one) for one in given) or given[0].dtype not in _FLOATING:
        return None
    features = given[1].shape[0]
    if given[1].dim() != 2 or (bias is not None and value_of(bias).shape != (features,)):
        return None
    return Projection(node, x, [[weight], [], [], [], []], bias, features, 0, "", node)


def _add_adapters(projection: Projection, report: GraphReport) -> None:
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
            miss(report, one, f"its result is {value_of(one).dtype} beside a layer in {own}")


def _keeps_value(node: Node, given: Node, dtype: torch.dtype) -> bool:
    """Whether this is a copy of ``given``, or a cast of it to a layer's dtype or the one that its sums may have."""
    copied = node.op == "call_method" and node.target == "clone" and node.args == (given,) and not node.kwargs
    return (copied or _cast_of(node) is given) and value_of(node).dtype in (dtype, wide(dtype))
