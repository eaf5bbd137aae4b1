"""benchmarks/kernels.py on a CPU: every case runs and agrees, and table, JSON and picture are made."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
sys.path.append(str(SCRIPT.parent))

import kernel_cases  # noqa: E402

_spec = importlib.util.spec_from_file_location("benchmark_of_kernels", SCRIPT)  # other modules are called kernels too
assert _spec is not None
assert _spec.loader is not None
kernels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernels)

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
    assert len({row["op"] for row in rows}) == 15
    assert all(row["us"] > 0 and row["gb_per_s"] > 0 and row["copy_gb_per_s"] > 0 for row in rows)
    assert "norm_rotary + dW" in done.stdout
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    x = next(row for row in rows if row["op"] == "rms_norm" and row["direction"] == "forward")
    assert x["bytes"] == 2 * 8 * 512 * 4 + 512 * 4 + 8 * 4  # x and y, weight, rstd


def new(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(shape[0]))


CASES = [
    case
    for make, width in (
        (kernel_cases.norms, 512),
        (kernel_cases.heads, 512),
        (kernel_cases.gates, 96),
        (kernel_cases.experts, 512),
    )
    for case in make(64, width, new)
]
NAMES = [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_rounding_in_other_places_agrees(case: kernel_cases.Case) -> None:
    """As a fused kernel does it: float32 inside, rounded at the end."""

    def fused(*given: torch.Tensor) -> list[torch.Tensor]:
        return [one.bfloat16() for one in kernels._outputs(case.reference(*(value.float() for value in given)))]

    kernels.agrees(case, fused)
    with pytest.raises(ValueError, match="of the largest value"):
        kernels.agrees(case, lambda *given: [one * 1.1 for one in fused(*given)])


def test_a_gradient_of_two_inputs_is_moved_once() -> None:
    x = 64 * 512 * 2
    row, vector = 64 * 4, 512 * 2
    moved = {case.name: kernels.bytes_of(case) for case in CASES}
    assert moved["add_rms_norm"] == (4 * x + vector + row, 4 * x + vector + row)  # backward: dy, dtotal, total; dx
    assert moved["rms_norm_add"] == (3 * x + vector + row, 3 * x + vector + row)  # backward: dtotal, x; dx


def test_a_contender_that_fails_is_a_row() -> None:
    def broken(*given: torch.Tensor) -> Any:
        raise AssertionError

    case = dataclasses.replace(CASES[NAMES.index("glu silu")], liger=broken)
    options = kernels.parse(["--device", "cpu", "--rounds", "1", "--contenders", "liger,eager"])
    rows = list(kernels.measured(case, options))
    assert [row["status"] for row in rows] == ["failed", "ok"] * 2
    assert kernels.reasons(rows) == ["liger, first at glu silu 64x96 forward: AssertionError: "]
    common = {"device": "cpu", "copy_gb_per_s": 1.0}
    console = Console(width=200, record=True)
    console.print(kernels.table([{**common, **row} for row in rows]))
    assert console.export_text().count("glu silu") == 2  # without fastft too


def test_contenders_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parse(["--contenders", "fastft,quack"])
    assert "no contender 'quack'" in capsys.readouterr().err


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
