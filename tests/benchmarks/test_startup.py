"""benchmarks/startup.py: who shares caches with whom, and the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import report
import startup
import workers

QUICK = "--model tiny --device cpu --lower eager --batch 1x32 --contenders fastft --layers 1"


def test_a_pair_shares_its_caches_and_no_other(tmp_path: Path) -> None:
    options = startup.parse(["--contenders", "inductor,fastft", "--layers", "2,4", "--batch", "4x64"])
    jobs = startup.jobs(options, tmp_path)
    pairs = list(zip(jobs[::2], jobs[1::2], strict=True))
    assert len({cold.caches for cold, _ in pairs}) == 4
    for cold, second in pairs:
        assert cold.caches == second.caches is not None
        assert (cold.asked["start"], second.asked["start"]) == ("cold", "second")
        assert cold.asked | {"start": "second"} == second.asked
        assert (cold.asked["batch"], cold.asked["length"]) == (4, 64)
    assert [(cold.asked["contender"], cold.asked["layers"]) for cold, _ in pairs] == [
        *(("inductor", 2), ("inductor", 4)),
        *(("fastft", 2), ("fastft", 4)),
    ]


def test_a_worker_gets_the_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches' folders reach the process: a task that only looks at its environment."""
    (tmp_path / "looks.py").write_text(
        "import os\n"
        "def measure(asked):\n"
        "    return {k: os.environ[k] for k in ('TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR')}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = workers.Job("looks", {"device": "cpu"}, tmp_path / "caches")
    row = workers.launch("looks", job, workers.make_environment(tmp_path), tmp_path / "1", timeout=120)
    assert row["status"] == "ok", row
    assert row["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "caches/inductor")
    assert row["TRITON_CACHE_DIR"] == str(tmp_path / "caches/triton")


@pytest.mark.slow
def test_a_start(tmp_path: Path) -> None:
    job = startup.jobs(startup.parse(QUICK.split()), tmp_path)[0]
    row = workers.launch("startup", job, workers.make_environment(tmp_path), tmp_path / "1", timeout=120)
    assert row["status"] == "ok", row
    assert row["graphs"] == 1
    # torch's timers are the ones that the table names: tracing is in the first step and takes much of it
    assert 0 < row["phases"]["bytecode_tracing"] < row["phases"]["_compile.compile_inner"] < row["first_step_s"]
    assert {"build_guards", "OutputGraph.call_user_compiler"} <= row["phases"].keys()
    assert row["caches"]["autograd_cache_hit"] == row["caches"]["fxgraph_cache_miss"] == 0
    json.dumps(row)


def row_of(contender: str, layers: int, start: str, first: float, **more: Any) -> dict[str, Any]:
    row = {"contender": contender, "layers": layers, "start": start, "first_step_s": first, "status": "ok"}
    row |= {
        "build_s": 1.0,
        "second_step_s": 0.25,
        "all_s": first + 0.25,
        "phases": {"bytecode_tracing": 3.0, "build_guards": 0.5},
    }
    caches = {"autograd_cache_hit": 1, "autograd_cache_miss": 2, "fxgraph_cache_hit": 3, "fxgraph_cache_miss": 4}
    return row | {"caches": caches, "model": "tiny", "nf4": False, "dtype": "float32", "mask": "ones"} | more


def test_ratios_are_to_the_fewest_layers_of_the_same_start(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row_of("inductor", 16, "cold", 10.0),
        row_of("inductor", 16, "second", 4.0),
        row_of("inductor", 32, "cold", 25.0),
        row_of("inductor", 32, "second", 6.0),
        row_of("fastft", 16, "cold", 8.0, status="error", error="lost", batch=1, length=32),
    ]
    report.present("a title", startup.table(rows), rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    cells = [line.split() for line in lines if line.startswith("inductor")]
    assert [line[:6] for line in cells] == [
        ["inductor", "16", "cold", "1.0", "10.0", "1.00"],
        ["inductor", "16", "second", "1.0", "4.0", "1.00"],
        ["inductor", "32", "cold", "1.0", "25.0", "2.50"],
        ["inductor", "32", "second", "1.0", "6.0", "1.50"],
    ]
    assert cells[0][6:] == ["0.250", "10.2", "3.0", "0.5", "-", "-", "-", "1/2", "3/4"]
    assert "fastft 1x32: lost" in lines
