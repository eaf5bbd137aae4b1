"""Edit a captured graph: new nodes with their metadata, values in place of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Node, map_arg

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import value_of


def annotate_like(node: Node, like: Node) -> None:
    """Record what a new call computes, and that it belongs to the module and the source line of another."""
    node.meta |= {key: value for key, value in like.meta.items() if key != "example_value"}
    fake_tensors.infer_example_value(node)


def infer_requires_grad(node: Node) -> None:
    """A new call's result needs a gradient if one of its arguments does."""
    given = [one for argument in node.all_input_nodes for one in fake_tensors.tensors_in(value_of(argument))]
    value = value_of(node)
    if isinstance(value, Tensor) and value.is_floating_point() and any(one.requires_grad for one in given):
        fake_tensors.set_value(node, value.detach().requires_grad_())


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
