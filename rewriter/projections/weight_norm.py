"""Find norms of the rows of a weight with its adapter, and make each a ``fastft::dora_weight_norm``.

The weight is a tensor or one in 4 bits, which is then de-quantised for the norm alone; the adapter's product is written
as its two layers of an identity matrix.  Casts on the way are left out: nothing is rounded before the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.errors import describe
from fastft.reasons import Declined
from fastft.rewriter.capture.normalize import ALIASES, arguments_of, cast_dtype
from fastft.rewriter.context import Context
from fastft.rewriter.fx.editing import annotate_like
from fastft.rewriter.fx.effects import UNDER_TRANSFORM, check_effects_between, transformed
from fastft.rewriter.fx.metadata import FLOATING, place_of, same_kind, same_sizes
from fastft.rewriter.projections import bnb4bit
from fastft.rewriter.report.data import Lifted, NearMiss

RULE = "dora.weight_norm"
_NORMS = (torch.linalg.norm, torch.linalg.vector_norm)


@dataclass
class WeightNorm:
    """A norm of a weight with its adapter.

    root: the node that replaces it; weight: a tensor's node, or a 4-bit weight.  inner: all that it was computed by.
    """

    root: Node
    weight: Node | bnb4bit.Weight
    a: Node
    b: Node
    scale: float
    inner: list[Node] = field(default_factory=list)

    @property
    def given(self) -> list[Node]:
        """All nodes that it reads."""
        own = [self.weight] if isinstance(self.weight, Node) else _tensors(self.weight)
        return [*own, self.a, self.b]


def lift(gm: GraphModule, context: Context) -> None:
    """Replace every norm of a weight with its adapter in one graph; near misses go into the report."""
    report, under_transforms = context.report, transformed(gm.graph)
    for node in [node for target in _NORMS for node in gm.graph.find_nodes(op="call_function", target=target)]:
        place = place_of(node)
        try:
            norm = _norm_at(node)
            if norm is None:
                continue
            if refusal := context.refusal(RULE, place[0], "dora_weight_norm"):
                raise Declined(refusal)
            if node in under_transforms:
                raise Declined(UNDER_TRANSFORM)
            _check(gm, norm)
            _replace(gm, norm)
            report.lifted.append(Lifted(RULE, *place))
        except Declined as declined:
            report.near_misses.append(NearMiss(RULE, *place, declined.reason))
        except Exception as error:  # an unknown form must not cost the whole graph
            report.near_misses.append(NearMiss(RULE, *place, f"it could not be read: {describe(error)}"))


def _norm_at(node: Node) -> WeightNorm | None:
    """Return the norm that this call computes; None if it is that of something else.  Raises Declined."""
    inner = [node]
    total = _below_casts(node.args[0], inner)
    if not isinstance(total, Node) or ALIASES.get(total.target, total.target) is not torch.add:  # type: ignore[arg-type]
        return None
    inner.append(total)
    for weight, product in (total.args, total.args[::-1]) if len(total.args) == 2 else ():
        reached: list[Node] = []
        if (factors := _scaled_product(product, reached)) is not None:
            inner += reached
            if node.kwargs != {"dim": 1} or len(node.args) > 1 or total.kwargs:
                raise Declined(f"a norm of another kind: {node.args[1:]} {node.kwargs}")
            found = _weight(_below_casts(weight, inner), inner)
            return WeightNorm(_root(node, inner), found, *factors, inner)
    return None


def _below_casts(node: Any, inner: list[Node]) -> Any:
    """Return what this is cast from or detached from; the nodes on the way go into ``inner``."""
    while isinstance(node, Node) and (_detaches(node) or _casts(node)):
        inner.append(node)
        node = node.args[0]
    return node


def _casts(node: Node) -> bool:
    source = node.args[0] if node.args else None
    return cast_dtype(node) is not None and {value_of(node).dtype, value_of(source).dtype} <= FLOATING


def _detaches(node: Node) -> bool:
    return node.op == "call_method" and node.target == "detach"


def _scaled_product(node: Any, inner: list[Node]) -> tuple[Node, Node, float] | None:
    """Return A, B and s of s (B A), or None."""
    if not isinstance(node, Node) or ALIASES.get(node.target, node.target) is not torch.mul or len(node.args) != 2:  # type: ignore[arg-type]
        return None
    numbers = [argument for argument in node.args if isinstance(argument, (int, float))]
    nodes = [argument for argument in node.args if isinstance(argument, Node)]
    if len(numbers) != 1 or len(nodes) != 1:
        return None
    inner.append(node)
    turned = _below_casts(nodes[0], inner)
    if not isinstance(turned, Node) or not _transposes(turned):
        return None
    inner.append(turned)
    factors: list[Node] = []
    current = _below_casts(turned.args[0], inner)
    for _ in range(2):
        bound = arguments_of(current) if isinstance(current, Node) and current.target is F.linear else None
        if bound is None or len(bound[0]) != 2:
            return None
        inner.append(current)
        factors.append(bound[0][1])
        current = _below_casts(bound[0][0], inner)
    if not isinstance(current, Node) or current.target is not torch.eye or len(current.args) != 1:
        return None
    inner.append(current)
    b, a = factors
    return a, b, float(numbers[0])


def _transposes(node: Node) -> bool:
    """Tell whether this is the transpose of a matrix."""
    if value_of(node).dim() != 2:
        return False
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    return node.op == "call_method" and (node.target == "t" or (node.target == "transpose" and len(node.args) == 3))


def _weight(node: Any, inner: list[Node]) -> Node | bnb4bit.Weight:
    """Return the weight that this is, whose 4 bits it may de-quantise.  Raises Declined."""
    if bnb4bit.is_op(node, "dequantize_4bit"):
        inner.append(node)
        return bnb4bit.Reader({}).weight(node)
    if not isinstance(node, Node) or value_of(node).dtype not in FLOATING:
        raise Declined(f"{node} is no weight of floating-point numbers")
    return node


def _root(node: Node, inner: list[Node]) -> Node:
    """Return the last of the casts and detaches of a norm, which needs no gradient.  Raises Declined."""
    root = node
    while len(root.users) == 1:
        (user,) = root.users
        if not (_detaches(user) or _casts(user)):
            break
        inner.insert(0, user)
        root = user
    if value_of(root).requires_grad:
        raise Declined("it has a gradient, where the norm is a constant")
    return root


def _check(gm: GraphModule, norm: WeightNorm) -> None:
    """Check that nothing that it reads is mutated, and that shapes fit.  Raises Declined."""
    for node in norm.given:
        value = value_of(node)
        plain = type(value) is Tensor or fake_tensors.is_plain(value)
        if not isinstance(value, Tensor) or not (plain or node not in (norm.weight, norm.a, norm.b)):
            raise Declined(f"{node} is no plain tensor")
    weight = norm.weight
    shape = tuple(value_of(weight).shape) if isinstance(weight, Node) else (weight.rows, weight.columns)
    if not same_sizes(shape, (value_of(norm.b).shape[0], value_of(norm.a).shape[1])):
        raise Declined(f"its weight is of shape {shape}")
    inside = [node for node in norm.inner if not bnb4bit.is_op(node, "dequantize_4bit")]
    if reason := check_effects_between(gm, [*norm.given, *inside], min(norm.inner), norm.root, "norm"):
        raise Declined(reason)


def _tensors(weight: bnb4bit.Weight) -> list[Node]:
    return [weight.packed, weight.absmax, *weight.nested]


def _replace(gm: GraphModule, norm: WeightNorm) -> None:
    """Replace the root by the op, and remove what only served it.  Raises Declined if the results are unlike."""
    root, made = norm.root, []

    def add(target: Any, *arguments: Any) -> Node:
        call = gm.graph.call_method if isinstance(target, str) else gm.graph.call_function
        made.append(call(target, arguments))
        annotate_like(made[-1], root)
        return made[-1]

    try:
        with gm.graph.inserting_before(root):
            a, b = (add("detach", node) if value_of(node).requires_grad else node for node in (norm.a, norm.b))
            if isinstance(norm.weight, Node):
                weight: Sequence[Any] = (norm.weight, None, None, None, None)
                quantized: tuple[Any, ...] = (0, "")
                if value_of(norm.weight).requires_grad:
                    weight = (add("detach", norm.weight), *weight[1:])
            else:
                weight = [*_tensors(norm.weight), None, None, None][:5]
                quantized = (norm.weight.blocksize, norm.weight.quant_type)
            result = add(torch.ops.fastft.dora_weight_norm, *weight, a, b, norm.scale, *quantized)
            if value_of(result).dtype != value_of(root).dtype:
                result = add("to", result, value_of(root).dtype)
        if not same_kind(value_of(result), value_of(root)):
            raise Declined("the op's result would be laid out otherwise")
    except Exception:
        for node in reversed(made):
            gm.graph.erase_node(node)
        raise
    root.replace_all_uses_with(result)
    served = [node for inner in norm.inner for node in inner.all_input_nodes if node not in norm.inner]
    for node in sorted(set(norm.inner), reverse=True):
        if not node.users:
            gm.graph.erase_node(node)
    bnb4bit.erase(gm, served)
