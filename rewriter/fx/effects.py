"""Side effects of nodes: mutation, aliasing, RNG use, and switches of grad or autocast mode."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fastft.compat import eager, fake_tensors, operators
from fastft.compat.fake_tensors import value_of
from fastft.reasons import Reason
from fastft.rewriter.fx.bodies import nested_graphs, runs_bodies
from fastft.rewriter.fx.editing import between
from fastft.rewriter.fx.metadata import name_of

UNDER_TRANSFORM = "it is computed under a torch.func transform or forward-mode differentiation"


def transformed(graph: Graph) -> frozenset[Node]:
    """Return the nodes that a torch.func transform or forward-mode AD is active at; the custom ops support neither."""
    if eager.in_forward_mode() or _ends_open(graph):
        return frozenset(graph.nodes)
    return frozenset(node for span in transform_spans(graph) for node in span)


def transform_spans(graph: Graph) -> list[list[Node]]:
    """List the stretches of nodes from where a transform begins to where it ends, the outermost of nested ones."""
    spans: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        if opens_transform(node.target):
            spans += [[]] if depth == 0 else []
            depth += 1
        if depth > 0:
            spans[-1].append(node)
        depth -= closes_transform(node.target)
    return spans


def _ends_open(graph: Graph) -> bool:
    """Tell whether transforms and their ends do not match: what lies between them is then not known."""
    targets = [node.target for node in graph.nodes]
    depths = list(itertools.accumulate(opens_transform(target) - closes_transform(target) for target in targets))
    return bool(depths) and (depths[-1] != 0 or min(depths) < 0)


def check_effects_between(gm: GraphModule, values: Sequence[Node], first: Node, last: Node, whole: str) -> str | None:
    """Return why the values of the calls from ``first`` to ``last`` do not stay as they are, or None.

    That is a write to one of them anywhere in the graph, or a mode switch between the two calls.  whole: what the calls
    are together, for the message.
    """
    if reason := check_mutation(values):
        return reason
    for node in between(first, last):
        if switches_mode(node):
            return f"{name_of(node.target)} is called halfway"
        if any(may_alias(target, value) for target in mutated_args(gm, node) for value in values):
            return f"{name_of(node.target)} writes to a value of the {whole}"
    return None


def check_mutation(nodes: Iterable[Node]) -> str | None:
    """Return which of these nodes is written to in place anywhere in the graph, or None."""
    for node in nodes:
        if any(map(fake_tensors.written_to, fake_tensors.tensors_in(value_of(node)))):
            return Reason(f"{node.name} is written to in place", "mutation")
    return None


_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift setitem delitem"
_IN_PLACE_OPERATORS = frozenset(getattr(operator, name) for name in _IN_PLACE.split())
_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in _IN_PLACE.split())
_KEYWORDS = ("and_", "or_", "not_", "is_")  # functions of ``operator`` whose underscore avoids a Python keyword
_RANDOM = re.compile("dropout|rand|bernoulli|multinomial|normal_|gumbel|poisson|exponential_|uniform_")
_OPENS = re.compile(r"_(grad|vmap|jvp|func)_increment_nesting|enter_dual_level")
_CLOSES = re.compile(r"_(grad|vmap|jvp|func)_decrement_nesting|exit_dual_level")
_MODE_SWITCHES = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
)


def maybe_mutated_args(node: Node) -> list[Any]:
    """List the arguments that this node may write to; the bodies of higher-order operators are not inspected."""
    named = node.kwargs.get("out")
    out = list(named) if isinstance(named, (tuple, list)) else [] if named is None else [named]
    if node.op not in ("call_function", "call_method") or not (node.args or node.kwargs):
        return out
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if names_a_write(name) or node.target in _IN_PLACE_OPERATORS or node.kwargs.get("inplace"):
        target = node.args[0] if node.args else node.all_input_nodes
        return [*(target if isinstance(target, (tuple, list)) else [target]), *out]
    if operators.is_mutable(node.target) or operators.is_higher_order(node.target):  # its body is not inspected
        return list(node.all_input_nodes)
    return out


def names_a_write(name: str) -> bool:
    """Tell whether a method or function of this name writes to its first argument."""
    in_place = name.endswith("_") and not name.endswith("__") and name not in _KEYWORDS
    return in_place or name in _IN_PLACE_METHODS


def only_reads(gm: GraphModule, node: Node) -> bool:
    """Tell whether this node runs known nested graphs, none of which writes to an input."""
    return runs_bodies(node) and not any(map(_writes_to_inputs, nested_graphs(gm, node)))


def mutated_args(gm: GraphModule, node: Node) -> list[Any]:
    """List the arguments that this node may write to, after inspecting the nested graphs that it runs."""
    return [] if only_reads(gm, node) else maybe_mutated_args(node)


def all_mutated(gm: GraphModule) -> list[Any]:
    """List what any node of a graph may write to."""
    return [target for node in gm.graph.nodes for target in mutated_args(gm, node)]


def _writes_to_inputs(body: GraphModule) -> bool:
    inputs = [node for node in body.graph.find_nodes(op="placeholder") if node.users]  # Dynamo fills in unused ones
    return any(may_alias(target, placeholder) for target in all_mutated(body) for placeholder in inputs)


def may_use_rng(node: Node) -> bool:
    """Tell whether this node may advance the RNG state, whose order a rewrite has to keep."""
    return operators.is_higher_order(node.target) or _RANDOM.search(name_of(node.target)) is not None


def switches_mode(node: Node) -> bool:
    """Tell whether this node switches grad, inference or autocast mode for the nodes after it."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _MODE_SWITCHES


def switched(nodes: Iterable[Node]) -> frozenset[Node]:
    """Return those of consecutive nodes after which another grad, inference or autocast mode is on than at first."""
    found: list[Node] = []
    depth, grad = 0, torch.is_grad_enabled()
    for node in nodes:
        name = name_of(node.target)
        if name == "_set_grad_enabled":
            grad = bool(node.args[0])
        elif switches_mode(node):
            depth += 1 if "enter" in name else -1
        if depth or grad != torch.is_grad_enabled():
            found.append(node)
    return frozenset(found)


def is_pure(node: Node) -> bool:
    """Tell whether this node only computes: made elsewhere, once more or not at all, it changes nothing else."""
    return not (maybe_mutated_args(node) or may_use_rng(node) or switches_mode(node))


def opens_transform(target: Any) -> bool:
    """Tell whether a torch.func transform, or forward-mode AD, begins with a call of this function."""
    return _OPENS.search(getattr(target, "__name__", "")) is not None


def closes_transform(target: Any) -> bool:
    """Tell whether a torch.func transform, or forward-mode AD, ends with a call of this function."""
    return _CLOSES.search(getattr(target, "__name__", "")) is not None


def may_alias(left: Any, right: Any) -> bool:
    """Tell whether a write to one value may change the other: they share storage, or one has no example value."""
    left, right = value_of(left), value_of(right)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return left is None or right is None
    return fake_tensors.storage_key(left) == fake_tensors.storage_key(right)
