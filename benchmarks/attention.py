"""How fast is attention, forward and backward, beside torch's kernels, for each kind of mask?

    python benchmarks/attention.py --json attention.json
    python benchmarks/attention.py --cases causal,packed --shapes 4x4096 --contenders fastft,dense,flex

A case is a mask (attention_cases.py); a shape is batch x length.  fastft is the op as it dispatches, triton its Triton
kernels whatever it would choose; cudnn and flash are torch's kernels, dense is its own choice with the mask as
transformers gives it, flex is flex_attention, compiled; eager is transformers' softmax, as it is and compiled.  Masks
of all kinds are made before and not counted.  "share" is that of the scores which the mask keeps, and TFLOP/s count
the products of these alone: 2 forward, and 5 more backward.

Short runs are replayed as a CUDA graph, others launched from Python; what cannot be recorded is marked *.  Inputs stay
in the L2 cache where they fit.  "transient" is what forward and backward allocate at most, the output included, less
the gradients.  "ratio" is the time, forward and backward, over that of dense, or of eager for softcap and sinks, which
torch's kernels do not have.

Errors are the largest, over the largest value, of some rows of the output at the full length and of the gradients that
come from them, beside eager's in float64.  One above three times eager's own in the same dtype is marked ~; a contender
off by 10% is not timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import checkout
import report
import torch
from attention_cases import CASES, CONTENDERS, Problem, as_contender, build, truth
from measure import GIB, machine
from rich.table import Table
from torch import Tensor

import kernels

Row = dict[str, Any]
DIRECTIONS = ("forward", "both")
PRODUCTS = {"forward": 2, "both": 7}
ERRORS = ("out_error", "grad_error")
ROWS = 64  # that are compared
SLACK, WRONG = 3.0, 1e-1  # errors: times eager's; what is not timed
CALLS, SHORT_S = 8, 1e-2  # in one graph; what is recorded, launches included
LIMIT_S = 0.5  # for all rounds of one contender and direction, but for the first two


@dataclass
class Runs:
    """What is timed: a run is so many calls."""

    run: Callable[[], Any]
    calls: int
    rounds: int
    seconds: list[float] = field(default_factory=list)

    def time(self, device: str) -> None:
        self.seconds.append(kernels.timed(self.run, device))


def compared(problem: Problem) -> tuple[Tensor, Tensor]:
    """Rows [R], all over the length, and gradients of the output there [B, R, H, D]."""
    B, H, S, D = problem.query.shape
    rows = torch.linspace(0, S - 1, min(S, ROWS), device=problem.query.device).long()
    return rows, torch.randn(B, len(rows), H, D, device=rows.device, dtype=problem.query.dtype)


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Of the output, and of the worst of the gradients."""
    off = [((mine - other).abs().max() / other.abs().max()).item() for mine, other in zip(found, expected, strict=True)]
    return dict(zip(ERRORS, (off[0], float(torch.tensor(off[1:]).max())), strict=True))  # keeps a NaN


