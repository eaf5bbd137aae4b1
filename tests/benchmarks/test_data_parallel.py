"""benchmarks/data_parallel.py: a run of two processes, from torchrun to the rows and the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import data_parallel  # noqa: E402


def test_settings_are_on_and_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_parallel.parse([]).settings == ["on", "off"]
    assert data_parallel.parse(["--settings=off"]).settings == ["off"]
    with pytest.raises(SystemExit):
        data_parallel.parse(["--settings=perhaps"])
    assert "'perhaps' is neither on nor off" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """A bucket of 16 kB is full within a layer: with the setting on, torch would cut the graph."""
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    command += f" {BENCHMARKS / 'data_parallel.py'} --model tiny --device cpu --dtype float32 --lower eager"
    command += f" --batch 2x16 --steps 2 --warmup 1 --bucket 0.015625 --json {tmp_path / 'rows.json'}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    on, off = json.loads((tmp_path / "rows.json").read_text())
    assert (on["optimize_ddp"], off["optimize_ddp"], on["processes"]) == ("on", "off", 2)
    assert on["regions"] == off["regions"]
    assert not on["failures"]
    assert not off["failures"]
    assert off["gradients_apart"] == 0
    assert on["loss_first"] == off["loss_first"]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("on", "off")] == ["on", "off"]
