"""Is each op at the speed of memory, and how fast are others?  Microseconds, and the share of a copy's bandwidth.

    python benchmarks/kernels.py --json kernels.json --png kernels.png
    python benchmarks/kernels.py --shapes 4096x4096x14336 --ops glu,rotary --contenders fastft,inductor

A shape is rows x hidden x intermediate.  Every call is recorded in a CUDA graph and replayed, so that what is timed is
the GPU's work and not its launches; "launched" is the time of a call from Python.  Contenders take turns, on copies of
the inputs that do not fit into the L2 cache.  Bytes are those that have to be moved: forward, the op's arguments, its
results and what it keeps for backward; backward, the gradients of the results, what was kept, and the gradients of the
inputs, one that is another's too counted once.  A contender whose results or gradients are not those of the reference
in float32 is not timed.  One that cannot be recorded is timed without a graph and marked *.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import checkout
import kernel_cases
import report
import torch
import torch._functorch.config  # nothing else has imported it yet
from kernel_cases import Case, Function
from measure import machine
from rich.table import Table
from torch import Tensor

Row = dict[str, Any]
CONTENDERS = ("fastft", "inductor", "liger", "eager")
SHAPES = ("16384x4096x14336", "4096x4096x14336", "16384x2048x8192", "16384x8192x8192", "512x4096x14336")
L2_BYTES = 3 * 50 * 2**20  # three times an H100's
TOLERANCE = 2e-2  # of the largest value: bfloat16, rounded in other places
CALLS = 8  # in one graph, or more


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--shapes", type=lambda text: text.split(","), default=list(SHAPES), help="rows x hidden x intermediate, ...")
    add("--ops", type=lambda text: text.split(","), default=[""], help="the beginnings of names (default all)")
    add("--contenders", type=arguments.listed(arguments.named("contender", CONTENDERS)), default=list(CONTENDERS))
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--device", default="cuda", help="cpu runs everything without graphs, to try this script out")
    add("--rounds", type=arguments.positive, default=15)
    add("--commit", default=checkout.commit(), help="recorded in the rows (default: from git)")
    add("--json", type=Path, help="write the rows here")
    add("--png", type=Path, help="draw the first shape here")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("kernels.py needs a CUDA device; --device cpu only tries it out.")
    torch._functorch.config.donated_buffer = False  # backward is run many times
    torch._dynamo.config.recompile_limit = 64
    with one_stream(options.device):
        compare(options)


def one_stream(device: str) -> contextlib.AbstractContextManager[Any]:
    """Backward runs on the stream of its forward, and the default stream cannot be recorded: all is done on another."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


def compare(options: argparse.Namespace) -> None:
    copy = copy_gb_per_s(options)
    common = {**machine(options.device), "dtype": options.dtype, "copy_gb_per_s": copy, "commit": options.commit}
    common["date"] = datetime.date.today().isoformat()
    rows: list[Row] = []
    for case in cases(options):
        for row in measured(case, options):
            rows.append({**common, **row})
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
        print(f"{case.name} {case.shape} done", flush=True)
    report.present(
        f"{common['gpu'] or 'CPU'}, {options.dtype}, microseconds; a copy moves {copy:,.0f} GB/s", table(rows), []
    )
    for line in reasons(rows):
        print(line[: report.WIDTH])
    if options.png:
        draw(rows, options.png)


def reasons(rows: list[Row]) -> list[str]:
    """Why times are missing or marked, once for each contender and reason."""
    found: dict[tuple[str, str], str] = {}
    for row in rows:
        if why := row.get("error") or row.get("not_recorded"):
            found.setdefault((row["contender"], why), f"{row['op']} {row['shape']} {row['direction']}")
    return [f"{name}, first at {where}: {why}" for (name, why), where in found.items()]


def cases(options: argparse.Namespace) -> Iterator[Case]:
    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=options.device, dtype=getattr(torch, options.dtype))

    for shape in options.shapes:
        rows, hidden, intermediate = map(int, shape.split("x"))
        for make, width in (
            (kernel_cases.norms, hidden), (kernel_cases.heads, hidden), (kernel_cases.gates, intermediate),
            (kernel_cases.experts, hidden),
        ):  # fmt: skip
            yield from (one for one in make(rows, width, new) if one.name.startswith(tuple(options.ops)))