class Check:
    """Compares contenders at one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rows, grad_output = compared(problem)
        self.grad_output = torch.zeros_like(problem.query.transpose(1, 2))
        self.grad_output[:, self.rows] = grad_output
        self.expected = truth(problem, self.rows, grad_output, torch.float64)
        self.eagers = errors(truth(problem, self.rows, grad_output, problem.query.dtype), self.expected)

    def __call__(self, row: Row, function: Callable[[Problem], Tensor]) -> None:
        """Note errors and mark the row; raise if it is not to be timed."""
        out = function(self.problem)
        if out.shape != self.grad_output.shape or out.dtype != self.grad_output.dtype:
            raise AssertionError(f"a result of {out.dtype} {tuple(out.shape)}")
        dquery, *others = torch.autograd.grad(out, self.problem.wanted, self.grad_output)
        off = errors([out.detach()[:, self.rows], dquery[:, :, self.rows], *others], self.expected)
        row |= {**off, **{f"eager_{name}": value for name, value in self.eagers.items()}}
        for name, value in off.items():
            if not value <= WRONG:
                raise AssertionError(f"{name} {value:.1e}")
            if value > max(SLACK * self.eagers[name], torch.finfo(out.dtype).eps):
                row["status"] = "rough"


def note_memory(row: Row, problem: Problem, step: Callable[[], Any]) -> None:
    before_bytes = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before_bytes
    row["transient_bytes"] = row["peak_bytes"] - sum(one.numel() * one.element_size() for one in problem.wanted)


def planned(row: Row, direction: str, run: Callable[[], Any], options: argparse.Namespace) -> Runs:
    """Recorded if it is short and can be, and as often as time allows; how is noted in the row."""
    run()  # compiled and warm
    seconds, calls = kernels.timed(run, options.device), 1
    if options.device == "cuda" and seconds < SHORT_S:
        made: list[Callable[[], Any]] = []
        why = kernels.attempt(lambda: made.append(kernels.recorded([run] * CALLS)))
        row |= {f"not_recorded_{direction}": why} if why else {}
        if made:
            run, calls = made[0], CALLS
            seconds = kernels.timed(run, options.device) / calls
    rounds = min(options.rounds, max(2, int(LIMIT_S / (calls * seconds))))
    return Runs(run, calls, rounds)


def ready(row: Row, runs: dict[str, Runs], check: Check, function: Callable, options: argparse.Namespace) -> None:
    """Compile, judge, see what a step allocates, and add what is timed to runs."""
    problem = check.problem
    check(row, function)
    grad_output = torch.randn_like(check.grad_output)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(problem), problem.wanted, grad_output)

    if options.device == "cuda":
        note_memory(row, problem, step)
    runs["forward"] = planned(row, "forward", partial(function, problem), options)
    runs["both"] = planned(row, "both", step, options)


def failed(row: Row, why: str) -> None:
    kinds = {"out of memory": "out of memory", "notimplementederror": "unsupported", "assertionerror": "wrong"}
    row |= {"status": next((kind for sign, kind in kinds.items() if sign in why.lower()), "failed"), "error": why}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(case: str, shape: tuple[int, int], options: argparse.Namespace) -> Iterator[Row]:
    """A row for each contender, who take turns."""
    torch._dynamo.reset()  # no graph of an earlier shape is used again
    torch.manual_seed(0)
    new = partial(torch.randn, device=options.device, dtype=getattr(torch, options.dtype))
    problem = build(CASES[case], *shape, options.heads, options.head_dim, new)
    common = {"case": case, "batch": shape[0], "length": shape[1], "share": problem.share, "status": "ok"}
    common |= {"head_dim": problem.query.shape[-1]}
    check = Check(problem)
    entries: list[tuple[Row, dict[str, Runs]]] = []
    for name in options.contenders:
        row: Row = {**common, "contender": name}
        runs: dict[str, Runs] = {}
        entries.append((row, runs))
        given = (row, runs, check, CONTENDERS[name], options)
        why = kernels.attempt(as_contender, name, options.device, ready, *given)
        if why:  # one contender must not cost the others their rows
            failed(row, why)
            runs.clear()
        print(f"{case} {report.shape_of(row)} {name}: {why or 'ready'}"[: report.WIDTH], flush=True)
    take_turns(entries, options)
    yield from finished(problem, entries)


def take_turns(entries: Sequence[tuple[Row, dict[str, Runs]]], options: argparse.Namespace) -> None:
    for turn in range(options.rounds):
        for row, runs in entries:
            for one in [one for one in runs.values() if turn < one.rounds]:
                why = kernels.attempt(as_contender, row["contender"], options.device, one.time, options.device)
                if why:  # beside the others there is not enough memory, say
                    failed(row, why)
                    one.rounds = 0


def finished(problem: Problem, entries: Sequence[tuple[Row, dict[str, Runs]]]) -> Iterator[Row]:
    """The rows with their figures."""
    B, H, S, D = problem.query.shape
    product = 2 * B * H * S * S * D * problem.share
    for row, runs in entries:
        for direction, one in runs.items():
            if row["status"] in ("ok", "rough"):
                p20, p50, p80 = (1e3 * value / one.calls for value in kernels.quantiles(one.seconds))
                row |= {f"ms_{direction}_p20": p20, f"ms_{direction}": p50, f"ms_{direction}_p80": p80}
                row |= {f"tflops_{direction}": PRODUCTS[direction] * product / p50 / 1e9}
                row |= {f"rounds_{direction}": len(one.seconds)}
    by_name = {row["contender"]: row for row, _ in entries}
    base = by_name.get("eager" if problem.case.softcap or problem.case.sinks else "dense", {})
    for row, _ in entries:
        if "ms_both" in base and "ms_both" in row:
            row["ratio"] = row["ms_both"] / base["ms_both"]
        yield row


def table(rows: list[Row]) -> Table:
    right = ("fwd ms", "both ms", "TFLOP/s", "both", "transient GiB", "out off", "grad off", "ratio")
    shown = report.columns(("case", "shape", "share", "contender"), right)
    where = None
    for row in rows:
        if where not in (None, (row["case"], report.shape_of(row))):
            shown.add_section()
        where = (row["case"], report.shape_of(row))
        shown.add_row(*where, f"{row['share']:.3f}", row["contender"], *cells(row))
    return shown


def cells(row: Row) -> list[str]:
    if row["status"] not in ("ok", "rough"):
        return [row["status"]]
    late = ["*" if f"not_recorded_{direction}" in row else "" for direction in DIRECTIONS]
    times = [report.figure(row[f"ms_{one}"], form=".3f") + mark for one, mark in zip(DIRECTIONS, late, strict=True)]
    figures = [report.figure(row[f"tflops_{direction}"], form=".3g") for direction in DIRECTIONS]
    figures.append(report.figure(row.get("transient_bytes"), 1 / GIB, ".2f"))
    figures += [f"{row[name]:.1e}" for name in ERRORS]
    figures[-1] += "~" if row["status"] == "rough" else ""
    return [*times, *figures, report.figure(row.get("ratio"), form=".2f")]


def reasons(rows: list[Row]) -> list[str]:
    """Why figures are missing or marked, once for each contender and reason."""
    found: dict[tuple[str, str], str] = {}
    for row in rows:
        for why in (row.get(key) for key in ("error", *(f"not_recorded_{direction}" for direction in DIRECTIONS))):
            if why:
                found.setdefault((row["contender"], why), f"{row['case']} {report.shape_of(row)}")
    return [f"{name}, first at {where}: {why}" for (name, why), where in found.items()]


def heads(text: str) -> tuple[int, int]:
    queries, _, keys = text.partition("/")
    found = arguments.positive(queries), arguments.positive(keys or queries)
    if found[0] % found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: the first is a multiple of the second")
    return found


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    shapes = [(1, 2048), (1, 8192), (1, 32768)]
    add("--shapes", type=arguments.listed(arguments.shape), default=shapes, help="batch x length, as in 4x2048,1x512")
    add("--heads", type=heads, default=(32, 8), help="of queries / of keys (default 32/8)")
    add("--head-dim", type=arguments.positive, default=128, help="default 128; sinks have 64 at most, as in GPT-OSS")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--cases", type=arguments.listed(arguments.named("case", CASES)), default=list(CASES))
    add("--contenders", type=arguments.listed(arguments.named("contender", CONTENDERS)), default=list(CONTENDERS))
    add("--device", default="cuda", help="cpu only tries this script out")
    add("--rounds", type=arguments.positive, default=15, help="at most (default 15); long ones have fewer")
    add("--commit", default=checkout.commit(), help="recorded in the rows (default: from git)")
    add("--json", type=Path, help="write the rows here, after each case and shape")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("attention.py needs a CUDA device; --device cpu only tries it out.")
    common = {**machine(options.device), "commit": options.commit, "date": datetime.date.today().isoformat()}
    common |= {"heads": options.heads, "dtype": options.dtype}
    rows: list[Row] = []
    with kernels.one_stream(options.device):
        for case in options.cases:
            for shape in options.shapes:
                rows += [{**common, **row} for row in measured(case, shape, options)]
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    of = f"{options.heads[0]}/{options.heads[1]} heads of {options.head_dim}, {options.dtype}"
    report.present(f"{common['gpu'] or 'CPU'}, {of}", table(rows), [])
    for line in reasons(rows):
        print(line[: report.WIDTH])


if __name__ == "__main__":
    main()
