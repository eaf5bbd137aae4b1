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


def test_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_parallel.parse([]).ways == ["one", "ddp", "fsdp", "eager-fsdp"]
    assert data_parallel.parse(["--ways=ddp-uncut"]).ways == ["ddp-uncut"]
    with pytest.raises(SystemExit):
        data_parallel.parse(["--ways=perhaps"])
    assert "'perhaps' is none of one, ddp" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        data_parallel.parse(["--share=0.5", "--turns=2"])
    assert "leave out --turns" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("turns", ["", "--turns 2"])
def test_two_processes(turns: str, tmp_path: Path) -> None:
    """A bucket of 16 kB is full within a layer: by its default, torch would cut the graph."""
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    command += f" {BENCHMARKS / 'data_parallel.py'} --model tiny --device cpu --dtype float32 --lower eager"
    command += f" --ways one,ddp,ddp-uncut,fsdp,fsdp-split,eager-fsdp --bucket 0.015625 {turns}"
    command += f" --batch 2x16 --steps 2 --warmup 1 --json {tmp_path / 'rows.json'}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["way"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert [row["processes"] for row in rows.values()] == [1, 2, 2, 2, 2, 2]
    assert rows["ddp"]["regions"] == rows["ddp-uncut"]["regions"]
    assert rows["ddp"]["loss_first"] == rows["ddp-uncut"]["loss_first"]
    assert rows["ddp-uncut"]["gradients_apart"] == 0
    assert [row["graphs"] for row in rows.values()] == [1, 1, 1, 1, 1, 0]
    assert not any(row["failures"] for row in rows.values())
    for way in ("fsdp", "fsdp-split"):
        assert rows[way]["gradients_apart"] < 1e-4
        assert rows[way]["loss_last"] == pytest.approx(rows["ddp"]["loss_last"], rel=1e-4)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines if line and line[0] in rows] == list(rows)
