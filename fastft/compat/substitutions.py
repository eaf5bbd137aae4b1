"""Functions of libraries that Dynamo cannot trace, and what is traced in their place where fastft compiles.

A substitute returns what the original returns, for all that it is called with here, and raises where it does not know.
It is traced alone: eager code, and what other backends compile, call the original.
``torch.compiler.substitute_in_graph`` does the same for a whole process, for plain functions.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._dynamo.variables.functions import UserFunctionVariable, UserMethodVariable

from fastft.compat.dynamo import put_around


@dataclass(frozen=True)
class Substitution:
    """A function of a library, and the one that is traced in its place.

    original: its module and qualified name, as ``peft.utils.integrations:dequantize_module_weight``.
    package: the distribution that has it, whose versions from ``since`` on and before ``until`` were looked at.
    reason: what Dynamo cannot trace in it.
    substitute: a function of the same arguments; of a method, the object is the first.
    """

    original: str
    package: str
    since: str
    until: str
    reason: str
    substitute: Callable

    def applies(self) -> bool:
        """Tell whether the installed package is of a version that was looked at."""
        try:
            found = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return False
        return _numbers(self.since) <= _numbers(found) < _numbers(self.until)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def dequantize_module_weight(module: Any) -> Any:
    """Return the weight of a layer that holds it as floating-point numbers."""
    weight = module.weight
    if not weight.is_floating_point() or hasattr(module, "W_q"):
        raise NotImplementedError("the weight is quantized")
    return weight


def linear_8bit(module: Any, x: Any) -> Any:
    """Multiply by a weight in 8 bits, and leave out that the parameter is set to the memory that it has already."""
    from bitsandbytes import matmul

    module.state.is_training = module.training
    if module.weight.CB is not None:
        module.init_8bit_state()
    if module.state.has_fp16_weights or (module.bias is not None and module.bias.dtype != x.dtype):
        raise NotImplementedError("the layer changes its parameters")
    return matmul(x, module.weight, bias=module.bias, state=module.state)


SUBSTITUTIONS: tuple[Substitution, ...] = (
    Substitution(
        "peft.utils.integrations:dequantize_module_weight", "peft", "0.17", "0.22",
        "it asks for the name of the module that the weight's class is defined in",
        dequantize_module_weight,
    ),
    Substitution(
        "bitsandbytes.nn.modules:Linear8bitLt.forward", "bitsandbytes", "0.49", "0.51",
        "it sets its parameter to the memory that it has, which is a write to an input of the graph",
        linear_8bit,
    ),
)  # fmt: skip


def install(is_ours: Callable[[], bool], substitutions: tuple[Substitution, ...] = SUBSTITUTIONS) -> None:
    """Trace the substitutes in compilations during which ``is_ours`` is true; leave all others alone."""
    known = {one.original: one for one in substitutions}
    applies = functools.cache(Substitution.applies)

    def call_function(original: Callable, self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        function = self.fn
        found = known.get(f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}")
        if found is None or not applies(found) or not is_ours():
            return original(self, tx, args, kwargs)
        return UserFunctionVariable(found.substitute).call_function(tx, [*self.self_args(), *args], kwargs)

    put_around(UserFunctionVariable, "call_function", call_function)
    put_around(UserMethodVariable, "call_function", call_function)
