"""Whole models through the backend: every norm is matched, and loss and gradients are eager's."""

import pytest
import torch
from compare import FORWARD, GRADIENT, assert_close_to_truth

import fastft
from models.families import FAMILIES, LAYERS, Family, batch, build, step, truth

OPTIONS = {"lower": "eager", "strict": True}
QUANTIZED = pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
CHECKPOINT = pytest.mark.parametrize("checkpoint", [False, True], ids=["keep", "checkpoint"])
PADDED = pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])


def check(model: torch.nn.Module, compiled: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Loss and every gradient against the unmodified model, both measured against float64."""
    exact_loss, exact = truth(model, inputs)
    eager_loss, eager = step(model, inputs, model)
    loss, gradients = step(compiled, inputs, model)
    assert_close_to_truth(loss, eager_loss, exact_loss, FORWARD)
    assert gradients.keys() == eager.keys() == exact.keys()
    for name, gradient in gradients.items():
        try:
            assert_close_to_truth(gradient, eager[name], exact[name], GRADIENT)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@QUANTIZED
@CHECKPOINT
@PADDED
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_norm_is_matched_and_the_gradients_are_right(
    family: Family, nf4: bool, checkpoint: bool, padded: bool
) -> None:
    torch._dynamo.reset()
    model = build(family, nf4=nf4, checkpoint=checkpoint, train_norms=padded)
    inputs = batch(padded=padded)
    report = fastft.explain(model, **inputs)
    assert [lifted.rule for lifted in report.lifted] == [family.rule] * family.norms(LAYERS)
    assert report.near_misses == []
    check(model, torch.compile(model, backend="fastft", options=OPTIONS), inputs)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_count_follows_the_layers(family: Family, layers: int) -> None:
    torch._dynamo.reset()
    model = build(family, nf4=False, checkpoint=False, train_norms=False, layers=layers)
    assert len(fastft.explain(model, **batch(padded=False)).lifted) == family.norms(layers)


@pytest.mark.slow
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[5]], ids=lambda family: family.name)
def test_through_inductor(family: Family) -> None:
    torch._dynamo.reset()
    model = build(family, nf4=False, checkpoint=False, train_norms=True)
    check(model, torch.compile(model, backend="fastft", options={"strict": True}), batch(padded=True))
