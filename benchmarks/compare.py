"""What changed between two files of rows, beyond noise?

    python benchmarks/compare.py old.json new.json             # rows of any benchmark here that writes --json
    python benchmarks/compare.py old.json new.json --fail 3%   # exit status 1 if a figure is worse by more than that
    python benchmarks/compare.py old.json new.json --changed   # only what is beyond noise

Rows are of one thing if they agree in model, batch, length, contender and all else that was asked for.  A figure that
has a spread (20th and 80th percentile) changed if its spreads do not overlap and it moved by more than 1%; any other,
if it moved by more than what such figures vary by themselves (THRESHOLDS).  A row that failed and did not before is
worse by any measure.

A ratio is only of worth between runs on one machine.  Where card or versions differ, that is said; two machines with
the same card differ as well, and no row tells of that: look at a contender that nobody changed, torch's own say.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Key = tuple[tuple[str, str], ...]
# What a row is a measurement of, in the order in which it is told.
ASKED = (
    *("model", "layers", "nf4", "dtype", "device", "mask", "loss", "lower", "seed", "batch", "length", "contender"),
    *("budget", "cap_bytes", "options", "start", "optimize_ddp", "bucket_cap_mb", "processes"),  # of steps
    *("op", "shape", "direction", "case", "heads", "head_dim", "group", "rows", "nested"),  # of kernels
    *("hidden", "tokens", "vocabulary", "ignored", "trainable", "chunk_bytes"),  # of heads
)
GIB = 2**30
# Figures by name, with what they are called, whether more is better, and what kind of noise they have.
FIGURES = {
    "tokens_per_s": ("tokens/s", True, "time"),
    "tokens_s": ("tokens/s", True, "time"),
    "us": ("µs", False, "time"),
    "ms": ("ms", False, "time"),
    "ms_forward": ("forward ms", False, "time"),
    "ms_both": ("forward, backward ms", False, "time"),
    "second_step_s": ("second step s", False, "host"),
    "host_s": ("host s", False, "host"),
    "peak_gib": ("peak GiB", False, "memory"),
    "peak_all_gib": ("peak GiB", False, "memory"),
    "peak_bytes": ("peak GiB", False, "memory"),
    "reserved_gib": ("reserved GiB", False, "memory"),
    "first_step_s": ("first step s", False, "compile"),
    "first_s": ("first step s", False, "compile"),
}
# The share that figures without a spread vary by themselves; what a host does varies most (docs/performance.md).
THRESHOLDS = {"time": 0.03, "memory": 0.01, "host": 0.25, "compile": 0.25}
LEAST = 0.01  # and what has a spread: that of steps in one process, which says nothing of the next process
WIDTH, MOST_SHOWN = 150, 12
SPREAD_OF = {"tokens_per_s": "seconds"}  # a figure that is made of others has their spread


@dataclass(frozen=True)
class Change:
    """A figure of two rows.  worse: by which share it became worse, negative for better; beyond: more than noise."""

    what: Key
    name: str
    old: float
    new: float
    worse: float
    beyond: bool


def key_of(row: Row) -> Key:
    """What a row is a measurement of."""
    found = {name: row.get(name) for name in ASKED}
    if not isinstance(found["loss"], str):  # a benchmark of heads has a loss among its results
        found["loss"] = "inside" if "mask" in row else None  # and older steps had no other
    found["device"] = str(found["device"] or "").partition(":")[0] or None
    texts = {name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
             for name, value in found.items() if value is not None and not _is_series(value)}  # fmt: skip
    return tuple(texts.items())


def _is_series(value: Any) -> bool:
    """Whether this is what was measured step by step, under a name that elsewhere is a setting."""
    return isinstance(value, list) and len(value) > 8


def by_key(rows: Sequence[Row]) -> dict[Key, Row]:
    """The rows by what they are of; what was measured again is told apart by number."""
    found: dict[Key, Row] = {}
    for row in rows:
        key, number = key_of(row), 1
        while (again := (*key, ("run", str(number))) if number > 1 else key) in found:
            number += 1
        found[again] = row
    return found


def changes(old: Row, new: Row, key: Key) -> Iterator[Change]:
    """Every figure that both rows have."""
    for name, (label, more_is_better, kind) in FIGURES.items():
        before, after = old.get(name), new.get(name)
        if not _is_figure(before) or not _is_figure(after) or (kind == "compile" and _compiled_apart(old, new)):
            continue
        ratio = after / before
        worse = 1 / ratio - 1 if more_is_better else ratio - 1
        unit = GIB if name.endswith("_bytes") else 1
        yield Change(key, label, before / unit, after / unit, worse, _is_beyond_noise(old, new, name, kind))


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _compiled_apart(old: Row, new: Row) -> bool:
    """Whether one of the two compiled beside others: first steps are not to be compared then."""
    return bool(old.get("turns")) != bool(new.get("turns"))


def _is_beyond_noise(old: Row, new: Row, name: str, kind: str) -> bool:
    moved = abs(math.log(new[name] / old[name]))
    spreads = _spread(old, name), _spread(new, name)
    if None in spreads:
        return moved > math.log1p(THRESHOLDS[kind])
    (low, high), (other_low, other_high) = spreads  # type: ignore[misc]
    return moved > math.log1p(LEAST) and (high < other_low or other_high < low)


def _spread(row: Row, name: str) -> tuple[float, float] | None:
    """The 20th and the 80th percentile of a figure, or of the times that it is made of."""
    base = SPREAD_OF.get(name, name)
    low, high = row.get(f"{base}_p20"), row.get(f"{base}_p80")
    return (low, high) if _is_figure(low) and _is_figure(high) else None


def warnings(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """What else is not the same, as far as both files tell: card, CUDA, versions, how many steps."""
    packages = sorted({name for row in (*old, *new) for name in row.get("versions") or {}} - {"fastft"})
    told = [(name, lambda row, name=name: row.get(name)) for name in ("gpu", "cuda", "steps", "warmup")]
    told += [(name, lambda row, name=name: (row.get("versions") or {}).get(name)) for name in packages]
    found = []
    for name, value_of in told:
        before, after = ({value_of(row) for row in rows} - {None} for rows in (old, new))
        if before and after and before != after:
            found.append(f"{name}: {_listed(before)}, then {_listed(after)}")
    return found


def _listed(values: set[Any]) -> str:
    return " and ".join(map(str, sorted(values)))


@dataclass(frozen=True)
class Comparison:
    """Two files: all figures of what both have; rows that only one has; what failed in one alone, with both states."""

    changes: list[Change]
    only_old: list[Key]
    only_new: list[Key]
    failed: list[tuple[Key, str, str]]

    @classmethod
    def of(cls, old: Sequence[Row], new: Sequence[Row]) -> Comparison:
        before, after = by_key(old), by_key(new)
        made = cls([], [key for key in before if key not in after], [key for key in after if key not in before], [])
        for key in (key for key in before if key in after):
            states = _state(before[key]), _state(after[key])
            if states == ("ok", "ok"):
                made.changes.extend(changes(before[key], after[key], key))
            elif states[0] != states[1]:
                made.failed.append((key, *states))
        return made

    @property
    def common(self) -> Key:
        """The settings that all rows of both files have."""
        keys = [one.what for one in self.changes] + self.only_old + self.only_new + [key for key, *_ in self.failed]
        return tuple(pair for pair in keys[0] if all(pair in key for key in keys)) if keys else ()

    def is_worse_by(self, share: float) -> bool:
        """Whether a figure is worse by more than this, and beyond noise, or a row failed that did not before."""
        newly_failed = any(before == "ok" for _, before, _ in self.failed)
        return newly_failed or any(one.beyond and one.worse > share for one in self.changes)


def _state(row: Row) -> str:
    status = row.get("status") or ("failed" if row.get("error") else "ok")
    return "ok" if status == "rough" else status  # it was measured; how far it is off is in the row


def _named(key: Key, common: Key = ()) -> str:
    return ", ".join(value if name in ("model", "contender", "op", "case") else f"{name} {value}"
                     for name, value in key if (name, value) not in common)  # fmt: skip


def table(found: Sequence[Change], common: Key) -> Table:
    """The figures, a row each; common: the settings that are left to the title."""
    out = report.columns(("what", "figure"), ("old", "new", "ratio"))
    out.add_column("")
    before: Key | None = None
    for one in found:
        style = None if not one.beyond else "red" if one.worse > 0 else "green"
        verdict = "within noise" if not one.beyond else "worse" if one.worse > 0 else "better"
        name = _named(one.what, common) if one.what != before else ""
        form = ",.0f" if one.old >= 1000 else ".4g"
        figures = format(one.old, form), format(one.new, form), f"{one.new / one.old:.3f}"
        out.add_row(name, one.name, *figures, verdict, style=style)
        before = one.what
    return out


def percent(text: str) -> float:
    """The type of a share such as 3% or 0.03."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 3% or 0.03")
    return value


