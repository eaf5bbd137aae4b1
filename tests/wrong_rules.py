"""Rules that are made wrong on purpose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastft import patterns


@contextmanager
def wrong(name: str, change: Callable[[Tensor], Tensor] = lambda tensor: 1.05 * tensor) -> Iterator[None]:
    """Make a rule's replacement compute something else."""
    rights = {rule: rule.replacement for rule in patterns.RULES if rule.name == name}
    assert rights
    for rule, right in rights.items():

        def replacement(*args: Any, right: Any = right, **named: Any) -> Any:
            results = right(*args, **named)
            return tuple(map(change, results)) if isinstance(results, tuple) else change(results)

        object.__setattr__(rule, "replacement", replacement)
    try:
        yield
    finally:
        for rule, right in rights.items():
            object.__setattr__(rule, "replacement", right)
