"""benchmarks/preference.py: that its contenders train on the same batches from the same weights, and its table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import preference
import report

SMALL = "--model tiny --device cpu --dtype float32 --lower eager --completions 4 --pairs 2 --prompt 24 --completion 8"


def asked_of(words: str, folder: Path) -> list[dict[str, Any]]:
    """What the workers of a command would be told."""
    options = preference.parse(f"{SMALL} --steps 2 --warmup 1 {words}".split())
    options.folder = str(folder)
    return [job.asked for job in preference.jobs(options, folder)]


def test_rows_and_tokens_of_a_step(tmp_path: Path) -> None:
    (grpo,) = asked_of("--loss grpo --contenders trl --groups 3", tmp_path)
    (dpo,) = asked_of("--loss dpo --contenders trl", tmp_path)
    assert (grpo["batch"], grpo["length"], dpo["batch"], dpo["length"]) == (12, 32, 4, 32)


def test_an_unknown_contender(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preference.parse(["--contenders", "trl,nobody"])
    assert "no contender 'nobody'" in capsys.readouterr().err


def test_answers_of_a_group_share_their_prompt_and_each_call_draws_anew(tmp_path: Path) -> None:
    (asked,) = asked_of("--loss grpo --contenders trl --groups 2", tmp_path)
    roll_out = preference.rollouts(asked)
    made = roll_out([""] * 8, None)
    prompts, answers = made["prompt_ids"], made["completion_ids"]
    assert [len(ids) for ids in prompts] == [24] * 8
    assert [len(ids) for ids in answers] == [8] * 8
    assert prompts[0] == prompts[3] != prompts[4] == prompts[7]
    assert len({tuple(ids) for ids in answers}) == 8
    assert roll_out([""] * 8, None) != made == preference.rollouts(asked)([""] * 8, None)


def test_a_pair_has_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    from fastft.presets import byte_tokenizer

    (asked,) = asked_of("--loss dpo --contenders trl", tmp_path)
    tokenizer = byte_tokenizer()
    for pair in preference.pairs(asked, steps=2):
        sizes = {name: len(tokenizer(text)["input_ids"]) for name, text in pair.items()}
        assert sizes == {"prompt": 24, "chosen": 7, "rejected": 7}


def test_dpo_is_of_these_pairs_with_the_adapter_off_as_reference(tmp_path: Path) -> None:
    """The first loss, computed in double precision from the logits of a model that never trained."""
    pytest.importorskip("trl")
    import torch

    (asked,) = asked_of("--loss dpo --contenders trl", tmp_path)
    preference.write_model(asked, tmp_path)
    trainer = preference.make_trainer(asked, "cpu")
    batch = next(iter(trainer.get_train_dataloader()))
    ids, counted = batch["input_ids"], batch["completion_mask"][:, 1:]

    def scores() -> torch.Tensor:
        logits = trainer.model.double()(input_ids=ids).logits[:, :-1]
        taken = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (taken * counted).sum(1)

    with torch.no_grad():
        policy = scores()
        with trainer.model.disable_adapter():
            margins = policy - scores()
    chosen, rejected = margins.chunk(2)
    expected = -torch.nn.functional.logsigmoid(preference.BETA["dpo"] * (chosen - rejected)).mean().item()
    row = preference.measure(asked)
    assert row["losses"][0] == pytest.approx(expected, rel=1e-5)
    assert margins.abs().min() > 0.01  # the policy is not its reference
    assert len(row["losses"]) == len(row["grad_norms"]) == 3
    assert row["tokens_s"] == pytest.approx(4 * 32 / row["step_s"], rel=0.5)


@pytest.mark.slow
def test_contenders_agree(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rows = [preference.measure(asked) for asked in asked_of("--loss grpo --contenders trl,fastft", tmp_path)]
    plain, ours = rows
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert ours["grad_norms"] == pytest.approx(plain["grad_norms"], rel=1e-3)
    assert min(plain["losses"]) > 0  # all advantages being weighed alike, what is left is the distance to the reference


def row_of(contender: str, seconds: float, **more: Any) -> dict[str, Any]:
    row = {"contender": contender, "status": "ok", "loss": "grpo", "model": "tiny", "nf4": True, "dtype": "bfloat16"}
    row |= {"groups": 1, "completions": 8, "prompt": 1024, "completion": 512, "batch": 8, "length": 1536}
    row |= {"step_s": seconds, "tokens_s": 12288 / seconds, "first_s": 30.0, "losses": [0.0125, 0.01]}
    return row | {"grad_norms": [0.5, 0.4], "peak_bytes": 2**31, "reserved_bytes": 2**32} | more


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row_of("trl", 2.0),
        row_of("unsloth", 2.0, status="error", error="it needs CUDA"),
        row_of("fastft", 1.0, peak_bytes=2**30),
    ]
    preference.show(rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    assert lines[0] == "GRPO, tiny, NF4 LoRA, bfloat16, 1 x 8 answers of 512 tokens to prompts of 1024, unknown device"
    cells = {line.split()[0]: line.split()[1:] for line in lines[2:5]}
    assert cells["trl"] == ["2.000", "6,144", "1.00", "2.00", "1.00", "4.00", "30", "0.0125", "0.5"]
    assert cells["fastft"] == ["1.000", "12,288", "2.00", "1.00", "0.50", "4.00", "30", "0.0125", "0.5"]
    assert "unsloth 8x1536: it needs CUDA" in lines
    assert "trl, losses: 0.0125 0.01" in lines