def copy_gb_per_s(options: argparse.Namespace) -> float:
    """A device-to-device copy of 256 MiB and more, both directions counted, by the same clock."""
    source = torch.zeros(2**27 if options.device == "cuda" else 2**16, dtype=torch.bfloat16, device=options.device)
    target = torch.empty_like(source)
    calls = [lambda: target.copy_(source)] * CALLS
    run = recorded(calls) if options.device == "cuda" else in_turn(calls)
    seconds = [timed(run, options.device) / CALLS for _ in range(4 * options.rounds)]  # the first ones wake the clocks
    return 2 * source.numel() * 2 / quantiles(seconds[len(seconds) // 2 :])[1] / 1e9


def measured(case: Case, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each contender and direction."""
    functions = {
        "fastft": case.ours,
        "inductor": torch.compile(case.reference, dynamic=False) if options.device == "cuda" else case.reference,
        "liger": case.liger,
        "eager": case.reference,
    }
    chosen = {name: found for name in options.contenders if (found := functions[name]) is not None}
    errors = {name: attempt(agrees, case, function) for name, function in chosen.items()}
    for direction, moved in zip(("forward", "backward"), bytes_of(case), strict=True):
        rows: dict[str, Row] = {}
        runs: dict[str, Callable[[], Any]] = {}
        for name, function in chosen.items():
            row = {"op": case.name, "shape": case.shape, "direction": direction, "contender": name, "bytes": moved}
            rows[name] = row | {"status": "ok"}
            error = errors[name] or attempt(ready, rows[name], runs, case, function, options.device)
            if error:  # a peer that cannot do this case is a row, not the end
                rows[name] |= {"status": "failed", "error": error}
        take_turns(rows, runs, options)
        yield from rows.values()


def attempt(action: Callable[..., None], *given: Any) -> str | None:
    """The first line of what went wrong."""
    try:
        action(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n", 1)[0]
    return None


def ready(row: Row, runs: dict[str, Callable[[], Any]], case: Case, function: Function, device: str) -> None:
    """Add what is timed to runs, recorded if it can be; how is noted in the row."""
    calls = prepared(case, function, row["direction"], row["bytes"] if device == "cuda" else L2_BYTES)
    calls[0]()  # compiled here, not in what is timed
    row["launched_us"] = 1e6 * timed(calls[0], device, times=10) / 10
    calls *= -(-CALLS // len(calls))
    row |= {"calls": len(calls), "graph": device == "cuda"}
    runs[row["contender"]] = in_turn(calls)
    if device == "cuda":
        problem = attempt(lambda: runs.update({row["contender"]: recorded(calls)}))
        row |= {"graph": False, "not_recorded": problem} if problem else {}


def take_turns(rows: dict[str, Row], runs: dict[str, Callable[[], Any]], options: argparse.Namespace) -> None:
    """Time everyone, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run, options.device) / rows[name]["calls"])
    for name, found in seconds.items():
        p20, p50, p80 = quantiles(found)
        times = {"us_p20": p20 * 1e6, "us": p50 * 1e6, "us_p80": p80 * 1e6}
        rows[name] |= {**times, "gb_per_s": rows[name]["bytes"] / p50 / 1e9}


def _outputs(result: Any) -> list[Tensor]:
    return [one for one in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(one, Tensor)]


def inputs(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Fresh copies in the same layout; those that are trained need a gradient."""
    return [
        torch.empty_like(value, dtype=dtype).copy_(value).requires_grad_(name in case.trained)
        for name, value in case.tensors.items()
    ]


def upstream(case: Case, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of outputs like these: the same numbers for every contender, of the case's dtype."""
    dtype = next(iter(case.tensors.values())).dtype
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    drawn = (torch.randn(one.shape, generator=generator, device=one.device, dtype=dtype) for one in outputs)
    return [torch.empty_like(one).copy_(value) for one, value in zip(outputs, drawn, strict=True)]


def differentiated(
    case: Case, function: Function, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], Callable[[], Any]]:
    """The outputs and a backward of them that can be run again and again."""
    given = inputs(case, dtype)
    outputs = [one for one in _outputs(function(*given)) if one.requires_grad]
    gradients = upstream(case, outputs)
    wanted = [one for one in given if one.requires_grad]
    return outputs, lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)


