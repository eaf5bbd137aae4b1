"""Find projections of 4-bit weights, as bitsandbytes writes them, and make each a ``fastft::lora_linear``.

bitsandbytes is not imported: its ops are recognised by name, and their arguments give all that is needed.  A
projection is ``gemm_4bit`` (0.50 and newer), or a linear of the result of ``dequantize_4bit`` (before), either in the
graph itself or in the body of an autograd.Function.  In a Function, the backward body must be the gradient of the
forward one: the upstream gradient times the same weight, and for the bias its sum.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors, operators
from fastft.compat.fake_tensors import value_of
from fastft.errors import describe
from fastft.reasons import Declined
from fastft.rewriter.capture.normalize import arguments_of
from fastft.rewriter.context import Context
from fastft.rewriter.fx.editing import annotate_like
from fastft.rewriter.fx.effects import UNDER_TRANSFORM, check_mutation, only_reads, transformed
from fastft.rewriter.fx.metadata import place_of, represents_exactly, same_kind
from fastft.rewriter.report.data import Lifted, NearMiss

RULE = "lora_linear.four_bit"
_NESTED_BLOCK = 256
_ADD = (operator.iadd, operator.add, torch.add)
_VIEWS = ("view", "reshape", "t", "contiguous")


@dataclass(frozen=True)
class Weight:
    """A 4-bit weight [rows, columns]: nodes of the outer graph, and numbers.  nested: absmax_8bit, code and offset."""

    packed: Node
    absmax: Node
    nested: tuple[Node, ...]
    rows: int
    columns: int
    blocksize: int
    quant_type: str


@dataclass(frozen=True)
class FourBitLinear:
    """x W^T + bias."""

    x: Node
    weight: Weight
    bias: Node | None


def lift(gm: GraphModule, context: Context) -> None:
    """Replace every projection of a 4-bit weight in one graph; near misses go into the report."""
    unused: list[Node] = []
    report, under_transforms = context.report, transformed(gm.graph)
    for node in list(gm.graph.nodes):
        if not any(is_op(call, "gemm_4bit", "dequantize_4bit") for call in _calls(gm, node)):
            continue
        place = place_of(node)
        try:
            if refusal := context.refusal(RULE, place[0], "lora_linear"):
                raise Declined(refusal)
            if node in under_transforms:
                raise Declined(UNDER_TRANSFORM)
            root, projection = _projection_at(gm, node)
            _check(root, projection)
            _replace(gm, root, projection, unused)
            report.lifted.append(Lifted(RULE, *place))
        except Declined as declined:
            report.near_misses.append(NearMiss(RULE, *place, declined.reason))
        except Exception as error:  # an unknown form must not cost the whole graph
            report.near_misses.append(NearMiss(RULE, *place, f"it could not be read: {describe(error)}"))
    erase(gm, unused)


def erase(gm: GraphModule, unused: list[Node]) -> None:
    """Remove what only served the replaced projections: views of their bytes, de-quantisation."""
    erased: set[Node] = set()
    while unused:
        node = unused.pop()
        if node not in erased and not node.users and _only_serves(node):
            erased.add(node)
            unused += node.all_input_nodes
            gm.graph.erase_node(node)


def _only_serves(node: Node) -> bool:
    """Tell whether this node has no side effects."""
    if node.op in ("get_attr", "call_method"):
        return node.op == "get_attr" or node.target in (*_VIEWS, "to")
    if _of_bitsandbytes(node):
        return not operators.is_mutable(node.target)
    added = node.target in _ADD and all(
        _of_bitsandbytes(argument) or argument.op == "placeholder" for argument in node.all_input_nodes
    )
    return added or _is_function(node)


def _calls(gm: GraphModule, node: Node) -> Iterator[Node]:
    """Iterate over the nodes of the forward body that this node runs, or over the node alone."""
    body = _body(gm, node, 0)
    yield from [node] if body is None else body.graph.nodes


def _body(gm: GraphModule, node: Node, number: int) -> GraphModule | None:
    """Return an autograd.Function's forward body (number 0) or backward body (number 1), or None."""
    if not _is_function(node):
        return None
    body: Any = node.args[number]
    return getattr(gm, str(body.target)) if isinstance(body, Node) else body


