"""Trace something else in the place of functions of libraries that Dynamo cannot trace, where fastft compiles.

A substitute returns what the original returns, and calls the original where it does not know what that is.  It is
traced alone: eager code, and what other backends compile, call the original.
``torch.compiler.substitute_in_graph`` does the same for a whole process, for plain functions.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable, Iterable
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
    substitute: a function of the original and then of the same arguments; of a method, the object is the first.
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


def install(is_ours: Callable[[], bool], substitutions: Iterable[Substitution]) -> None:
    """Trace the substitutes in compilations during which ``is_ours`` is true; leave all others alone."""
    known = {one.original: one for one in substitutions}
    applies = functools.cache(Substitution.applies)

    def call_function(original: Callable, self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        function = self.fn
        found = known.get(f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}")
        if found is None or _calls_original(tx, found) or not applies(found) or not is_ours():
            return original(self, tx, args, kwargs)
        arguments = [UserFunctionVariable(function), *self.self_args(), *args]
        substitute: Any = found.substitute
        return UserFunctionVariable(substitute).call_function(tx, arguments, kwargs)

    put_around(UserFunctionVariable, "call_function", call_function)
    put_around(UserMethodVariable, "call_function", call_function)


def _calls_original(tx: Any, substitution: Substitution) -> bool:
    """Tell whether it is the substitute that makes the call which is traced now."""
    return getattr(tx, "f_code", None) is getattr(substitution.substitute, "__code__", substitution)
