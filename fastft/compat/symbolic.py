"""Symbolic sizes: reading them, their hints, and expressions of them that outlive a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_symbols, statically_known_true

from fastft.compat.fake_tensors import value_of

__all__ = ["statically_known_true"]  # what is only passed on


Sizes = dict[Any, int]  # the symbols of a graph's sizes, and what they are


def expression(size: Any) -> Any:
    """Convert a size to what outlives its graph: a number, or an expression of symbols."""
    return size.node.expr if is_symbolic(size) else int(size)


def evaluate(expression: Any, sizes: dict[Any, int]) -> int:
    """Evaluate an expression, given the values of its symbols."""
    return expression if isinstance(expression, int) else int(expression.xreplace(sizes))


def hints_in(env: Any) -> dict[Any, Any]:
    """Return all symbols of a ShapeEnv, with their values in the example."""
    return env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # torch 2.11


def hints_of(value: Tensor) -> dict[Any, int]:
    """Return the symbols in a tensor's shape and strides, with their values in the example."""
    hints: dict[Any, int] = {}
    for size in (*value.shape, *value.stride()):
        if isinstance(size, torch.SymInt):
            known = hints_in(size.node.shape_env)
            hints |= {symbol: int(known[symbol]) for symbol in size.node.expr.free_symbols if symbol in known}
    return hints


def is_zero(size: Any) -> bool:
    """Return whether a size is the number 0; False for a symbol."""
    return isinstance(size, int) and size == 0


def is_symbolic(value: Any) -> bool:
    """Return whether a value is a number that is computed from symbols, of any type."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def is_one(expression: Any) -> bool:
    """Return whether an expression of sizes is one symbol by itself."""
    return getattr(expression, "is_Symbol", False)


def hint(size: Any) -> int:
    """Return a size's value in the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def number(value: Any) -> Any:
    """Return a size, or a number that Dynamo made an input of, as it is in the example."""
    return float(value.node.hint) if isinstance(value, torch.SymFloat) else hint(value)


def size_inputs(graph: Graph) -> dict[Any, Node]:
    """Map each symbol in the graph's shapes to the input that holds its value."""
    inputs = [(node, value_of(node)) for node in graph.find_nodes(op="placeholder")]
    return {value.node.expr: node for node, value in inputs if isinstance(value, torch.SymInt)}


def new_size(like: torch.SymInt, name: str, example: int) -> torch.SymInt:
    """Return a number of which nothing but the example is known, as a symbol beside those of ``like``."""
    value, _ = new_symbol(like.node.shape_env, name, example)
    assert isinstance(value, torch.SymInt)
    return value


def new_symbol(env: ShapeEnv, name: str, example: int) -> tuple[torch.SymInt | int, Any]:
    """Return a size of its own, and the symbol that it is, or the number where the example is below 2."""
    if example < 0:  # of which torch has no symbols
        return example, example
    source = ConstantSource(name)
    symbol = env.create_symbol(example, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=example, source=source), symbol


class LaterGuards:
    """What is assumed of sizes from now on, by lowering: compiled code is for sizes for which it holds.

    Dynamo asks it of its own inputs alone.
    """

    def __init__(self, like: torch.SymInt) -> None:
        self.env = like.node.shape_env
        self.begin = len(self.env.guards)
        self.asked: dict[Any, tuple[int, bool]] = {}  # by sizes: of how many guards, and the answer

    def hold(self, sizes: Sizes) -> bool:
        """Return whether all hold for these sizes."""
        key, guards = tuple(sizes.values()), self.env.guards
        count, answer = self.asked.get(key, (self.begin, True))
        if count < len(guards):  # backward is compiled late
            answer = answer and all(guard.expr.xreplace(sizes) != False for guard in guards[count:])  # noqa: E712
            self.asked[key] = len(guards), answer
        return answer


def made_equal(left: Any, right: Any) -> bool:
    """Return whether two sizes are equal in the example; if so, what is compiled is for batches where they are.

    The graph is guarded by it, and the symbol of one replaces that of the other.
    """
    return hint(left) == hint(right) and bool(left == right)


def place_of_size(graph: Graph, size: Any, besides: Node) -> tuple[Node, int] | None:
    """Return the first input of a graph but ``besides``, and an axis of it, that has this symbolic size; or None."""
    for node in graph.find_nodes(op="placeholder") if isinstance(size, torch.SymInt) else ():
        shape = value.shape if node is not besides and isinstance(value := value_of(node), Tensor) else ()
        for axis, length in enumerate(shape):
            if isinstance(length, torch.SymInt) and length.node.expr == size.node.expr:
                return node, axis
    return None


def symbols_of(value: Any) -> list[Any]:
    """List the symbols in a tensor's shape and strides, sorted by name."""
    return sorted(free_symbols(value), key=str) if type(value) is FakeTensor else []
