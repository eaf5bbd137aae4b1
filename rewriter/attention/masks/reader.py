"""Read one element of a node as a term of its indices, going backwards through the graph from an attention mask.

value(node, index) goes through broadcasting, indexing and pointwise calls to what they read.  A bool is a condition, an
int32 or int64 a Sum; of other dtypes Cases are known, numbers under conditions, and of anything else the variables that
it Depends on.  An unknown call is data: its elements are leaves.  pointwise.py and indexing.py have the handlers that
read calls.
"""

from __future__ import annotations

import builtins
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import Signature, signature
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fastft.compat import symbolic
from fastft.compat.fake_tensors import value_of
from fastft.reasons import Declined
from fastft.rewriter.attention.masks.substitution import substitute
from fastft.rewriter.attention.masks.terms import (
    MOST_CHOICES,
    Condition,
    Indicator,
    Leaf,
    Size,
    Sum,
    Var,
    atom,
    atoms,
    bounds,
    every,
    indicator,
    negate,
    some,
    truth,
    variables,
    whole,
    zero,
)
from fastft.rewriter.attention.masks.terms import cases as cases_of
from fastft.rewriter.capture.normalize import NUMPY_NAMES
from fastft.rewriter.fx.metadata import name_of, source_line

MOST_NUMBERS = 8  # that an element of a non-integer dtype may be, at the most
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Cases:
    """Numbers of a dtype, each under a condition; the conditions exclude each other and one always holds."""

    numbers: tuple[tuple[float | int, Condition], ...]


@dataclass(frozen=True)
class Depends:
    """An unknown value that these index variables determine."""

    names: frozenset[str]


Value = Union[Condition, Sum, Cases, Depends]  # noqa: UP007
Index = tuple[Sum, ...]
Handler = Callable[..., Value]
_KNOWN: dict[str, tuple[Signature, Handler]] = {}
_OPERATORS = {
    "and_": "bitwise_and", "or_": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not", "inv": "bitwise_not",
    "truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "iand": "bitwise_and", "ior": "bitwise_or",
    "ixor": "bitwise_xor", "iadd": "add", "isub": "sub", "imul": "mul", "and": "bitwise_and", "or": "bitwise_or",
    "invert__": "bitwise_not", "absolute": "abs", "negative": "neg", "multiply": "mul", "subtract": "sub",
    "divide": "div", "true_divide": "div", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge",
    "not_equal": "ne", "permute_dims": "permute", "swapaxes": "transpose", "swapdims": "transpose",
}  # fmt: skip
_HOMES = (torch, operator, F, builtins)


def reads(*names: str, form: Callable) -> Callable[[Handler], Handler]:
    """Register handler(reader, node, index, arguments...) for calls of these names, with arguments as in ``form``."""

    def register(handler: Handler) -> Handler:
        _KNOWN.update((name, (signature(form), handler)) for name in names)
        return handler

    return register


def call_name(node: Node) -> str:
    """Return one name for function, method and operator, in place or not; "" for an ambiguous or unknown one."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if not any(getattr(home, name, None) is node.target for home in _HOMES):
            return ""
    else:
        return ""
    if node.op == "call_method" and name.startswith("__") and name.endswith("__"):
        name = {"__radd__": "add", "__rmul__": "mul", "__rand__": "and", "__ror__": "or"}.get(name, name.strip("_"))
    elif name.endswith("_") and name not in _OPERATORS:
        name = name[:-1]
    return _OPERATORS.get(name, name)


def dtype_of(argument: Any) -> torch.dtype | None:
    """Return a tensor's dtype, None for a number."""
    value = value_of(argument)
    return value.dtype if isinstance(value, Tensor) else None


def steady(condition: bool | torch.SymBool) -> bool:
    """Tell whether a condition on sizes is statically known to be true."""
    return symbolic.statically_known_true(condition)


