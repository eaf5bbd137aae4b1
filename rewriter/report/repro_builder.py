"""Build a reproducer's graph as Dynamo had it: every node knows what it computes and where it is from."""

from __future__ import annotations

import builtins
import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from fastft.compat import fake_tensors, operators
from fastft.compat.fake_tensors import value_of
from fastft.errors import UserError
from fastft.rewriter.report.repro_inputs import Input

Build = Callable[["Builder"], None]
_DEVICES = ("cuda", "meta", "xpu", "mps", "hpu")
_INLINED = ("tag_activation_checkpoint", "wrap", "invoke_subgraph")  # compute what their graph does, of what is given
_FUNCTION = "autograd_function_apply"
_UNKNOWN: Any = object()


class Builder:
    """Builds one graph; each call is made on fake tensors, as Dynamo does.

    device: where to put everything, "" for where it was.  given: what a nested graph is called with, as far as known.
    """

    def __init__(self, mode: Any, device: str = "", given: Sequence[Any] = ()) -> None:
        self.mode, self.device, self.given = mode, device, list(given)
        self.graph, self.root = Graph(), nn.Module()
        self.inputs: list[Input | int | None] = []
        self.result: Any = None
        self._place: dict[str, Any] = {}
        self._storages: dict[int, Any] = {}
        self._bodies: dict[str, tuple[Build, int]] = {}
        self._unnoted: dict[Node, Any] = {}

    def built(self, build: Build) -> GraphModule:
        """Return the graph that a function of a builder makes."""
        build(self)
        return GraphModule(self.root, self.graph)

    def at(self, module: str, line: str) -> None:
        """Note which module made what follows, at which ``file:line``."""
        file, _, number = line.rpartition(":")
        self._place = {"nn_module_stack": {module: (module, nn.Module)}} if module else {}
        self._place |= {"stack_trace": f'  File "{file}", line {number}, in forward\n'} if line else {}

    def input(self, name: str, dtype: torch.dtype, size: Sequence[int], /, **more: Any) -> Node:
        """Add a tensor that the graph is given; see Input."""
        node = self.graph.create_node("placeholder", name, name=name)
        one = self._input(name, dtype, size, more)
        self.inputs.append(one)
        if one.static:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": one.static}
        return self._with_value(node, self._given(lambda: one.fake(self.mode)))

    def number(self, name: str, value: Any, symbol: str = "") -> Node:
        """Add a number that the graph is given, a symbol if it is named."""
        node = self.graph.create_node("placeholder", name, name=name)
        self.inputs.append(value)
        return self._with_value(
            node, self._given(lambda: self._symbol(value, symbol) if symbol and value > 1 else value)
        )

    def unknown(self, name: str) -> Node:
        """Add what a graph is given that Dynamo noted no value of, so that its nodes have none here either."""
        node = self.graph.create_node("placeholder", name, name=name)
        self.inputs.append(None)
        self._unnoted[node] = self._given(lambda: None)
        return node

    def constant(self, name: str, dtype: torch.dtype, size: Sequence[int], /, **more: Any) -> Node:
        """Add a tensor that the graph holds."""
        one = self._input(name, dtype, size, more)
        one.fill()
        self.root.register_buffer(name, one.tensor)
        return self._with_value(self.graph.create_node("get_attr", name, name=name), one.fake(self.mode))

    def body(self, name: str, build: Build, inputs: int) -> Node:
        """Add a graph that calls are given; it is built with the first of them, when it is known what it is given."""
        self._bodies[name] = build, inputs
        return self.graph.create_node("get_attr", name, name=name)

    def call(self, name: str, target: str, /, *args: Any, **kwargs: Any) -> Node:
        """Add a call of a function."""
        return self._call("call_function", name, named(target), args, kwargs)

    def method(self, name: str, target: str, /, *args: Any, **kwargs: Any) -> Node:
        """Add a call of a method."""
        return self._call("call_method", name, target, args, kwargs)

    def output(self, value: Any) -> None:
        """Say what the graph returns."""
        self.graph.output(value)
        self.result = map_arg(value, self._value)

    def named(self, target: str) -> Any:
        """Find what is given to a call and is neither a number, a string nor a tensor."""
        return named(target)

    def _given(self, make: Callable[[], Any]) -> Any:
        value = self.given.pop(0) if self.given else _UNKNOWN
        return make() if value is _UNKNOWN else value

    def _input(self, name: str, dtype: torch.dtype, size: Sequence[int], more: Mapping[str, Any]) -> Input:
        device = self.device or more.get("device", "cpu")
        return Input(name, dtype, tuple(size), **{**more, "device": device, "storages": self._storages})

    def _symbol(self, value: int, symbol: str) -> Any:
        example = torch.empty(value, dtype=torch.bool)
        return fake_tensors.as_captured(self.mode, example, symbol, (0,)).shape[0]

    def _call(self, kind: str, name: str, target: Any, args: Any, kwargs: Any) -> Node:
        args, kwargs = map_aggregate(args, self._moved), map_aggregate(kwargs, self._moved)
        node = self.graph.create_node(kind, target, args, kwargs, name=name)
        node.meta.update(self._place)
        if operators.is_higher_order(target):
            return self._with_value(node, self._nested(node))
        return self._with_value(node, self._computed(node, self._value))

    def _computed(self, node: Node, value: Callable[[Node], Any]) -> Any:
        args, kwargs = map_arg((node.args, dict(node.kwargs)), value)
        with fake_tensors.computing_in(self.mode):
            if node.op == "call_method":
                return operator.methodcaller(str(node.target), *args[1:], **kwargs)(args[0])
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _with_value(self, node: Node, value: Any) -> Node:
        if isinstance(value, torch.autocast):  # entered: Dynamo notes no value of it either
            self._unnoted[node] = value
        else:
            fake_tensors.set_value(node, value)
        return node

    def _value(self, node: Node) -> Any:
        return self._unnoted[node] if node in self._unnoted else value_of(node)

    def _moved(self, value: Any) -> Any:
        """Put a device, or the name of one, where everything is to be."""
        if self.device and isinstance(value, torch.device):
            return torch.device(self.device)
        is_name = self.device and isinstance(value, str) and value.split(":")[0] in _DEVICES
        return self.device.split(":")[0] if is_name else value

    def _nested(self, node: Node) -> Any:
        """Build the graphs that a call runs, where possible on what it gives them, and compute it."""
        kind = node.target.name()  # type: ignore[union-attr]
        names = [argument.name for argument in node.all_input_nodes if argument.name in self._bodies]
        given = [
            self._value(argument) if isinstance(argument, Node) else argument for argument in node.args[len(names) :]
        ]
        known = given if kind in (*_INLINED, _FUNCTION) else []
        first = self._build_body(names[0], known) if names else None
        for name in names[1:]:  # an autograd.Function's backward: of gradients like the results, and what was saved
            self._build_body(name, _flat(first.result) if kind == _FUNCTION and first is not None else [])
        if kind in _INLINED and first is not None:
            return first.result
        return self._computed(node, lambda one: getattr(self.root, one.name) if one.name in names else self._value(one))

    def _build_body(self, name: str, given: Sequence[Any]) -> Builder | None:
        """Build a nested graph; None for one that another call has built.  given: the last are the graph's inputs."""
        if hasattr(self.root, name):
            return None
        build, inputs = self._bodies[name]
        values = [*[_UNKNOWN] * max(0, inputs - len(given)), *given[max(0, len(given) - inputs) :]]
        inner = Builder(self.mode, self.device, values)
        self.root.add_module(name, inner.built(build))
        return inner


def _flat(returned: Any) -> list[Any]:
    """List what a forward returns, then what it saves."""
    results, saved = returned
    return [*(results if isinstance(results, (tuple, list)) else [results]), *saved]


def named(target: str) -> Any:
    """Find a function, a class or an operator by its dotted name; raise UserError where there is none."""
    parts = target.split(".")
    if parts[:2] == ["torch", "ops"]:
        with suppress(ImportError):
            importlib.import_module(parts[2])  # bitsandbytes registers its operators when it is imported
        known, found = 2, cast(Any, torch.ops)
    else:
        known, found = _module_of(parts)
    try:
        return reduce(getattr, parts[known:], found)
    except AttributeError as error:
        raise UserError(f"This graph calls {target}, which is not here: install what it is from.") from error


def _module_of(parts: Sequence[str]) -> tuple[int, Any]:
    """Find the longest beginning of a dotted name that is a module: its number of parts, and the module."""
    for end in range(len(parts) - 1, 0, -1):
        with suppress(ImportError):
            return end, importlib.import_module(".".join(parts[:end]))
    return 0, builtins
