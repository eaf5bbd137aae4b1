"""Rows of step.py as a table and as a picture.

python benchmarks/report.py rows.json more.json --png steps.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
WIDTH = 120
COLOURS = ("#8c8c8c", "#c9a227", "#4477aa", "#228833", "#aa3377", "#66ccee", "#ee6677")


def shape_of(row: Row) -> str:
    return f"{row['batch']}x{row['length']}"


def title_of(rows: list[Row]) -> str:
    row = rows[0]
    layers = f", {row['layers']} layers" if row["layers"] else ""
    kind = "NF4 LoRA" if row["nf4"] else "LoRA"
    where = next((row.get("gpu") or row["device"] for row in rows if row.get("device")), "unknown device")
    mask = "mask {mask}".format(**row)
    if row.get("lengths"):
        shares = {row["padding"] for row in rows if "padding" in row}
        mask = "rows of {} to {} tokens".format(*row["lengths"]) + "".join(f", {s:.0%} padding" for s in sorted(shares))
    trainer = ", as a trainer" if row.get("as_trainer") else ""
    return f"{row['model']}{layers}, {kind}, {row['dtype']}{trainer}, {mask}, {where}"


def show(rows: list[Row], console: Console | None = None) -> None:
    """Print the table, then the reason of each failure."""
    present(title_of(rows), table(rows), rows, console)


def present(title: str, made: Table, rows: list[Row], console: Console | None = None) -> None:
    """Print a table and below it why rows are missing; plain where nobody watches, so that a log stays readable."""
    console = console or Console(soft_wrap=True)
    if not console.is_terminal or console.width > WIDTH:
        console = Console(file=console.file, width=WIDTH, soft_wrap=True)
    made.box = box.SIMPLE_HEAD if console.is_terminal else None
    console.print(title, highlight=False)
    console.print(made, highlight=False)
    for row in rows:
        if row["status"] != "ok":
            say(f"{row['contender']} {shape_of(row)}: {row['error']}", console)
        if row.get("occupancy_error"):
            say(f"{row['contender']} {shape_of(row)}, host and GPU time: {row['occupancy_error']}", console)


def say(text: str, console: Console) -> None:
    """One line, cut where it is too long."""
    console.print(text[: WIDTH - 1], markup=False, highlight=False)


def columns(left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table: words to the left, figures to the right."""
    out = Table(pad_edge=False, show_edge=False, collapse_padding=True)
    for name in left:
        out.add_column(name, no_wrap=True)
    for name in right:
        out.add_column(name, justify="right", no_wrap=True)
    return out


def table(rows: list[Row]) -> Table:
    names = ("s/step", "p20", "p80", "tokens/s", "ratio", "peak GiB", "ratio", "first s", "host ms", "busy %")
    out = columns(("batch", "contender"), (*names, "loss", "grad norm"))
    for shape, group in by_shape(rows).items():
        for row in group:
            cells = _cells(row, group[0]) if row["status"] == "ok" else [row["status"]]
            out.add_row(shape, row["contender"], *cells, style=None if row["status"] == "ok" else "red")
        out.add_section()
    return out


def _cells(row: Row, base: Row) -> list[str]:
    return [
        *(seconds(row[f"seconds_{p}"]) for p in ("p50", "p20", "p80")),
        f"{row['tokens_per_s']:,.0f}",
        ratio(row, base, "tokens_per_s"),
        f"{row['peak_gib']:.2f}",
        ratio(row, base, "peak_gib"),
        f"{row['first_step_s']:.1f}",
        figure(row.get("host_s"), 1e3),
        figure(row.get("gpu_busy"), 100),
        f"{row['loss_last']:.4f}",
        f"{row['grad_norm_last']:.4g}",
    ]


def figure(value: float | None, times: float = 1.0, form: str = ".0f") -> str:
    """A number, or a dash where nothing was measured: on a CPU, in older rows, after a failure."""
    return "-" if value is None else format(value * times, form)


def ratio(row: Row, base: Row, key: str) -> str:
    return f"{row[key] / base[key]:.2f}" if base.get(key) else "-"


def seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def by_shape(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(shape_of(row), []).append(row)
    return groups


def draw(rows: list[Row], path: Path) -> None:
    """Bars of tokens/s above bars of peak memory, a group per batch and length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_shape(rows)
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    width = max(6.5, 1.5 + 0.85 * len(groups) * (len(contenders) + 0.8))
    figure, axes = plt.subplots(2, 1, figsize=(width, 7), sharex=True, layout="constrained")
    panels = (("tokens_per_s", "tokens/s", "{:,.0f}"), ("peak_gib", "peak memory, GiB", "{:#.3g}"))
    for axis, (key, label, form) in zip(axes, panels, strict=True):
        _bars(axis, groups, contenders, key, form)
        axis.set_ylabel(label)
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    axes[1].set_xticks(range(len(groups)), list(groups))
    axes[1].set_xlabel("batch x length")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(contenders)), frameon=False)
    figure.suptitle(title_of(rows), fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, groups: dict[str, list[Row]], contenders: list[str], key: str, form: str) -> None:
    step = 0.85 / len(contenders)
    for i, contender in enumerate(contenders):
        colour = COLOURS[i % len(COLOURS)]
        places = [g + (i - (len(contenders) - 1) / 2) * step for g in range(len(groups))]
        found = [next((row for row in group if row["contender"] == contender), {}) for group in groups.values()]
        heights = [row.get(key) or 0.0 for row in found]
        bars = axis.bar(places, heights, step * 0.92, color=colour, label=contender)
        texts = [form.format(row[key]) if row.get(key) else row.get("status", "") for row in found]
        axis.bar_label(bars, texts, fontsize=8, padding=2)
        for text, row in zip(axis.texts[-len(found) :], found, strict=True):
            text.set_rotation(0 if row.get(key) else 90)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show rows that step.py wrote.")
    parser.add_argument("rows", type=Path, nargs="+", help="JSON files; their rows are put together")
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    rows = [row for path in arguments.rows for row in json.loads(path.read_text())]
    if len({tuple(row[key] for key in ("model", "layers", "nf4", "dtype", "mask")) for row in rows}) != 1:
        parser.error("the rows are of different models or settings; show them one by one")
    show(rows)
    if arguments.png:
        draw(rows, arguments.png)


if __name__ == "__main__":
    main()