def size_of(length: Any) -> Sum:
    """Return a size, or another integer of the graph, as a term.  Raises Declined.

    length: a number, a SymInt, or a node that computes one.
    """
    value = value_of(length)
    if isinstance(value, int) and not isinstance(value, bool):
        return whole(value)
    if not isinstance(value, torch.SymInt):
        raise Declined(f"{length} is not a size")
    spelling = str(value)
    if spelling.lstrip("-").isdigit():
        return whole(int(spelling))
    return atom(Size(spelling, 0 if steady(value >= 0) else None))


class Reader:
    """Reads nodes of one graph.

    visited: the nodes it read; strange: the calls it did not know; made: nodes that were added to the graph.
    """

    def __init__(self) -> None:
        self.visited: dict[Node, None] = {}
        self.strange: dict[Node, str] = {}
        self.made: list[Node] = []
        self._known: dict[tuple[Node, Index], Value] = {}

    def value(self, node: Node, index: Sequence[Sum]) -> Value:
        """Return the element of a node at this index.  Raises Declined."""
        tensor = value_of(node)
        if not isinstance(tensor, Tensor) or tensor.dim() != len(index):
            raise Declined(f"{node} is not a tensor of {len(index)} axes")
        reduced = tuple(
            whole(0) if steady(size == 1) else position for size, position in zip(tensor.shape, index, strict=True)
        )
        if (node, reduced) not in self._known:
            self.visited[node] = None
            self._known[node, reduced] = self._read(node, reduced)
        return self._known[node, reduced]

    def _read(self, node: Node, index: Index) -> Value:
        known = _KNOWN.get(call_name(node))
        if known is None:
            if node.op in ("call_function", "call_method"):
                self.strange[node] = name_of(node.target)
            return self.data(node, index)
        form, handler = known
        named = {NUMPY_NAMES.get(name, name): argument for name, argument in node.kwargs.items()}
        try:
            bound = form.bind(*node.args, **named)
        except TypeError:
            self.strange[node] = name_of(node.target)
            return self.data(node, index)
        bound.apply_defaults()
        return handler(self, node, index, *bound.args, **bound.kwargs)

    def unknown(self, node: Node) -> str | None:
        """Return the first unknown call that a node is computed from, with its source line, or None."""
        pending, met = [node], {node}
        while pending:
            current = pending.pop()
            if current in self.strange:
                line = source_line(current)
                return f"unknown: {self.strange[current]}" + (f" ({line})" if line else "")
            pending += [source for source in current.all_input_nodes if source not in met]
            met.update(current.all_input_nodes)
        return None

    def data(self, node: Node, index: Index, names: Iterable[str] | None = None) -> Value:
        """Return an element as a leaf that depends on its index, or only on these of its variables."""
        if names is not None:
            fixed = {var: whole(0) for var in atoms(*index) if isinstance(var, Var) and var.name not in names}
            index = tuple(substitute(term, fixed) for term in index)
        leaf, dtype = Leaf(node, index), value_of(node).dtype
        if dtype == torch.bool:
            return truth(leaf)
        return atom(leaf) if dtype in INTEGERS else Depends(frozenset(variables(*index)))

    def operand(self, argument: Any, node: Node, index: Index) -> Value:
        """Return the element of an argument that a pointwise call reads for this element, after broadcasting."""
        value = value_of(argument)
        if not isinstance(value, Tensor):
            return literal(argument)
        shape = value_of(node).shape
        if value.dim() > len(shape):
            raise Declined(f"{name_of(node.target)} reads more axes than it has")
        start = len(shape) - value.dim()
        for size, mine in zip(value.shape, shape[start:], strict=True):
            if not steady(size == 1) and not steady(size == mine):
                raise Declined(f"{name_of(node.target)} of sizes {size} and {mine}")
        return self.value(argument, index[start:])

    def opaque(self, node: Node, index: Index, *values: Value) -> Value:
        """Return an element of a pointwise call that is not understood: a leaf that depends on these values alone."""
        return self.data(node, index, set().union(*map(depends, values)))


