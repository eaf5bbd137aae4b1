"""Trace something else in the place of functions of libraries that Dynamo cannot trace, where fastft compiles.

A substitute returns what the original returns, and calls the original where it does not know what that is.  It is
traced alone: eager code, and what other backends compile, call the original.
``torch.compiler.substitute_in_graph`` does the same for a whole process, for plain functions.
"""

from __future__ import annotations

import collections
import functools
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch._dynamo.variables.functions import UserFunctionVariable, UserMethodVariable
from torch._dynamo.variables.misc import AutogradFunctionVariable

from fastft.compat.dynamo import RestartAnalysis, put_around


@dataclass(frozen=True)
class Substitution:
    """A function of a library, and the one that is traced in its place.

    original: its module and qualified name, as ``peft.utils.integrations:dequantize_module_weight``; of an
        autograd.Function that of the class, whose ``apply`` it is then.
    package: the distribution that has it, whose versions from ``since`` on and before ``until`` were looked at.
    reason: what Dynamo cannot trace in it.
    substitute: a function of the same arguments; of a method, the object is the first.  One whose first argument is
        named ``original`` is given the original too, to leave to it what the substitute is not made for.
    at_once: the substitute is not traced, but called with the objects themselves; if it returns that it changed them,
        Dynamo begins again, and then traces the original.  For what changes modules in their first call.
    rule: the name by which it is switched off, if it can be.  Of several substitutes of one function the first is
        traced that is on.
    caller: the name of the only function in which calls are replaced, if it is not in all.
    """

    original: str
    package: str
    since: str
    until: str
    reason: str
    substitute: Callable
    at_once: bool = False
    rule: str = ""
    caller: str = ""

    def applies(self) -> bool:
        """Tell whether the installed package is of a version that was looked at."""
        try:
            found = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return False
        return _numbers(self.since) <= _numbers(found) < _numbers(self.until)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


class _Original(UserFunctionVariable):
    """A function that a substitute calls, and that is therefore not replaced."""


class _OriginalFunction(AutogradFunctionVariable):
    """An autograd.Function that a substitute applies, and that is therefore not replaced."""


def install(
    is_ours: Callable[[], bool], substitutions: Iterable[Substitution],
    is_on: Callable[[str, Any], bool] = lambda rule, tx: True,
) -> None:  # fmt: skip
    """Trace the substitutes in compilations during which ``is_ours`` is true; leave all others alone.

    is_on: tells of a rule's name, and of Dynamo's translator, whether the rule may be applied in what is traced now.
    """
    known = collections.defaultdict(list)
    for one in substitutions:
        known[one.original].append(one)
    applies = functools.cache(Substitution.applies)

    def chosen(function: Any, tx: Any) -> Substitution | None:
        name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
        candidates = [one for one in known.get(name, ()) if applies(one)]
        if not candidates or hasattr(function, "__wrapped__") or not is_ours():  # what decorators do, they still do
            return None
        called = [one for one in candidates if one.caller in ("", tx.f_code.co_name)]
        return next((one for one in called if not one.rule or is_on(one.rule, tx)), None)

    def traced(found: Substitution, untouched: Any, tx: Any, given: list[Any], kwargs: Any) -> Any:
        substitute: Any = found.substitute
        if next(iter(inspect.signature(substitute).parameters)) == "original":
            given = [untouched, *given]
        return UserFunctionVariable(substitute).call_function(tx, given, kwargs)

    def call_function(original: Callable, self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        found = None if isinstance(self, _Original) else chosen(function := self.fn, tx)
        if found is None:
            return original(self, tx, args, kwargs)
        if found.at_once:
            if found.substitute(function, *(argument.value for argument in args)):
                raise RestartAnalysis(restart_reason=f"{found.original} was called")
            return original(self, tx, args, kwargs)
        return traced(found, _Original(function), tx, [*self.self_args(), *args], kwargs)

    def call_apply(original: Callable, self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        found = None if isinstance(self, _OriginalFunction) else chosen(self.fn_cls, tx)
        if found is None:
            return original(self, tx, args, kwargs)
        return traced(found, _OriginalFunction(self.fn_cls, source=self.source), tx, list(args), kwargs)

    put_around(UserFunctionVariable, "call_function", call_function)
    put_around(UserMethodVariable, "call_function", call_function)
    put_around(AutogradFunctionVariable, "call_apply", call_apply)
