"""A function recorded as a graph in milliseconds, as Dynamo would give it, factories of tensors included."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import FakeTensorMode, value_of

_OPERATORS = {
    Tensor.__getitem__: operator.getitem, Tensor.__setitem__: operator.setitem, Tensor.__invert__: operator.invert,
    Tensor.__and__: operator.and_, Tensor.__or__: operator.or_, Tensor.__xor__: operator.xor,
    Tensor.__iand__: operator.iand, Tensor.__ior__: operator.ior,
}  # fmt: skip


class Recording(TorchFunctionMode):
    """Runs calls of tensors, and writes down those that give one or change one; values: what each node gave.

    A tensor that it has not met is one more input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode()
        self.graph, self.inputs, self.values = Graph(), list[Tensor](), dict[Node, Tensor]()
        self._nodes: dict[int, Node] = {}
        self._alive: list[Any] = []  # whose ids are in _nodes

    def node(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            last = [*self.graph.find_nodes(op="placeholder")][-1:]
            with self.graph.inserting_after(last[0]) if last else self.graph.inserting_before():
                self._know(value, self.graph.placeholder(f"given_{len(self.inputs)}"), self.fakes.from_tensor(value))
            self.inputs.append(value)
        return self._nodes[id(value)]

    def _know(self, value: Any, node: Node, fake: Any) -> None:
        self._alive.append(value)
        self._nodes[id(value)] = node
        fake_tensors.set_value(node, fake)
        if isinstance(value, Tensor):
            self.values[node] = value.detach().clone()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not fake_tensors.tensors_in(result) and func is not Tensor.__setitem__:
            return result
        given, named = pytree.tree_map(self.node, (tuple(args), dict(kwargs or {})))
        fakes, fakes_named = torch.fx.map_arg((given, named), value_of)
        with self.fakes:
            fake = func(*fakes, **fakes_named)
        self._know(result, self._call(func, given, named), fake)
        if isinstance(result, (tuple, list)):
            for at, one in enumerate(result):
                self._know(one, self.graph.call_function(operator.getitem, (self._nodes[id(result)], at)), fake[at])
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Node:
        if func in _OPERATORS:
            return self.graph.call_function(_OPERATORS[func], args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self.graph.call_function(getattr, (args[0], func.__self__.__name__))
        if (resolve_name(func) or "").startswith("torch.Tensor."):
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)


def record(function: Callable, *values: Any) -> tuple[GraphModule, Recording]:
    """The graph of a function at these values, tensors and what holds them, and what it was recorded by."""
    recording = Recording()
    given = pytree.tree_map(lambda one: _copied(one) if isinstance(one, Tensor) else one, values)
    for tensor in pytree.tree_leaves(given):
        recording.node(tensor)
    originals = [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
    with recording:
        returned = function(*given)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    recording.graph.output(tuple(recording.node(one) for one in outputs))
    recording.inputs[: len(originals)] = originals
    return GraphModule(torch.nn.Module(), recording.graph), recording


def _copied(value: Tensor) -> Tensor:
    """The same as an input of its own, which a function may write to."""
    return value.detach().clone().requires_grad_(value.requires_grad)