def depends(value: Value) -> set[str]:
    """Return the names of the variables that determine a value."""
    if isinstance(value, Depends):
        return set(value.names)
    return variables(*(condition for _, condition in value.numbers)) if isinstance(value, Cases) else variables(value)


def literal(argument: Any) -> Value:
    """Return a Python number, or a node that computes a size, as a value.  Raises Declined."""
    value = value_of(argument)
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return Cases(((value, True),))
    if isinstance(value, (int, torch.SymInt)):
        return size_of(argument)
    raise Declined(f"the number {argument} is not known")


def as_condition(value: Value) -> Condition | None:
    """Return the condition that a value is not 0, or None if it is unknown."""
    if isinstance(value, Sum):
        return negate(zero(value))
    if isinstance(value, Cases):
        return some(condition for number, condition in value.numbers if number != 0)
    return None if isinstance(value, Depends) else value


def are_exact(cases: Cases) -> bool:
    """Tell whether these are integers that compare in the same way as floats.

    torch compares integers with a Python float in its default dtype: below this limit all integers, and the next after
    each, are representable in it, so that only these integers themselves are rounded to them.
    """
    limit = 2 / torch.finfo(torch.get_default_dtype()).eps
    return all(float(number).is_integer() and abs(number) < limit for number, _ in cases.numbers)


def as_sum(value: Value) -> Sum | None:
    """Return a value as an integer term, or None if it is none or unknown."""
    if isinstance(value, Cases):
        if not are_exact(value):
            return None
        *others, (last, _) = value.numbers  # one condition holds: the last number is what the others leave
        return sum_of((indicator(condition) * int(number - last) for number, condition in others), int(last))
    if isinstance(value, Depends):
        return None
    return value if isinstance(value, Sum) else indicator(value)


def sum_of(terms: Iterable[Sum], constant: int = 0) -> Sum:
    """Return the sum of terms and a constant."""
    result = whole(constant)
    for term in terms:
        result = result + term
    return result


def as_cases(value: Value, dtype: torch.dtype) -> Cases | None:
    """Return the numbers that a value may be once cast to dtype, or None if they are many or unknown."""
    if isinstance(value, Depends):
        return None
    if isinstance(value, Sum):
        if len(value.parts) > MOST_CHOICES or not all(isinstance(atom_, Indicator) for atom_, _ in value.parts):
            return None
        pairs: list[tuple[Any, Condition]] = [(number, condition) for condition, number in cases_of(value)]
    elif isinstance(value, Cases):
        pairs = list(value.numbers)
    else:
        pairs = [(1, value), (0, negate(value))]
    return merged((scalar(number).to(dtype).item(), condition) for number, condition in pairs)


def scalar(number: float | int) -> Tensor:
    """Return a number as a float64 or int64 tensor, which represents it exactly."""
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64)


def merged(pairs: Iterable[tuple[float | int, Condition]]) -> Cases | None:
    """Return each number once, under all of its conditions, or None for too many numbers; NaNs count as one."""
    by_number: dict[float | int, list[Condition]] = {}
    for number, condition in pairs:
        if condition is not False:
            by_number.setdefault(number if number == number else float("nan"), []).append(condition)
    result = [(number, some(conditions)) for number, conditions in by_number.items()]
    return Cases(tuple(result)) if len(result) <= MOST_NUMBERS else None


def combined(function: Callable[..., Any], *values: Cases) -> Cases | None:
    """Apply a function to every possible combination of numbers, or return None for too many results."""
    pairs = []
    for chosen in itertools.product(*(value.numbers for value in values)):
        condition = every(condition for _, condition in chosen)
        if condition is not False:
            pairs.append((function(*(number for number, _ in chosen)), condition))
    return merged(pairs)


def not_negative(term: Sum) -> bool:
    """Tell whether a term is known to be at least 0."""
    low, _ = bounds(term)
    return low is not None and low >= 0
