"""What the passes need to know of an FX graph: its nested bodies, what mutates, how to take it back."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from fastft.rewriter import compat
from fastft.rewriter.compat import value_of

# Operators whose body is an ordinary graph run in place of a call: what is equal inside is equal outside.
_BODIES = ("tag_activation_checkpoint", "autograd_function_apply", "invoke_subgraph", "wrap")
_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift setitem delitem"
_IN_PLACE_OPERATORS = frozenset(getattr(operator, name) for name in _IN_PLACE.split())
_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in _IN_PLACE.split())
_KEYWORDS = ("and_", "or_", "not_", "is_")  # functions of operator whose names would be Python's own
_RANDOM = re.compile("dropout|rand|bernoulli|multinomial|normal_|gumbel|poisson|exponential_|uniform_")
_TRANSFORM = re.compile(
    r"_(grad|vmap|jvp|func)_(increment|decrement)_nesting|_add_batch_dim|_make_dual|enter_dual_level"
)
_MODE_SWITCHES = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
)


def bodies(gm: GraphModule) -> list[GraphModule]:
    """``gm`` and every graph nested in it that may be rewritten: checkpointed regions, autograd.Functions."""
    found = {id(gm): gm}
    for node in gm.graph.nodes:
        if _runs_bodies(node):
            for body in _arguments(gm, node):
                found.update((id(inner), inner) for inner in bodies(body))
    return list(found.values())


def calls_of(gm: GraphModule, body: GraphModule) -> list[Node]:
    """The nodes that run this body: one of gm, then one of the body that it runs, and so on; none for gm itself."""
    for node in gm.graph.nodes if body is not gm else ():
        if _runs_bodies(node):
            for inner in _arguments(gm, node):
                if inner is body or (deeper := calls_of(inner, body)):
                    return [node] if inner is body else [node, *deeper]
    return []


def called(gm: GraphModule, node: Node) -> GraphModule | None:
    """The graph that a node runs in place of a call: of an autograd.Function, its forward."""
    return next(iter(_arguments(gm, node)), None) if _runs_bodies(node) else None


def _arguments(gm: GraphModule, node: Node) -> list[GraphModule]:
    """The graphs that a node is given."""
    attributes = [getattr(gm, str(one.target), None) for one in node.all_input_nodes if one.op == "get_attr"]
    return [attribute for attribute in attributes if isinstance(attribute, GraphModule)]


def size(gm: GraphModule, nodes: Iterable[Node]) -> int:
    """How many nodes these are with those of the graphs that they run."""
    return sum(1 + sum(size(body, body.graph.nodes) for body in _arguments(gm, node)) for node in nodes)


class Snapshot:
    """The graphs of ``gm`` and its bodies as they are now; ``restore`` puts them back, once."""

    def __init__(self, gm: GraphModule):
        self._saved = [(body, compat.copy_graph(body.graph)) for body in bodies(gm)]

    def restore(self) -> None:
        for body, graph in self._saved:
            body.graph = graph


def written(node: Node) -> list[Any]:
    """The arguments that this node may write to."""
    named = node.kwargs.get("out")
    out = list(named) if isinstance(named, (tuple, list)) else [] if named is None else [named]
    if node.op not in ("call_function", "call_method") or not (node.args or node.kwargs):
        return out
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if names_a_write(name) or node.target in _IN_PLACE_OPERATORS or node.kwargs.get("inplace"):
        target = node.args[0] if node.args else node.all_input_nodes
        return [*(target if isinstance(target, (tuple, list)) else [target]), *out]
    if compat.is_mutable(node.target) or compat.is_higher_order(node.target):  # its body is not looked into
        return list(node.all_input_nodes)
    return out


def names_a_write(name: str) -> bool:
    """Whether a method of this name, or a function named like one, writes to its first argument."""
    in_place = name.endswith("_") and not name.endswith("__") and name not in _KEYWORDS
    return in_place or name in _IN_PLACE_METHODS


def _runs_bodies(node: Node) -> bool:
    target: Any = node.target
    return node.op == "call_function" and compat.is_higher_order(target) and target.name() in _BODIES


def only_reads(gm: GraphModule, node: Node) -> bool:
    """Whether this node runs nested graphs, all of them known, that write to none of what they are given."""
    return _runs_bodies(node) and not any(map(_writes_to_inputs, _arguments(gm, node)))


def written_by(gm: GraphModule, node: Node) -> list[Any]:
    """The arguments that this node may write to, where it runs nested graphs as far as these write to any."""
    return [] if only_reads(gm, node) else written(node)


def _writes_to_inputs(body: GraphModule) -> bool:
    given = [node for node in body.graph.find_nodes(op="placeholder") if node.users]  # Dynamo fills in unused ones
    targets = [target for node in body.graph.nodes for target in written_by(body, node)]
    return any(may_alias(target, one) for target in targets for one in given)


def draws(node: Node) -> bool:
    """Whether this node may take random numbers, whose order is part of what a graph computes."""
    return compat.is_higher_order(node.target) or _RANDOM.search(name_of(node.target)) is not None


def switches_mode(node: Node) -> bool:
    """Whether this node turns gradients or autocast on or off for those after it."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _MODE_SWITCHES


def is_transform(target: Any) -> bool:
    """Whether a node's target begins, ends or is part of a torch.func transform or forward-mode differentiation."""
    return _TRANSFORM.search(getattr(target, "__name__", "")) is not None


def may_alias(left: Any, right: Any) -> bool:
    """Whether writing to one value may change the other; what is unknown may."""
    left, right = value_of(left), value_of(right)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return left is None or right is None
    return compat.storage_key(left) == compat.storage_key(right)


def describe_as(node: Node, like: Node) -> None:
    """Record what a new call computes, and that it belongs to the module and the source line of another."""
    node.meta |= {key: value for key, value in like.meta.items() if key != "example_value"}
    compat.propagate(node)


def mark_trained(node: Node) -> None:
    """A new call's result needs a gradient if one of its arguments does."""
    given = [one for argument in node.all_input_nodes for one in compat.tensors_in(value_of(argument))]
    value = value_of(node)
    if isinstance(value, Tensor) and value.is_floating_point() and any(one.requires_grad for one in given):
        compat.set_value(node, value.detach().requires_grad_())


def replace_by_value(node: Node, value: Any) -> None:
    """A value that is no node, in place of this one wherever it is used."""

    def value_for(one: Node) -> Any:
        return value if one is node else one

    for user in list(node.users):
        arguments: Any = map_arg((user.args, user.kwargs), value_for)
        user.args, user.kwargs = arguments


def between(first: Node, last: Node) -> Iterator[Node]:
    """The nodes strictly after ``first`` and before ``last``, in graph order; none if they are the same."""
    node = first.next if first is not last else last
    while node is not last and node.op != "root":
        yield node
        node = node.next


def name_of(target: Any) -> str:
    """An op's name for people: ``rsqrt``, ``fastft.rms_norm``."""
    if isinstance(target, str):
        return target
    if compat.is_operator(target):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", None) or str(target)


def describe(error: BaseException) -> str:
    """An error's class and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
