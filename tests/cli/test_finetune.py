"""The command from end to end, on the tiny model."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastft import data, models, training
from fastft.finetune import Settings, resolve, run, staged
from fastft.progress import LINES

Command = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 1_000  # of which a tenth is waited for


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def losses(folder: Path, contender: str = "fastft") -> list[float]:
    return [step["loss"] for step in metrics(folder)["contenders"][contender]["steps"]]


def reloaded(folder: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder)


def batch_of_step(number: int) -> dict[str, Any]:
    """What the tiny runs here read at one step."""
    tokenizer = models.load_tokenizer(models.find("tiny-llama"))
    examples = data.load(None, tokenizer, seq_len=32, batch_size=2)
    return next(islice(data.batches(examples, batch_size=2, pad_id=0, seed=0), number - 1, None))


def test_the_saved_adapter_is_the_trained_model(fastft: Command, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """The loss of step 4 is taken before its update, so the adapter saved after step 3 must have it too."""
    for steps in ("4", "3"):  # the second run replaces the first one's folder
        done = fastft("finetune", *tiny, "--steps", steps)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        if steps == "4":
            expected = losses(tmp_path / "fastft-out")
    assert losses(tmp_path / "fastft-out") == expected[:3]
    assert {path.name for path in tmp_path.iterdir()} == {"fastft-out"}
    model = reloaded(tmp_path / "fastft-out")
    with torch.no_grad():
        loss = model(**batch_of_step(4)).loss.item()
    assert loss == pytest.approx(expected[3], rel=1e-5)
    assert loss < expected[0]
    recorded = json.loads((tmp_path / "fastft-out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded == str(tmp_path / "fastft-out" / "base")
    assert (tmp_path / "fastft-out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "fastft: step 3/3" in done.stdout
    _snippet_works(done.stdout, tmp_path)


def _snippet_works(printed: str, folder: Path) -> None:
    code = printed[printed.index("from peft import") :]
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The for statement")


def test_nf4_rows_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QLoRA on rows of several lengths; the printed code loads the quantised model with the adapter."""
    from rich.console import Console

    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a" * number, "completion": "b" * (2 * number)} for number in range(1, 9)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = Settings(data="rows.jsonl", nf4=True, device="cpu", lower="eager", steps=3, batch_size=2, seq_len=32)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run(settings, Console(file=printed)) == 0
    found = losses(tmp_path / "fastft-out")
    assert len(found) == 3
    assert found[-1] < found[0]
    text = printed.getvalue()
    code = text[text.index("from peft import") :]
    namespace: dict[str, Any] = {}
    exec(code.replace("max_new_tokens=60", "max_new_tokens=2"), namespace)
    assert type(namespace["base"].model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_nf4_is_of_experts_too(tmp_path: Path) -> None:
    """What transformers' loader leaves in 16 bits is 4-bit behind the adapters, which are as they would be without."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, vocab_size=320, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, plain = (
        models.add_lora(
            models.load(models.find(str(tmp_path)), device="cpu", dtype="bfloat16", nf4=nf4), rank=2, random_base=False
        )
        for nf4 in (True, False)
    )
    before = copy.deepcopy(model.get_base_model().config.quantization_config)
    models.four_bit_experts(model, dtype="bfloat16")
    assert adapters(model) == adapters(plain)
    layer = model.base_model.model.model.layers[0]
    assert type(layer.self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    assert set(layer.mlp.experts.get_base_layer().parametrizations) == {"gate_up_proj", "down_proj"}
    assert model.get_base_model().config.quantization_config.to_dict() == before.to_dict()
    on_meta, _ = models.on_meta(str(tmp_path), rank=2, batch_size=1, seq_len=8, nf4=True)
    experts = on_meta.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    assert [one.original.nbytes for one in experts.parametrizations.values()] == [4 * 128 * 64 // 2, 4 * 64 * 64 // 2]
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}


def adapters(model: Any) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_compare_with_eager(fastft: Command, tiny: tuple[str, ...], tmp_path: Path) -> None:
    done = fastft("finetune", *tiny, "--steps", "3", "--compare", "eager", "--output", "both")
    assert done.returncode == 0, done.stderr
    found = metrics(tmp_path / "both")
    assert list(found["contenders"]) == ["fastft", "eager"]
    assert found["max_relative_loss_difference"] < 1e-4
    assert losses(tmp_path / "both", "eager") == pytest.approx(losses(tmp_path / "both"), rel=1e-4)
    for contender in found["contenders"].values():
        assert contender["peak_memory_bytes"] > 2**20
    for row in ("first step", "median step", "tokens/s", "peak memory", "first loss", "last loss", "relative"):
        assert row in done.stdout


def started(tiny: tuple[str, ...], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastft", "finetune", *tiny, "--steps", str(STEPS)]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background processes ignore it
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the command ended without saying {text!r}")


def test_ctrl_c_saves_what_was_trained(tiny: tuple[str, ...], tmp_path: Path) -> None:
    process = started(tiny, tmp_path)
    wait_for(process, f"step {2 * STEPS // LINES:>{len(str(STEPS))}}/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Stopped by Ctrl-C after" in out
    found = losses(tmp_path / "fastft-out")
    assert 2 * STEPS // LINES <= len(found) < STEPS
    assert metrics(tmp_path / "fastft-out")["contenders"]["fastft"]["interrupted"]
    assert {path.name for path in tmp_path.iterdir()} == {"fastft-out"}
    reloaded(tmp_path / "fastft-out")


def test_ctrl_c_before_the_first_step_writes_nothing(tiny: tuple[str, ...], tmp_path: Path) -> None:
    process = started(tiny, tmp_path)
    wait_for(process, "compiling")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "nothing was written" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_ctrl_c_that_python_drops_ends_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a finaliser, say, as in compiling there may be."""
    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, attention_mask: torch.Tensor) -> SimpleNamespace:
            Finalised()
            return SimpleNamespace(loss=(self.weight * attention_mask).sum())

    trained, outer, before = training.Run("eager"), signal.getsignal(signal.SIGINT), signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # a shell's background processes ignore it
    with pytest.raises(KeyboardInterrupt):
        training.train(Model(), repeat({"attention_mask": torch.ones(2)}), trained, steps=3, lr=1e-3)
    found = signal.signal(signal.SIGINT, outer)
    assert len(dropped) == 1
    assert not trained.steps
    assert found is before


