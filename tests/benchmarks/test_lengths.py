"""benchmarks/lengths.py: what it counts, what it complains of, and one run through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import lengths  # noqa: E402


def row_of(graphs: list[int], losses: list[float], **more: Any) -> dict[str, Any]:
    """As a worker's row, eager's loss being 2 and every step taking a second."""
    steps = [
        {"batch": 1, "length": 10 + i, "s": 1.0, "graphs": count, "eager": 2.0, "loss": loss}
        for i, (count, loss) in enumerate(zip(graphs, losses, strict=True))
    ]
    row = {"status": "ok", "dtype": "float32", "allow": 2, "passes": steps, **lengths.summary(steps)}
    return row | more


def test_summary() -> None:
    row = row_of([1, 2, 2, 3], [2.0, 2.1, 1.6, 2.0])
    assert (row["captured"], row["compilations"], row["compiled_at"]) == (1, 3, [0, 1, 3])
    assert (row["compiling_s"], row["other_s"]) == (3.0, 1.0)
    assert (row["worst_difference"], row["worst_at"]) == (pytest.approx(0.2), 2)


def test_nothing_to_complain_of() -> None:
    assert lengths.complaints(row_of([1, 2, 2], [2.0, 2.0, 2.00001])) == []
    assert lengths.complaints(row_of([3, 6, 6], [2.0] * 3)) == []  # a graph break: two of each graph


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (row_of([1, 2, 3], [2.0] * 3), "3 compilations of 1 captured graphs; 2 of each allowed"),
        (row_of([0, 0, 0], [2.0] * 3), "nothing was compiled in the first step"),
        (row_of([1, 2, 2], [2.0, 2.0, 2.0001]), "loss off by 5e-05 at 1x12; 1e-05 allowed in float32"),
        (row_of([1, 2, 2], [2.0, 2.1, 2.0], dtype="bfloat16"), "loss off by 0.05 at 1x11; 0.02 allowed in bfloat16"),
        (row_of([1, 2, 2], [2.0, float("nan"), 2.5]), "loss off by nan at 1x11; 1e-05 allowed in float32"),
        ({"status": "timeout"}, "no result: timeout"),
    ],
)
def test_complaints(row: dict[str, Any], said: str) -> None:
    assert lengths.complaints(row) == [said]


def test_lengths_are_drawn_within_bounds_and_again_the_same() -> None:
    options = lengths.parse(["--min=5", "--max=9", "--batch-sizes=2,3", "--count=200"])
    shapes = lengths.draw(options)
    assert {batch for batch, _ in shapes} == {2, 3}
    assert {length for _, length in shapes} == {5, 6, 7, 8, 9}
    assert shapes == lengths.draw(options)
    options.seed = 1
    assert shapes != lengths.draw(options)


def test_bounds_the_wrong_way_round(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lengths.parse(["--min=9", "--max=5"])
    assert "--min 9 is more than --max 5" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("allow", "status"), [(2, 0), (1, 1)])
def test_a_run(allow: int, status: int, tmp_path: Path) -> None:
    command = f"{sys.executable} {BENCHMARKS / 'lengths.py'} --model tiny --device cpu --dtype float32 --lower eager"
    command += f" --layers 1 --count 6 --max 64 --allow {allow} --json {tmp_path / 'rows.json'}"
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=120, check=False)
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["status"] == "ok", row
    assert done.returncode == status, done.stdout
    assert [step["length"] for step in row["passes"]] == [length for _, length in row["shapes"]]
    assert len({step["eager"] for step in row["passes"]}) == 6
    assert (row["captured"], row["compilations"], row["compiled_at"]) == (1, 2, [0, 1])
    assert ("2 compilations of 1 captured graphs; 1 of each allowed" in done.stdout) == (status == 1)
