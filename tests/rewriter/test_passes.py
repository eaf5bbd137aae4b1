"""The passes as data: watched, written down, and switched off one by one."""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_stack import LAYERS, Stack, X
from torch import Tensor

import fastft
from fastft import patterns
from fastft.rewriter import passes
from fastft.rewriter.context import SWITCHED_OFF

KINDS = 1  # of layers, of which one is traced and rewritten for all


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compiled(**options: object) -> tuple[Tensor, fastft.Report]:
    """Compile a stack, run it, and return its result with the report of its graph."""
    torch.manual_seed(0)
    model = Stack()
    call = torch.compile(model, backend="fastft", options={"lower": "eager", "strict": True, **options})
    result = call(X)
    torch.testing.assert_close(result, model(X))
    return result, fastft.Report(graphs=fastft.compilations().graphs[-1:])


def applied(report: fastft.Report) -> Counter[str]:
    return Counter(lifted.rule for lifted in (*report.lifted, *report.fused))


def test_each_pass_is_recorded() -> None:
    _, report = compiled()
    (graph,) = report.graphs
    assert [record.name for record in graph.passes] == [each.name for each in passes.PASSES]
    by_name = {record.name: record for record in graph.passes}
    lift = by_name["lift"]
    assert lift.nodes_after < lift.nodes_before
    assert (lift.changes["fastft.rms_norm"], lift.changes["rsqrt"]) == (KINDS, -KINDS)
    assert lift.changes["fastft.glu"] == KINDS
    assert not by_name["attention"].changes
    for before, after in zip(graph.passes, graph.passes[1:], strict=False):
        assert before.nodes_after == after.nodes_before
    assert all(record.seconds >= 0 for record in graph.passes)


def test_each_rule_is_counted() -> None:
    _, report = compiled()
    (graph,) = report.graphs
    norm = graph.rules["rms_norm.llama"]
    assert (norm.attempts, norm.matches, norm.applied) == (KINDS, KINDS, KINDS)
    assert norm.seconds > 0
    others = [record for name, record in graph.rules.items() if name.startswith("rms_norm.") and record is not norm]
    assert all(record.attempts == KINDS and record.applied == 0 for record in others)
    assert norm.applied < applied(report)["rms_norm.llama"] == LAYERS, "the report is of every layer"
    text = str(report)
    assert "What rules took" in text
    assert "What passes took" in text


@pytest.mark.parametrize("name", ["glu.silu", "op:glu", "pass:lift"])
def test_what_is_disabled_is_left_alone(name: str) -> None:
    own, all_on = compiled()
    result, report = compiled(disable=[name])
    assert torch.allclose(own, result)
    gone = {"glu.silu"} if name != "pass:lift" else set(applied(all_on))
    assert applied(report) == Counter({rule: times for rule, times in applied(all_on).items() if rule not in gone})
    if name != "pass:lift":
        assert {miss.reason for miss in report.near_misses} == {SWITCHED_OFF}


def test_one_application_is_disabled() -> None:
    _, report = compiled(disable=["rms_norm.llama@layers.1"])
    assert [lifted.module for lifted in report.lifted if lifted.rule == "rms_norm.llama"] == ["layers.0", "layers.2"]


def test_a_pass_that_is_disabled_does_not_run() -> None:
    _, report = compiled(disable=["pass:fuse", "pass:loss"])
    assert not {"fuse", "loss"} & {record.name for record in report.graphs[0].passes}


@pytest.mark.parametrize(
    ("disable", "hint"),
    [
        (["pass:lft"], "pass:lift"), (["op:glue"], "op:glu"), (["rms_norm.lama@layers.1"], "rms_norm.llama"),
        (["pass:inline_checkpoints"], "pass:"), ("pass:lift", "a list of names"), ([1], "a list of names"),
    ],
)  # fmt: skip
def test_what_nothing_is_called_is_an_error(disable: object, hint: str) -> None:
    with pytest.raises(Exception, match=hint) as caught:
        torch.compile(Stack(), backend="fastft", options={"lower": "eager", "disable": disable})(X)
    assert "OptionsError" in repr(caught.value) + str(caught.value)


def test_names_are_those_of_the_rules() -> None:
    assert {rule.name for rule in patterns.RULES} <= set(passes.rule_names())
    assert len(set(passes.rule_names())) == len(passes.rule_names())


def test_graphs_are_written_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_DUMP", str(tmp_path))
    compiled()
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("Stack_forward")
    names = sorted(path.name for path in folder.glob("*.py") if path.name != "repro.py")
    assert names[0] == "00_captured.py"
    number = [each.name for each in passes.PASSES].index("lift") + 1
    assert f"{number:02}_lift.py" in names
    assert not any("attention" in name for name in names), "a pass that changes nothing writes nothing"
    before, after = ((folder / name).read_text(encoding="utf-8") for name in ("00_captured.py", f"{number:02}_lift.py"))
    assert before.count("= torch.rsqrt(") == KINDS
    assert "f32[2, 5, 16]" in before
    assert after.startswith("# pass lift: ")
    assert after.count("fastft.rms_norm") >= KINDS
    torch._dynamo.reset()
    compiled()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_no_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTFT_DUMP", str(tmp_path / "file" / "folder"))
    with caplog.at_level(logging.WARNING, "fastft"):
        _, report = compiled()
    assert report.lifted
    assert "cannot be written" in caplog.text


def test_the_log_tells_every_pass(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fastft"):
        compiled()
    for each in passes.PASSES:
        assert f"pass {each.name}: " in caplog.text
    assert f"+{KINDS} fastft.rms_norm" in caplog.text


TRACED = """
import torch, small_stack
call = torch.compile(small_stack.Stack(), backend="fastft", options={"lower": "eager", "strict": True})
call(small_stack.X)
"""


@pytest.mark.slow
def test_torchs_trace_and_log_show_each_pass(tmp_path: Path) -> None:
    """As a user sees them: TORCH_TRACE for tlparse, TORCH_LOGS on the terminal."""
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "+fastft"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", TRACED]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = [line for path in tmp_path.glob("*.log") for line in path.read_text(encoding="utf-8").splitlines()]
    found = [json.loads(line.partition("] ")[2])["artifact"]["name"] for line in lines if '"artifact"' in line]
    ours = [name for name in found if name.startswith("fastft_")]
    assert ours == ["fastft_00_captured", *(f"fastft_{n:02}_{each.name}" for n, each in enumerate(passes.PASSES, 1))]
    for each in passes.PASSES:
        assert f"pass {each.name}: " in done.stderr
