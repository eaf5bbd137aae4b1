"""benchmarks/compare.py: what is of one thing, what is noise, what is said, and when it fails."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
SPEC = importlib.util.spec_from_file_location("benchmarks_compare", BENCHMARKS / "compare.py")
assert SPEC is not None
assert SPEC.loader is not None
compare = importlib.util.module_from_spec(SPEC)  # there is a tests/compare.py too
sys.modules[SPEC.name] = compare
SPEC.loader.exec_module(compare)

Row = dict[str, Any]


def step(seconds: float = 1.0, spread: float = 0.005, **more: Any) -> Row:
    """A row as step.py writes it."""
    return {
        "model": "tiny", "layers": None, "nf4": True, "dtype": "bfloat16", "device": "cuda", "mask": "ones",
        "loss": "inside", "seed": 0, "lower": "inductor", "batch": 2, "length": 128, "contender": "fastft",
        "steps": 10, "warmup": 3, "turns": None, "gpu": "A card", "cuda": "13.0", "status": "ok",
        "versions": {"torch": "2.13.0", "fastft": "0.1.0"}, "seconds_p20": seconds * (1 - spread),
        "seconds_p50": seconds, "seconds_p80": seconds * (1 + spread), "tokens_per_s": 256 / seconds,
        "peak_gib": 4.0, "first_step_s": 60.0, **more,
    }  # fmt: skip


def verdicts(old: Row, new: Row) -> dict[str, str]:
    """What is said of each figure."""
    found = compare.Comparison.of([old], [new])
    return {one.name: ("worse" if one.worse > 0 else "better") if one.beyond else "" for one in found.changes}


def run(tmp_path: Path, old: list[Row], new: list[Row], *words: str) -> tuple[int, str]:
    """Exit status and what is printed."""
    for name, rows in (("old.json", old), ("new.json", new)):
        (tmp_path / name).write_text(json.dumps(rows))
    text = io.StringIO()
    paths = [str(tmp_path / name) for name in ("old.json", "new.json")]
    return compare.main([*paths, *words], Console(file=text, width=200)), text.getvalue()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (step(), step(), {"tokens/s": "", "peak GiB": "", "first step s": ""}),
        (step(), step(1.1), {"tokens/s": "worse"}),
        (step(), step(0.9), {"tokens/s": "better"}),
        (step(spread=0.2), step(1.1, spread=0.2), {"tokens/s": ""}),  # the spreads overlap
        (step(spread=0.0001), step(1.005, spread=0.0001), {"tokens/s": ""}),  # too little, however narrow they are
        (step(), step(peak_gib=4.02), {"peak GiB": ""}),
        (step(), step(peak_gib=4.2), {"peak GiB": "worse"}),
        (step(), step(first_step_s=70.0), {"first step s": ""}),
        (step(), step(first_step_s=90.0), {"first step s": "worse"}),
        (step(), step(first_step_s=30.0), {"first step s": "better"}),
    ],
)
def test_what_is_beyond_noise(old: Row, new: Row, expected: dict[str, str]) -> None:
    found = verdicts(old, new)
    assert {name: found[name] for name in expected} == expected
    assert not any(verdict for name, verdict in found.items() if name not in expected)


def test_without_a_spread_a_threshold_decides() -> None:
    old = {"us": 100.0, "op": "glu", "shape": "8x8", "direction": "forward", "contender": "fastft"}
    assert verdicts(old, {**old, "us": 102.0}) == {"µs": ""}
    assert verdicts(old, {**old, "us": 104.0}) == {"µs": "worse"}
    assert verdicts({**old, "us_p20": 99.0, "us_p80": 101.0}, {**old, "us": 104.0}) == {"µs": "worse"}


def test_first_steps_beside_others_are_not_compared() -> None:
    assert "first step s" not in verdicts(step(), step(turns="a file", first_step_s=200.0))


def test_rows_are_of_one_thing_if_they_were_asked_for_the_same() -> None:
    """Neither date, commit, card nor results are part of it; rows from before there was an option have its default."""
    older = step(date="then", commit="a", gpu="Another")
    del older["loss"]
    assert compare.key_of(older) == compare.key_of(step(2.0, date="now", commit="b"))
    for name, value in (("batch", 4), ("nf4", False), ("layers", 8), ("budget", "min"), ("contender", "eager")):
        assert compare.key_of(step(**{name: value})) != compare.key_of(step()), name
    assert compare.key_of(step(device="cuda:0")) == compare.key_of(step())
    assert compare.key_of(step(tokens=[256] * 10)) == compare.key_of(step())  # of each step, as trainer.py has them


def test_what_was_measured_twice_is_compared_in_turn() -> None:
    found = compare.Comparison.of([step(), step(2.0)], [step(), step(2.0)])
    assert [one.old for one in found.changes if one.name == "tokens/s"] == [256.0, 128.0]
    assert not any(one.beyond for one in found.changes)


def test_rows_of_one_file_alone_are_named(tmp_path: Path) -> None:
    status, text = run(tmp_path, [step(), step(batch=4)], [step(), step(contender="eager")], "--fail", "1%")
    assert status == 0
    assert "only in the old file: batch 4, fastft" in text
    assert "only in the new file: batch 2, eager" in text


def test_another_card_or_version_is_said(tmp_path: Path) -> None:
    new = step(gpu="Another", versions={"torch": "2.14.0", "fastft": "0.2.0", "triton": "3.8"})
    _, text = run(tmp_path, [step()], [new])
    assert "warning: not the same in both: gpu: A card, then Another" in text
    assert "torch: 2.13.0, then 2.14.0" in text
    assert "triton" not in text  # the old file does not tell
    assert "0.2.0" not in text  # fastft's own is what is compared
    _, text = run(tmp_path, [step()], [step()])
    assert "warning" not in text


@pytest.mark.parametrize(
    ("new", "words", "expected"),
    [
        (step(1.1), [], 0),
        (step(1.1), ["--fail", "3%"], 1),
        (step(1.1), ["--fail", "0.03"], 1),
        (step(1.1), ["--fail", "20%"], 0),
        (step(0.5), ["--fail", "3%"], 0),
        (step(1.1, spread=0.2), ["--fail", "3%"], 0),  # worse, and within noise
        (step(peak_gib=4.3), ["--fail", "3%"], 1),
        ({**step(), "status": "out of memory"}, ["--fail", "50%"], 1),
    ],
)
def test_exit_status(tmp_path: Path, new: Row, words: list[str], expected: int) -> None:
    status, _ = run(tmp_path, [step()], [new], *words)
    assert status == expected


def test_a_failure_is_told_and_one_that_was_there_before_is_none(tmp_path: Path) -> None:
    failed = {**step(), "status": "out of memory"}
    assert "ok, then out of memory" in run(tmp_path, [step()], [failed])[1]
    status, text = run(tmp_path, [failed], [failed], "--fail", "1%")
    assert (status, "out of memory" in text) == (0, False)
    assert run(tmp_path, [failed], [step()], "--fail", "1%")[0] == 0


def test_only_what_changed(tmp_path: Path) -> None:
    _, text = run(tmp_path, [step()], [step(1.1)], "--changed")
    assert "tokens/s" in text
    assert "peak GiB" not in text
    assert "3 figures: 1 worse, 0 better" in text


@pytest.mark.parametrize("text", ["rows", "{}", "[1]"])
def test_what_holds_no_rows_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"rows\.json"):
        compare.main([str(path), str(path)])


@pytest.mark.parametrize("text", ["", "x%", "-1%", "300%", "nan"])
def test_what_is_no_share_is_an_error(text: str) -> None:
    with pytest.raises(Exception, match="no share"):
        compare.percent(text)


def test_two_files_that_were_measured() -> None:
    """The step of 2026-11-25 before and after logits became lazy: 2 GiB less, and as fast."""
    folder = BENCHMARKS / "results"
    names = ("2026-11-25-step-llama-8b-nf4-plain-h100.json", "2026-11-25-step-llama-8b-nf4-lazy-h100.json")
    old, new = (compare.rows_of(folder / name) for name in names)
    found = compare.Comparison.of(old, new)
    beyond = {(dict(one.what)["contender"], one.name): one.new / one.old for one in found.changes if one.beyond}
    assert beyond.pop(("fastft", "peak GiB")) == pytest.approx(22.14 / 24.06, abs=1e-3)
    assert set(beyond) == {("fastft", "host s")}
    assert [dict(key)["contender"] for key in found.only_old] == ["fastft-plain"]


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_file_is_as_itself(path: Path) -> None:
    """Every benchmark's rows are told apart and compared; no row is lost."""
    rows = compare.rows_of(path)
    found = compare.Comparison.of(rows, rows)
    assert (found.only_old, found.only_new, found.failed) == ([], [], [])
    assert not any(one.beyond or one.worse for one in found.changes)
    keys = compare.by_key(rows)
    assert len(keys) == len(rows)
