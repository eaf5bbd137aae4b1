"""How long is a fine-tuning step, and how much memory does it take?

A step is forward, loss, backward and AdamW on the LoRA factors (r=16 on all seven projections) of a model with random
weights.  Each contender runs at each batch and length in a process of its own, with empty compile caches.

    pip install --no-deps --no-build-isolation -e .     # once; without it the checkout is used as it lies
    python benchmarks/step.py --model tiny --batches 1x32 --device cpu --lower eager
    python benchmarks/step.py --model llama-1b --batches 4x2048,1x512
    python benchmarks/step.py --model llama-8b --nf4 --batches 1x2048,2x2048,8x2048 --json rows.json --png steps.png
    python benchmarks/step.py --model llama-8b --nf4 --layers 4 --contenders inductor,fastft --batches 2x2048
    python benchmarks/report.py rows.json more.json --png steps.png      # show rows again, or several files together

Run it as a file, not with -m: from the root, ``kernels`` would shadow the package of that name.

What is measured: seconds from step to step, 20th, 50th and 80th percentile after the warm-up, between CUDA events and
without a wait in each step; tokens/s at the median; the first step, compilation included (cold unless --warm-cache);
peak memory of tensors over all steps (on a CPU: the process's peak resident size, which the compiler dominates).  The
loss and gradient norm of the last step are there to compare contenders by: they see the same weights and batches.

What a user would write: ids, labels and an all-ones attention_mask, as a tokenizer returns them (--mask none leaves it
out); use_cache off, as in Trainer; base model in --dtype, LoRA factors in float32, no autocast.  The base of --nf4 is
double-quantised and not passed through prepare_model_for_kbit_training, so norms, embeddings and head stay in --dtype.
Checkpointing is non-reentrant, every layer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import checkout
import report
from contenders import CONTENDERS
from presets import PRESETS

Row = dict[str, Any]
RUN_OPTIONS = ("model", "layers", "nf4", "dtype", "device", "mask", "steps", "warmup", "seed", "lower")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--model", choices=tuple(PRESETS), default="llama-1b")
    add("--contenders", type=_names, default=list(CONTENDERS), help="comma-separated; ratios are to the first")
    add("--batches", type=_shapes, default=[(1, 2048)], help="batch x length, as in 4x2048,1x512")
    add("--nf4", action="store_true", help="quantise the base's projections with bitsandbytes")
    add("--layers", type=_positive, help="cut the model to this many layers")
    add("--steps", type=_positive, default=10, help="timed steps (default 10)")
    add("--warmup", type=_positive, default=3, help="steps before them, the first included (default 3)")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--device", help="cuda if there is one, else cpu")
    add("--mask", choices=("ones", "none"), default="ones", help="attention_mask passed to the model (default ones)")
    add("--lower", default="inductor", help="fastft's option of that name")
    add("--timeout", type=float, default=900, help="seconds for one contender at one batch (default 900)")
    add("--warm-cache", action="store_true", help="keep using the machine's compile caches")
    add("--commit", default=checkout.commit(), help="recorded in the rows (default: from git)")
    add("--json", type=Path, help="write the rows here, after each one")
    add("--png", type=Path, help="draw the rows here")
    add("--rows", action="store_true", help="print each row as a line of JSON when it is done, besides the table")
    add("--worker", nargs=2, type=Path, metavar=("RUN", "ROW"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.worker:
        return work(*options.worker)
    with tempfile.TemporaryDirectory(prefix="fastft-bench-", ignore_cleanup_errors=True) as folder:
        rows = run_all(options, Path(folder))
    report.show(rows)
    if options.png:
        report.draw(rows, options.png)


def run_all(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Every contender at every shape, one process after another."""
    environment = make_environment(scratch)
    jobs = [(name, *shape) for shape in options.batches for name in options.contenders]
    rows: list[Row] = []
    began = time.perf_counter()
    for i, (name, batch, length) in enumerate(jobs, 1):
        run = {"contender": name, "batch": batch, "length": length}
        run |= {key: getattr(options, key) for key in RUN_OPTIONS}
        print(f"[{i}/{len(jobs)}] {name} {batch}x{length} ...", end=" ", flush=True, file=sys.stderr)
        row = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": options.commit, **run}
        row |= launch(run, environment, scratch / str(i), options.timeout, options.warm_cache)
        rows.append(row)
        elapsed = time.perf_counter() - began
        print(f"{row['status']}, {row['wall_s']:.0f} s ({elapsed:.0f} s in all)", flush=True, file=sys.stderr)
        if options.rows:
            print(json.dumps(row), flush=True)
        if options.json:
            _write(options.json, rows)
    return rows


def launch(run: Row, environment: dict[str, str], folder: Path, timeout: float, warm_cache: bool = False) -> Row:
    """What one worker measured, or what became of it."""
    folder.mkdir()
    run_file, row_file, log_file = folder / "run.json", folder / "row.json", folder / "log"
    run_file.write_text(json.dumps(run))
    if not warm_cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder / "inductor", "TRITON_CACHE_DIR": folder / "triton"}
        environment = environment | {name: str(path) for name, path in caches.items()}
    command = [sys.executable, __file__, "--worker", str(run_file), str(row_file)]
    began = time.perf_counter()
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # compile workers too
            process.wait()
    log_text = log_file.read_text(errors="replace")
    row: Row = json.loads(row_file.read_text()) if row_file.exists() else {}
    if code is None:
        row |= {"status": "timeout", "error": f"no result after {timeout:g} s"}
    elif "status" not in row:
        row |= {"status": "error", "error": _last_words(code, log_text)}
    return row | {"wall_s": time.perf_counter() - began, "log": log_text[-4000:]}


def make_environment(scratch: Path) -> dict[str, str]:
    """The workers' environment, in which fastft imports."""
    path = checkout.search_path()
    if not checkout.installed():
        print("fastft is not installed; using the checkout as it lies", file=sys.stderr)
        checkout.link_package(scratch / "site")
        path.insert(0, str(scratch / "site"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def work(run_file: Path, row_file: Path) -> None:
    """The inside of a worker.  The machine is noted first, for the row of a run that dies."""
    from measure import Run, machine, measure

    run = Run(**json.loads(run_file.read_text()))
    row = machine(run)
    _write(row_file, row)
    _write(row_file, row | measure(run))


def _write(path: Path, content: Any) -> None:
    """All or nothing: whoever reads it may have killed the writer."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def _last_words(code: int, log: str) -> str:
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    lines = log.strip().splitlines()
    return lines[-1] if lines else f"exit status {code}"


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"no contender {name!r}; there are {', '.join(CONTENDERS)}")
    return names


def _shapes(text: str) -> list[tuple[int, int]]:
    try:
        shapes = [(int(batch), int(length)) for batch, length in (part.split("x") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 4x2048,1x512") from None
    if any(size < 1 for shape in shapes for size in shape):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are at least 1")
    return shapes


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    main()
