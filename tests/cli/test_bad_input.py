"""What the user can put right is one sentence on stderr, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastft import env, models
from fastft.cli import main


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Assert that the command says ``words`` in one line and writes nothing in the current folder."""
    before = sorted(Path().iterdir())
    code = main(arguments)
    printed = capsys.readouterr().err
    assert code == 2
    assert len(printed.strip().splitlines()) == 1, printed
    assert "Traceback" not in printed
    for word in words:
        assert word in printed
    assert sorted(Path().iterdir()) == before


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune", "--stepz", "3"], ["--stepz", "did you mean --steps?"]),
        (["finetune", "--batchsize=3"], ["--batchsize", "did you mean --batch-size?"]),
        (["finetun"], ["finetun", "finetune"]),
        (["finetune", "--steps", "0"], ["--steps", "above zero"]),
        (["finetune", "--rank", "-1"], ["--rank", "above zero"]),
        (["finetune", "--batch-size", "two"], ["--batch-size", "whole number", "'two'"]),
        (["finetune", "--seq-len", "1.5"], ["--seq-len", "whole number"]),
        (["finetune", "--seq-len", "1"], ["--seq-len", "2"]),
        (["finetune", "--lr", "nan"], ["--lr", "above zero"]),
        (["finetune", "--seed", "-3"], ["--seed"]),
        (["finetune", "--lower", "fast"], ["--lower", "inductor", "eager"]),
        (["finetune", "--device", "gpu"], ["--device", "cuda"]),
        (["finetune", "--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["finetune", "--model", "tiny-lama"], ["tiny-lama", "did you mean 'tiny-llama'?"]),
        (["finetune", "--model", "./no/such/folder"], ["./no/such/folder", "check the path"]),
        (["finetune", "--model", "missing.gguf"], ["missing.gguf", "check the path"]),
        (["finetune", "--data", "missing.txt"], ["missing.txt", "--data"]),
        (["finetune", "--data", "missing.jsonl"], ["missing.jsonl", "--data"]),
        (["finetune", "--output", "no/such/parent"], ["no/such", "--output"]),
        (["explain", "./no/such/folder"], ["./no/such/folder"]),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("finetune", "finetun", "explain") else "",
)
def test_malformed(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(arguments, capsys, *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", ["0 examples", "--seq-len"]),
        ("short.txt", "too short", ["0 examples", "--seq-len"]),
        ("bad.jsonl", '{"text": "fine"}\n\n{"text": \n', ["bad.jsonl line 3", "not JSON"]),
        ("keys.jsonl", '{"text": "fine"}\n{"txt": "x"}\n', ["keys.jsonl line 2", "'txt'", '"messages"']),
        ("number.jsonl", '{"text": 7}\n', ["number.jsonl line 1", '"text"']),
        ("list.jsonl", "[1, 2]\n", ["list.jsonl line 1", "list"]),
        ("turns.jsonl", '{"messages": [{"role": "user"}]}\n', ["turns.jsonl line 1"]),
        ("long.jsonl", json.dumps({"prompt": "x" * 999, "completion": "y"}) + "\n", ["0 examples", "--seq-len"]),
    ],
)
def test_data(name: str, content: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_text(content)
    refused(["finetune", "--data", name, "--lower", "eager", "--device", "cpu"], capsys, *words)


def test_data_that_is_not_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("image.bin").write_bytes(b"\x89PNG\xff")
    refused(["finetune", "--data", "image.bin", "--lower", "eager", "--device", "cpu"], capsys, "not UTF-8")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "bert"},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
    ],
    ids=lambda config: config.get("architectures", ["bare " + config["model_type"]])[0],
)
def test_model_that_is_not_causal(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(config))
    refused(["finetune", "--model", "model", "--device", "cpu"], capsys, "not a causal language model")


def test_model_folder_that_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    refused(["finetune", "--model", "model"], capsys, "config.json")
    Path("model/config.json").write_text("{")
    refused(["finetune", "--model", "model"], capsys, "Cannot load the model model")
    Path("model/config.json").write_text('{"model_type": "no-such-type"}')
    refused(["finetune", "--model", "model"], capsys, "Cannot load the model model", "no-such-type")


def test_gguf_that_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.gguf").write_bytes(b"not a model")
    refused(["finetune", "--model", "model.gguf"], capsys, "Cannot load the model model.gguf")
    Path("model.bin").write_bytes(b"")
    refused(["finetune", "--model", "model.bin"], capsys, "not a .gguf file")


def test_weights_that_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    models.config("tiny-llama").save_pretrained("model")
    models.byte_tokenizer().save_pretrained("model")
    refused(["finetune", "--model", "model", "--device", "cpu", "--lower", "eager"], capsys, "Cannot load the model")


def test_hub_out_of_reach(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["finetune", "--model", "nobody/no-such-model"], capsys, "nobody/no-such-model", "hub cannot be reached")


def test_package_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    refused(["finetune", "--nf4"], capsys, "--nf4 needs bitsandbytes", "pip install bitsandbytes")


def test_compiler_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refused(["finetune", "--device", "cpu"], capsys, "C++ compiler", "install g++", "--lower eager")
    refused(["finetune", "--device", "cpu", "--lower", "eager", "--compare", "inductor"], capsys, "C++ compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(["finetune", "--device", "cpu"], capsys, "no-such-compiler was not found")


def test_output_that_is_somebody_elses(capsys: pytest.CaptureFixture[str]) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("years of work")
    refused(["finetune", "--output", "thesis"], capsys, "not empty", "--output")
    assert Path("thesis/chapter.txt").read_text() == "years of work"
    refused(["finetune", "--output", "thesis/chapter.txt"], capsys, "is a file")


def test_kernels_say_why_they_cannot_run() -> None:
    assert all(why == "yes" for _, why in env.kernels((9, 0), triton=True))
    assert all("no CUDA device" in why for _, why in env.kernels(None, triton=True))
    assert all("triton is not installed" in why for _, why in env.kernels((9, 0), triton=False))
    assert all("7.0 is below 7.5" in why for _, why in env.kernels((7, 0), triton=True))
    elementwise, matrix, bf16 = (why for _, why in env.kernels((7, 5), triton=True))
    assert elementwise == "yes"
    assert "below 8.0" in matrix
    assert "below 8.0" in bf16
