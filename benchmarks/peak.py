"""What is the peak of memory made of?

Two steps to warm up, then one whose every allocation is recorded.  The record is replayed to the moment when most bytes
are live, and the blocks that live then are sorted into classes by size (blocks.py) or, if they were there before the
step, by whose they are.  Needs CUDA.

    python benchmarks/peak.py --model llama-8b --nf4 --batch 2x1536 --contender fastft --json peak.json --png peak.png
    python benchmarks/peak.py --model llama-1b --batch 4x1920 --contender inductor

The table's sum is of what was asked for; the allocator rounds up, so its own peak, in the line below, is a little
higher.  Buffers inside a CUDA graph show when it is recorded, not when it is replayed: with fastft-graphs they are
"live before: other".
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arguments
import blocks
import report
import workers
from presets import PRESETS
from rich.table import Table

Row = dict[str, Any]
GIB = 2**30
WARMUP = 2
RANK = 16  # of LoRA, as in models.py
COLOURS = (*report.COLOURS, "#bbbbbb", "#332288", "#88ccee", "#ddcc77", "#882255")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.common(__doc__)
    add = parser.add_argument
    add("--contender", type=arguments.contender, default="fastft")
    add("--layers", type=arguments.positive, help="cut the model to this many layers")
    add("--batch", type=arguments.shape, default=(1, 2048), help="batch x length (default 1x2048)")
    add("--png", type=Path, help="draw the classes here")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    rows = workers.run_all("peak", jobs, options)
    report.present(f"{report.title_of(rows)}, {options.contender} {report.shape_of(rows[0])}", table(rows), rows)
    if rows[0]["status"] == "ok":
        print(checks(rows[0]))
        if options.png:
            draw(rows[0], options.png)


def jobs(options: argparse.Namespace, scratch: Path) -> list[workers.Job]:
    batch, length = options.batch
    asked = arguments.asked(options, "contender", "layers") | {"batch": batch, "length": length}
    asked |= {"warmup": WARMUP, "steps": 1}
    return [workers.Job(f"{options.contender} {batch}x{length}", asked, scratch / "caches")]


def measure(asked: Row) -> Row:
    """In a worker."""
    import torch
    from measure import Run, make_batches, prepare

    run = Run.of(asked)
    training = prepare(run)
    if not training.clock.cuda:
        raise RuntimeError("the allocator's history is recorded on CUDA only")
    *warmup, batch = make_batches(run)
    for early in warmup:
        training.step(early)
    torch.cuda.synchronize()
    training.clock.reset_peak()
    before = live_before(kinds(training.model, training.optimizer))
    start_bytes = torch.cuda.memory_allocated()
    events = record(lambda: training.step(batch))
    at, live = blocks.replay(before, events)
    sizes = blocks.sizes_of(PRESETS[run.model], run.batch, run.length, nf4=run.nf4, rank=RANK)
    return {
        "classes": blocks.summarise(live, sizes),
        "other": blocks.largest_other(live, sizes),
        "peak_bytes": sum(block.size_bytes for block in live),
        "events": len(events),
        "peak_event": at,
        "before_bytes": sum(block.size_bytes for block in before.values()),
        "allocator_before_bytes": start_bytes,
        "allocator_peak_bytes": torch.cuda.max_memory_allocated(),
    }


def record(step: Any) -> list[Row]:
    """What the allocator did in a step, in order."""
    from torch.cuda import current_device, memory, synchronize

    # without stack traces, which nobody reads here and which take gigabytes
    memory._record_memory_history(max_entries=1_000_000, context=None, stacks="python")
    try:
        step()
        synchronize()
        return memory._snapshot()["device_traces"][current_device()]
    finally:
        memory._record_memory_history(enabled=None)


def live_before(kind_of: dict[int, str]) -> dict[int, blocks.Block]:
    """The blocks in use, by address; kind_of: whose an address is."""
    from torch.cuda import current_device, memory

    found = {}
    for segment in memory._snapshot()["segments"]:
        if segment["device"] != current_device():
            continue
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                kind = kind_of.get(block["address"], "other")
                size = block.get("requested_size") or block["size"]
                found[block["address"]] = blocks.Block(size, f"live before: {kind}")
    return found


def kinds(model: Any, optimizer: Any) -> dict[int, str]:
    """The addresses of what belongs to the model and the optimizer, and what it is.

    The gradients of the step before are among them: a step begins by freeing them.
    """
    named: dict[int, str] = {}

    def note(tensors: Any, kind: str) -> None:
        named.update((tensor.untyped_storage().data_ptr(), kind) for tensor in tensors if tensor is not None)

    note(model.buffers(), "buffers")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            note([parameter], "LoRA")
            note([parameter.grad], "gradients")
        elif hasattr(parameter, "quant_state"):
            note([parameter, *tensors_of(parameter.quant_state)], "4-bit weights")
        else:
            note([parameter], "embeddings and head" if _is_outside(name) else "16-bit parameters")
    for state in optimizer.state.values():
        note((value for value in state.values() if hasattr(value, "untyped_storage")), "optimizer state")
    return named


def _is_outside(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name


def tensors_of(state: Any) -> Iterator[Any]:
    """A quantisation's tables and scales, those of its own scales included (bitsandbytes' QuantState)."""
    for value in vars(state).values() if state is not None else ():
        if hasattr(value, "untyped_storage"):
            yield value
        elif type(value) is type(state):
            yield from tensors_of(value)


def table(rows: list[Row]) -> Table:
    out = report.columns(("class",), ("blocks", "GiB", "share"))
    for row in rows:
        for found in row.get("classes", ()):
            share = f"{found['bytes'] / row['peak_bytes']:.1%}"
            out.add_row(found["class"], str(found["blocks"]), f"{found['bytes'] / GIB:.3f}", share)
            if found["class"] == blocks.OTHER:
                for size in row["other"][:5]:
                    out.add_row(f"  of {size['bytes']:,} bytes", str(size["blocks"]), _gib(size), "")
    return out


def _gib(size: Row) -> str:
    return f"{size['bytes'] * size['blocks'] / GIB:.3f}"


def checks(row: Row) -> str:
    """The sum beside the allocator's own figures: if they differ by more than rounding, do not trust the table."""
    return (
        f"sum {row['peak_bytes'] / GIB:.3f} GiB, allocator's peak {row['allocator_peak_bytes'] / GIB:.3f}; "
        f"before the step {row['before_bytes'] / GIB:.3f}, allocator's {row['allocator_before_bytes'] / GIB:.3f}; "
        f"at event {row['peak_event']:,} of {row['events']:,}"
    )


def draw(row: Row, path: Path) -> None:
    """One bar, a piece for each class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 6), layout="constrained")
    bottom = 0.0
    for i, found in enumerate(row["classes"]):
        height = found["bytes"] / GIB
        label = f"{found['class']}, {height:.2f} GiB"
        axis.bar([0], [height], 0.5, bottom=bottom, color=COLOURS[i % len(COLOURS)], label=label)
        bottom += height
    axis.set_ylabel("live bytes at the peak, GiB")
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"{report.title_of([row])}\n{row['contender']} {report.shape_of(row)}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
