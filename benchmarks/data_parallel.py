"""Several cards: one alone, DistributedDataParallel and FSDP2, with fastft, as torch runs them, and by Inductor.

QLoRA with 4-bit weights stored as the other weights are, which FSDP2 asks for, one process for each card, one way after
the other, with a new model, compilation and Inductor's caches each time.  fastft's own kernels stay compiled, which
makes later first steps shorter: to compare first steps, give each command one of --ways.

    torchrun --nproc_per_node 2 benchmarks/data_parallel.py --model llama-8b --layers 8 --json ways.json
    torchrun --nproc_per_node 2 benchmarks/data_parallel.py --model tiny --device cpu --batch 1x32 --lower eager

one: each card trains by itself.  ddp: fastft around DDP; ddp-uncut without torch's optimize_ddp.  fsdp: fully_shard of
each layer and the model, then fastft; fsdp-split: of embeddings, head and statistics too; fsdp-layers: each layer
compiled before it is sharded, its 4-bit weights left whole.  eager-ddp, eager-fsdp, inductor-fsdp: without fastft.
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
GIB = 2**30
WAYS = (
    "one", "ddp", "ddp-uncut", "fsdp", "fsdp-split", "fsdp-layers", "eager-ddp", "eager-fsdp", "inductor-fsdp",
)  # fmt: skip
FIGURES = (
    "first_step_s", "seconds_p50", "peak_gib", "planned_gib", "held_gib", "frozen_gib", "loss_first", "loss_last",
)  # fmt: skip
USUAL = ("one", "ddp", "fsdp", "eager-fsdp")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--model", choices=tuple(PRESETS), default="llama-1b")
    add("--layers", type=arguments.positive, help="cut the model to this many layers")
    add("--batch", type=arguments.shape, default=(2, 2048), help="rows x tokens, for each process (default 2x2048)")
    add("--steps", type=arguments.positive, default=20, help="timed steps (default 20)")
    add("--warmup", type=arguments.positive, default=5, help="steps before them (default 5)")
    add("--ways", type=arguments.listed(_way), default=list(USUAL), help=f"default {','.join(USUAL)}")
    add("--bucket", type=float, default=25, help="DDP's bucket_cap_mb (default 25)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base and of autocast")
    add("--device", choices=("cuda", "cpu"), help="cuda if there is one, else cpu")
    add("--lower", default="inductor", help="fastft's option of that name")
    add("--budget", help="fastft's memory_budget, for each card")
    add("--share", type=float, help="of each card's memory, all that a process may allocate once its model is built")
    add("--seed", type=int, default=0)
    add("--commit", default=checkout.commit(), help="recorded in the rows (default: from git)")
    add("--json", type=Path, help="write the rows here")
    return parser.parse_args(words)


def _way(name: str) -> str:
    if name not in WAYS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(WAYS)}")
    return name


def main() -> None:
    options = parse()
    with processes(options) as (device, rank):
        rows = compared([measured(options, way, device, rank) for way in options.ways])
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


def measured(options: argparse.Namespace, way: str, device: str, rank: int) -> Row:
    """One training; what this process alone needs later is under "gradients"."""
    import torch
    import torch.distributed as dist
    from measure import machine
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    try:
        with torch._dynamo.config.patch(optimize_ddp=way != "ddp-uncut"), fresh_cache():
            row = train(options, way, device, rank) | {"status": "ok"}
    except torch.OutOfMemoryError as error:
        row = dict.fromkeys(FIGURES, float("nan")) | {"status": "out of memory", "error": str(error)[:80]}
        row |= {"contender": way, "graphs": 0, "gradients": []}
    batch, length = options.batch
    processes = 1 if way == "one" else dist.get_world_size()
    about = {"way": way, "date": date.today().isoformat(), "commit": options.commit}
    asked = {name: getattr(options, name) for name in ("model", "layers", "dtype", "lower", "seed", "steps", "warmup")}
    about |= asked | {"batch": batch, "length": length, "nf4": True, "mask": "ones", "bucket_cap_mb": options.bucket}
    row["tokens_per_s"] = batch * length * processes / row["seconds_p50"]
    return about | {"processes": processes, "budget": options.budget, "share": options.share} | machine(device) | row


def train(options: argparse.Namespace, way: str, device: str, rank: int) -> Row:
    """Steps of AdamW under autocast; times and peaks are those of the slowest and largest process, losses are means."""
    import models
    import torch
    from measure import Clock, Run, make_batch
    from torch import nn
    from torch.distributed.tensor import DTensor

    import fastft

    dtype, clock, known = getattr(torch, options.dtype), Clock(device), len(fastft.compilations().graphs)
    model: nn.Module = models.build(
        options.model, layers=options.layers, nf4=True, dtype=dtype, device=device, seed=options.seed, storage=dtype
    )
    frozen_gib = sum(one.numel() * one.element_size() for one in model.parameters() if not one.requires_grad) / GIB
    called = made(way, model, options)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    run = Run.of({**_RUN, **vars(options), "device": device, "batch": options.batch[0], "length": options.batch[1]})
    generator = torch.Generator().manual_seed(options.seed + rank)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype is torch.bfloat16)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with autocast:
            loss = called(**make_batch(run, run.batch, run.length, generator)).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    gc.collect()
    if options.share and device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(options.share)
    clock.reset_peak()
    held_gib, began = clock.allocated_gib(), clock.now()
    losses = [step()]
    first_step_s = clock.now() - began
    gradients = [one.grad for one in trained if one.grad is not None]
    gradients = [(one.full_tensor() if isinstance(one, DTensor) else one).float().cpu() for one in gradients]
    losses += [step() for _ in range(options.warmup - 1)]
    clock.mark()
    for _ in range(options.steps):
        losses.append(step())
        clock.mark()
    seconds = torch.tensor(clock.intervals()).median().item()
    graphs = fastft.compilations().graphs[known:]
    planned = max((graph.plan.peak_bytes for graph in graphs if graph.plan is not None), default=0) / GIB
    figures = [first_step_s, seconds, clock.peak_gib(), held_gib, planned]
    first_step_s, seconds, peak_gib, held_gib, planned = _over_all(figures, device, largest=True)
    loss_first, loss_last = _over_all([losses[0].item(), losses[-1].item()], device, largest=False)
    return {
        "first_step_s": first_step_s, "seconds_p50": seconds, "peak_gib": peak_gib, "planned_gib": planned,
        "held_gib": held_gib, "frozen_gib": frozen_gib, "loss_first": loss_first, "loss_last": loss_last,
        "graphs": len(graphs), "regions": [list(map(str, graph.regions)) for graph in graphs],
        "failures": [graph.failure for graph in graphs if graph.failure],
        "corrections": [graph.plan.corrections for graph in graphs if graph.plan is not None], "gradients": gradients,
    }  # fmt: skip


def made(way: str, model: Any, options: argparse.Namespace) -> Any:
    """The model as this way trains it."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from fastft.statistics import statistics_as_parameters_

    settings = {"lower": options.lower} | ({"memory_budget": options.budget} if options.budget else {})
    compiler: dict[str, Any] = {"backend": "fastft", "options": settings}
    if way == "one":
        return torch.compile(model, **compiler)
    if "ddp" in way:
        wrapped = DistributedDataParallel(model, bucket_cap_mb=options.bucket)
        return wrapped if way == "eager-ddp" else torch.compile(wrapped, **compiler)
    base = model.get_base_model()
    if way == "fsdp-split":
        statistics_as_parameters_(model)
    whole = (
        {one for name, one in model.named_parameters() if one.ndim == 2 and one.shape[1] == 1}
        if way == "fsdp-layers"
        else None
    )
    for layer in base.model.layers:
        if way in ("fsdp-layers", "inductor-fsdp"):
            layer.compile(**(compiler if way == "fsdp-layers" else {}))
        fully_shard(layer, ignored_params=whole)
    if way == "fsdp-split":
        tied = base.lm_head.weight is base.model.embed_tokens.weight
        fully_shard([base.model.embed_tokens, base.lm_head] if tied else base.model.embed_tokens)
        if not tied:
            fully_shard(base.lm_head)
    fully_shard(model, ignored_params=whole)
    return torch.compile(model, **compiler) if way in ("fsdp", "fsdp-split") else model


