"""benchmarks/dequantize.py on a CPU: both contenders give the same bits and are timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "dequantize.py"


@pytest.mark.parametrize("more", [(), ("--flat",)])
def test_both_are_timed(tmp_path: Path, more: tuple[str, ...]) -> None:
    words = ["--device", "cpu", "--shapes", "64x128,32x256", "--rounds", "2", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run([sys.executable, str(SCRIPT), *words, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["shape"], row["contender"]) for row in rows] == [
        (shape, name) for shape in ("64x128", "32x256") for name in ("fastft", "bitsandbytes")
    ]
    assert all(row["us"] > 0 for row in rows)
    statistics_bytes = 128 * 4 if more else 128 + 4
    assert rows[0]["bytes"] == 64 * 128 // 2 + 64 * 128 * 2 + statistics_bytes
    assert "64x128" in done.stdout
