"""Show Dynamo the hooks of modules without those that are for eager code alone.

Dynamo guards how many hooks a module has, whatever it is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable

from fastft.compat.dynamo import put_around

BEFORE, BEHIND = "_forward_pre_hooks", "_forward_hooks"
_HOOKS = {BEFORE, BEHIND, f"{BEFORE}_with_kwargs", f"{BEHIND}_with_kwargs", f"{BEHIND}_always_called"}
# What a module's hooks [its translator, the module, the attribute that has them, Dynamo's variable for it] are seen as.
View = Callable[[Any, Any, str, Any], Any]


def install(is_ours: Callable[[], bool], views: dict[Callable[[Any], bool], View]) -> None:
    """See the hooks of modules by ``views``, those of each for the modules of which its key is true.

    is_ours: whether the compilation that is under way is fastft's; all others are left alone.
    """

    def attribute(original: Callable, self: Any, tx: Any, name: str) -> Any:
        found = original(self, tx, name)
        if name in _HOOKS and getattr(self.value, name, None) and hasattr(found, "items"):
            for applies, view in views.items():
                if applies(self.value) and is_ours():
                    found = view(tx, self.value, name, found)
        return found

    for name in ("var_getattr", "tp_getattro_impl"):  # the second from torch 2.14 on
        if name in vars(UnspecializedNNModuleVariable):
            put_around(UnspecializedNNModuleVariable, name, attribute)


def keep(found: Any, items: dict[Any, Any]) -> Any:
    """Return Dynamo's variable for a dict of hooks with these alone."""
    found.items = items
    found.original_items = dict(items)
    return found
