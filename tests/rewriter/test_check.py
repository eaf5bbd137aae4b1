"""fastft.check: a right model is right, what is wrong is seen however small, and layers are told by kind."""

import re
from typing import Any, NoReturn

import pytest
import torch
from small_stack import LAYERS, X, stack
from torch import Tensor, nn
from wrong_rules import wrong

import fastft
from fastft.rewriter.report import by_layer
from fastft.rewriter.report.data import GraphReport, Lifted, NearMiss
from fastft.rewriter.trial import Trial, nudged


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def test_a_model_that_is_right() -> None:
    model = stack()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fastft.check(model, X, then=[(X[:, :-1].contiguous(),)])
    assert found.right, str(found)
    assert 0 <= found.loss_difference <= 1e-5
    assert 0 <= found.gradient_difference <= 1e-4
    assert len(found.differences) == 2 * (1 + len(list(model.parameters())))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(found.graphs) == 1
    assert found.breaks == []
    assert any("rms_norm" in ops for name, ops in found.layers if name == f"layers.* ×{LAYERS}")
    for text in (str(found), re.sub("<[^>]+>", "", found._repr_html_())):
        assert "as in eager" in text
        assert f"layers.* ×{LAYERS}" in text


def test_a_wrong_gradient_is_named() -> None:
    with wrong("glu.silu", lambda tensor: tensor.detach() + 0.999 * (tensor - tensor.detach())):
        found = fastft.check(stack(), X)
    assert not found.right
    assert found.loss.within
    assert found.gradient.result.startswith("the gradient of ")
    assert "NOT" in str(found)


def test_what_fails_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the graph runs as it was, and so as in eager."""
    from fastft.rewriter import backend

    def broken(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("a broken pass")

    monkeypatch.setattr(backend, "lower", broken)
    with pytest.warns(RuntimeWarning, match="a broken pass"):
        found = fastft.check(stack(), X)
    assert found.loss.within
    assert found.gradient.within
    assert not found.right
    assert "a broken pass" in str(found)


class Attention(nn.Module):
    """Its bias of keys has a gradient of zero in exact arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return (weights @ x).square().mean() + self.scale.square()


def test_rounding_is_no_difference_and_hides_none() -> None:
    torch.manual_seed(0)
    model = Attention()
    trial = Trial(model, (torch.randn(2, 8, 16),), {}, loss=lambda result: result, tolerance=1e-4)
    noise = "the gradient of key.bias"
    norms = {name: value.norm().item() for name, value in trial.truth.items()}
    largest = max(norm for name, norm in norms.items() if name != "the loss")
    assert norms[noise] < 1e-6 * largest
    assert {name for name, norm in norms.items() if trial.scales[name] > 1.01 * norm} == {noise}
    for name, value in trial.truth.items():
        moved = 2e-6 * largest * torch.ones_like(value) if name == noise else 1.0002 * value
        (error,) = (one for one in trial.differences({**trial.truth, name: moved}) if one.result == name)
        assert not error.within, name
    other = {**trial.truth, noise: -trial.truth[noise]}
    assert trial.compare(other) is None, "another rounding is as good"
    (missing,) = (one for one in trial.differences({}) if one.result == noise)
    assert missing.error == float("inf")
    nan = {**trial.truth, noise: trial.truth[noise] * float("nan")}
    assert trial.compare(nan) is not None


class Jumping(nn.Module):
    """Its gradient is four times as large on one side of a weight's value."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weight = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight * torch.where(self.gate >= 1.0, 4.0, 1.0)).sum() + 0.0 * self.gate.sum()


def test_what_jumps_hides_nothing() -> None:
    trial = Trial(Jumping(), (torch.randn(4, 8),), {}, loss=lambda result: result, tolerance=1e-4)
    name = "the gradient of weight"
    moved = {**trial.truth, name: 1.001 * trial.truth[name]}
    assert [one.result for one in trial.differences(moved) if not one.within] == [name]


def test_weights_come_back() -> None:
    model = stack()
    before = [parameter.clone() for parameter in model.parameters()]
    with nudged(model.parameters(), 0):
        moved = [(old != new).float().mean() for old, new in zip(before, model.parameters(), strict=True)]
    assert min(moved) > 0.9
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_layers_are_told_by_kind() -> None:
    def lifted(*modules: str) -> list[Lifted]:
        return [Lifted(rule, module, "a.py:1") for rule, module in (one.split("@") for one in modules)]

    graph = GraphReport(
        lifted=lifted(
            "norm.a@m.layers.0.x", "norm.b@m.layers.0.y", "glu.c@m.layers.0", "norm.a@m.layers.1.x",
            "norm.a@m.layers.2.experts.5", "loss.d@",
        ),
        near_misses=[NearMiss("norm.a", "", "", f"hidden_{n} is of s{n} rows, not 7") for n in range(3)],
    )  # fmt: skip
    assert by_layer.lifted_by_layer([graph]) == [
        ("m.layers.* ×1", "2 norm, glu"), ("m.layers.* ×2", "norm"), (by_layer.ELSEWHERE, "loss"),
    ]  # fmt: skip
    assert by_layer.left_by_reason([graph]) == [("norm", "hidden is of s rows, not 7", 3)]
