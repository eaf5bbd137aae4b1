"""benchmarks/head.py on a CPU: contenders agree and are timed; those that are wrong or absent are rows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--device", "cpu", "--hidden", "64", "--tokens", "40", "--rounds", "2"]
PRETENDED = """
import head

def absent(*given):
    import no_such_peer

head.CONTENDERS |= {
    "rough": lambda *given: 1.05 * head.eager(*given), "wrong": lambda *given: 1.2 * head.eager(*given),
    "absent": absent,
}
head.main()
"""


def rows_of(path: Path, *command: str) -> tuple[list[dict[str, Any]], str]:
    """What was measured, and what was printed."""
    words = [sys.executable, *command, *TINY, "--json", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text()), done.stdout


def test_contenders_agree_and_are_timed(tmp_path: Path) -> None:
    names = "GEMMs alone,fastft,eager"
    sizes = ["--vocabularies", "96,200", "--ignored", "0,0.5", "--chunk", "1MiB,2MiB", "--contenders", names]
    rows, printed = rows_of(tmp_path / "rows.json", "head.py", *sizes)
    assert [(row["vocabulary"], row["ignored"], row["contender"], row.get("chunk_bytes")) for row in rows] == [
        (vocabulary, ignored, name, chunk_bytes)
        for vocabulary in (96, 200)
        for ignored in (0.0, 0.5)
        for name, chunk_bytes in (("GEMMs alone", None), ("fastft", 2**20), ("fastft", 2**21), ("eager", None))
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert abs(row["tflops"] * row["ms"] * 1e9 / (4 * 40 * 64 * row["vocabulary"]) - 1) < 1e-6
        assert "dweight_error" not in row
        if row["contender"] != "GEMMs alone":
            assert 1e-4 < row["dhidden_error"] < 1e-2
            assert abs(row["loss_difference"]) < 1e-2 * row["loss"]
    assert "fastft 2 MiB" in printed


def test_one_that_is_wrong_is_not_timed(tmp_path: Path) -> None:
    words = ["--vocabularies", "96", "--trainable", "--contenders", "GEMMs alone,fastft,rough,wrong,absent"]
    rows, printed = rows_of(tmp_path / "rows.json", "-c", PRETENDED, *words)
    found = {row["contender"]: row for row in rows}
    assert {name: row["status"] for name, row in found.items()} == {
        "GEMMs alone": "ok", "fastft": "ok", "rough": "rough", "wrong": "failed", "absent": "failed"
    }  # fmt: skip
    assert {name for name, row in found.items() if "ms" in row} == {"GEMMs alone", "fastft", "rough"}
    assert found["fastft"]["dweight_error"] < 1e-2
    assert abs(found["rough"]["dhidden_error"] - 0.05) < 1e-2
    assert found["absent"]["error"] == "ModuleNotFoundError: No module named 'no_such_peer'"
    assert "rough ~" in printed
    assert "wrong: AssertionError: loss_error" in printed
    row = found["fastft"]
    assert abs(row["tflops"] * row["ms"] * 1e9 / (6 * 40 * 64 * 96) - 1) < 1e-6
