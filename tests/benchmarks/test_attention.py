"""benchmarks/attention.py on a CPU: masks are what they are called, contenders agree, who cannot do a case is a row."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import attention_cases  # noqa: E402
from attention_cases import CASES, Problem, build  # noqa: E402

TINY = "--device cpu --heads 4/2 --head-dim 16 --rounds 2"
PRETENDED = """
import attention

def beyond(problem):
    raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")

attention.CONTENDERS |= {
    "rough": lambda problem: 1.05 * attention.CONTENDERS["eager"](problem),
    "wrong": lambda problem: 1.2 * attention.CONTENDERS["eager"](problem),
    "beyond": beyond,
}
attention.main()
"""
PARSED = """
import sys
import attention

for words in sys.argv[1:]:
    try:
        attention.parse(words.split())
    except SystemExit as done:
        print(done.code)
"""


def rows_of(path: Path, command: list[str], words: str) -> tuple[list[dict[str, Any]], str]:
    """What was measured, and what was printed."""
    done = subprocess.run(
        [sys.executable, *command, *f"{TINY} {words} --json {path}".split()],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text()), done.stdout


def problem_of(case: str, batch: int = 2, length: int = 32) -> Problem:
    torch.manual_seed(0)
    return build(CASES[case], batch, length, (4, 2), 16, partial(torch.randn, dtype=torch.float32))


def expected_mask(case: str, length: int = 32) -> list[list[bool]]:
    """Of a row that has 32 tokens: documents of 8, windows of 16, and the last 8 padded."""
    rules = {
        "bidirectional": lambda i, j: True,
        "padded": lambda i, j: j <= i and j < 24,
        "packed": lambda i, j: j <= i and i // 8 == j // 8,
        "window": lambda i, j: i - 16 < j <= i,
        "sinks": lambda i, j: i - 16 < j <= i,
    }
    rule = rules.get(case, lambda i, j: j <= i)
    return [[rule(i, j) for j in range(length)] for i in range(length)]


@pytest.mark.parametrize("case", CASES)
def test_masks(case: str) -> None:
    problem, expected = problem_of(case), torch.tensor(expected_mask(case))
    allowed = problem.allowed(problem.positions)
    assert torch.equal(allowed.expand(2, 1, 32, 32), expected.expand(2, 1, 32, 32))
    assert problem.share == expected.float().mean().item()
    assert (problem.mask is None) == (case in ("causal", "bidirectional", "softcap"))
    assert problem.mask is None or torch.equal(problem.mask, allowed)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_each_way_to_say_a_mask(case: str) -> None:
    """The op's, flex_attention's and torch's, beside eager's."""
    problem = problem_of(case)
    with torch.no_grad():
        expected = attention_cases.eager(problem)
        given = [one.detach() for one in (problem.query, problem.key, problem.value)]
        sinks = None if problem.sinks is None else problem.sinks.detach()
        # torch gives no sum of exponentials of flex_attention on a CPU
        if sinks is None:
            flexed = attention_cases.flexed(*given, None, problem.block_mask, problem.case.softcap)
            torch.testing.assert_close(flexed, expected)
        torch.testing.assert_close(attention_cases.ours(problem), expected)
        if case not in ("softcap", "sinks"):
            torch.testing.assert_close(attention_cases.dense(problem), expected)


def test_what_is_timed_is_laid_out_as_in_a_model() -> None:
    problem = problem_of("causal")
    assert all(one.transpose(1, 2).is_contiguous() for one in (problem.query, problem.key, problem.value))
    assert attention_cases.ours(problem).is_contiguous()


def test_contenders_agree_and_are_timed(tmp_path: Path) -> None:
    names = ["fastft", "triton", "cudnn", "flash", "dense", "eager"]
    words = f"--cases causal,packed,sinks --shapes 1x32,2x64 --contenders {','.join(names)}"
    rows, printed = rows_of(tmp_path / "rows.json", ["attention.py"], words)
    assert [(row["case"], row["batch"], row["length"], row["contender"]) for row in rows] == [
        (case, *shape, name) for case in ("causal", "packed", "sinks") for shape in ((1, 32), (2, 64)) for name in names
    ]
    unable = {(case, name) for case in ("causal", "packed", "sinks") for name in ("triton", "cudnn")}
    unable |= {("packed", "flash"), ("sinks", "flash"), ("sinks", "dense")}
    assert {(row["case"], row["contender"]) for row in rows if row["status"] == "unsupported"} == unable
    for row in rows:
        if row["status"] == "unsupported":
            assert "ms_both" not in row
            continue
        assert row["status"] == "ok", row
        for direction, products in (("forward", 4), ("both", 14)):
            assert 0 < row[f"ms_{direction}_p20"] <= row[f"ms_{direction}"] <= row[f"ms_{direction}_p80"]
            counted = products * row["batch"] * 4 * row["length"] ** 2 * row["head_dim"] * row["share"]
            assert row[f"tflops_{direction}"] * row[f"ms_{direction}"] * 1e9 == pytest.approx(counted)
        assert 1e-4 < row["out_error"] < 2e-2
        assert 1e-4 < row["grad_error"] < 2e-2
        base = "eager" if row["case"] == "sinks" else "dense"
        assert (row["ratio"] == 1.0) == (row["contender"] == base)
    assert "flash, first at packed 1x32: NotImplementedError: torch's FlashAttention takes no mask" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_one_that_is_wrong_is_not_timed(tmp_path: Path) -> None:
    words = "--cases causal --shapes 1x32 --contenders eager,rough,wrong,beyond"
    rows, printed = rows_of(tmp_path / "rows.json", ["-c", PRETENDED], words)
    found = {row["contender"]: row for row in rows}
    assert {name: row["status"] for name, row in found.items()} == {
        "eager": "ok", "rough": "rough", "wrong": "wrong", "beyond": "out of memory"
    }  # fmt: skip
    assert {name for name, row in found.items() if "ms_both" in row} == {"eager", "rough"}
    assert abs(found["rough"]["out_error"] - 0.05) < 2e-2
    assert "ratio" not in found["rough"]
    assert "~" in next(line for line in printed.splitlines() if " rough " in line)
    assert "wrong, first at causal 1x32: AssertionError: out_error" in printed


def test_bad_arguments_are_told() -> None:
    """One process for all: importing transformers takes seconds."""
    wrong = ["--heads 4/3", "--cases typo", "--contenders fastft,typo", "--shapes 4"]
    done = subprocess.run([sys.executable, "-c", PARSED, *wrong], capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.stdout.split() == ["2"] * len(wrong), done.stderr[-2000:]
    assert all(f"argument {words.split()[0]}: " in done.stderr for words in wrong)
