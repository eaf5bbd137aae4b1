"""Lift a head with its loss, and defer logits that leave the graph until they are read.

From a product with a vocabulary on, every use of its logits is followed (logits.py).  Where all of them end in losses
and in outputs of the graph, the losses become ``fastft::linear_cross_entropy``, and the outputs hidden states, of which
runtime/lazy_logits.py makes tensors that compute themselves when they are read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fastft.compat import dynamo, fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.kernels.lora_group import Group
from fastft.reasons import Declined
from fastft.rewriter.capture.normalize import arguments_of
from fastft.rewriter.context import Context
from fastft.rewriter.fx.editing import annotate_like, between, infer_requires_grad
from fastft.rewriter.fx.effects import (
    UNDER_TRANSFORM,
    check_mutation,
    may_alias,
    mutated_args,
    switches_mode,
    transformed,
)
from fastft.rewriter.fx.metadata import FLOATING, module_path, name_of, place_of, same_kind, source_line
from fastft.rewriter.loss.head import Head, Logits
from fastft.rewriter.loss.logits import consume, follow
from fastft.rewriter.report.data import Lifted, NearMiss

RULE = "linear_cross_entropy"
_TRANSPOSES: dict[str, list[Any]] = {  # by name of the call: what comes behind the weight
    "t": [()],
    "transpose": [(0, 1), (1, 0), (-1, -2), (-2, -1)],
    "getattr": [("T",), ("mT",)],
    "aten.numpy_T": [()],  # as torch 2.14 has .T
    "aten.mT": [()],
}
LAZY = "lazy_logits"
RULES = (LAZY, *(f"{RULE}.{loss}" for loss in ("cross_entropy", "nll_loss", "kl_div", "log_probability")))
_NAMES = {"gather": "log_probability"}  # of losses, where the function's own name says little


@dataclass(frozen=True)
class Deferred:
    """An output that is computed when it is read.

    position: of its hidden states among the graph's outputs.  logits: with numbers in the place of tensors.
    values: where the head's tensors are: ("input", number) or ("output", number).
    """

    position: int
    logits: Logits
    values: tuple[tuple[str, int], ...]
    module: str


def lift(gm: GraphModule, context: Context) -> None:
    """Replace the losses of one graph, and take logits out of its outputs; near misses go into the report."""
    graph, report, deferred = gm.graph, context.report, context.deferred
    vocabularies = {*_embeddings(graph), *_embeddings_of_the_model()}
    has_loss = any(name_of(node.target) in ("cross_entropy", "nll_loss", "kl_div") for node in graph.nodes)
    under_transforms = transformed(graph)
    heads = [(root, logits) for root, logits in _heads(graph) if root not in under_transforms]
    for root, logits in heads:
        known = logits.head.classes in vocabularies
        lifting = _Lifting(gm, root, logits, context, under_transforms)
        lazy = deferred is not None and context.refusal(LAZY, module_path(root)) is None
        try:
            outputs = lifting.run(lazy=lazy, known=known)
        except Declined as declined:
            lifting.undo()
            last = root is heads[-1][0]
            if lifting.losses or (last and known and has_loss):
                report.near_misses.append(NearMiss(RULE, *place_of(root), declined.reason))
            continue
        report.lifted += [Lifted(f"{RULE}.{name}", *place_of(node)) for node, name in lifting.losses]
        if deferred is not None:
            deferred += outputs
        report.deferred += [output.module for output in outputs]


def _embeddings(graph: Graph) -> Iterator[int]:
    """Iterate over the numbers of rows of the graph's embedding tables."""
    for node in graph.find_nodes(op="call_function", target=F.embedding):
        table = value_of(node.args[1] if len(node.args) > 1 else node.kwargs.get("weight"))
        if isinstance(table, Tensor) and isinstance(table.shape[0], int):
            yield table.shape[0]


def _embeddings_of_the_model() -> list[int]:
    """List the embedding sizes of the module being compiled: after a graph break the lookup is in another graph."""
    try:
        _, owner = dynamo.current_code()
    except Exception:  # called without Dynamo
        return []
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    return [module.num_embeddings for module in modules if isinstance(module, nn.Embedding)]


def _heads(graph: Graph) -> Iterator[tuple[Node, Logits]]:
    """Iterate over products with more results than features, and the logits that they make."""
    for node in graph.nodes:
        product = _linear(node) or _transposed(node) or _group(node)
        if product is None:
            continue
        hidden, head = product
        values = [value_of(operand) for operand in (hidden, node, *head.values)]
        plain = all(
            isinstance(operand, Tensor) and type(operand) is not Tensor and fake_tensors.is_plain(operand)
            for operand in values
        )
        if plain and value_of(hidden).dtype in FLOATING and values[1].dim() == values[0].dim() > 1:
            yield node, Logits(hidden, head, values[1].dtype, _trained(node, hidden, head))