def rows_of(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SystemExit(f"{path} holds no list of rows, as the benchmarks write with --json.")
    return rows


def show(found: Comparison, warned: Sequence[str], console: Console, *, only_changed: bool) -> None:
    """Print what differs besides, the table, what only one file has, and how many figures moved."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False)

    for line in warned:
        say(f"warning: not the same in both: {line}", "yellow")
    beyond = [one for one in found.changes if one.beyond]
    say(_named(found.common))
    if shown := beyond if only_changed else found.changes:
        made = table(shown, found.common)
        made.box = box.SIMPLE_HEAD if console.is_terminal else None
        console.print(made, highlight=False)
    for where, keys in (("old", found.only_old), ("new", found.only_new)):
        for key in keys[:MOST_SHOWN]:
            say(f"only in the {where} file: {_named(key, found.common)}")
        if len(keys) > MOST_SHOWN:
            say(f"... and {len(keys) - MOST_SHOWN} more")
    for key, before, after in found.failed:
        say(f"{before}, then {after}: {_named(key, found.common)}", "red" if before == "ok" else None)
    worse = sum(one.worse > 0 for one in beyond)
    say(f"{len(found.changes)} figures: {worse} worse, {len(beyond) - worse} better, the others within noise")


def main(words: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Compare, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("old", type=Path, help="a file of rows")
    parser.add_argument("new", type=Path, help="another, measured later")
    parser.add_argument("--fail", type=percent, help="exit status 1 if a figure is worse by more, and beyond noise")
    parser.add_argument("--changed", action="store_true", help="leave out what is within noise")
    options = parser.parse_args(words)
    old, new = rows_of(options.old), rows_of(options.new)
    found = Comparison.of(old, new)
    show(found, warnings(old, new), console or Console(soft_wrap=True), only_changed=options.changed)
    return int(options.fail is not None and found.is_worse_by(options.fail))


if __name__ == "__main__":
    sys.exit(main())
