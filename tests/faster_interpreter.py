"""Takes a quarter from the time of Triton's interpreter, which patches its language whenever a kernel calls a function.

Names that are replaced already are found and left, so that nothing changes but that they are not looked for again.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any


def install() -> None:
    """Before the first kernel runs; does nothing where the interpreter is another than expected."""
    import triton.language as tl
    from triton.runtime import interpreter

    original, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if original is None or scope is None:
        return

    @cache
    def languages(fn: Callable) -> tuple[ModuleType, ...]:
        return tuple(one for one in fn.__globals__.values() if isinstance(one, ModuleType) and one in (tl, tl.core))

    def patch(fn: Callable) -> Any:
        found = languages(fn)
        return scope() if found and not any(tl.core.is_builtin(one.load) for one in found) else original(fn)

    interpreter._patch_lang = patch
