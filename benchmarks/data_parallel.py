"""Several cards: one alone, DistributedDataParallel and FSDP2, with fastft, as torch runs them, and by Inductor.

QLoRA with 4-bit weights stored as the other weights are, which FSDP2 asks for, one process for each card, one way after
the other, with a new model, compilation and Inductor's caches each time.  fastft's own kernels stay compiled, which
makes later first steps shorter, and some memory stays taken: to compare first steps and peaks, give each command one of
--ways.  Cards become slower as they become warm: to compare speed, hold all models and let them take turns (--turns).

    torchrun --nproc_per_node 2 benchmarks/data_parallel.py --model llama-8b --layers 8 --turns 4 --json ways.json
    torchrun --nproc_per_node 2 benchmarks/data_parallel.py --model tiny --device cpu --batch 1x32 --lower eager

one: each card trains by itself.  ddp: fastft around DDP; ddp-uncut without torch's optimize_ddp; ddp-lean with
gradient_as_bucket_view and without broadcast_buffers.  fsdp: fully_shard of each layer and the model, then fastft;
fsdp-split: of embeddings, head and statistics too; fsdp-layers: each layer compiled before it is sharded, its 4-bit
weights left whole.  eager-ddp, eager-fsdp, inductor-fsdp: without fastft.
"""

from __future__ import annotations

import argparse
import functools
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
    "one", "ddp", "ddp-uncut", "ddp-lean", "fsdp", "fsdp-split", "fsdp-layers", "eager-ddp", "eager-fsdp",
    "inductor-fsdp",
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
    add("--steps", type=arguments.positive, default=20, help="timed steps, in each turn (default 20)")
    add("--turns", type=arguments.positive, help="hold all models, and time each way so many times, in turn")
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
    options = parser.parse_args(words)
    if options.turns and options.share:
        parser.error("--share is of one model's memory: leave out --turns")
    return options


def _way(name: str) -> str:
    if name not in WAYS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(WAYS)}")
    return name


def main() -> None:
    options = parse()
    with processes(options) as (device, rank):
        rows = compared(in_turn(options, device, rank) if options.turns else one_by_one(options, device, rank))
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


def one_by_one(options: argparse.Namespace, device: str, rank: int) -> list[Row]:
    """Each way by itself; what this process alone needs later is under "gradients"."""
    import torch

    rows = []
    for way in options.ways:
        torch._dynamo.reset()
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)
        rows.append(measured(options, way, device, rank))
    return rows


def measured(options: argparse.Namespace, way: str, device: str, rank: int) -> Row:
    """One training, or that there was too little memory for it."""
    import torch

    try:
        training = Training(options, way, device, rank)
        training.begin()
        training.time()
        return training.row()
    except torch.OutOfMemoryError as error:
        row = dict.fromkeys((*FIGURES, "tokens_per_s"), float("nan")) | {"status": "out of memory"}
        row |= {"error": str(error)[:80], "contender": way, "graphs": 0, "gradients": []}
        return about(options, way, device) | row


def in_turn(options: argparse.Namespace, device: str, rank: int) -> list[Row]:
    """All ways side by side, so that they meet cards of the same warmth."""
    trainings = []
    for way in options.ways:
        trainings.append(Training(options, way, device, rank))
        trainings[-1].begin()
    for _ in range(options.turns):
        for training in trainings:
            training.time()
    return [training.row() for training in trainings]


def about(options: argparse.Namespace, way: str, device: str) -> Row:
    """What a row says of how it was measured."""
    import torch.distributed as dist
    from measure import machine

    batch, length = options.batch
    names = ("model", "layers", "dtype", "lower", "seed", "steps", "turns", "warmup", "budget", "share", "commit")
    row = {"way": way, "date": date.today().isoformat()} | {name: getattr(options, name) for name in names}
    row |= {"batch": batch, "length": length, "nf4": True, "mask": "ones", "bucket_cap_mb": options.bucket}
    return row | {"processes": 1 if way == "one" else dist.get_world_size()} | machine(device)


