"""benchmarks/step.py from the command line to the rows, the table and the picture."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import checkout  # noqa: E402
import contenders  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import step  # noqa: E402
import workers  # noqa: E402

Row = dict[str, Any]
QUICK = "--model tiny --device cpu --lower eager --steps 2 --warmup 1 --batches 1x32 --contenders fastft"
ASKED = {"contender", "batch", "length", "model", "nf4", "dtype", "device", "mask", "loss", "seed", "lower"}
ASKED |= {"layers", "steps", "warmup", "turns", "as_trainer", "lengths", "median", "max_length"}
ABOUT = {"date", "commit", "status", "gpu", "cuda", "versions", "wall_s", "log"}
MEASURED = {
    *("seconds", "seconds_p20", "seconds_p50", "seconds_p80", "tokens_per_s", "first_step_s", "build_s"),
    *("peak_gib", "peak_steps_gib", "peak_warmup_gib", "model_gib", "loss_first", "loss_last", "grad_norm_last"),
    *("reserved_gib", "trained_parameters", "graphs", "graph_breaks", "warmup_s", "first_step_parts_s"),
}
ON_CUDA = {"host_s", "host_syncs", "gpu_busy_s", "gpu_busy", "occupancy_error"}


def job_of(**changes: Any) -> workers.Job:
    """What a worker is asked, quick by default."""
    (job,) = step.jobs(step.parse(QUICK.split()), Path("unused"))
    return workers.Job(job.label, job.asked | changes, None)


def row_of(contender: str, **changes: Any) -> Row:
    """A row as a worker would have measured it."""
    row: Row = {**job_of(contender=contender).asked, "status": "ok", "gpu": "Some GPU", "wall_s": 9.0}
    row |= {"tokens_per_s": 1e4, "peak_gib": 20.0}
    row |= dict.fromkeys(MEASURED - row.keys(), 0.5) | dict.fromkeys(ON_CUDA)
    return row | changes


@pytest.mark.slow
def test_eager_and_fastft(tmp_path: Path) -> None:
    command = f"{sys.executable} {BENCHMARKS / 'step.py'} --model tiny --batches 1x32 --contenders eager,fastft"
    command += (
        f" --device cpu --dtype float32 --lower eager --steps 2 --warmup 1 --rows --json {tmp_path / 'rows.json'}"
    )
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=120, check=True)
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows:
        assert row["status"] == "ok", row
        assert row.keys() == ASKED | ABOUT | MEASURED | ON_CUDA
        assert {row[key] for key in ON_CUDA} == {None}
        assert len(row["seconds"]) == 2
        assert row["seconds_p20"] <= row["seconds_p50"] <= row["seconds_p80"]
        assert row["tokens_per_s"] == pytest.approx(32 / row["seconds_p50"])
    eager, fastft = rows
    assert (eager["contender"], fastft["contender"]) == ("eager", "fastft")
    assert (eager["graphs"], fastft["graphs"], fastft["graph_breaks"]) == (0, 1, 0)
    for key in ("loss_first", "loss_last", "grad_norm_last"):
        assert fastft[key] == pytest.approx(eager[key], rel=1e-4)
    lines = done.stdout.splitlines()
    assert [json.loads(line) for line in lines if line.startswith("{")] == rows
    assert [line.split()[:2] for line in lines if line.startswith("1x32")] == [["1x32", "eager"], ["1x32", "fastft"]]
    assert "[1/2] eager 1x32" in done.stderr
    assert "[2/2] fastft 1x32" in done.stderr


@pytest.mark.slow
def test_rows_of_many_lengths_as_a_trainer_steps(tmp_path: Path) -> None:
    command = f"{sys.executable} {BENCHMARKS / 'step.py'} --model tiny --batches 3x9 --lengths 8-40 --as-trainer"
    command += " --contenders eager,fastft --device cpu --dtype float32 --lower eager --steps 3 --warmup 2"
    done = subprocess.run([*command.split(), "--json", str(tmp_path / "rows.json")], capture_output=True, check=True)
    eager, fastft = json.loads((tmp_path / "rows.json").read_text())
    for row in (eager, fastft):
        assert (row["batch"], row["length"], row["lengths"], row["as_trainer"]) == (3, 40, [8, 40], True)
        assert len(row["warmup_s"]) == 2
        assert row["first_step_s"] == row["warmup_s"][0] >= sum(row["first_step_parts_s"].values())
        tokens = 3 * sum(row["longest_rows"])
        assert all(8 <= longest <= 40 for longest in row["longest_rows"])
        assert row["tokens_per_s"] == pytest.approx(tokens / sum(row["seconds"]))
        assert row["tokens_per_s_without_padding"] == pytest.approx(row["tokens_per_s"] * (1 - row["padding"]))
        assert 0 < row["padding"] < 1
    assert eager["longest_rows"] == fastft["longest_rows"]
    assert len(set(eager["longest_rows"])) > 1
    assert fastft["loss_last"] == pytest.approx(eager["loss_last"], rel=2e-2)
    assert b"rows of 8 to 40 tokens" in done.stdout


def test_padding_is_on_the_right_and_has_no_labels() -> None:
    run = measure.Run.of({**job_of().asked, "batch": 4, "lengths": (3, 9), "device": "cpu"})
    for batch in measure.make_batches(run):
        read = batch["attention_mask"].bool()
        assert 3 <= int(read.sum(1).min()) <= int(read.sum(1).max()) == read.shape[1] <= 9
        assert bool((read.int().diff(dim=1) <= 0).all()), "what is read comes first"
        assert bool((batch["labels"][~read] == measure.IGNORED).all())
        assert torch.equal(batch["labels"][read], batch["input_ids"][read])


def test_padding_up_to_the_longest_that_there_may_be() -> None:
    asked = {**job_of().asked, "batch": 4, "length": 9, "lengths": (3, 9), "device": "cpu"}
    own, longest = (measure.make_batches(measure.Run.of({**asked, "max_length": fixed})) for fixed in (False, True))
    assert {batch["input_ids"].shape[1] for batch in longest} == {9}
    assert {batch["input_ids"].shape[1] for batch in own} != {9}
    assert torch.equal(own[0]["attention_mask"].sum(1), longest[0]["attention_mask"].sum(1))


@pytest.mark.parametrize("text", ["8", "0-4", "9-3", "a-b"])
def test_lengths_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.parse([*QUICK.split(), "--lengths", text])
    assert "--lengths" in capsys.readouterr().err


def test_a_crash_is_a_row(tmp_path: Path) -> None:
    row = workers.launch(
        "measure", job_of(device="nowhere"), workers.make_environment(tmp_path), tmp_path / "1", timeout=120
    )
    assert row["status"] == "error"
    assert row["error"].startswith("RuntimeError: Expected one of cpu, cuda")
    assert "Traceback" in row["detail"]
    assert row["versions"]["torch"]


def test_a_timeout_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never.py").write_text("import threading\ndef measure(asked):\n    threading.Event().wait()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = workers.launch("never", job_of(), workers.make_environment(tmp_path), tmp_path / "1", timeout=0.2)
    assert (row["status"], row["error"]) == ("timeout", "no result after 0.2 s")


@pytest.mark.slow
def test_a_timeout_tells_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never.py").write_text("import threading\ndef measure(asked):\n    threading.Event().wait()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = workers.launch("never", job_of(), workers.make_environment(tmp_path), tmp_path / "1", timeout=20)
    assert row["status"] == "timeout"
    assert re.search(r'never.py", line 3 in measure', row["log"]), row["log"]


def test_one_failure_does_not_stop_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"status": "out of memory", "error": "OutOfMemoryError: tried to allocate 9 GiB", "wall_s": 1.0}
    monkeypatch.setattr(
        workers, "launch", lambda _, job, *__: failed if job.asked["contender"] == "eager" else row_of("fastft")
    )
    options = step.parse(f"--contenders eager,fastft --batches 1x32,4x64 --json {tmp_path / 'rows.json'}".split())
    rows = workers.run_all("measure", step.jobs, options)
    assert [row["status"] for row in rows] == ["out of memory", "ok"] * 2
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"status": "out of memory", "error": "OutOfMemoryError: " + "very " * 60 + "long"}
    rows = [
        row_of("eager"),
        {**job_of(contender="eager-checkpoint").asked, **failed},
        row_of("fastft", tokens_per_s=123456.0, peak_gib=5.0, seconds_p50=123.456, grad_norm_last=1.234e-5)
        | {"host_s": 0.1234, "gpu_busy": 0.987},
    ]
    for key in ON_CUDA:
        del rows[0][key]  # as in rows of before there were such figures
    report.show(rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    fastft = next(line for line in out.splitlines() if "fastft" in line).split()
    times, ratios = ["123.456", "0.500", "0.500", "123,456", "12.35"], ["5.00", "0.25", "0.5"]
    assert fastft[2:] == [*times, *ratios, "123", "99", "0.5000", "1.234e-05"]
    eager = next(line for line in out.splitlines() if " eager " in line).split()
    assert eager[10:12] == ["-", "-"]
    assert "eager-checkpoint 1x32: OutOfMemoryError: very" in out
    report.draw(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_a_failed_profiler_is_told_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    report.show([row_of("fastft", host_s=0.02, occupancy_error="RuntimeError: no profiler")])
    out = capsys.readouterr().out
    assert " 20 " in out
    assert "fastft 1x32, host and GPU time: RuntimeError: no profiler" in out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastft", {}),
        ("fastft-whole", {"outline": False}),
        ("fastft-min", {"memory_budget": "min"}),
        ("fastft-graphs", {"cuda_graphs": True}),
    ],
)
def test_options_of_contenders(name: str, options: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda model, **how: (model, how))
    model, how = contenders.CONTENDERS[name](lambda: "a model", "eager")
    assert model == "a model"
    assert how == {"backend": "fastft", "options": {"lower": "eager", **options}}


def test_contenders_with_options_run_only_when_asked_for() -> None:
    assert step.parse([]).contenders == ["eager", "eager-checkpoint", "inductor", "fastft"]


def test_caches(tmp_path: Path) -> None:
    batches = ["--batches", "1x32,4x64"]
    cold = [job.caches for job in step.jobs(step.parse(batches), tmp_path)]
    assert len(set(cold)) == 8
    assert {job.caches for job in step.jobs(step.parse([*batches, "--warm-cache"]), tmp_path)} == {None}


def test_links_stand_in_for_an_installation(tmp_path: Path) -> None:
    checkout.link_package(tmp_path)
    (found,) = metadata.distributions(path=[str(tmp_path)])
    assert found.metadata["Name"] == "fastft"
    (point,) = found.entry_points.select(group="torch_dynamo_backends")
    assert (point.name, point.module) == ("fastft", "fastft.rewriter.backend")
    assert (tmp_path / "fastft/rewriter/backend.py").samefile(BENCHMARKS.parent / "rewriter/backend.py")


def batch_of(mask: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    run = measure.Run.of(job_of(mask=mask, batch=batch, length=length).asked)
    return measure.make_batches(run)[0]


@pytest.mark.parametrize("mask", ["ones", "none"])
def test_batches_without_padding(mask: str) -> None:
    made = batch_of(mask, 2, 8)
    assert set(made) == {"input_ids", "labels"} | ({"attention_mask"} if mask == "ones" else set())
    assert torch.equal(made["labels"], made["input_ids"])
    assert mask == "none" or made["attention_mask"].tolist() == [[1] * 8] * 2


@pytest.mark.parametrize("batch", [1, 3])
def test_padded_batches(batch: int) -> None:
    """The last quarter of all rows but the first, or of the only one."""
    made = batch_of("padded", batch, 10)
    assert set(made) == {"input_ids", "labels", "attention_mask"}
    whole = [[1] * 10] * (batch > 1)
    assert made["attention_mask"].tolist() == whole + [[1] * 8 + [0] * 2] * (batch - len(whole))
    assert torch.equal(made["labels"], torch.where(made["attention_mask"] == 1, made["input_ids"], -100))


@pytest.mark.parametrize(("length", "document"), [(1300, 325), (2100, 512), (10, 2), (3, 1)])
def test_packed_batches(length: int, document: int) -> None:
    made = batch_of("packed", 2, length)
    assert set(made) == {"input_ids", "labels", "position_ids"}
    assert made["position_ids"].tolist() == [[i % document for i in range(length)]] * 2
    assert torch.equal(made["labels"], torch.where(made["position_ids"] > 0, made["input_ids"], -100))


def test_packed_batches_are_as_the_collator_makes_them() -> None:
    made = batch_of("packed", 1, 16)
    documents = [{"input_ids": ids} for ids in made["input_ids"].view(4, 4).tolist()]
    expected = transformers.DataCollatorWithFlattening()(documents)
    assert set(made) == set(expected)
    assert all(torch.equal(made[name], value) for name, value in expected.items())


def test_masks_change_no_tokens() -> None:
    first, *others = (batch_of(mask, 2, 8)["input_ids"] for mask in ("ones", "none", "padded", "packed"))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    "wrong", ["--batches 4", "--batches 0x32", "--contenders eager,typo", "--steps 0", "--mask some"]
)
def test_bad_arguments_are_told(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.parse(wrong.split())
    assert wrong.split()[0] in capsys.readouterr().err
