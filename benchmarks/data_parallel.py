"""Does DDP's `optimize_ddp` change what fastft makes of a model: its speed, its memory, its gradients?

QLoRA in DistributedDataParallel, one process for each card, trained with the setting on (torch's default) and off, with
a new model, compilation and Inductor's caches each time.  fastft's own kernels stay compiled, which makes the second
first step shorter: to compare first steps, give each command one of --settings.

    torchrun --nproc_per_node 2 benchmarks/data_parallel.py --model llama-8b --layers 8 --json ddp.json
    torchrun --nproc_per_node 2 benchmarks/data_parallel.py --model tiny --device cpu --batch 1x32 --lower eager
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import arguments
import checkout
import report
from presets import PRESETS
from rich.table import Table

Row = dict[str, Any]
SETTINGS = ("on", "off")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--model", choices=tuple(PRESETS), default="llama-1b")
    add("--layers", type=arguments.positive, help="cut the model to this many layers")
    add("--batch", type=arguments.shape, default=(2, 2048), help="rows x tokens, for each process (default 2x2048)")
    add("--steps", type=arguments.positive, default=20, help="timed steps (default 20)")
    add("--warmup", type=arguments.positive, default=5, help="steps before them (default 5)")
    add("--settings", type=arguments.listed(_setting), default=list(SETTINGS), help="of optimize_ddp (default on,off)")
    add("--bucket", type=float, default=25, help="DDP's bucket_cap_mb (default 25)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base and of autocast")
    add("--device", choices=("cuda", "cpu"), help="cuda if there is one, else cpu")
    add("--lower", default="inductor", help="fastft's option of that name")
    add("--seed", type=int, default=0)
    add("--commit", default=checkout.commit(), help="recorded in the rows (default: from git)")
    add("--json", type=Path, help="write the rows here")
    return parser.parse_args(words)


def _setting(name: str) -> str:
    if name not in SETTINGS:
        raise argparse.ArgumentTypeError(f"{name!r} is neither on nor off")
    return name


def main() -> None:
    options = parse()
    with processes(options) as (device, rank):
        rows = compared([measured(options, setting, device, rank) for setting in options.settings])
        if rank == 0:
            show(rows)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))


@contextmanager
def processes(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The group that torchrun started; gives this process's device and rank."""
    import torch
    import torch.distributed as dist
    from measure import device_of

    device = device_of(options.device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    first = min(dist._DEFAULT_FIRST_BUCKET_BYTES, int(options.bucket * 2**20))
    dist._DEFAULT_FIRST_BUCKET_BYTES = first  # which torch wants to be no larger than the others
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device, dist.get_rank()
    finally:
        dist.destroy_process_group()


def measured(options: argparse.Namespace, setting: str, device: str, rank: int) -> Row:
    """One training; what this process alone needs later is under "gradients"."""
    import torch
    import torch.distributed as dist
    from measure import machine
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    with torch._dynamo.config.patch(optimize_ddp=setting == "on"), fresh_cache():
        row = train(options, device, rank)
    batch, length = options.batch
    about = {"optimize_ddp": setting, "status": "ok", "date": date.today().isoformat(), "commit": options.commit}
    asked = {name: getattr(options, name) for name in ("model", "layers", "dtype", "lower", "seed", "steps", "warmup")}
    about |= asked | {"batch": batch, "length": length, "nf4": True, "mask": "ones", "bucket_cap_mb": options.bucket}
    row["tokens_per_s"] = batch * length * dist.get_world_size() / row["seconds_p50"]
    return about | {"processes": dist.get_world_size()} | machine(device) | row


def train(options: argparse.Namespace, device: str, rank: int) -> Row:
    """Steps of AdamW under autocast; times and peaks are those of the slowest and largest process, losses are means."""
    import models
    import torch
    from measure import Clock, Run, make_batch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import fastft

    dtype, clock, known = getattr(torch, options.dtype), Clock(device), len(fastft.compilations().graphs)
    model: nn.Module = models.build(
        options.model, layers=options.layers, nf4=True, dtype=dtype, device=device, seed=options.seed
    )
    trained = [one for one in model.parameters() if one.requires_grad]
    wrapped = DistributedDataParallel(model, bucket_cap_mb=options.bucket)
    compiled = torch.compile(wrapped, backend="fastft", options={"lower": options.lower})
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    run = Run.of({**_RUN, **vars(options), "device": device, "batch": options.batch[0], "length": options.batch[1]})
    generator = torch.Generator().manual_seed(options.seed + rank)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype is torch.bfloat16)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with autocast:
            loss = compiled(**make_batch(run, run.batch, run.length, generator)).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    clock.reset_peak()
    began = clock.now()
    losses = [step()]
    first_step_s = clock.now() - began
    gradients = [one.grad.float().cpu() for one in trained if one.grad is not None]
    losses += [step() for _ in range(options.warmup - 1)]
    clock.mark()
    for _ in range(options.steps):
        losses.append(step())
        clock.mark()
    seconds = torch.tensor(clock.intervals()).median().item()
    graphs = fastft.compilations().graphs[known:]
    first_step_s, seconds, peak_gib = _over_all([first_step_s, seconds, clock.peak_gib()], device, largest=True)
    loss_first, loss_last = _over_all([losses[0].item(), losses[-1].item()], device, largest=False)
    return {
        "first_step_s": first_step_s, "seconds_p50": seconds, "peak_gib": peak_gib, "loss_first": loss_first,
        "loss_last": loss_last, "graphs": len(graphs), "regions": [list(map(str, graph.regions)) for graph in graphs],
        "failures": [graph.failure for graph in graphs if graph.failure], "gradients": gradients,
    }  # fmt: skip


_RUN = {"contender": "fastft", "nf4": True, "mask": "ones", "loss": "inside"}


def _over_all(values: Sequence[float], device: str, *, largest: bool) -> list[float]:
    """The largest or the mean of what each process has."""
    import torch
    import torch.distributed as dist

    together = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(together, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return (together if largest else together / dist.get_world_size()).tolist()


def compared(rows: list[Row]) -> list[Row]:
    """The rows without the first step's gradients, but with how far they are from the first row's, by their size."""
    first, *_ = gradients = [row.pop("gradients") for row in rows]
    for row, mine in zip(rows, gradients, strict=True):
        pairs = zip(mine, first, strict=True)
        row["gradients_apart"] = max(((one - other).norm() / other.norm()).item() for one, other in pairs)
    return rows


def show(rows: list[Row]) -> None:
    title = f"{report.title_of(rows)}, {rows[0]['processes']} processes, {report.shape_of(rows[0])} each"
    report.present(title, table(rows), rows)


def table(rows: list[Row]) -> Table:
    figures = ("first step s", "tokens/s", "ratio", "peak GiB", "loss", "last loss", "gradients apart", "graphs")
    out = report.columns(("optimize_ddp",), figures)
    for row in rows:
        out.add_row(
            row["optimize_ddp"], f"{row['first_step_s']:.1f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / rows[0]['tokens_per_s']:.3f}", f"{row['peak_gib']:.2f}",
            f"{row['loss_first']:.4f}", f"{row['loss_last']:.4f}", f"{row['gradients_apart']:.1e}", str(row["graphs"]),
        )  # fmt: skip
    return out


if __name__ == "__main__":
    main()