def _trained(node: Node, hidden: Node, head: Head) -> tuple[bool, ...]:
    """Tell which of hidden, weight, bias, lora_s and lora_b require grad."""
    needs = lambda operand: isinstance(value := value_of(operand), Tensor) and value.requires_grad  # noqa: E731
    if not needs(node):
        return (False,) * 5
    adapted = len(head.lora_a) > 0
    s = adapted and (needs(hidden) or any(map(needs, head.lora_a)))
    return needs(hidden), needs(head.weight), needs(head.bias), s, any(map(needs, head.lora_b))


def _linear(node: Node) -> tuple[Node, Head] | None:
    """Return hidden states and head of F.linear, or None."""
    bound = arguments_of(node) if node.target is F.linear else None
    if bound is None or bound[1]:
        return None
    hidden, weight, bias = [*bound[0], None][:3]
    return _of_weight(node, hidden, weight, bias)


def _transposed(node: Node) -> tuple[Node, Head] | None:
    """Return hidden states and head of hidden @ weight.T, or None."""
    if name_of(node.target) not in ("matmul", "linear") or len(node.args) != 2 or node.kwargs:
        return None
    hidden, turned = node.args
    if not isinstance(turned, Node) or not turned.args:
        return None
    name, rest = name_of(turned.target), tuple(turned.args[1:])
    if turned.kwargs or rest not in _TRANSPOSES.get(name, []):
        return None
    return _of_weight(node, hidden, turned.args[0], None)


def _of_weight(node: Node, hidden: Any, weight: Any, bias: Any) -> tuple[Node, Head] | None:
    """Return hidden states and head if the weight has more rows than columns, or None."""
    shape: Any = getattr(value_of(weight), "shape", ())
    if not isinstance(hidden, Node) or not isinstance(weight, Node) or len(shape) != 2 or value_of(node) is None:
        return None
    classes, features = shape
    if type(classes) is not int or type(features) is not int or classes <= features:
        return None
    dtype = value_of(node).dtype
    return hidden, Head(weight, bias, classes, features, dtype, dtype)


def _group(node: Node) -> tuple[Node, Head] | None:
    """Return hidden states and head of a lora_linear of one layer, as projections/ makes them, or None."""
    if node.target is not operator.getitem or not isinstance(node.args[0], Node) or node.args[1] != 0:
        return None
    call = node.args[0]
    if call.target is not torch.ops.fastft.lora_linear or len(call.users) != 1:
        return None
    layer: Any = Group(*call.args)  # type: ignore[arg-type]  # nodes in the places of tensors
    features = value_of(layer.x).shape[-1]
    if len(layer.features) != 1 or layer.inputs or type(features) is not int or layer.features[0] <= features:
        return None
    nested = (layer.absmax, layer.absmax_8bit, layer.absmax_code, layer.absmax_offset)
    statistics = tuple(tensors[0] for tensors in nested if tensors)
    return layer.x, Head(
        layer.weights[0], next(iter(layer.biases), None), layer.features[0], features, value_of(layer.x).dtype,
        value_of(node).dtype, statistics, tuple(layer.lora_a), tuple(layer.lora_b), tuple(layer.scales),
        layer.blocksize, layer.quant_type, plain=False, rounded=layer.rounded,
    )  # fmt: skip