def test_ctrl_c_inside_an_exec_has_the_same_exit_code(tmp_path: Path) -> None:
    """CPython remembers a KeyboardInterrupt that left an exec of a string, and kills `python -m` with it at the end."""
    program = """
from fastft import cli
def interrupted():
    exec("raise KeyboardInterrupt")
cli.parser = interrupted
raise SystemExit(cli.main())
"""
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, "-m", "program"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "nothing was written" in done.stderr


def test_a_failure_leaves_the_former_result(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staged(output) as folder:
        (folder / "metrics.json").write_text("first")
    with contextlib.suppress(RuntimeError), staged(output) as folder:
        (folder / "metrics.json").write_text("second")
        raise RuntimeError("midway")
    assert (output / "metrics.json").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_defaults_depend_on_the_model() -> None:
    preset, _ = resolve(Settings(device="cpu"))
    assert (preset.lr, preset.dtype, preset.device) == (2e-3, "float32", "cpu")
    assert resolve(Settings(device="cpu", lr=1e-3))[0].lr == 1e-3


@pytest.mark.parametrize("preset", models.PRESETS)
def test_presets_load_on_meta(preset: str) -> None:
    model, batch = models.on_meta(preset, rank=4, batch_size=2, seq_len=8)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    decoder = model.get_base_model().model
    assert {type(layer) for layer in decoder.layers} == {type(decoder.layers[0])}
    decoder.layers = decoder.layers[:2]  # torch traces each for a second
    assert torch.compile(model, backend="eager", fullgraph=True)(**batch).loss.shape == ()