def _is_function(node: Node) -> bool:
    target: Any = node.target
    return (
        node.op == "call_function" and operators.is_higher_order(target) and target.name() == "autograd_function_apply"
    )


def _of_bitsandbytes(node: Any) -> bool:
    return (
        isinstance(node, Node) and operators.is_operator(node.target) and str(node.target).startswith("bitsandbytes.")
    )


def is_op(node: Any, *names: str) -> bool:
    """Tell whether this is a call of one of bitsandbytes' ops."""
    return _of_bitsandbytes(node) and str(node.target).split(".")[1] in names


def _projection_at(gm: GraphModule, node: Node) -> tuple[Node, FourBitLinear]:
    """Return the node whose value is the projection, and the projection.  Raises Declined."""
    body = _body(gm, node, 0)
    if body is None:
        reader = Reader({})
        if is_op(node, "gemm_4bit"):
            return node, reader.projection(node)
        return _linear_above(node, reader)
    backward = _body(gm, node, 1)
    assert backward is not None
    return _function(gm, node, body, backward)


def _linear_above(node: Node, reader: Reader) -> tuple[Node, FourBitLinear]:
    """Return the linear that a de-quantised weight goes to, through no-op casts and transposes.  Raises Declined."""
    current = node
    while True:
        users = list(current.users)
        if len(users) != 1:
            raise Declined(f"the de-quantised weight is used {len(users)} times", "weight.dequantized")
        current = users[0]
        if current.target is F.linear:
            return current, reader.projection(current)
        if current.op != "call_method" or current.target not in ("t", "to"):
            raise Declined("the de-quantised weight goes elsewhere than into a linear layer", "weight.dequantized")


def _function(gm: GraphModule, node: Node, body: GraphModule, backward: GraphModule) -> tuple[Node, FourBitLinear]:
    """Read a projection from an autograd.Function, and check its backward.  Raises Declined."""
    arguments = list(node.args[2:])
    outside = dict(zip(body.graph.find_nodes(op="placeholder"), arguments, strict=True))
    if not only_reads(gm, node):
        raise Declined("its autograd.Function writes to what it is given")
    results, saved = _output(body)
    projection = Reader(outside).projection(_first(results))
    for user in list(node.users):
        if user.target is operator.getitem and not user.users:  # torch 2.11 unpacks every result in a checkpoint
            gm.graph.erase_node(user)
    users = list(node.users)
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in users) or len(users) != 1:
        raise Declined("other results of its autograd.Function are used")
    placeholders = backward.graph.find_nodes(op="placeholder")
    kept = placeholders[len(placeholders) - len(saved) :]
    reader = Reader(outside)
    known = {
        placeholder: outside[source] if source in outside else reader.packed(source)
        for placeholder, source in zip(kept, saved, strict=True)
    }
    _check_gradients(Reader(known), placeholders[0], _output_list(backward), arguments, projection)
    return users[0], projection


def _output(body: GraphModule) -> tuple[Any, Sequence[Any]]:
    """Return what a forward body returns, and what it saves for backward."""
    returned: Any = body.graph.output_node().args[0]
    results, saved = returned
    return results, saved


def _output_list(backward: GraphModule) -> Sequence[Any]:
    returned: Any = backward.graph.output_node().args[0]
    return returned if isinstance(returned, (tuple, list)) else (returned,)


def _first(results: Any) -> Any:
    return results[0] if isinstance(results, (tuple, list)) else results


def _is_view(node: Any) -> bool:
    """Tell whether this has the bytes of its argument in their order; a transpose has if one axis has size 1."""
    if not isinstance(node, Node) or node.op != "call_method" or node.target not in _VIEWS:
        return False
    typed = any(isinstance(argument, torch.dtype) for argument in node.args)
    return not typed and (node.target != "t" or 1 in value_of(node).shape)


def _is_seen_as(node: Any) -> bool:
    """Tell whether this has the bytes of its argument as another dtype."""
    return (
        isinstance(node, Node) and node.op == "call_method" and node.target == "view" and not node.kwargs
        and len(node.args) == 2 and isinstance(node.args[1], torch.dtype)
    )  # fmt: skip


