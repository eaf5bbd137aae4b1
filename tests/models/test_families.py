"""Whole models through the backend: every norm is matched, and loss and gradients are eager's."""

from collections.abc import Callable

import pytest
import torch
from compare import FORWARD, GRADIENT, assert_close_to_truth
from torch import Tensor, nn

import fastft
from fastft.rewriter.report import GraphReport
from fastft.rewriter.rewrite import rewrite
from models.families import FAMILIES, LAYERS, Family, Step, batch, build, step, truth

QUANTIZED = pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
CHECKPOINT = pytest.mark.parametrize("checkpoint", [False, True], ids=["keep", "checkpoint"])
PADDED = pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])


def check(model: nn.Module, compiled: Callable, inputs: dict[str, Tensor], *others: Callable) -> None:
    """Logits, loss and every gradient against the unmodified model, both measured against float64.

    others: the unmodified model lowered differently.  Torch's own error is the largest of its ways to run the model:
    Inductor rounds less often than eager in low precision, and has faster exponentials than eager in float32.
    """
    exact, actual = truth(model, inputs), step(compiled, inputs, model)
    torch_steps = [step(other, inputs, model) for other in (model, *others)]

    def assert_close(name: str, of: Callable[[Step], Tensor], factor: float) -> None:
        eager = max((of(one) for one in torch_steps), key=lambda value: _error(value, of(exact)))
        try:
            assert_close_to_truth(of(actual), eager, of(exact), factor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None

    assert_close("logits", lambda one: one.logits, FORWARD)
    # The loss is one number, whose error may be small by luck; it moves by at most twice what the logits move by.
    worst = max(_error(one.logits, exact.logits) for one in torch_steps)
    assert _error(actual.loss, exact.loss) <= FORWARD * 2 * worst + torch.finfo(actual.loss.dtype).eps * exact.loss
    assert all(one.gradients.keys() == exact.gradients.keys() for one in (actual, *torch_steps))
    for name in exact.gradients:
        assert_close(name, lambda one, name=name: one.gradients[name], GRADIENT)


def _error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()


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
    model = build(family, nf4=False, checkpoint=False, train_norms=False, layers=layers)
    assert len(fastft.explain(model, **batch(padded=False)).lifted) == family.norms(layers)


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
    check(model, compiled, batch(padded=True, device="cuda"), torch.compile(model))
