"""Whole models through the backend: what is lifted and fused, as a formula of the layers, and eager's gradients."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from compare import FORWARD, GRADIENT, assert_close_to_truth
from lifting import rewritten
from torch import Tensor, nn

import fastft
from fastft.rewriter.report.data import GraphReport
from models.families import (
    CHUNKED,
    FAMILIES,
    LAYERS,
    OTHERS,
    Family,
    Step,
    batch,
    build,
    expected,
    stacked,
    step,
    truth,
    with_lora,
)
from models.golden import KEPT

CHUNK = 2**12  # bytes of logits: a few rows
QUANTIZED = pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
CHECKPOINT = pytest.mark.parametrize("checkpoint", [False, True], ids=["keep", "checkpoint"])


def by_name(families: Sequence[Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


def check(model: nn.Module, compiled: Callable, inputs: dict[str, Tensor], *others: Callable) -> None:
    """Logits, loss and every gradient against the unmodified model, both measured against float64.

    others: the unmodified model lowered differently.  Torch's own error is the largest of its ways to run the model:
    Inductor rounds less often than eager in low precision, and has faster exponentials than eager in float32.
    """
    first = step(compiled, inputs, model)
    if first.logits.dtype != torch.float32:
        compare(model, compiled, inputs, nearby(inputs), *others)
        return
    try:
        compare(model, compiled, inputs, [], *others)
    except AssertionError:  # by luck of eager's?  Then not on most batches.
        compare(model, compiled, inputs, nearby(inputs), *others)


def compare(
    model: nn.Module, compiled: Callable, inputs: dict[str, Tensor], more: list[dict[str, Tensor]], *others: Callable
) -> None:
    """The median of the errors on this batch and more."""
    first = step(compiled, inputs, model)
    actual = stacked([first, *(step(compiled, one, model) for one in more)])
    exact = stacked([truth(model, one) for one in (inputs, *more)])
    torch_steps = [stacked([step(run, one, model) for one in (inputs, *more)]) for run in (model, *others)]

    def assert_close(name: str, of: Callable[[Step], Tensor], factor: float) -> None:
        worst = max(range(len(torch_steps)), key=lambda way: _error(of(torch_steps[way]), of(exact)))
        try:
            assert_close_to_truth(of(actual), of(torch_steps[worst]), of(exact), factor, cases=True)
        except AssertionError as error:
            raise AssertionError(f"{name}, beside torch's way {worst}: {error}") from None

    assert_close("logits", lambda one: one.logits, FORWARD)
    # The loss is one number, whose error may be small by luck; it moves by at most twice what the logits move by.
    worst = max(max(2 * _error(one.logits, exact.logits), _error(one.loss, exact.loss)) for one in torch_steps)
    rounding = torch.finfo(actual.loss.dtype).eps * exact.loss.max()
    assert _error(actual.loss, exact.loss) <= FORWARD * worst + rounding
    assert all(one.gradients.keys() == exact.gradients.keys() for one in (actual, *torch_steps))
    for name in exact.gradients:
        assert_close(name, lambda one, name=name: one.gradients[name], GRADIENT)


def nearby(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Other tokens: on one batch a model may err little by luck, and on another one much."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    turned = [ids.roll(places, -1) for places in range(1, ids.shape[-1])]
    return [{**inputs, "input_ids": one, "labels": torch.where(labels == -100, labels, one)} for one in turned]


def _error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()


def rewriting(reports: list[GraphReport]) -> Callable:
    """A backend: lower="eager", a few logits at a time, with the reports kept."""

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:
        run, report = rewritten(gm, lazy=True, logits_memory=CHUNK)
        reports.append(report)
        return run

    return backend


def assert_counts(reports: list[GraphReport], family: Family, layers: int) -> None:
    lifted = {**family.lifted, **family.head}
    found = Counter(one.rule for report in reports for one in report.lifted)
    attention = [times for rule, times in found.items() if rule.startswith("attention.")]  # test_masks.py says which
    assert sum(attention) == sum(len(report.masks) for report in reports) == layers
    assert Counter({rule: times for rule, times in found.items() if "attention." not in rule}) == expected(
        lifted, layers
    )
    assert Counter(one.rule for report in reports for one in report.fused) == expected(family.fused, layers)
    missed = Counter(f"{miss.rule}: {miss.reason}" for report in reports for miss in report.near_misses)
    assert missed == expected(family.missed, layers)


def variants() -> list[Any]:
    """Half of each family's: any two of the choices meet in every family, all three in every other."""
    return [
        pytest.param(family, nf4, checkpoint, padded, id=f"{family.name}-{nf4=}-{checkpoint=}-{padded=}")
        for number, family in enumerate(FAMILIES)
        for nf4, checkpoint, padded in itertools.product((False, True), repeat=3)
        if (number + nf4 + checkpoint + padded) % 2 == 0
    ]


