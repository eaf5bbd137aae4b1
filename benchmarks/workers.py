"""A process for each measurement: what the commands here share.

A task is a module with ``measure(asked) -> row``.  It runs in a fresh process (``workers.py TASK RUN ROW``), so that no
contender sees another's patches, caches or memory; a crash, a timeout and running out of memory become rows as well.
The log of a timeout ends in what its threads were doing.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import checkout

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One measurement to make.

    asked: what the task is given; all of it is kept in the row.
    caches: where torch's and Triton's compile caches are; None is the machine's own.
    """

    label: str
    asked: Row
    caches: Path | None


def run_all(task: str, plan: Callable[[argparse.Namespace, Path], list[Job]], options: argparse.Namespace) -> list[Row]:
    """The rows of all jobs, one process after another.

    plan: makes the jobs, given the options and a folder that lives as long as they run.  options: see arguments.common.
    """
    with tempfile.TemporaryDirectory(prefix="fastft-bench-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        return _run(task, plan(options, scratch), options, scratch)


def _run(task: str, jobs: Sequence[Job], options: argparse.Namespace, scratch: Path) -> list[Row]:
    environment = make_environment(scratch)
    rows: list[Row] = []
    began = time.perf_counter()
    for i, job in enumerate(jobs, 1):
        print(f"[{i}/{len(jobs)}] {job.label} ...", end=" ", flush=True, file=sys.stderr)
        row = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": options.commit, **job.asked}
        row |= launch(task, job, environment, scratch / str(i), options.timeout)
        rows.append(row)
        elapsed = time.perf_counter() - began
        print(f"{row['status']}, {row['wall_s']:.0f} s ({elapsed:.0f} s in all)", flush=True, file=sys.stderr)
        if options.rows:
            print(json.dumps(row), flush=True)
        if options.json:
            write(options.json, rows)
    return rows


def launch(task: str, job: Job, environment: dict[str, str], folder: Path, timeout: float) -> Row:
    """What one worker measured, or what became of it."""
    folder.mkdir()
    run_file, row_file, log_file = folder / "run.json", folder / "row.json", folder / "log"
    run_file.write_text(json.dumps(job.asked))
    if job.caches:
        caches = {"TORCHINDUCTOR_CACHE_DIR": job.caches / "inductor", "TRITON_CACHE_DIR": job.caches / "triton"}
        environment = environment | {name: str(path) for name, path in caches.items()}
    command = [sys.executable, __file__, task, str(run_file), str(row_file)]
    began = time.perf_counter()
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGUSR1)  # it writes where it is into its log, or ends
            time.sleep(0.5)
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


def work(task: str, run_file: Path, row_file: Path) -> None:
    """The inside of a worker.  The machine is noted first, for the row of a run that dies."""
    faulthandler.register(signal.SIGUSR1)
    from measure import device_of, machine

    asked = json.loads(run_file.read_text())
    row = machine(device_of(asked["device"]))
    write(row_file, row)
    try:
        row |= {"status": "ok", **importlib.import_module(task).measure(asked)}
    except Exception as error:
        row |= _failure(error)
    write(row_file, row)


def write(path: Path, content: Any) -> None:
    """All or nothing: whoever reads it may have killed the writer."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def first_line(text: str) -> str:
    """The first line that says something; a line that ends in a colon only announces the next."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def describe(error: Exception) -> str:
    return first_line(f"{type(error).__name__}: {error}")


def _failure(error: Exception) -> Row:
    memory = "out of memory" in str(error).lower()  # a compiler may have wrapped the exception
    detail = "".join(traceback.format_exception(error))[-6000:]
    return {"status": "out of memory" if memory else "error", "error": describe(error), "detail": detail}


def _last_words(code: int, log: str) -> str:
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    lines = log.strip().splitlines()
    return lines[-1] if lines else f"exit status {code}"


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
