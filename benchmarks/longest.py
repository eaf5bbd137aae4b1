"""What is the longest context that a card can train?

The model is traced once with open sizes, and the planner is asked for the least peak at one length after another, until
the longest that fits is found for every card.  Lengths named by --confirm are then run, with the process's memory
capped to that card's.  Needs CUDA.

    python benchmarks/longest.py --model llama-8b --nf4 --cards 8,12,16,24,80 --confirm 12,16 --json longest.json

--mask padded pads the last quarter: lengths that are found and run are then those without padding.  --all-rows has
every row computed, and counts all.

A card of 12 GB has 12e9 bytes, less 0.5 GiB for CUDA's context and MARGIN for fragments.  That is too little where
the allocator's segments cannot grow: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or see shorter ones run.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import arguments
import budget as budgets
import report
import workers
from rich.table import Table

Row = dict[str, Any]
GIB = 2**30
MARGIN = 0.03  # of what a card has for tensors
STEP = 256  # tokens: lengths are multiples
SHORTER, LEAST = 0.95, 0.75  # where a length does not run: of it, the next; of the planner's, the last


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.common(__doc__)
    add = parser.add_argument
    add("--cards", type=arguments.listed(int), default=[8, 12, 16, 24, 80], help="GB, comma-separated")
    add("--confirm", type=arguments.listed(int), default=[], help="of these, which to run")
    add("--layers", type=arguments.positive, help="cut the model to this many layers")
    add("--all-rows", action="store_true", help="skip_padding=False")
    add("--turns", help="a file: of commands that name the same one, started together, each is timed alone")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    (row,) = workers.run_all("longest", jobs, options)
    report.present(f"longest context, {report.title_of([row])}", table(row), [row])


def jobs(options: argparse.Namespace, scratch: Path) -> list[workers.Job]:
    asked = arguments.asked(options, "layers", "cards", "confirm", "turns")
    asked |= {"contender": "fastft", "batch": 1, "length": 2048, "warmup": 1, "steps": 1}
    asked["options"] = {"memory_budget": "min", "cuda_graphs": False}
    if options.all_rows:
        asked["options"]["skip_padding"] = False
    return [workers.Job("longest contexts", asked, scratch / "caches")]


def measure(asked: Row) -> Row:
    """In a worker."""
    import torch
    from measure import Run, make_batches, prepare
    from turns import Turns

    run, turns = Run.of(asked), Turns(asked.get("turns"))
    turns.prepare()
    training = prepare(run)
    for batch in make_batches(run):
        for tensor in batch.values():
            torch._dynamo.maybe_mark_dynamic(tensor, 1)  # as Dynamo does itself once a length has changed
        training.step(batch)
    turns.time()
    found = [longest(card, left_out=_left_out(run)) for card in asked["cards"]]
    for point in found:
        if point["card_gb"] in asked["confirm"] and point["tokens"]:
            point |= confirmed(training, run, point)
    return {"points": found}


def confirmed(training: Any, run: Any, point: Row) -> Row:
    """The longest that ran: the planner's, or a shorter one as long as memory runs out."""
    tokens, failed = point["tokens"], {}
    while tokens > LEAST * point["tokens"]:
        try:
            return {"ran": tokens, **confirm(training, run, point["card_gb"], tokens), "failed": failed}
        except RuntimeError as error:  # such as that memory ran out; the others' figures stand
            failed[tokens] = f"{type(error).__name__}: {error}"
        tokens = int(SHORTER * tokens) // STEP * STEP
    return {"failed": failed}


def usable_bytes(card_gb: int) -> int:
    return int((card_gb * 10**9 - budgets.CONTEXT_BYTES) * (1 - MARGIN))


def _left_out(run: Any) -> bool:
    """Whether padding is left out, so that lengths are those without it."""
    return run.mask == "padded" and run.options.get("skip_padding") is None


def longest(card_gb: int, *, left_out: bool) -> Row:
    """By bisection over the planner's least peak, which grows with the length.

    left_out: see _left_out; rows are then rounded up.
    """
    from fastft.rewriter.memory import planner
    from fastft.rewriter.rows import selection
    from fastft.rewriter.runtime import controller

    (planned,) = controller.alive
    (book, budget) = planned.controller, usable_bytes(card_gb)
    symbol = max(planned.sizes, key=lambda one: planned.sizes[one])

    def peak(tokens: int) -> int:
        rows = selection.rounded(tokens) if left_out else tokens
        return planner.plan(book.sequence, book.facts, 0, {symbol: rows}, graphs=False).peak_bytes

    low, high = 0, 2**20 // STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(middle * STEP) <= budget else (low, middle - 1)
    tokens = low * STEP
    return {"card_gb": card_gb, "tokens": tokens, "planned_gib": peak(tokens) / GIB if tokens else None}


def confirm(training: Any, run: Any, card_gb: int, tokens: int) -> Row:
    """A few steps of that length on a card of that size."""
    import torch
    from measure import make_batch

    import fastft

    length = tokens * 4 // 3 if _left_out(run) else tokens
    batch = make_batch(run, 1, length, torch.Generator().manual_seed(1))
    training.model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    budgets.cap(card_gb * 10**9)
    fastft.set_memory_budget(usable_bytes(card_gb))
    training.clock.reset_peak()
    losses = [training.step(batch) for _ in range(2)]
    training.clock.marks.clear()
    training.clock.mark()
    losses.append(training.step(batch))
    training.clock.mark()
    (seconds,) = training.clock.intervals()
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "measured_gib": training.clock.peak_gib(), "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "seconds": seconds, "loss": losses[-1].item(), "plan": str(fastft.compilations().graphs[-1].plan),
    }  # fmt: skip


def table(row: Row) -> Table:
    out = report.columns(("card",), ("tokens", "planned GiB", "ran", "measured GiB", "reserved GiB", "s/step", "loss"))
    for point in row.get("points", ()):
        out.add_row(
            f"{point['card_gb']} GB", f"{point['tokens']:,}", report.figure(point["planned_gib"], form=".2f"),
            report.figure(point.get("ran"), form=",.0f"), report.figure(point.get("measured_gib"), form=".2f"),
            report.figure(point.get("reserved_gib"), form=".2f"), report.figure(point.get("seconds"), form=".2f"),
            report.figure(point.get("loss"), form=".4f"),
        )  # fmt: skip
    return out


if __name__ == "__main__":
    main()
