"""Sizes as symbols: compute with them, and write down as Python what was computed, and what was assumed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.printers import PythonPrinter

from fastft.compat import symbolic
from fastft.compat.fake_tensors import computing_in

without_modes = _disable_current_modes  # within it tensors are real, and no mode sees them


class SymbolicSizes:
    """Named sizes as symbols, in a mode of fake tensors of their own.

    A comparison of symbols has the result that it has for the example's sizes, and is noted as an assumption.  A size
    below 2 stays a number, and the others count as at least 2.
    """

    def __init__(self, example: Mapping[str, int]) -> None:
        self.env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env)
        self.values: dict[str, Any] = {}
        self.printer = _Printer()
        for name, size in example.items():
            self.values[name], symbol = symbolic.new_symbol(self.env, name, size)
            self.printer.names[str(symbol)] = name

    def computing(self) -> AbstractContextManager[None]:
        """Make new tensors fake ones, and keep their sizes symbols."""
        return computing_in(self.mode)

    def value(self, size: int | str) -> Any:
        """Return a number, or the value of an expression of the names."""
        return size if isinstance(size, int) else eval(size, {"max": torch.sym_max, "min": torch.sym_min}, self.values)

    def tensor(self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make a fake tensor in storage of its own; shape and stride: of numbers and expressions of the names."""
        with self.mode:
            return torch.empty_strided(
                [self.value(size) for size in shape], [self.value(step) for step in stride], dtype=dtype, device=device
            )

    def text(self, size: Any) -> str:
        """Write a size as Python, in terms of the names."""
        return self.printer.doprint(size.node.expr) if isinstance(size, torch.SymInt) else repr(int(size))

    def may_exceed(self, size: torch.SymInt, bound: int) -> bool:
        """Return whether a size may be larger than this bound."""
        return not bool(self.env.bound_sympy(size.node.expr).upper <= bound)

    def assumptions(self) -> list[str]:
        """Write what must hold, so that a computation with other sizes is the same, as conditions in Python."""
        of_names = [
            f"{name} >= 2" if isinstance(value, torch.SymInt) else f"{name} == {value}"
            for name, value in self.values.items()
        ]
        return list(dict.fromkeys([*of_names, *(self.printer.doprint(guard.expr) for guard in self.env.guards)]))


def divisible(size: Any, by: int) -> bool:
    """Return whether a size is sure to be a multiple of a number, whatever its symbols are."""
    if not isinstance(size, torch.SymInt):
        return int(size) % by == 0
    terms = size.node.expr.expand().as_coefficients_dict()
    return all(factor.is_integer and int(factor) % by == 0 for factor in terms.values())


def is_symbol(size: Any) -> bool:
    """Return whether a size depends on symbols."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


class _Printer(PythonPrinter):
    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}

    def _print_Symbol(self, expr: Any) -> str:  # noqa: N802
        return self.names[expr.name]
