"""Loops, trainers and optimizers as people use them: with fastft as without, and everything lifted."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from strategies import DEVICES

from fastft.rewriter.report import history
from training import loops, optimizers, trainers
from training.loops import LOOPS
from training.optimizers import OPTIMIZERS
from training.outcome import outcome, seen
from training.setting import LAYERS, Setting

OFTEN = {"rms_norm": 2, "rotary": 2, "glu": 1, "attention": 1}  # in each layer
NOT_OURS = ("the result of neg does not reach add", "expected mul(x, cos)")  # what losses and optimizers negate
NEARLY = {  # what else is rightly left, by scenario: noise on the embeddings; one token beside a cache that grows
    "noisy": "expected mul(x, cos), found embedding", "writing": "v has size",
}  # fmt: skip
COMPILE_THEMSELVES = {"torchao_adamw_8bit"}  # by Inductor, which takes half a minute on a CPU: the table has it


def each(scenarios: Sequence[Any]) -> Any:
    return pytest.mark.parametrize("scenario", [one for one in scenarios if one.__name__ not in COMPILE_THEMSELVES])


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_graphs", deque(maxlen=history.LIMIT))


def assert_as_without(scenario: Any, device: str) -> None:
    found = outcome(scenario, device=device)
    assert found.right, f"{found.difference:.1e} apart, {found.allowed:.1e} allowed"
    layers = [graph for graph in found.graphs if any(one.rule.startswith("attention") for one in graph.lifted)]
    assert layers
    for graph in found.graphs:
        assert not graph.failure
        counts = {rule: sum(one.rule.split(".")[0] == rule for one in graph.lifted) for rule in OFTEN}
        nearly = NEARLY.get(scenario.__name__)
        misses = [miss for miss in graph.near_misses if nearly is None or not miss.reason.startswith(nearly)]
        if graph not in layers:
            assert all(miss.reason.startswith(NOT_OURS) for miss in misses)
            continue
        assert not misses
        assert counts["attention"] in (1, LAYERS)
        last = counts["rms_norm"] % 2  # the norm after all layers
        assert counts == {
            rule: often * counts["attention"] + last * (rule == "rms_norm") for rule, often in OFTEN.items()
        }


@pytest.mark.parametrize("device", DEVICES)
@each(LOOPS)
def test_loops(scenario: Any, device: str) -> None:
    assert_as_without(scenario, device)


@pytest.mark.parametrize("device", DEVICES)
@each(trainers.TRAINERS)
def test_trainers(scenario: Any, device: str) -> None:
    assert_as_without(scenario, device)


@pytest.mark.parametrize("device", DEVICES)
@each(OPTIMIZERS)
def test_optimizers(scenario: Any, device: str) -> None:
    assert_as_without(scenario, device)


def test_a_gradient_that_is_slightly_wrong_is_noticed() -> None:
    def wrong(setting: Setting) -> Sequence[float]:
        model = setting.model()
        if setting.compiled:
            value = next(
                value for name, value in model.named_parameters() if "layers.1.self_attn.q_proj.lora_B" in name
            )
            value.register_hook(lambda gradient: gradient * 1.001)
        return loops.train(setting, model, setting.compile(model))

    assert not outcome(wrong).right


def test_scenarios_train() -> None:
    """Losses fall, so that a model that learns nothing would be seen."""
    losses = seen(loops.plain)[::2]
    assert losses[0] - losses[-1] > 0.01


def test_accelerate_takes_no_backend_of_others() -> None:
    """So `torch_compile_backend="fastft"` cannot work; when it does, docs/trainers.md is to say so."""
    from accelerate.utils import TorchDynamoPlugin

    with pytest.raises(ValueError, match="FASTFT"):
        TorchDynamoPlugin(backend="fastft")
    assert torch._dynamo.lookup_backend("fastft")


def test_every_scenario_has_a_title() -> None:
    for one in (*loops.LOOPS, *trainers.TRAINERS, *optimizers.OPTIMIZERS):
        assert one.__doc__, one
