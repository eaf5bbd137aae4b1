"""What does a memory budget cost?

fastft at each budget and other contenders take step.py's steps, each in a process of its own with empty compile caches.

    python benchmarks/budget.py --model llama-8b --nf4 --batches 2x2048,8x2048 --budgets min,9GiB,0.5,max-speed
    python benchmarks/budget.py --model llama-8b --nf4 --batches 8x2048 --budgets 7 --contenders unsloth-checkpoint
    python benchmarks/budget.py --model llama-8b --nf4 --budgets max-speed --cap 16GB --contenders liger-checkpoint
    python benchmarks/budget.py --budgets none --contenders liger,unsloth --json peers.json
    for b in min 9GiB; do python benchmarks/budget.py --budgets $b --turns /tmp/turns --json $b.json & done; wait
    python benchmarks/budget.py --show peers.json min.json 9GiB.json --png budgets.png

A budget is what the option memory_budget takes: min, max-speed, bytes (14GiB, 12GB) or a share (0.5, 50%).  A whole
number N stands for N of them: min, max-speed and, once these have run, N-2 between their peaks, each the same factor
above the last.

The peak is what tensors had allocated at most in the timed steps, those after --warmup, and what idle CUDA graphs
hold beside them; the planner's figure is beside it, and the rows have what the allocator held (reserved_gib). All are
of CUDA only. Below the table stands, for every other contender, which of fastft's points is fastest in no more
memory, and which is leanest at no less speed: only what was measured counts, nothing is interpolated. For --turns,
--mask, --loss and what a user would write see step.py.
"""

from __future__ import annotations

import argparse
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import peers
import report
import workers
from rich.table import Table

Row = dict[str, Any]
Case = tuple[arguments.Shape, str, str | None]  # batch and length, contender, budget
GIB = 2**30
ENDS = ["min", "max-speed"]
SETTINGS = ("model", "layers", "nf4", "dtype", "mask", "loss", "cap_bytes")  # what rows shown together agree in
CONTEXT_BYTES = GIB // 2  # what CUDA itself holds of a card's memory, and no allocator sees


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.common(__doc__)
    add = parser.add_argument
    shapes, contenders = arguments.listed(arguments.shape), arguments.listed(arguments.contender)
    add("--batches", type=shapes, default=[(1, 2048)], help="batch x length, as in 4x2048,1x512")
    add("--budgets", type=budgets, default=ENDS, help="comma-separated (default min,max-speed), or none")
    add("--contenders", type=contenders, default=[], help="others to compare with, comma-separated")
    add("--layers", type=arguments.positive, help="cut the model to this many layers")
    add("--steps", type=arguments.positive, default=10, help="timed steps (default 10)")
    add("--warmup", type=arguments.positive, default=3, help="steps before them, the first included (default 3)")
    add(
        "--cap", type=bytes_of, help="as on a card of, say, 12GB: the allocator gets it less 0.5 GiB for CUDA's context"
    )
    add("--turns", help="a file: of commands that name the same one, started together, each is timed alone")
    add("--show", type=Path, nargs="+", metavar="JSON", help="measure nothing; show the rows of these files together")
    add("--png", type=Path, help="draw the rows here")
    options = parser.parse_args(words)
    if not options.budgets and not options.contenders and not options.show:
        parser.error("--budgets none leaves nothing to run without --contenders")
    return options


def budgets(text: str) -> list[str]:
    found = [] if text == "none" else [part.strip() for part in text.split(",")]
    for part in found:
        if part.isdigit():
            if int(part) < 3:
                raise argparse.ArgumentTypeError(f"{part} budgets have none between min and max-speed")
        elif part not in ENDS:
            memory_budget(part)
    if sum(part.isdigit() for part in found) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} has more than one number of budgets")
    return found


def memory_budget(budget: str) -> float | str:
    """The option's value: 0.5 as a number, all else as it was written."""
    if budget in ENDS or re.fullmatch(r"(100|\d?\d(\.\d+)?)%", budget):
        return budget
    if re.fullmatch(r"\d*\.\d+", budget):
        if not 0 < float(budget) <= 1:
            raise argparse.ArgumentTypeError(f"the share {budget} is not between 0 and 1")
        return float(budget)
    bytes_of(budget)
    return budget


def bytes_of(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 14GiB or 12GB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))


