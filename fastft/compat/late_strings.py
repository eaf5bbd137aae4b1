"""Strings that tell sizes, put together when they are read.

An f-string with a size makes Dynamo take the size for a constant, and compile again for every other.  Most such strings
are messages of errors that never happen.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from typing import Any

from torch._dynamo.symbolic_convert import InstructionTranslator, InstructionTranslatorBase
from torch._dynamo.variables.lazy import LazyCache, LazySymNodeFormatString, LazyVariableTracker

from fastft.compat.dynamo import put_around


class _LateString(LazyCache):
    """An f-string of which a part is a size, before Dynamo has put it together."""

    def __init__(self, size: LazySymNodeFormatString, build: Callable[[Any], None], parts: list[Any]) -> None:
        super().__init__(size, None)
        self.build, self.parts = build, parts

    def realize(self) -> None:
        """Put the string together as Dynamo would have done at once."""
        tx = InstructionTranslator.current_tx()
        for part in self.parts:
            tx.push(part)
        self.build(tx)
        self.vt = tx.pop()


def install(is_ours: Callable[[], bool]) -> None:
    """Put strings together late in compilations during which ``is_ours`` is true; leave all others alone."""

    def build_string(original: Callable, self: Any, inst: Any) -> None:
        parts = self.stack[len(self.stack) - inst.arg :]
        size = next((value for value in map(_waiting, parts) if value is not None), None)
        if size is None or not is_ours():
            return original(self, inst)
        self.popn(inst.arg)
        self.push(LazyVariableTracker(_LateString(size, lambda tx: original(tx, inst), parts), source=None))
        return None

    put_around(InstructionTranslatorBase, "BUILD_STRING", build_string)
    for translator in _subclasses(InstructionTranslatorBase):  # each has looked it up
        translator.dispatch_table[dis.opmap["BUILD_STRING"]] = translator.BUILD_STRING


def _subclasses(of: type[InstructionTranslatorBase]) -> Iterator[type[InstructionTranslatorBase]]:
    """Yield a class and all that are derived from it."""
    yield of
    for subclass in of.__subclasses__():
        yield from _subclasses(subclass)


def _waiting(part: Any) -> LazySymNodeFormatString | None:
    """Return the size that a part of a string tells, if Dynamo has not yet looked at it."""
    waits = type(part) is LazyVariableTracker and not part.is_realized()
    value = part.original_value() if waits else None
    return value if isinstance(value, LazySymNodeFormatString) else None
