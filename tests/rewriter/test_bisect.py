"""fastft.bisect finds a rule that was made wrong on purpose, and the first place where that shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from small_stack import LAYERS, Stack, X, stack
from torch import Tensor, nn
from training.setting import adapter, base, batch
from wrong_rules import wrong

import fastft
from fastft.cli import main
from fastft.rewriter.bisect import NOT_A_RULE, _first


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def tuned() -> nn.Module:
    """A model of transformers' with adapters that compute something."""
    model = get_peft_model(base(layers=1), adapter())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def test_nothing_is_found_of_a_model_that_is_right() -> None:
    assert fastft.bisect(stack(), X) is None


def test_the_rule_and_its_first_application_in_a_hand_written_model() -> None:
    model = stack()
    said: list[str] = []
    with wrong("rms_norm.llama"):
        culprit = fastft.bisect(model, X, say=said.append)
    assert culprit is not None
    assert (culprit.rule, culprit.of) == ("rms_norm.llama", LAYERS)
    assert culprit.application is not None
    assert culprit.application.module == "layers.0"
    file, _, line = culprit.application.source.rpartition(":")
    assert "self.norm" in Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert culprit.difference.error > 0.01
    for part in ("rms_norm.llama", "layers.0", "small_stack.py:", "options={'disable': ['rms_norm.llama']}"):
        assert part in str(culprit)
    assert len(said) > 3
    assert fastft.bisect(model, X) is None


@pytest.mark.parametrize("name", ["rms_norm.llama", "rotary.half", "attention.dot_product_masked"])
def test_the_rule_in_a_llama(name: str) -> None:
    model = tuned()
    with wrong(name):
        culprit = fastft.bisect(model, **batch(0))
    assert culprit is not None
    assert culprit.rule == name
    assert culprit.application is not None
    assert "layers.0." in culprit.application.module


def test_the_application_that_is_wrong_alone() -> None:
    """Of a rule that is right elsewhere: only where the norm's weight is another."""
    model = stack()
    with torch.no_grad():
        model.layers[1].norm.fill_(3.0)

    def change(tensor: Tensor) -> Tensor:
        return torch.where(tensor.abs().amax() > 5.0, 1.5 * tensor, tensor)

    with wrong("rms_norm.llama", change):
        culprit = fastft.bisect(model, X)
    assert culprit is not None
    assert culprit.application is not None
    assert culprit.application.module == "layers.1"


def test_a_gradient_alone_is_enough() -> None:
    with wrong("glu.silu", lambda tensor: tensor.detach() + 0.5 * (tensor - tensor.detach())):
        culprit = fastft.bisect(stack(), X)
    assert culprit is not None
    assert culprit.rule == "glu.silu"
    assert culprit.difference.result.startswith("the gradient of ")


def test_what_is_no_rules_fault_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.rewriter import backend

    lower = backend.lower

    def spoilt(*args: Any, **named: Any) -> Callable:
        run = lower(*args, **named)
        return lambda *inputs: tuple(1.1 * result for result in run(*inputs))

    monkeypatch.setattr(backend, "lower", spoilt)
    culprit = fastft.bisect(stack(), X)
    assert culprit is not None
    assert (culprit.rule, culprit.application) == (NOT_A_RULE, None)


class Noisy(Stack):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(torch.seed()))
        return super().forward(x + noise)


class Counting(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(x)


def test_a_model_that_does_not_repeat_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="does not repeat itself"):
        fastft.bisect(Noisy(), X)


def test_nothing_of_the_model_changes() -> None:
    model = Counting()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with wrong("glu.silu"):
        fastft.bisect(model, X)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("length", range(1, 9))
def test_the_least_bad_count(length: int) -> None:
    for least in range(1, length + 1):
        assert _first(length, lambda count, least=least: count >= least) == least


SCRIPT = """
import torch
from small_stack import Stack, X

def make():
    torch.manual_seed(0)
    return Stack(), (X,)
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert main(["bisect", str(script)]) == 0
    assert "as in eager" in capsys.readouterr().out
    with wrong("glu.silu"):
        assert main(["bisect", str(script)]) == 1
    assert "glu.silu in layers.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"), [("", "no function make()"), ("def make(): return 1", "a model and a batch"), (None, "no script")]
)
def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, told: str
) -> None:
    script = tmp_path / "script.py"
    if text is not None:
        script.write_text(text)
    assert main(["bisect", str(script)]) == 2
    assert told in capsys.readouterr().err