def main() -> None:
    options = parse()
    if options.show:
        rows = [row for path in options.show for row in json.loads(path.read_text())]
        if len({tuple(row[key] for key in SETTINGS) for row in rows}) != 1:
            raise SystemExit("the rows are of different models or settings; show them one by one")
    else:
        rows = run(options)
    show(rows)
    if options.png:
        draw(rows, options.png)


def run(options: argparse.Namespace) -> list[Row]:
    """Rows of all that was asked for; what lies between two peaks is asked for once these are known."""
    rows = workers.run_all("budget", partial(jobs, first_cases(options)), options)
    later = [case for shape in options.batches for case in cases_between(rows, shape, options.budgets)]
    if later:
        rest = argparse.Namespace(**vars(options))
        rest.json = options.json and options.json.with_suffix(".rest.json")  # so that it does not replace the first
        rows += workers.run_all("budget", partial(jobs, later), rest)
        if options.json:
            workers.write(options.json, rows)
            rest.json.unlink()
    return rows


def first_cases(options: argparse.Namespace) -> list[Case]:
    named = [end for part in options.budgets for end in (ENDS if part.isdigit() else [part])]
    made: list[Case] = []
    for shape in options.batches:
        made += [(shape, name, None) for name in options.contenders]
        made += [(shape, "fastft", one) for one in dict.fromkeys(named)]
    return made


def cases_between(rows: list[Row], shape: arguments.Shape, asked: list[str]) -> list[Case]:
    """The rest of a whole number of budgets, at this batch and length."""
    count = next((int(part) for part in asked if part.isdigit()), 0)
    peaks = {row["budget"]: row.get("measured_gib") for row in rows if (row["batch"], row["length"]) == shape}
    low, high = (peaks.get(end) for end in ENDS)
    if not count or not low or not high or low >= high:
        return []
    ratio = (high / low) ** (1 / (count - 1))
    return [(shape, "fastft", f"{low * ratio**i:.3f}GiB") for i in range(1, count - 1)]


def jobs(cases: list[Case], options: argparse.Namespace, scratch: Path) -> list[workers.Job]:
    made = []
    for i, ((batch, length), contender, budget) in enumerate(cases):
        asked = arguments.asked(options, "layers", "steps", "warmup", "turns")
        asked |= {"contender": contender, "batch": batch, "length": length, "budget": budget, "cap_bytes": options.cap}
        asked["options"] = {} if budget is None else {"memory_budget": memory_budget(budget)}
        made.append(workers.Job(f"{label(asked)} {batch}x{length}", asked, scratch / f"caches-{i}"))
    return made


def measure(asked: Row) -> Row:
    """In a worker."""
    import torch
    from measure import device_of
    from measure import measure as measure_steps

    peers.import_first(asked["contender"])
    cuda = torch.device(device_of(asked["device"])).type == "cuda"
    if asked["cap_bytes"]:
        cap(asked["cap_bytes"])
    row = measure_steps(asked)
    plan = plan_of_last() if asked["contender"].startswith("fastft") else None
    row["planned_gib"] = None if plan is None else plan.peak_bytes / GIB
    row["measured_gib"] = with_idle_graphs(row["peak_steps_gib"], plan) if cuda else None
    row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB if cuda else None
    return row


def cap(size_bytes: int) -> None:
    """Let the allocator have what it could on a card of this size."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("--cap needs CUDA")
    total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if size_bytes > total_bytes:
        raise RuntimeError(f"--cap {size_bytes / GIB:.2f} GiB is more than this card's {total_bytes / GIB:.2f} GiB")
    torch.cuda.set_per_process_memory_fraction((size_bytes - CONTEXT_BYTES) / total_bytes)


def with_idle_graphs(peak_gib: float, plan: Any) -> float:
    """A peak as torch counts it, or fastft's own figure, which has what CUDA graphs hold while they do not run."""
    own_bytes = plan.measured_bytes or 0 if plan is not None and plan.graphed else 0
    return max(peak_gib, own_bytes / GIB)


def plan_of_last() -> Any:
    """That of the last graph that fastft compiled; None where it planned nothing."""
    import fastft

    graphs = fastft.compilations().graphs
    return getattr(graphs[-1], "plan", None) if graphs else None


def label(row: Row) -> str:
    return row["contender"] + (f" {row['budget']}" if row["budget"] else "")


def title_of(rows: list[Row]) -> str:
    return report.title_of(rows) + (f", capped at {rows[0]['cap_bytes'] / GIB:.1f} GiB" if rows[0]["cap_bytes"] else "")