_RUN = {"contender": "fastft", "nf4": True, "mask": "ones", "loss": "inside"}


def _over_all(values: Sequence[float], device: str, *, largest: bool) -> list[float]:
    """The largest or the mean of what each process has."""
    import torch
    import torch.distributed as dist

    together = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(together, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return (together if largest else together / dist.get_world_size()).tolist()


def compared(rows: list[Row]) -> list[Row]:
    """The rows without the first step's gradients, but with how far they are from the first row's on several cards."""
    gradients = [row.pop("gradients") for row in rows]
    first = next((mine for row, mine in zip(rows, gradients, strict=True) if row["way"] != "one"), [])
    for row, mine in zip(rows, gradients, strict=True):
        pairs = zip(mine, first, strict=True) if row["way"] != "one" and mine else ()
        row["gradients_apart"] = max(
            (((one - other).norm() / other.norm()).item() for one, other in pairs), default=0.0
        )
    return rows


def show(rows: list[Row]) -> None:
    title = f"{report.title_of(rows)}, {rows[-1]['processes']} processes, {report.shape_of(rows[0])} each"
    report.present(title, table(rows), rows)


def table(rows: list[Row]) -> Table:
    figures = (
        "first step s",
        "tokens/s",
        "ratio",
        "peak GiB",
        "planned",
        "held",
        "loss",
        "last loss",
        "apart",
        "graphs",
    )
    out = report.columns(("way",), figures)
    for row in rows:
        out.add_row(
            row["way"], f"{row['first_step_s']:.1f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / rows[0]['tokens_per_s']:.3f}", f"{row['peak_gib']:.2f}",
            f"{row['planned_gib']:.2f}", f"{row['held_gib']:.2f}", f"{row['loss_first']:.4f}",
            f"{row['loss_last']:.4f}", f"{row['gradients_apart']:.1e}", str(row["graphs"]),
        )  # fmt: skip
    return out


if __name__ == "__main__":
    main()
