"""What a user may say in ``torch.compile(model, backend="fastft", options={...})``."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

LEAST_BUDGET = 2**20  # bytes: a smaller number was meant as something else
Lower = Literal["inductor", "eager"]


class OptionsError(ValueError):
    """An option that does not exist, or a value that it cannot take."""


@dataclass(frozen=True)
class Options:
    """Options of the backend.

    lower: ``"inductor"`` compiles the rewritten graph; ``"eager"`` runs it as it is, for debugging and quick tests.
    outline: compile each kind of layer once and call it for every layer of that kind; False compiles the graph whole.
    cuda_graphs: launch the stack of layers as one CUDA graph forward and one backward, once it has been called twice
        with the same shapes.  None does so where a layer is so small that launching it takes longer than computing.
        Backward then runs once for each forward (no retain_graph).
    memory_budget: what tensors may take on the device in a step: bytes or "14GiB"; a share of the card, 0.5 or "50%";
        ``"min"``, as little as possible; ``"max-speed"``, whatever is fastest.  None fits what is free, with a margin.
    lazy_logits: logits that a model returns are computed when they are read, and not at all if nobody does; False
        computes them in every forward.
    logits_memory: what a loss may take for logits, in bytes or as "256MiB": it is computed for so many tokens at once.
    skip_padding: run layers without the rows of a batch that nobody reads: padding, and what follows the last label.
        None does so where the graph has the labels, so that nothing else can count.  True does so too where the loss is
        taken of logits or hidden states outside the graph, as TRL's trainers do, and promises that it counts no
        padding, whose rows are zeros then.  False runs all rows.
    share_prefixes: run rows once that are the same in several sequences of a batch because these begin alike, as the
        completions of one prompt do.  Each batch is compared; without dropout, under causal masks, and where rows may
        be left out at all (skip_padding).
    disable: what to leave out, to find out whose fault something is: names of rules ("glu.silu"), of one
        application of a rule ("glu.silu@layers.3.mlp"), of passes ("pass:attention"), and of
        ops ("op:glu").  ``fastft bisect`` finds the name.
    strict: raise where fastft would otherwise warn and compile the graph as the user wrote it.
    """

    lower: Lower = "inductor"
    outline: bool = True
    cuda_graphs: bool | None = None
    memory_budget: int | float | str | None = None
    lazy_logits: bool = True
    logits_memory: int | str = "256MiB"
    skip_padding: bool | None = None
    share_prefixes: bool = False
    disable: Sequence[str] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            _check(field.name, getattr(self, field.name), hints[field.name])

    @property
    def logits_bytes(self) -> int:
        """logits_memory as a number."""
        return bytes_of("logits_memory", self.logits_memory)

    @property
    def budget(self) -> int | float | str | None:
        """memory_budget with bytes as an int and a share as a float."""
        return budget_of(self.memory_budget)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Options | None) -> Options:
        """Validate what the user passed; raises OptionsError with one sentence that says what to do."""
        if isinstance(options, Options):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise OptionsError(f"options must be a dict such as {{'strict': True}}, not {type(options).__name__}.")
        names = [field.name for field in fields(cls)]
        for name in options or {}:
            if name not in names:
                raise OptionsError(f"fastft has no option {name!r}; did you mean {nearest(str(name), names)!r}?")
        return cls(**(options or {}))


def nearest(word: str, valid: list[str]) -> str:
    """Return the valid word most like ``word``."""
    return max(valid, key=lambda candidate: difflib.SequenceMatcher(None, word, candidate).ratio())


def bytes_of(name: str, value: int | str) -> int:
    """ "256MiB" or "1.5 GB" as a number of bytes; raises OptionsError for what is none."""
    if type(value) is int and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)\s*", str(value)) if isinstance(value, str) else None
    if found is None or float(found[1]) <= 0:
        raise OptionsError(f"option {name!r} is a number of bytes such as '256MiB' or 2**28, not {value!r}.")
    unit = found[2].removesuffix("B")
    base = 1024 if unit.endswith("i") else 1000
    return int(float(found[1]) * base ** ("KMGT".index(unit[0]) + 1 if unit else 0))


def budget_of(value: Any) -> int | float | str | None:
    """Parse a memory budget: bytes as an int, a share as a float.  Raises OptionsError for anything else."""
    if value in (None, "min", "max-speed"):
        return value
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    if share is not None:
        value = float(share[1]) / 100
    if isinstance(value, float):
        if 0.0 < value <= 1.0:
            return value
    elif isinstance(value, str) or (type(value) is int and value >= LEAST_BUDGET):
        with contextlib.suppress(OptionsError):
            return bytes_of("memory_budget", value)
    raise OptionsError(
        "option 'memory_budget' is bytes such as '14GiB', a share of the card such as 0.5 or '50%', 'min' or "
        f"'max-speed', not {value!r}."
    )


def _check(name: str, value: object, hint: Any) -> None:
    if name == "logits_memory":
        bytes_of(name, value)  # type: ignore[arg-type]
        return
    if name == "memory_budget":
        budget_of(value)
        return
    if name == "disable":
        if (
            isinstance(value, str)
            or not isinstance(value, Sequence)
            or not all(isinstance(name, str) for name in value)
        ):
            raise OptionsError(f"option 'disable' is a list of names such as ['pass:attention'], not {value!r}.")
        return
    if bool in (hint, *get_args(hint)):
        if not isinstance(value, bool) and (value is not None or hint is bool):
            raise OptionsError(f"option {name!r} is True or False, not {value!r}.")
        return
    choices = get_args(hint)
    if value not in choices:
        raise OptionsError(f"option {name!r} is one of {', '.join(map(repr, choices))}, not {value!r}.")
