"""The curve of tokens/s over peak memory, at several budgets in one process.

budget.py compiles a model for each budget; here it is traced once, and fastft.set_memory_budget moves it from budget to
budget, from the least to the fastest, in steps of one factor between the two.  The rows are those of budget.py, which
shows them together with its own:

    python benchmarks/curve.py --model llama-8b --nf4 --batches 2x2048 --count 8 --json curve.json
    python benchmarks/budget.py --show curve.json peers.json --png budgets.png

At each budget a few steps pass first, in which fastft compiles what is new, captures its CUDA graphs and corrects
its plan; the peak is that of all steps from then on, with the memory that idle CUDA graphs hold.  peak_all_gib
is that of all steps at the budget.  For --turns see step.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import arguments
import budget as budgets
import workers

Row = dict[str, Any]
GIB = 2**30
SETTLE = 4  # steps until fastft has checked its plan


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.common(__doc__)
    add = parser.add_argument
    shapes = arguments.listed(arguments.shape)
    add("--batches", type=shapes, default=[(1, 2048)], help="batch x length, as in 4x2048,1x512")
    add("--count", type=arguments.positive, default=8, help="budgets (default 8)")
    add("--layers", type=arguments.positive, help="cut the model to this many layers")
    add("--steps", type=arguments.positive, default=5, help="timed steps at each budget (default 5)")
    add("--warmup", type=arguments.positive, default=3, help="steps before the first budget (default 3)")
    add("--cap", type=budgets.bytes_of, help="as on a card of, say, 12GB: see budget.py")
    add("--turns", help="a file: of commands that name the same one, started together, each is timed alone")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    rows = [one for row in workers.run_all("curve", jobs, options) for one in spread(row)]
    budgets.show(rows)
    if options.json:
        workers.write(options.json, rows)


def jobs(options: argparse.Namespace, scratch: Path) -> list[workers.Job]:
    made = []
    for i, (batch, length) in enumerate(options.batches):
        asked = arguments.asked(options, "layers", "steps", "warmup", "turns", "count")
        asked |= {"contender": "fastft", "batch": batch, "length": length, "cap_bytes": options.cap, "budget": "curve"}
        asked["options"] = {"memory_budget": "min"}
        made.append(workers.Job(f"fastft {batch}x{length}", asked, scratch / f"caches-{i}"))
    return made


def spread(row: Row) -> list[Row]:
    """A worker's row as one for each budget."""
    points = row.pop("points", None)
    return [row | point for point in points] if points else [row]


def measure(asked: Row) -> Row:
    """In a worker."""
    import torch
    from measure import Run, make_batches, prepare
    from turns import Turns

    import fastft

    if asked["cap_bytes"]:
        budgets.cap(asked["cap_bytes"])
    run, turns = Run.of(asked), Turns(asked.get("turns"))
    turns.prepare()
    training = prepare(run)
    batches = make_batches(run)
    began = training.clock.now()
    training.step(batches[0])
    row: Row = {"first_step_s": training.clock.now() - began}
    turns.time()
    for batch in batches[1:]:
        training.step(batch)
    plan = fastft.compilations().graphs[-1].plan
    points = [point(training, batches, plan, "min")]
    fastft.set_memory_budget("max-speed")
    low, high = points[0]["planned_gib"], plan.peak_bytes / GIB
    high = min(high, torch.cuda.get_device_properties(0).total_memory / GIB * 0.94)
    for i in range(1, asked["count"] - 1):
        points.append(point(training, batches, plan, f"{low * (high / low) ** (i / (asked['count'] - 1)):.3f}GiB"))
    free = torch.cuda.get_device_properties(0).total_memory / GIB * 0.94
    points.append(point(training, batches, plan, "max-speed" if high < free else f"{high:.3f}GiB"))
    return row | {"points": points}


def point(training: Any, batches: list[Any], plan: Any, budget: str) -> Row:
    """What a budget gives."""
    import torch

    import fastft

    fastft.set_memory_budget(budget)
    corrections, clock = plan.corrections, training.clock
    torch.cuda.synchronize()
    clock.reset_peak()
    peak, before = 0.0, corrections - 1
    while plan.corrections > before:  # until the plan stays as it is
        before = plan.corrections
        clock.reset_peak()
        for batch in (batches * SETTLE)[:SETTLE]:
            loss = training.step(batch)
        peak = max(peak, clock.peak_gib())
    clock.marks.clear()
    clock.mark()
    for batch in (batches * training_steps(batches))[: training_steps(batches)]:
        loss = training.step(batch)
        clock.mark()
    seconds = clock.intervals()
    p20, p50, p80 = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    ids = batches[0]["input_ids"]
    measured = budgets.with_idle_graphs(clock.peak_gib(), plan)
    return {
        "budget": budget, "status": "ok", "seconds": seconds, "seconds_p20": p20, "seconds_p50": p50,
        "seconds_p80": p80, "tokens_per_s": ids.numel() / p50, "planned_gib": plan.peak_bytes / GIB,
        "measured_gib": measured, "peak_all_gib": max(peak, measured), "corrections": plan.corrections - corrections,
        "reserved_gib": torch.cuda.memory_reserved() / GIB, "graphed": plan.graphed, "host_gib": plan.host_bytes / GIB,
        "extra_s": plan.seconds, "peak_at": plan.peak_at, "moments": plan.moments, "loss_last": loss.item(),
        "items": [list(row) for row in plan.rows()],
        "grad_norm_last": torch.nn.utils.get_total_norm([p.grad for p in training.trained]).item(),
    }  # fmt: skip


def training_steps(batches: list[Any]) -> int:
    """As many as were made beyond the warm-up."""
    return max(2, len(batches) - 3)


if __name__ == "__main__":
    main()
