"""Whole models through the backend: every norm is matched, and loss and gradients are eager's."""

from collections.abc import Callable

import pytest
import torch
from compare import FORWARD, GRADIENT, assert_close_to_truth

import fastft
from fastft.rewriter.report import GraphReport
from fastft.rewriter.rewrite import rewrite
from models.families import FAMILIES, LAYERS, Family, batch, build, step, truth

QUANTIZED = pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
CHECKPOINT = pytest.mark.parametrize("checkpoint", [False, True], ids=["keep", "checkpoint"])
PADDED = pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])


def check(
    model: torch.nn.Module, compiled: Callable, inputs: dict[str, torch.Tensor], baseline: Callable | None = None
) -> None:
    """Logits, loss and every gradient against the unmodified model, both measured against float64.

    baseline: where the lowering rounds by itself (Inductor's), the unmodified model with that lowering.
    """
    exact, actual = truth(model, inputs), step(compiled, inputs, model)
    eager = step(model if baseline is None else baseline, inputs, model)
    assert_close_to_truth(actual.logits, eager.logits, exact.logits, FORWARD)
    # The loss is one number, whose error in eager may be small by luck; it moves by at most twice what logits move by.
    worst = (eager.logits.double() - exact.logits).abs().max()
    assert abs(actual.loss.double() - exact.loss) <= FORWARD * 2 * worst
    assert actual.gradients.keys() == eager.gradients.keys() == exact.gradients.keys()
    for name, gradient in actual.gradients.items():
        try:
            assert_close_to_truth(gradient, eager.gradients[name], exact.gradients[name], GRADIENT)
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
    reports: list[GraphReport] = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:  # lower="eager", with the report kept
        reports.append(rewrite(gm))
        return gm.forward

    check(model, torch.compile(model, backend=backend), batch(padded=padded))
    assert [one.rule for report in reports for one in report.lifted] == [family.rule] * family.norms(LAYERS)
    assert [miss for report in reports for miss in report.near_misses] == []


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_count_follows_the_layers(family: Family, layers: int) -> None:
    torch._dynamo.reset()
    with torch.device("meta"):
        model = build(family, nf4=False, checkpoint=False, train_norms=False, layers=layers)
    inputs = {name: value.to("meta") for name, value in batch(padded=False).items()}
    assert len(fastft.explain(model, **inputs).lifted) == family.norms(layers)


@pytest.mark.slow
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[5]], ids=lambda family: family.name)
def test_through_inductor(family: Family) -> None:
    torch._dynamo.reset()
    model = build(family, nf4=False, checkpoint=False, train_norms=True)
    check(model, torch.compile(model, backend="fastft", options={"strict": True}), batch(padded=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@QUANTIZED
@CHECKPOINT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[3], FAMILIES[4]], ids=lambda family: family.name)
def test_on_the_gpu(family: Family, dtype: torch.dtype, checkpoint: bool, nf4: bool) -> None:
    """Triton kernels inside Inductor's code, bfloat16 included."""
    torch._dynamo.reset()
    model = build(family, nf4=nf4, checkpoint=checkpoint, train_norms=True, dtype=dtype, device="cuda")
    compiled = torch.compile(model, backend="fastft", options={"strict": True})
    check(model, compiled, batch(padded=True, device="cuda"), baseline=torch.compile(model))