def _seen_as(node: Node, dtype: Any) -> Node:
    """Return the node of the outer graph that has these bytes as another dtype; forward and backward share it."""
    for user in node.users:
        if _is_seen_as(user) and user.args[1] == dtype:
            return user
    with node.graph.inserting_before(next(iter(node.users))):  # and not ahead of all layers
        view = node.graph.call_method("view", (node, dtype))
    annotate_like(view, node)
    return view


def _check_gradients(
    reader: Reader, grad_output: Node, gradients: Sequence[Any], arguments: Sequence[Any], projection: FourBitLinear
) -> None:
    """Check that x's gradient is grad_output W, the bias's the sum of grad_output over rows, and there is no other.

    Raises Declined.
    """
    for gradient, argument in zip(gradients, arguments, strict=True):
        if argument is projection.x:
            product = _through_casts(gradient, value_of(projection.x).dtype)
            right = product.target in (torch.matmul, operator.matmul) or product.target == "matmul"
            if not right or product.args[0] is not grad_output:
                raise Declined("its backward is not the product of the gradient and the weight")
            if reader.weight(product.args[1]) != projection.weight:
                raise Declined("its backward takes another weight than its forward")
        elif argument is projection.bias and (gradient is not None or value_of(argument).requires_grad):
            if gradient is None or gradient.target != "sum" or gradient.args[:2] != (grad_output, 0):
                raise Declined("the bias's gradient is not a sum over rows")
        elif gradient is not None:
            raise Declined("something besides x and the bias gets a gradient")


def _through_casts(node: Any, dtype: torch.dtype | None = None) -> Any:
    """Return what this is cast from, if the casts lose nothing; the last one may round to ``dtype``."""
    last = True
    while isinstance(node, Node) and node.op == "call_method" and node.target == "to":
        source, result = value_of(node.args[0]).dtype, value_of(node).dtype
        widens = source.is_floating_point and result.is_floating_point and represents_exactly(result, source)
        if not widens and not (last and result == dtype and source.is_floating_point):
            break
        node, last = node.args[0], False
    return node


