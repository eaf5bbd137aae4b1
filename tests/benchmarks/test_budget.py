"""benchmarks/budget.py: what is asked of the workers, the table, the comparison with peers, and a run of eager."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import budget  # noqa: E402
import contenders  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import workers  # noqa: E402

Row = dict[str, Any]
QUICK = "--model tiny --device cpu --lower eager --steps 2 --warmup 1 --batches 1x32"
FIGURES = {"seconds_p50": 0.5, "first_step_s": 30.0, "loss_last": 0.5, "grad_norm_last": 1.25}


def asked_of(words: str) -> list[Row]:
    """What the first workers are asked."""
    options = budget.parse([*QUICK.split(), *words.split()])
    return [job.asked for job in budget.jobs(budget.first_cases(options), options, Path("unused"))]


def row_of(contender: str, gib: float | None, tokens: float, **changes: Any) -> Row:
    """A row as a worker would have measured it."""
    (asked,) = asked_of("--budgets none --contenders eager")
    row = asked | {"status": "ok", "gpu": "Some GPU", "contender": contender, "tokens_per_s": tokens}
    return row | FIGURES | {"measured_gib": gib, "planned_gib": None} | changes


def point(memory_budget: str, gib: float, tokens: float, **changes: Any) -> Row:
    return row_of("fastft", gib, tokens, budget=memory_budget, **changes)


def test_what_workers_are_asked() -> None:
    eager, *ours = asked_of("--budgets min,0.5,14GiB,40% --contenders eager")
    assert (eager["budget"], eager["options"]) == (None, {})
    assert [row["budget"] for row in ours] == ["min", "0.5", "14GiB", "40%"]
    assert [row["options"] for row in ours] == [{"memory_budget": value} for value in ("min", 0.5, "14GiB", "40%")]
    assert measure.Run.of(ours[2]).options == {"memory_budget": "14GiB"}
    del eager["options"]  # as other commands ask
    assert measure.Run.of(eager).options == {}


def test_other_contenders_run_before_the_budgets_of_a_batch() -> None:
    asked = asked_of("--contenders eager,liger --batches 1x32,2x16")
    ends = ["fastft min", "fastft max-speed"]
    assert [budget.label(row) for row in asked] == ["eager", "liger", *ends] * 2
    assert [row["batch"] for row in asked] == [1] * 4 + [2] * 4


def test_caches_are_not_shared() -> None:
    options = budget.parse(["--contenders", "eager"])
    caches = [job.caches for job in budget.jobs(budget.first_cases(options), options, Path("scratch"))]
    assert len(set(caches)) == 3
    assert None not in caches


@pytest.mark.parametrize(
    "wrong",
    [
        *("--budgets 2", "--budgets 5,min,6", "--budgets fast", "--budgets 1.5", "--budgets 0.0", "--budgets 101%"),
        *("--cap 12", "--cap card", "--budgets none", "--contenders typo"),
    ],
)
def test_bad_arguments_are_told(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        budget.parse(wrong.split())
    assert wrong.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("12GB", 12 * 10**9), ("16GiB", 16 * 2**30), ("1.5 TiB", 3 * 2**39), ("7B", 7)]
)
def test_bytes(text: str, size_bytes: int) -> None:
    assert budget.bytes_of(text) == size_bytes


def test_budgets_between_two_peaks() -> None:
    rows = [point("min", 4.0, 1.0), point("max-speed", 32.0, 2.0), point("9GiB", 9.0, 1.5)]
    made = budget.cases_between(rows, (1, 32), ["9GiB", "4"])
    assert made == [((1, 32), "fastft", "8.000GiB"), ((1, 32), "fastft", "16.000GiB")]
    assert budget.cases_between(rows, (1, 32), ["9GiB"]) == []
    assert budget.cases_between(rows, (2, 32), ["4"]) == []


@pytest.mark.parametrize("low", [None, 32.0])
def test_without_two_peaks_there_is_nothing_between(low: float | None) -> None:
    rows = [row_of("fastft", low, 1.0, budget="min"), point("max-speed", 32.0, 2.0)]
    assert budget.cases_between(rows, (1, 32), ["4"]) == []
    assert budget.cases_between(rows[1:], (1, 32), ["4"]) == []


def test_a_number_of_budgets_takes_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"min": 1.0, "max-speed": 4.0, "2.000GiB": 2.0}
    measured = {"status": "ok", "gpu": "Some GPU", "tokens_per_s": 1.0, "planned_gib": None, "wall_s": 1.0}
    monkeypatch.setattr(
        workers, "launch", lambda _, job, *__: measured | {"measured_gib": peaks.get(job.asked["budget"], 9.0)}
    )
    path = tmp_path / "rows.json"
    rows = budget.run(budget.parse(f"--budgets 3 --contenders eager --json {path}".split()))
    assert [budget.label(row) for row in rows] == ["eager", "fastft min", "fastft max-speed", "fastft 2.000GiB"]
    assert json.loads(path.read_text()) == rows
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(6.0, 110.0)], ["faster (a: 110 tokens/s in 6.00 GiB)", "needs less (a: 110"]),
        ([(8.0, 100.0)], ["not faster (a: 100", "does not need less (a: 100"]),
        ([(6.0, 90.0), (9.0, 120.0)], ["not faster (a: 90", "does not need less (b: 120"]),
        ([(6.0, 90.0), (7.0, 105.0), (7.5, 103.0)], ["faster (b: 105", "needs less (b: 105"]),
        ([(9.0, 120.0)], ["not measured in so little memory", "does not need less (a: 120"]),
        ([(6.0, 90.0)], ["not faster (a: 90", "not at no less speed"]),
        ([], ["not measured in so little memory", "not at no less speed"]),
    ],
)
def test_verdict(points: list[tuple[float, float]], said: list[str]) -> None:
    """A peer of 100 tokens/s in 8 GiB against points a, b, c; no line is drawn between them."""
    rows = [point(name, *figures) for name, figures in zip("abc", points, strict=False)]
    text = budget.verdict(row_of("unsloth", 8.0, 100.0), rows)
    assert text.startswith("1x32 unsloth (100 tokens/s in 8.00 GiB): ")
    for answer, expected in zip(text.split(": ", 1)[1].split("; "), said, strict=True):
        assert expected in answer
        assert ("not faster" in answer) == ("not faster" in expected)


def test_table_verdict_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"status": "out of memory", "error": "OutOfMemoryError: tried to allocate 9 GiB", "measured_gib": None}
    rows = [
        point("max-speed", 20.0, 12345.6, planned_gib=16.0),
        point("min", 5.0, 8000.0),
        row_of("unsloth", 6.0, 7000.0),
        {**asked_of("--budgets none --contenders eager")[0], **failed},
        point("2GiB", 0.0, 0.0) | failed,
    ]
    budget.show(rows)
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert max(len(line) for line in out.splitlines()[:8]) <= 120
    rest = ["0.500", "30.0", "0.5000", "1.25"]
    assert ["1x32", "fastft", "max-speed", "12,346", "20.00", "16.00", "1.250", *rest] in lines
    assert ["1x32", "fastft", "min", "8,000", "5.00", "-", "-", *rest] in lines
    assert "fastft 2GiB 1x32: OutOfMemoryError: tried to allocate 9 GiB" in out
    assert "unsloth (7,000 tokens/s in 6.00 GiB): in no more memory fastft is faster (min: 8,000" in out
    budget.draw(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_rows_of_several_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "1.json", tmp_path / "2.json"]
    for path, row in zip(paths, [point("min", 5.0, 8e3), row_of("unsloth", 6.0, 7e3)], strict=True):
        path.write_text(json.dumps([row]))
    monkeypatch.setattr(sys, "argv", ["budget.py", "--show", *map(str, paths)])
    budget.main()
    assert "fastft is faster" in capsys.readouterr().out
    paths[1].write_text(json.dumps([row_of("unsloth", 6.0, 7e3, cap_bytes=2**34)]))
    with pytest.raises(SystemExit, match="different models or settings"):
        budget.main()


def test_the_plan_is_that_of_the_last_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [SimpleNamespace(), SimpleNamespace(plan=None), SimpleNamespace(plan=7)]
    for count, expected in enumerate((None, None, None, 7)):
        made = SimpleNamespace(graphs=graphs[:count])
        monkeypatch.setattr("fastft.compilations", lambda made=made: made, raising=False)
        assert budget.plan_of_last() == expected


def test_a_cap_leaves_room_for_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", given.append)
    budget.cap(16 * 2**30)
    assert given == [15.5 / 80]
    with pytest.raises(RuntimeError, match="more than this card's 80"):
        budget.cap(81 * 2**30)


def test_peers_are_imported_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"liger", "liger-checkpoint", "unsloth", "unsloth-checkpoint"} <= contenders.CONTENDERS.keys()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = set(sys.modules)
    for name in contenders.CONTENDERS.keys() - {"unsloth", "unsloth-checkpoint"}:
        peers.import_first(name)
    with pytest.raises(RuntimeError, match="unsloth-checkpoint needs CUDA"):
        peers.import_first("unsloth-checkpoint")
    assert set(sys.modules) == before


def test_batches_are_lengthened_for_unsloth() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    peers._set_length(model, 8)
    for length, expected in ((4, 8), (16, 16)):
        peers._lengthen(model, (), {"input_ids": torch.zeros(1, length)})
        assert {module.max_seq_length for module in model.modules()} == {expected}


def test_a_run_of_eager(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, BENCHMARKS / "budget.py", *QUICK.split(), "--dtype", "float32", "--json", path]
    command += ["--budgets", "none", "--contenders", "eager", "--turns", tmp_path / "turns"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (row,) = json.loads(path.read_text())
    assert row["status"] == "ok", row
    assert {row[key] for key in ("budget", "planned_gib", "measured_gib", "reserved_gib", "cap_bytes")} == {None}
    assert row["options"] == {}
    assert row["tokens_per_s"] > 0
    assert [line.split()[:2] for line in done.stdout.splitlines()][-1] == ["1x32", "eager"]
