"""How fast are 4-bit weights de-quantised?  Microseconds on the device, and the share of a copy's bandwidth.

    python benchmarks/dequantize.py --json dequantize.json
    python benchmarks/dequantize.py --shapes 4096x14336 --flat

A shape is rows x columns of one weight in bfloat16.  Statistics are quantised too unless --flat is given.  Contenders
take turns in CUDA graphs, over as many weights as do not fit into the L2 cache; bytes are those that have to be moved:
4 bits an element and its statistics in, 16 bits out.  A contender whose bits are not bitsandbytes' own is not timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import arguments
import checkout
import report
import torch
from measure import machine
from torch import Tensor

import kernels

Row = dict[str, Any]
SHAPES = ("4096x14336", "14336x4096", "4096x4096", "1024x4096")


def weight(rows: int, columns: int, options: argparse.Namespace) -> tuple[Tensor, Any]:
    """Bytes and statistics of a random one."""
    from bitsandbytes.functional import quantize_4bit

    from fastft.quantize import on_default_stream

    values = torch.randn(rows, columns, device=options.device, dtype=torch.bfloat16)
    with on_default_stream(values.device):
        return quantize_4bit(values, quant_type="nf4", compress_statistics=not options.flat)


def bitsandbytes(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)


def fastft(packed: Tensor, state: Any) -> Tensor:
    from fastft.kernels.dequantize_4bit import padded

    nested = (state.state2.absmax, state.absmax, state.state2.code, state.offset) if state.nested else (state.absmax,)
    sizes = (*state.shape, state.blocksize, state.quant_type, state.dtype)
    return torch.ops.fastft.dequantize_4bit(packed, *padded(nested), *sizes)


CONTENDERS: dict[str, Callable[[Tensor, Any], Tensor]] = {"fastft": fastft, "bitsandbytes": bitsandbytes}


def bytes_of(packed: Tensor, state: Any) -> int:
    """What one call has to move."""
    statistics = [state.absmax, *([state.state2.absmax] if state.nested else [])]
    read_bytes = sum(one.numel() * one.element_size() for one in (packed, *statistics))
    return read_bytes + 2 * state.shape[0] * state.shape[1]


def measured(shape: str, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each contender."""
    rows, columns = map(int, shape.split("x"))
    first = weight(rows, columns, options)
    moved_bytes = bytes_of(*first)
    copies = 1 if options.device == "cpu" else -(-kernels.L2_BYTES // moved_bytes)
    weights = [first, *(weight(rows, columns, options) for _ in range(copies - 1))]
    expected, runs, counts = bitsandbytes(*first), {}, {}
    for name, function in CONTENDERS.items():
        if not torch.equal(function(*first), expected):
            yield {"shape": shape, "contender": name, "error": "other bits than bitsandbytes'"}
            continue
        calls = [lambda one=one, function=function: function(*one) for one in weights]
        calls *= -(-kernels.CALLS // len(calls))
        counts[name] = len(calls)
        runs[name] = kernels.in_turn(calls) if options.device == "cpu" else kernels.recorded(calls)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            seconds[name].append(kernels.timed(run, options.device) / counts[name])
    for name, found in seconds.items():
        p20, p50, p80 = kernels.quantiles(found)
        times = {"us_p20": 1e6 * p20, "us": 1e6 * p50, "us_p80": 1e6 * p80}
        yield {"shape": shape, "contender": name, "bytes": moved_bytes, **times, "gb_per_s": moved_bytes / p50 / 1e9}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--shapes", type=lambda text: text.split(","), default=list(SHAPES), help="rows x columns, ...")
    add("--flat", action="store_true", help="statistics that are not quantised themselves")
    add("--device", default="cuda", help="cpu runs everything without graphs, to try this script out")
    add("--rounds", type=arguments.positive, default=15)
    add("--commit", default=checkout.commit(), help="recorded in the rows (default: from git)")
    add("--json", type=Path, help="write the rows here")
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("dequantize.py needs a CUDA device; --device cpu only tries it out.")
    found: list[Row] = []
    with kernels.one_stream(options.device):
        copy = kernels.copy_gb_per_s(options)
        common = {**machine(options.device), "copy_gb_per_s": copy, "nested": not options.flat}
        common |= {"commit": options.commit, "date": datetime.date.today().isoformat()}
        for shape in options.shapes:
            found += [{**common, **row} for row in measured(shape, options)]
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))
    table = report.columns(("shape", "contender"), ("us", "p20", "p80", "GB/s", "of a copy"))
    for row in found:
        times = [report.figure(row.get(name), form=".1f") for name in ("us", "us_p20", "us_p80")]
        share = row["gb_per_s"] / copy if "us" in row else None
        figures = [report.figure(row.get("gb_per_s"), form=",.0f"), report.figure(share, form=".0%")]
        table.add_row(row["shape"], row["contender"], *times, *figures)
    notes = [f"{row['contender']} {row['shape']}: {row['error']}" for row in found if "error" in row]
    report.present(f"{common['gpu'] or 'CPU'}, NF4 to bfloat16; a copy moves {copy:,.0f} GB/s", table, notes)


if __name__ == "__main__":
    main()