def show(rows: list[Row]) -> None:
    """The table, why rows are missing, and how fastft's points compare with the other contenders."""
    report.present(title_of(rows), table(rows), [row | {"contender": label(row)} for row in rows])
    for group in report.by_shape(rows).values():
        for peer in measured(group, of_fastft=False):
            print(verdict(peer, measured(group, of_fastft=True)))


def table(rows: list[Row]) -> Table:
    names = ("tokens/s", "peak GiB", "planned", "peak/plan", "s/step", "first s", "loss", "grad norm")
    out = report.columns(("batch", "contender"), names)
    for shape, group in report.by_shape(rows).items():
        for row in sorted(group, key=lambda row: (row["budget"] is not None, row.get("measured_gib") or 0)):
            ok = row["status"] == "ok"
            out.add_row(shape, label(row), *(_cells(row) if ok else [row["status"]]), style=None if ok else "red")
        out.add_section()
    return out


def _cells(row: Row) -> list[str]:
    peak, planned = row["measured_gib"], row["planned_gib"]
    return [
        f"{row['tokens_per_s']:,.0f}",
        report.figure(peak, form=".2f"),
        report.figure(planned, form=".2f"),
        report.figure(peak / planned if peak and planned else None, form=".3f"),
        report.seconds(row["seconds_p50"]),
        f"{row['first_step_s']:.1f}",
        f"{row['loss_last']:.4f}",
        f"{row['grad_norm_last']:.4g}",
    ]


def measured(rows: list[Row], *, of_fastft: bool) -> list[Row]:
    """fastft's rows at a budget, or the others; without those that have no peak."""
    return [row for row in rows if row.get("measured_gib") and (row["budget"] is not None) == of_fastft]


def verdict(peer: Row, points: list[Row]) -> str:
    """Whether fastft is faster in no more memory, and needs less at no less speed, by its points as they are."""
    within = [row for row in points if row["measured_gib"] <= peer["measured_gib"]]
    as_fast = [row for row in points if row["tokens_per_s"] >= peer["tokens_per_s"]]
    said = ["fastft was not measured in so little memory", "not at no less speed"]
    if within:
        best = max(within, key=lambda row: row["tokens_per_s"])
        answer = "faster" if best["tokens_per_s"] > peer["tokens_per_s"] else "not faster"
        said[0] = f"in no more memory fastft is {answer} ({best['budget']}: {_point(best)})"
    if as_fast:
        best = min(as_fast, key=lambda row: row["measured_gib"])
        answer = "needs less" if best["measured_gib"] < peer["measured_gib"] else "does not need less"
        said[1] = f"at no less speed it {answer} ({best['budget']}: {_point(best)})"
    return f"{report.shape_of(peer)} {label(peer)} ({_point(peer)}): {said[0]}; {said[1]}"


def _point(row: Row) -> str:
    return f"{row['tokens_per_s']:,.0f} tokens/s in {row['measured_gib']:.2f} GiB"


def draw(rows: list[Row], path: Path) -> None:
    """tokens/s over the peak, a panel per batch: fastft's budgets as a line, the others as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = report.by_shape(rows)
    figure, axes = plt.subplots(1, len(groups), figsize=(1 + 5.5 * len(groups), 5), squeeze=False, layout="constrained")
    for axis, (shape, group) in zip(axes[0], groups.items(), strict=True):
        line = sorted(measured(group, of_fastft=True), key=lambda row: row["measured_gib"])
        _points(axis, line, "budget", color="#228833", marker="o", label="fastft")
        _points(axis, measured(group, of_fastft=False), "contender", color="#4477aa", marker="s", linestyle="none")
        axis.set_title(shape, fontsize=10)
        axis.set_xlabel("peak memory, GiB")
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(0.15)
        if line:
            axis.legend(frameon=False)
    axes[0][0].set_ylabel("tokens/s")
    figure.suptitle(title_of(rows), fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _points(axis: Any, rows: list[Row], name: str, **style: Any) -> None:
    places = [(row["measured_gib"], row["tokens_per_s"]) for row in rows]
    axis.plot([x for x, _ in places], [y for _, y in places], **style)
    for row, place in zip(rows, places, strict=True):
        axis.annotate(row[name], place, xytext=(5, -11), textcoords="offset points", fontsize=8, color=style["color"])


if __name__ == "__main__":
    main()
