"""A rule: the PyTorch function to recognise, and its replacement."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Rule:
    """Where ``reference`` occurs in a graph, ``replacement`` is called instead.  Either may return several tensors.

    reference: a straight-line PyTorch function.  It is at once the pattern, the specification and the tests' oracle.
        Parameters annotated ``Tensor`` match any tensor, those annotated ``float``, ``int``, ``bool`` or
        ``str`` a literal.
    replacement: a function of the same parameters, made of ``torch.ops.fastft`` calls; None declines what matches.
    anchor: the rarest function of the reference; each of its calls in a graph is either matched or reported.
    shapes: a tensor parameter's dimensions, by name or number; "..." stands for any number of leading ones, and "*" for
        any that broadcast with those of other tensors.
    dtype_from: the tensor parameters whose dtype decides which calls the reference makes: it casts them, or their
        product.
    between_casts: whether these may be float32 in a graph that has other dtypes too.  If not, what is float32 between
        two casts is left to Inductor, whose one kernel casts, computes and rounds, where an op would write float32.
    same_dtype_as: tensor parameters, and that of dtype_from whose dtype they have.
    booleans: the tensor parameters that are bool.
    report_misses: whether a call of the anchor that is not part of a match is worth reporting.
    decline_if: called with the bound values, returns why the rule does not apply, or None.
    decline_reason: for a rule without replacement, the reason it gives.
    """

    reference: Callable
    replacement: Callable | None
    anchor: Callable
    shapes: Mapping[str, str]
    dtype_from: tuple[str, ...] = ()
    between_casts: bool = True
    same_dtype_as: Mapping[str, str] = field(default_factory=dict)
    booleans: tuple[str, ...] = ()
    report_misses: bool = True
    decline_if: Callable[..., str | None] = lambda **_: None
    decline_reason: str = ""

    def __post_init__(self) -> None:
        for name, parameter in inspect.signature(self.reference).parameters.items():
            kind = str(getattr(parameter.annotation, "__name__", parameter.annotation))
            if kind == "Tensor" and name not in self.shapes:
                raise ValueError(
                    f"{self.name}: {name} is a Tensor, so its dimensions belong into shapes, as '... D' say."
                )

    @property
    def name(self) -> str:
        """``file.reference``, as reports spell it: ``rms_norm.torch_rms_norm``."""
        return f"{self.reference.__module__.rpartition('.')[2]}.{self.reference.__name__}"


def table(rules: Iterable[Rule]) -> str:
    """Format the rules as a Markdown table, for README.md; those of one reference share a row."""
    lines = {"| rule | what it recognises | becomes |": None, "|---|---|---|": None}
    for rule in rules:
        function = getattr(rule.replacement, "func", rule.replacement)  # a partial's own function
        becomes = f"`{inspect.getdoc(function)}`" if function else f"left alone: {rule.decline_reason}"
        lines[f"| `{rule.name}` | {inspect.getdoc(rule.reference)} | {becomes} |"] = None
    return "\n".join(lines)


def dims(spec: str) -> tuple[bool, list[str]]:
    """Parse ``"... S D"`` into (leading dimensions allowed, names of the others)."""
    names = spec.split()
    leading = bool(names) and names[0] in ("...", "*")
    return leading, names[1:] if leading else names


def rank_fits(spec: str, rank: int) -> bool:
    """Tell whether a tensor of ``rank`` dimensions can have the shape ``spec``."""
    leading, names = dims(spec)
    return rank >= len(names) if leading else rank == len(names)


def shape_reason(shapes: Mapping[str, str], sizes: Mapping[str, Any], equal: Callable[[Any, Any], bool]) -> str | None:
    """Return why these sizes do not fit the rule's shapes, or None.

    A dimension of one name has the same size everywhere.
    """
    known: dict[str, tuple[str, Any]] = {}
    for parameter, spec in shapes.items():
        _, names = dims(spec)
        size = tuple(sizes[parameter])
        if not rank_fits(spec, len(size)):
            return f"{parameter} has {len(size)} dimensions and not '{spec}'"
        for name, length in zip(names, size[len(size) - len(names) :], strict=True):
            fixed = ("the op", int(name)) if name.isdigit() else (parameter, length)
            other, first = known.setdefault(name, fixed)
            if not equal(first, length):
                return f"{parameter} has size {length} in dimension {name} and {other} has {first}"
    return None
