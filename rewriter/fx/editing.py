"""Edit a captured graph: annotate new nodes, replace nodes by constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Node, map_arg

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import value_of


def annotate_like(node: Node, like: Node) -> None:
    """Infer a new node's example value, and copy the other metadata (module stack, stack trace) from ``like``."""
    node.meta |= {key: value for key, value in like.meta.items() if key != "example_value"}
    fake_tensors.infer_example_value(node)


def infer_requires_grad(node: Node) -> None:
    """Mark the example value of a new call as requiring grad if one of its arguments does."""
    inputs = [tensor for argument in node.all_input_nodes for tensor in fake_tensors.tensors_in(value_of(argument))]
    value = value_of(node)
    if isinstance(value, Tensor) and value.is_floating_point() and any(tensor.requires_grad for tensor in inputs):
        fake_tensors.set_value(node, value.detach().requires_grad_())


def replace_by_value(node: Node, value: Any) -> None:
    """Replace every use of this node by a value that is not a node."""

    def value_for(argument: Node) -> Any:
        return value if argument is node else argument

    for user in list(node.users):
        arguments: Any = map_arg((user.args, user.kwargs), value_for)
        user.args, user.kwargs = arguments


def between(first: Node, last: Node) -> Iterator[Node]:
    """Iterate over the nodes strictly between ``first`` and ``last``, in graph order; none if they are the same."""
    node = first.next if first is not last else last
    while node is not last and node.op != "root":
        yield node
        node = node.next