@dataclass(frozen=True)
class Reader:
    """Read expressions of a body whose placeholders stand for nodes of the outer graph."""

    known: Mapping[Node, Any]

    def outer(self, node: Any) -> Node:
        """Return the node of the outer graph that this stands for.  Raises Declined."""
        outer_node = self.known.get(node) if self.known else node
        if outer_node is None and _is_seen_as(node):
            return _seen_as(self.outer(node.args[0]), node.args[1])
        if not isinstance(outer_node, Node):
            raise Declined(f"{node} is computed inside")
        return outer_node

    def packed(self, node: Any) -> Node:
        """Return the packed bytes, behind any views of them.  Raises Declined."""
        while _is_view(node):
            node = node.args[0]
        outer_node = self.outer(node)
        while _is_view(outer_node):
            outer_node = outer_node.args[0]  # type: ignore[assignment]
        return outer_node

    def projection(self, node: Any) -> FourBitLinear:
        """Return the projection that this call computes.  Raises Declined."""
        if is_op(node, "gemm_4bit"):
            return self._gemm(node)
        node = _through_casts(node)
        if not isinstance(node, Node) or node.target is not F.linear:
            raise Declined(f"{node} is not a linear layer")
        bound = arguments_of(node)
        if bound is None:
            raise Declined(f"{node} is called in a way that is not known")
        x, weight, bias = [*bound[0], None][:3]
        read = self.outer(x)
        return FourBitLinear(
            read, self.weight(weight, value_of(read).dtype), None if bias is None else self.outer(bias)
        )

    def _gemm(self, node: Node) -> FourBitLinear:
        names = ("x", "packed", "shape", "absmax", "blocksize", "quant_type", "bias", "absmax_8bit", "absmax_code")
        values: dict[str, Any] = {**dict(zip((*names, "absmax_offset"), node.args, strict=False)), **node.kwargs}
        nested = [values.get(name) for name in ("absmax_8bit", "absmax_code", "absmax_offset")]
        present = tuple(self.outer(statistic) for statistic in nested if statistic is not None)
        rows, columns = values["shape"]
        weight = Weight(
            self.packed(values["packed"]), self.outer(values["absmax"]), present, rows, columns, values["blocksize"],
            values["quant_type"],
        )  # fmt: skip
        bias = values.get("bias")
        return FourBitLinear(self.outer(values["x"]), weight, None if bias is None else self.outer(bias))

    def weight(self, node: Any, narrowest: torch.dtype | None = None) -> Weight:
        """Return the weight [rows, columns] that this de-quantises, transposed an even number of times.

        narrowest: the narrowest dtype that it may be rounded to on the way.  None in backward: the weight remembers the
        dtype that it was made from, and only in backward does bitsandbytes round it to that.  Raises Declined.
        """
        turned, dtypes = False, []
        while isinstance(node, Node) and node.op == "call_method" and node.target in ("t", "to"):
            turned ^= node.target == "t"
            dtypes.append(value_of(node).dtype)
            node = node.args[0]
        if not is_op(node, "dequantize_4bit") or node.kwargs:
            raise Declined(f"{node} is not a de-quantised weight", "weight.dequantized")
        packed, absmax, blocksize, quant_type, shape, dtype = node.args
        for rounded_to in (*dtypes, dtype):
            if narrowest is not None and not represents_exactly(rounded_to, narrowest):
                raise Declined(f"the weight is rounded to {rounded_to} before {narrowest}")
        if turned:
            raise Declined("the weight is transposed")
        first, nested = self._absmax(absmax)
        rows, columns = shape
        return Weight(self.packed(packed), first, nested, rows, columns, blocksize, quant_type)

    def _absmax(self, node: Any) -> tuple[Node, tuple[Node, ...]]:
        if getattr(node, "target", None) not in _ADD:
            return self.outer(node), ()
        inner, offset = node.args
        if node.kwargs or not is_op(inner, "dequantize_blockwise"):
            raise Declined("the absmax are computed in a way that is not known")
        bits, absmax, code, block, dtype = inner.args
        if block != _NESTED_BLOCK or dtype != torch.float32:
            raise Declined(f"the absmax are quantised in blocks of {block}")
        return self.outer(absmax), (self.outer(bits), self.outer(_through_casts(code)), self.outer(offset))


def _check(root: Node, projection: FourBitLinear) -> None:
    """Check that nothing the projection reads is mutated, and that the op supports it.  Raises Declined."""
    weight = projection.weight
    biases = [] if projection.bias is None else [projection.bias]
    nodes = [projection.x, weight.packed, weight.absmax, *weight.nested, *biases, root]
    for node in nodes:
        if not isinstance(value_of(node), Tensor):
            raise Declined(f"{node} is not a tensor")
    if reason := check_mutation(nodes):
        raise Declined(reason)
    for bias in map(value_of, biases):
        if bias.shape != (weight.rows,):
            raise Declined(f"its bias is of shape {tuple(bias.shape)}")


def _replace(gm: GraphModule, root: Node, projection: FourBitLinear, unused: list[Node]) -> None:
    """Replace the root by the op; the root's inputs go into ``unused``.  Raises Declined if the results are unlike."""
    weight = projection.weight
    lists: list[list[Node]] = [[weight.packed], [weight.absmax], *([statistic] for statistic in weight.nested)]
    lists += [[]] * (5 - len(lists))
    biases = [] if projection.bias is None else [projection.bias]
    arguments: Any = (
        projection.x, *lists, biases, [], [], [], [weight.rows], [0] * len(biases), [], [], weight.blocksize,
        weight.quant_type, False, False,
    )  # fmt: skip
    with gm.graph.inserting_before(root):
        call = gm.graph.call_function(torch.ops.fastft.lora_linear, arguments)
        result = gm.graph.call_function(operator.getitem, (call, 0))
    try:
        for node in (call, result):
            annotate_like(node, root)
        if not same_kind(value_of(result), value_of(root)):
            raise Declined("the op's result would be laid out otherwise")
    except Exception:
        gm.graph.erase_node(result)
        gm.graph.erase_node(call)
        raise
    fake_tensors.set_value(result, value_of(root))
    root.replace_all_uses_with(result)
    unused += root.all_input_nodes
    gm.graph.erase_node(root)
