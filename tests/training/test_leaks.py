"""Nothing is left behind by a step: bytes and objects are as many after the tenth as after the third."""

import gc
from collections.abc import Iterator

import pytest
import torch

from training import leaks
from training.leaks import OPTIONS, Run

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU = [pytest.mark.gpu, on_gpu]
CASES = [("cpu", options) for options in ("plain", "least")]
CASES += [pytest.param("cuda", options, marks=GPU) for options in OPTIONS]
A_LOSS = 512  # bytes: a loss that is kept holds itself and a graph that its backward has emptied; so allocated


@pytest.fixture(scope="module", autouse=True)
def _unfrozen() -> Iterator[None]:
    """Leave no more to be kept than the tests' configuration says, which on a GPU is nothing."""
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize(("device", "options"), CASES)
def test_the_tenth_step_holds_what_the_third_did(device: str, options: str) -> None:
    run, more = Run(device, OPTIONS[options]), {}
    for loop in leaks.loops(device, options):
        first, last = leaks.measured(run, loop)
        words = leaks.growth(first, last)
        if loop is leaks.keeps_losses:
            assert len(run.held) == leaks.LAST
            if last.allocated - first.allocated > (leaks.LAST - leaks.FIRST) * A_LOSS:
                more[loop.__name__] = words
        elif words:
            more[loop.__name__] = words
    assert more == {}


def test_a_leak_is_noticed() -> None:
    """One that Python's collector cannot see: a tensor that its own node in autograd's graph holds."""

    class Holds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.box = box = []
            boxes.append(box)
            return x * 2

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad * 2

    boxes: list[list] = []

    def leaks_logits(run: Run, step: int) -> None:
        logits = Holds.apply(run.one(**run.batch(step)).logits)
        boxes.pop().append(logits)

    first, last = leaks.measured(Run("cpu", OPTIONS["plain"]), leaks_logits)
    assert last.allocated > first.allocated
    assert "torch.Tensor +" in leaks.growth(first, last)
