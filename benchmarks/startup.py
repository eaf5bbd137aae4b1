"""How long until the first optimizer step is over?

Each contender at each number of layers runs in two processes, one after the other, that share a fresh folder of compile
caches: the first finds it empty (cold), the second finds what the first left.

    python benchmarks/startup.py --model tiny --layers 1,2 --batch 1x32 --device cpu --lower eager --contenders fastft
    python benchmarks/startup.py --model llama-8b --nf4 --layers 8,16,32 --batch 1x2048 --json startup.json

With ``--lengths 40`` every step has another length, drawn from --min to --max, as a Trainer pads its batches:

    python benchmarks/startup.py --model llama-8b --nf4 --batch 2x2048 --lengths 40 --min 256

What is measured: the first step and the second, which is a step without compilation (with --lengths, the first of
another length), and all steps together; the model's loading is not in it (build_s).  What of the first step is whose,
by torch's own timers: trace is Dynamo reading the model, guards are its checks, backend is what happens to the graph up
to a forward that can be called, backward its lowering, which happens at the first backward; wait is the part of these
two that waits for kernels to be compiled.  In the JSON, ``phases`` has the sum of every timer; they are nested, so they
do not add up.  Caches: hits/misses of AOTAutograd's and of Inductor's.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import arguments
import report
import workers
from rich.table import Table

Row = dict[str, Any]
CONTENDERS = ["inductor", "fastft"]
STARTS = ("cold", "second")
PHASES = {  # column: torch's timer
    "trace": "bytecode_tracing",
    "guards": "build_guards",
    "backend": "OutputGraph.call_user_compiler",
    "backward": "backward._backward_impl",
    "wait": "async_compile.wait",
}
CACHES = {"autograd_cache": "aot_autograd", "fxgraph_cache": "inductor"}  # prefix of the counters: their group
EVENTS = ("hit", "miss", "bypass")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.common(__doc__)
    add = parser.add_argument
    add("--contenders", type=arguments.listed(arguments.contender), default=CONTENDERS, help="comma-separated")
    layers = arguments.listed(arguments.positive)
    add("--layers", type=layers, default=[None], help="numbers of layers, as in 16,32; ratios are to the first")
    add("--batch", type=arguments.shape, default=(1, 2048), help="batch x length (default 1x2048)")
    add("--lengths", type=arguments.positive, help="as many steps, each of another length (default: two of one length)")
    add("--min", type=arguments.positive, default=16, help="shortest of these lengths (default 16)")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    rows = workers.run_all("startup", jobs, options)
    # the layers are a column of the table, not a part of its title
    title = report.title_of([row | {"layers": None} for row in rows])
    report.present(f"{title}, {report.shape_of(rows[0])}", table(rows), rows)


def jobs(options: argparse.Namespace, scratch: Path) -> list[workers.Job]:
    """Two for each contender and number of layers: the second finds the caches of the first."""
    batch, length = options.batch
    lengths = [length] * 2
    if options.lengths:
        lengths = random.Random(options.seed).sample(range(options.min, length + 1), options.lengths)
    made = []
    for contender in options.contenders:
        for layers in options.layers:
            asked = arguments.asked(options) | {"contender": contender, "layers": layers}
            asked |= {"batch": batch, "length": length, "warmup": 0, "steps": len(lengths), "lengths": lengths}
            caches = scratch / f"caches-{contender}-{layers}"
            for start in STARTS:
                label = f"{contender}, {layers or 'all'} layers, {start}"
                made.append(workers.Job(label, asked | {"start": start}, caches))
    return made


def measure(asked: Row) -> Row:
    """In a worker."""
    import torch
    from measure import Run, make_batch, prepare

    run = Run.of(asked)
    training = prepare(run)
    row: Row = {"build_s": training.build_s}
    generator = torch.Generator().manual_seed(run.seed)
    row["steps_s"] = []
    for length in asked["lengths"]:
        batch = make_batch(run, run.batch, length, generator)
        began = training.clock.now()
        loss = training.step(batch)
        row["loss_last"] = loss.item()  # read every step, as training loops do
        row["steps_s"].append(training.clock.now() - began)
    row["first_step_s"], row["second_step_s"], *_ = row["steps_s"]
    row["all_s"] = sum(row["steps_s"])
    utils = torch._dynamo.utils
    timers = getattr(utils, "compilation_time_metrics", {})
    row["phases"] = {name: sum(times) for name, times in timers.items() if sum(times) >= 1e-3}
    row["graphs"] = utils.counters["stats"]["unique_graphs"]
    row["caches"] = {
        f"{prefix}_{event}": utils.counters[group][f"{prefix}_{event}"]
        for prefix, group in CACHES.items()
        for event in EVENTS
    }
    return row


def table(rows: list[Row]) -> Table:
    out = report.columns(
        ("contender", "layers", "start"),
        ("build s", "first s", "ratio", "then s", "all s", *(f"{name} s" for name in PHASES), "AOT cache", "FX cache"),
    )
    for row in rows:
        same = ("contender", "start")
        base = next(other for other in rows if all(other[key] == row[key] for key in same))  # its first layers' count
        cells = _cells(row, base) if row["status"] == "ok" else [row["status"]]
        out.add_row(row["contender"], str(row["layers"] or "all"), row["start"], *cells)
    return out


def _cells(row: Row, base: Row) -> list[str]:
    caches = row["caches"]
    return [
        f"{row['build_s']:.1f}",
        f"{row['first_step_s']:.1f}",
        report.ratio(row, base, "first_step_s"),
        report.seconds(row["second_step_s"]),
        f"{row['all_s']:.1f}",
        *(report.figure(row["phases"].get(timer), form=".1f") for timer in PHASES.values()),
        *(f"{caches[f'{prefix}_hit']}/{caches[f'{prefix}_miss']}" for prefix in CACHES),
    ]


if __name__ == "__main__":
    main()
