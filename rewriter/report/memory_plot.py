"""A picture of a step's memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastft.units import GIB

_COLOURS = ("#bbbbbb", "#8c8c8c", "#ddcc77", "#66ccee", "#4477aa", "#228833", "#ee6677", "#aa3377")


def draw(
    moments: Sequence[tuple[str, Mapping[str, int]]],
    limits: Mapping[str, int | None],
    title: str,
    target: str | Path | io.BytesIO,
    form: str,
) -> None:
    """Draw bytes over the moments of a step, stacked by what holds them.  Needs matplotlib.

    moments: a label, and bytes by what holds them.  limits: lines across, by name; None and 0 are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    held = [parts for _, parts in moments]
    names = list(dict.fromkeys(name for parts in held for name in parts))
    shown = [name for name in names if any(parts.get(name, 0) for parts in held)]
    at = [place + shift for place in range(len(moments)) for shift in (-0.5, 0.5)]
    heights = [[parts.get(name, 0) / GIB for parts in held for _ in range(2)] for name in shown]
    colours = [_COLOURS[names.index(name) % len(_COLOURS)] for name in shown]
    axis.stackplot(at, *heights, labels=shown, colors=colours, linewidth=0)
    for (label, limit), style in zip(limits.items(), ("-", "--"), strict=True):
        if limit:
            axis.axhline(limit / GIB, color="black", linestyle=style, linewidth=1, label=label)
    axis.set_ylabel("allocated, GiB")
    axis.set_xlim(-0.5, len(moments) - 0.5)
    turn = next((place for place, (label, _) in enumerate(moments) if label.startswith("backward")), None)
    axis.set_xticks(
        [] if turn is None else [turn / 2, turn + turn / 2], [] if turn is None else ["forward", "backward"]
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(target, format=form, dpi=130)
