"""benchmarks/kernels.py on a CPU: every case runs and agrees, and table, JSON and picture are made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
TINY = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--shapes",
    "8x512x48",
    "--rounds",
    "2",
    "--contenders",
    "fastft,eager",
]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)


def test_every_case(tmp_path: Path) -> None:
    done = run(*TINY, "--json", str(tmp_path / "rows.json"), "--png", str(tmp_path / "rows.png"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row for row in rows if row["status"] != "ok"] == []
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    assert len({row["op"] for row in rows}) == 13
    assert all(row["us"] > 0 and row["gb_per_s"] > 0 and row["copy_gb_per_s"] > 0 for row in rows)
    assert "norm_rotary + dW" in done.stdout
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    x = next(row for row in rows if row["op"] == "rms_norm" and row["direction"] == "forward")
    assert x["bytes"] == 2 * 8 * 512 * 4 + 512 * 4


def test_ops_are_chosen_by_their_beginning() -> None:
    done = run(*TINY, "--ops", "glu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "glu_packed silu" in done.stdout
    assert "rms_norm" not in done.stdout


def test_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run()
    assert done.returncode != 0
    assert "needs a CUDA device" in done.stderr