@pytest.mark.parametrize(("family", "nf4", "checkpoint", "padded"), variants())
def test_all_is_matched_and_the_gradients_are_right(family: Family, nf4: bool, checkpoint: bool, padded: bool) -> None:
    torch._dynamo.reset()
    model = build(family, nf4=nf4, checkpoint=checkpoint, train_norms=padded)
    reports: list[GraphReport] = []
    check(model, torch.compile(model, backend=rewriting(reports)), batch(padded=padded))
    assert_counts(reports, with_lora(family, nf4), LAYERS)
    assert len(reports) == 1, "nothing breaks the graph"


def test_checkpoints_as_transformers_enables_them() -> None:
    """The graph breaks before the layers, which hangs on no family."""
    torch._dynamo.reset()
    model = build(FAMILIES[0], nf4=True, checkpoint=True, train_norms=False, hooked=True)
    reports: list[GraphReport] = []
    check(model, torch.compile(model, backend=rewriting(reports)), batch(padded=True))
    assert_counts(reports, with_lora(FAMILIES[0], True), LAYERS)
    assert len(reports) > 1


@by_name((*OTHERS, *CHUNKED))
def test_other_families_trained_whole(family: Family) -> None:
    torch._dynamo.reset()
    model = build(family, nf4=False, checkpoint=False, train_norms=True, lora=False)
    reports: list[GraphReport] = []
    check(model, torch.compile(model, backend=rewriting(reports)), batch(padded=False))
    assert_counts(reports, family, LAYERS)


@by_name([family for family in (*OTHERS, *CHUNKED) if family not in KEPT])
def test_the_counts_follow_the_layers(family: Family) -> None:
    """By explain(), in one layer, as those of the others are of two; test_golden.py has them of three."""
    torch._dynamo.reset()
    model = build(family, nf4=False, checkpoint=False, train_norms=False, layers=1, lora=False)
    family = replace(family, lifted={**family.lifted, **family.substituted})
    assert_counts(fastft.explain(model, **batch(padded=False)).graphs, family, 1)


@by_name((FAMILIES[0], FAMILIES[3], FAMILIES[4]))
def test_under_autocast(family: Family) -> None:
    """The residual stream is float32 and the blocks bfloat16: as much is lifted and fused."""
    torch._dynamo.reset()
    model = build(family, nf4=False, checkpoint=False, train_norms=True)
    reports: list[GraphReport] = []

    def cast(run: Callable) -> Callable:
        return lambda **inputs: torch.autocast("cpu", torch.bfloat16)(run)(**inputs)

    check(model, cast(torch.compile(model, backend=rewriting(reports))), batch(padded=False), cast(model))
    assert_counts(reports, with_lora(family, False), LAYERS)


@pytest.mark.slow
@by_name((FAMILIES[0], FAMILIES[5]))
def test_through_inductor(family: Family) -> None:
    torch._dynamo.reset()
    model = build(family, nf4=False, checkpoint=False, train_norms=True)
    compiled = torch.compile(model, backend="fastft", options={"strict": True})
    check(model, compiled, batch(padded=True), torch.compile(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@QUANTIZED
@CHECKPOINT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@by_name((FAMILIES[0], FAMILIES[3], FAMILIES[4]))
def test_on_the_gpu(family: Family, dtype: torch.dtype, checkpoint: bool, nf4: bool) -> None:
    """Triton kernels inside Inductor's code, bfloat16 included."""
    torch._dynamo.reset()
    model = build(family, nf4=nf4, checkpoint=checkpoint, train_norms=True, dtype=dtype, device="cuda")
    compiled = torch.compile(model, backend="fastft", options={"strict": True})
    check(model, compiled, batch(padded=True, device="cuda"), torch.compile(model))