class Training:
    """Steps of AdamW under autocast; times and peaks are those of the slowest and largest process, losses are means."""

    def __init__(self, options: argparse.Namespace, way: str, device: str, rank: int) -> None:
        import models
        import torch
        from measure import Clock, Run
        from torch import nn

        import fastft

        self.options, self.way, self.device = options, way, device
        dtype, self.clock = getattr(torch, options.dtype), Clock(device)
        self.others_gib = self.clock.allocated_gib() if options.turns and device.startswith("cuda") else 0.0
        self.known = len(fastft.compilations().graphs)
        model: nn.Module = models.build(
            options.model, layers=options.layers, nf4=True, dtype=dtype, device=device, seed=options.seed, storage=dtype
        )
        parameters = list(model.parameters())
        self.frozen_gib = sum(one.numel() * one.element_size() for one in parameters if not one.requires_grad) / GIB
        self.model = made(way, model, options)
        self.trained = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self.run = Run.of(
            {**_RUN, **vars(options), "device": device, "batch": options.batch[0], "length": options.batch[1]}
        )
        self.generator = torch.Generator().manual_seed(options.seed + rank)
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype is torch.bfloat16)
        self.losses: list[Any] = []
        self.seconds: list[float] = []

    def step(self) -> None:
        from measure import make_batch

        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.model(**make_batch(self.run, self.run.batch, self.run.length, self.generator)).loss
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def begin(self) -> None:
        """Take the first step, with what it compiles, and those of the warm-up."""
        import torch
        from torch._inductor.utils import fresh_cache
        from torch.distributed.tensor import DTensor

        import fastft

        gc.collect()
        if self.options.share and self.device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(self.options.share)
        self.clock.reset_peak()
        self.held_gib, began = self.clock.allocated_gib() - self.others_gib, self.clock.now()
        with torch._dynamo.config.patch(optimize_ddp=self.way != "ddp-uncut"), fresh_cache():
            self.step()
            self.first_step_s = self.clock.now() - began
            gradients = [one.grad for one in self.trained if one.grad is not None]
            whole = [one.full_tensor() if isinstance(one, DTensor) else one for one in gradients]
            self.gradients = [one.float().cpu() for one in whole]
            for _ in range(self.options.warmup - 1):
                self.step()
        self.peak_gib = self.clock.peak_gib() - self.others_gib
        self.graphs = fastft.compilations().graphs[self.known :]

    def time(self) -> None:
        """Time steps; what memory they take is known where no other model is held."""
        from measure import Clock

        self.step()  # behind another model's, whose memory is another
        clock = Clock(self.device)
        clock.mark()
        for _ in range(self.options.steps):
            self.step()
            clock.mark()
        self.seconds += clock.intervals()
        if not self.options.turns:
            self.peak_gib = max(self.peak_gib, clock.peak_gib())

    def row(self) -> Row:
        import torch

        plans = [graph.plan for graph in self.graphs if graph.plan is not None]
        planned = max((plan.peak_bytes for plan in plans), default=0) / GIB - (self.others_gib if plans else 0)
        figures = [
            self.first_step_s, torch.tensor(self.seconds).median().item(), self.peak_gib, self.held_gib, planned
        ]  # fmt: skip
        first_step_s, seconds, peak_gib, held_gib, planned = _over_all(figures, self.device, largest=True)
        losses = [self.losses[0].item(), self.losses[-1].item()]
        loss_first, loss_last = _over_all(losses, self.device, largest=False)
        row = about(self.options, self.way, self.device)
        return row | {
            "status": "ok", "first_step_s": first_step_s, "seconds_p50": seconds, "peak_gib": peak_gib,
            "planned_gib": planned, "held_gib": held_gib, "frozen_gib": self.frozen_gib, "loss_first": loss_first,
            "loss_last": loss_last, "tokens_per_s": row["batch"] * row["length"] * row["processes"] / seconds,
            "graphs": len(self.graphs), "regions": [list(map(str, graph.regions)) for graph in self.graphs],
            "failures": [graph.failure for graph in self.graphs if graph.failure],
            "corrections": [plan.corrections for plan in plans], "gradients": self.gradients,
        }  # fmt: skip


def made(way: str, model: Any, options: argparse.Namespace) -> Any:
    """The model as this way trains it."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from fastft.statistics import statistics_as_parameters_

    settings = {"lower": options.lower} | ({"memory_budget": options.budget} if options.budget else {})
    compiler: dict[str, Any] = {"backend": new_backend(), "options": settings}
    if way == "one":
        return torch.compile(model, **compiler)
    if "ddp" in way:
        lean = way == "ddp-lean"
        wrapped = DistributedDataParallel(
            model, bucket_cap_mb=options.bucket, gradient_as_bucket_view=lean, broadcast_buffers=not lean
        )
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


def new_backend() -> Any:
    """fastft, as a function of its own: what was compiled for one way is not used for another."""
    import torch

    fastft_backend = torch._dynamo.lookup_backend("fastft")

    @functools.wraps(fastft_backend)
    def backend(graph: Any, inputs: Any, **settings: Any) -> Any:
        return fastft_backend(graph, inputs, **settings)

    return backend


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