class _Lifting:
    """One head, whose logits are followed to all of their uses."""

    def __init__(
        self, gm: GraphModule, root: Node, logits: Logits, context: Context, under_transforms: frozenset[Node]
    ) -> None:  # fmt: skip
        self.under_transforms = under_transforms
        self.gm, self.graph, self.root, self.context = gm, gm.graph, root, context
        self.states = {root: logits}
        self.losses: list[tuple[Node, str]] = []  # the user's calls
        self.results: dict[Node, Node] = {}  # what replaces them
        self.made: list[Node] = []

    def run(self, *, lazy: bool, known: bool) -> list[Deferred]:
        """Follow, check and replace.  Raises Declined; ``undo`` then removes the nodes that were added.

        lazy: whether logits may leave the graph uncomputed.  known: whether there are as many embeddings as classes.
        """
        output, last = self.graph.output_node(), self.root
        for node in self.graph.nodes:
            if node is output or self.states.keys().isdisjoint(node.all_input_nodes):
                continue
            last = node
            self._visit(node)
        left = [node for node in self.states if output in node.users]
        if left and not (lazy and (known or self.losses)):
            raise Declined("its logits are an output")
        if any(self.states[node].classes_second or self.states[node].is_kl_terms for node in left):
            raise Declined("its logits are an output in another order", "logits.used")
        if not left and not self.losses:
            raise Declined("nothing reads its logits")
        self._check(last)
        for node, result in self.results.items():
            node.replace_all_uses_with(result)
        deferred = self._defer(left)
        call = [self.root.args[0]] if self.root.target is operator.getitem else []
        unused = {*self.states, *self.results, *call}
        for node in reversed(self.graph.nodes):
            if node in unused and not node.users:
                self.graph.erase_node(node)
        return deferred

    def undo(self) -> None:
        """Remove the nodes that were added."""
        for node in reversed(self.made):
            self.graph.erase_node(node)

    def _visit(self, node: Node) -> None:
        name, args = name_of(node.target), list(node.args)
        if name in ("mul", "add") and len(args) == 2 and args[1] in self.states:
            args.reverse()  # what it is multiplied by, or a bias, may come first
        first, value = args[0] if args else None, value_of(node)
        others = [argument for argument in node.all_input_nodes if argument in self.states and argument is not first]
        if node in self.under_transforms:
            raise Declined(UNDER_TRANSFORM)
        if others or not isinstance(first, Node) or first not in self.states or not isinstance(value, Tensor):
            raise Declined(f"its logits are also used by {name} ({source_line(node)})", "logits.used")
        logits = self.states[first]

        def call(function: Callable | str, *args: Any, **kwargs: Any) -> Node:
            return self._call(node, function, args, kwargs)

        if name == "add":
            followed = self._biased(node, logits, args[1])
        else:
            followed = follow(name, logits, args[1:], node.kwargs, call, value.dtype)
        if followed is not None and tuple(map(str, followed.shape)) == tuple(map(str, value.shape)):
            self.states[node] = followed
            return
        result = consume(name, logits, args[1:], node.kwargs, call, self.context.options.logits_bytes, value.dtype)
        if result is None:
            raise Declined(f"its logits are also used by {name} ({source_line(node)})", "logits.used")
        if not same_kind(value_of(result), value):
            raise Declined(f"{name} gives another result")
        loss = "kl_div" if logits.is_kl_terms else _NAMES.get(name, name)
        op = "linear_kl_div" if loss == "kl_div" else "linear_cross_entropy"
        if refusal := self.context.refusal(f"{RULE}.{loss}", module_path(node), op):
            raise Declined(refusal)
        self.losses.append((node, loss))
        self.results[node] = result

    def _biased(self, node: Node, logits: Logits, bias: Any) -> Logits | None:
        """Return logits with a bias, one number for each class, that is added to the product by itself; else None."""
        head, value, result = logits.head, value_of(bias), value_of(node)
        if node.kwargs or not isinstance(value, Tensor) or not fake_tensors.is_plain(value):
            return None
        if logits.steps or logits.classes_second or not head.plain or head.bias is not None:
            return None
        ones = (1,) * (value.dim() - 1)
        if value.dim() == 0 or tuple(value.shape) != (*ones, head.classes) or value.device != result.device:
            return None
        if {value.dtype, head.dtype, logits.dtype} != {result.dtype}:
            return None
        hidden, weight, _, *adapter = logits.trained
        trained = (hidden, weight, value.requires_grad and result.requires_grad, *adapter)
        return replace(logits, head=replace(head, bias=bias), trained=trained)

    def _call(self, before: Node, function: Callable | str, args: Sequence[Any], kwargs: Any) -> Node:
        kind = "call_method" if isinstance(function, str) else "call_function"
        with self.graph.inserting_before(before):
            node = self.graph.create_node(kind, function, tuple(args), dict(kwargs))
        self.made.append(node)
        annotate_like(node, before)
        infer_requires_grad(node)
        return node

    def _check(self, last: Node) -> None:
        """Check that nothing read is mutated and grad mode is not switched midway; autocast may.  Raises Declined."""
        values = list(
            dict.fromkeys([*self.states, *(value for state in self.states.values() for value in state.values)])
        )
        if reason := check_mutation(values):
            raise Declined(reason)
        for node in between(self.root, last):
            if switches_mode(node) and "autocast" not in name_of(node.target):
                raise Declined(f"{name_of(node.target)} is called halfway")
            if any(may_alias(target, value) for target in mutated_args(self.gm, node) for value in values):
                raise Declined(f"{name_of(node.target)} writes to what it is made of")

    def _defer(self, left: Sequence[Node]) -> list[Deferred]:
        """Replace logits among the outputs by hidden states, and append what else the logits are computed from."""
        node = self.graph.output_node()
        outputs = list(node.args[0])  # type: ignore[arg-type]
        inputs = {placeholder: number for number, placeholder in enumerate(self.graph.find_nodes(op="placeholder"))}
        deferred = []
        for position, output in enumerate(list(outputs)):
            if output not in left:
                continue
            logits = self.states[output]
            outputs[position] = logits.hidden
            values = []
            for value in logits.head.values:
                if value not in inputs and value not in outputs:
                    outputs.append(value)
                values.append(("input", inputs[value]) if value in inputs else ("output", outputs.index(value)))
            bare = logits.with_values(range(1 + len(values)))
            deferred.append(Deferred(position, bare, tuple(values), module_path(self.root)))
        node.args = (tuple(outputs),)
        return deferred
