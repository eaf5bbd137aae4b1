"""The command lines' common part: which model, how it runs, where the rows go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import checkout
from contenders import CONTENDERS
from presets import PRESETS

Row = dict[str, Any]
Shape = tuple[int, int]
Item = TypeVar("Item")
RUN_OPTIONS = ("model", "nf4", "dtype", "device", "mask", "loss", "seed", "lower")


LOSSES = {"inside": "the model's own", "outside": "of the logits it returns"}


def common(doc: str | None, losses: Mapping[str, str] = LOSSES) -> argparse.ArgumentParser:
    """A parser whose options every command has; RUN_OPTIONS go to the worker.  losses: what each --loss is."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--model", choices=tuple(PRESETS), default="llama-1b")
    add("--nf4", action="store_true", help="quantise the base's projections with bitsandbytes")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--device", help="cuda if there is one, else cpu")
    masks = ("ones", "none", "padded", "packed")
    add(
        "--mask",
        choices=masks,
        default="ones",
        help="what the batch's attention_mask is, or what is there instead of it",
    )
    said = "; ".join(f"{name}: {what}" for name, what in losses.items())
    add("--loss", choices=tuple(losses), default=next(iter(losses)), help=said)
    add("--lower", default="inductor", help="fastft's option of that name")
    add("--timeout", type=float, default=900, help="seconds for one process (default 900)")
    add("--commit", default=checkout.commit(), help="recorded in the rows (default: from git)")
    add("--json", type=Path, help="write the rows here, after each one")
    add("--rows", action="store_true", help="print each row as a line of JSON when it is done, besides the table")
    return parser


def asked(options: argparse.Namespace, *more: str) -> Row:
    """What a worker is told of the options: the common ones and those named."""
    return {key: getattr(options, key) for key in (*RUN_OPTIONS, *more)}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def shape(text: str) -> Shape:
    try:
        batch, length = (positive(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not batch x length, such as 4x2048") from None
    return batch, length


def span(text: str) -> Shape:
    try:
        low, high = (positive(part) for part in text.split("-"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not shortest-longest, such as 256-2048") from None
    if low > high:
        raise argparse.ArgumentTypeError(f"{low} is more than {high}")
    return low, high


def named(kind: str, known: Collection[str]) -> Callable[[str], str]:
    """The type of a name of this kind."""

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"no {kind} {text!r}; there are {', '.join(known)}")
        return text

    return name


contender = named("contender", CONTENDERS)


def listed(item: Callable[[str], Item]) -> Callable[[str], list[Item]]:
    """The type of a comma-separated list of ``item``."""

    def items(text: str) -> list[Item]:
        return [item(part) for part in text.split(",")]

    items.__name__ = f"list of {item.__name__}"  # argparse names it where it cannot convert
    return items