def prepared(case: Case, function: Function, direction: str, moved_bytes: int) -> list[Callable[[], Any]]:
    """The same call on as many copies of the inputs as do not fit into the L2 cache together."""
    copies = range(-(-L2_BYTES // moved_bytes))
    if direction == "backward":
        return [differentiated(case, function)[1] for _ in copies]

    def forward(given: list[Tensor]) -> Any:
        with torch.no_grad():
            return function(*given)

    copied = [[one.detach() for one in inputs(case)] for _ in copies]
    return [partial(forward, given) for given in copied]


def agrees(case: Case, function: Function) -> None:
    """Raise if outputs or gradients are not those of the reference in float32."""
    expected, expected_backward = differentiated(case, case.reference, torch.float32)
    actual, backward = differentiated(case, function)
    for mine, other in zip([*actual, *backward()], [*expected, *expected_backward()], strict=True):
        error = (mine.float() - other).abs().max() / other.abs().max()
        if not error < TOLERANCE:
            raise ValueError(f"off by {error.item():.1%} of the largest value")


def bytes_of(case: Case) -> tuple[int, int]:
    """What has to be moved, forward and backward."""
    from fastft.kernels.core.registry import bytes_moved

    kept: list[Tensor] = []
    given = inputs(case)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = _outputs(case.ours(*given))
    results = [one for one in outputs if one.requires_grad]
    gradients = upstream(case, results)
    found = torch.autograd.grad(results, [one for one in given if one.requires_grad], gradients)
    return bytes_moved(distinct(*given, *outputs, *kept)), bytes_moved(distinct(*gradients, *kept, *found))


def distinct(*tensors: Tensor) -> list[Tensor]:
    """Each memory once: the gradients of both addends are one tensor."""
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """All of these one after another; all results live until the end, so that each call writes elsewhere."""
    return lambda: [call() for call in calls]


def recorded(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """All of these as one CUDA graph, which reads the memory of what they were given: they are kept with it."""
    for call in calls[:3]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="relaxed"):
        in_turn(calls)()
    return partial(_replay, graph, calls)


def _replay(graph: torch.cuda.CUDAGraph, calls: object) -> None:
    graph.replay()


def timed(run: Callable[[], Any], device: str, times: int = 1) -> float:
    """Seconds for so many runs."""
    if device != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            run()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def quantiles(seconds: Sequence[float]) -> list[float]:
    """p20, p50 and p80."""
    return torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()


def groups(rows: list[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """By op, shape and direction, a row for each contender."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["op"], row["shape"], row["direction"]), {})[row["contender"]] = row
    return found


def table(rows: list[Row]) -> Table:
    """Microseconds in a graph and, in the last two columns, launched from Python; x: the best other over fastft."""
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in rows)]
    launched = ("fastft", "inductor")
    figures = ("GB/s", "copy", *names, "x", "launched", "inductor's")
    out = report.columns(("op", "shape", "pass"), figures)
    for (op, shape, direction), found in groups(rows).items():
        ours = found.get("fastft", {})
        share = ours["gb_per_s"] / ours["copy_gb_per_s"] if "us" in ours else None
        speeds = [report.figure(ours.get("gb_per_s"), form=",.0f"), report.figure(share, form=".0%")]
        others = [row["us"] for name, row in found.items() if name != "fastft" and "us" in row]
        best = f"{min(others) / ours['us']:.2f}" if others and "us" in ours else "-"
        times = [report.figure(found.get(name, {}).get("us"), form=".1f") + _mark(found.get(name)) for name in names]
        waits = [report.figure(found.get(name, {}).get("launched_us")) for name in launched]
        short = {"forward": "fwd", "backward": "bwd"}[direction]
        style = "red" if ours.get("status") == "failed" else None
        out.add_row(op, shape, short, *speeds, *times, best, *waits, style=style)
    return out


def _mark(row: Row | None) -> str:
    return "*" if row and row["device"] != "cpu" and row.get("graph") is False else ""


def draw(rows: list[Row], path: Path) -> None:
    """The first shape's share of a copy's bandwidth, op by op: a roofline with one roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = {row["op"]: row["shape"] for row in reversed(rows)}
    chosen = {key: found for key, found in groups(rows).items() if shapes[key[0]] == key[1]}
    labels = [f"{op} {direction}  {shape}" for op, shape, direction in chosen]
    names = [name for name in CONTENDERS if any(name in found for found in chosen.values())]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(labels) + 1.5))
    for at, name in enumerate(names):
        shares = [found[name]["gb_per_s"] / found[name]["copy_gb_per_s"] if "us" in found.get(name, {}) else 0.0
                  for found in chosen.values()]  # fmt: skip
        places = [place + 0.8 * at / len(names) for place in range(len(labels))]
        axes.barh(places, shares, 0.8 / len(names), label=name, color=report.COLOURS[-1 - at])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([place + 0.3 for place in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"share of a copy's {rows[0]['copy_gb_per_s']:,.0f} GB/s, {rows[0]['gpu'] or rows[0]['device']}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
