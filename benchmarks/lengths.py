"""What do changing lengths cost, and is the loss right at each of them?

One compiled model takes batches of random lengths in a row, forward and backward, and its loss is compared with that of
the same weights in eager.  Dynamo compiles for the first length as it is and, when it meets a second one, for any
length; more than that is a guard that depends on the length.

    python benchmarks/lengths.py --model tiny --device cpu --dtype float32 --lower eager --max 64
    python benchmarks/lengths.py --model llama-1b --min 64 --max 2048 --json lengths.json
    python benchmarks/lengths.py --model llama-1b --batch-sizes 2,3,5 --max 1024

Exit status 1: more compilations than --allow for each graph that the first step captured, a loss too far from eager's,
nothing compiled, or no result.  A batch size of 1 beside others needs --allow 3: Dynamo always compiles it apart.
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
DIFFERENCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}  # of the loss, relative to eager's


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.common(__doc__)
    add = parser.add_argument
    add("--contender", type=arguments.contender, default="fastft")
    add("--layers", type=arguments.positive, help="cut the model to this many layers")
    add("--count", type=arguments.positive, default=50, help="how many batches (default 50)")
    add("--min", type=arguments.positive, default=16, help="shortest (default 16)")
    add("--max", type=arguments.positive, default=512, help="longest (default 512)")
    add("--batch-sizes", type=arguments.listed(arguments.positive), default=[1], help="drawn from (default 1)")
    add("--allow", type=arguments.positive, default=2, help="compilations of each captured graph (default 2)")
    options = parser.parse_args(words)
    if options.min > options.max:
        parser.error(f"--min {options.min} is more than --max {options.max}")
    return options


def main() -> None:
    options = parse()
    rows = workers.run_all("lengths", jobs, options)
    report.present(report.title_of(rows), table(rows), rows)
    wrong = complaints(rows[0])
    for line in (*rows[0].get("warnings", ()), *wrong):
        print(line)
    raise SystemExit(1 if wrong else 0)


def jobs(options: argparse.Namespace, scratch: Path) -> list[workers.Job]:
    shapes = draw(options)
    asked = arguments.asked(options, "contender", "layers", "allow") | {"shapes": shapes, "warmup": 0}
    asked |= {"batch": max(options.batch_sizes), "length": options.max, "steps": len(shapes)}
    return [workers.Job(f"{options.contender}, {len(shapes)} lengths", asked, scratch / "caches")]


def draw(options: argparse.Namespace) -> list[tuple[int, int]]:
    chance = random.Random(options.seed)
    return [
        (chance.choice(options.batch_sizes), chance.randint(options.min, options.max)) for _ in range(options.count)
    ]


def measure(asked: Row) -> Row:
    """In a worker."""
    import warnings

    import torch
    from measure import Run, make_batch, prepare

    run = Run.of(asked)
    training = prepare(run)
    eager = getattr(training.model, "_orig_mod", training.model)  # the same module, not compiled
    generator = torch.Generator().manual_seed(run.seed)
    steps: list[Row] = []
    with warnings.catch_warnings(record=True) as caught:
        for size, length in asked["shapes"]:
            batch = make_batch(run, size, length, generator)
            training.optimizer.zero_grad()
            with torch.no_grad():
                expected = eager(**batch).loss.item()
            began = training.clock.now()
            loss = training.model(**batch).loss
            loss.backward()
            seconds = training.clock.now() - began
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            steps.append({"batch": size, "length": length, "s": seconds, "graphs": graphs, "eager": expected})
            steps[-1]["loss"] = loss.item()
    said = dict.fromkeys(str(warning.message) for warning in caught if "fastft" in str(warning.message))
    return {"build_s": training.build_s, "passes": steps, "warnings": list(said), **summary(steps)}


def summary(steps: list[Row]) -> Row:
    before = [0, *(step["graphs"] for step in steps)]
    compiled = [i for i, step in enumerate(steps) if step["graphs"] > before[i]]
    differences = [abs(step["loss"] - step["eager"]) / abs(step["eager"]) for step in steps]
    # max() would lose a NaN that does not come first
    worst = next((i for i, value in enumerate(differences) if value != value), None)
    if worst is None:
        worst = max(range(len(steps)), key=differences.__getitem__)
    return {
        "captured": steps[0]["graphs"],
        "compilations": steps[-1]["graphs"],
        "compiled_at": compiled,
        "compiling_s": sum(steps[i]["s"] for i in compiled),
        "other_s": sum(step["s"] for i, step in enumerate(steps) if i not in compiled),
        "worst_difference": differences[worst],
        "worst_at": worst,
    }


def complaints(row: Row) -> list[str]:
    """What is wrong, a sentence each."""
    if row["status"] != "ok":
        return [f"no result: {row['status']}"]
    found = []
    if not row["captured"]:
        found.append("nothing was compiled in the first step")
    if row["compilations"] > row["allow"] * row["captured"]:
        found.append(
            f"{row['compilations']} compilations of {row['captured']} captured graphs; {row['allow']} of each allowed"
        )
    allowed, worst = DIFFERENCE[row["dtype"]], row["worst_difference"]
    if not worst <= allowed:  # so that a NaN is wrong too
        step = row["passes"][row["worst_at"]]
        found.append(f"loss off by {worst:.2g} at {report.shape_of(step)}; {allowed:g} allowed in {row['dtype']}")
    return found


def table(rows: list[Row]) -> Table:
    names = ("graphs", "compilations", "at steps", "compiling s", "other s", "worst loss difference", "at")
    out = report.columns(("contender", "batches"), names)
    for row in rows:
        out.add_row(row["contender"], str(len(row["shapes"])), *(_cells(row) if row["status"] == "ok" else ()))
    return out


def _cells(row: Row) -> list[str]:
    return [
        str(row["captured"]),
        str(row["compilations"]),
        ", ".join(str(i + 1) for i in row["compiled_at"][:8]) + (" ..." if len(row["compiled_at"]) > 8 else ""),
        f"{row['compiling_s']:.1f}",
        f"{row['other_s']:.2f}",
        f"{row['worst_difference']:.2g}",
        report.shape_of(row["passes"][row["worst_at"]]),
    ]


if __name__ == "__main__":
    main()
