"""Whole models in regions: layers are shared, and train as when the graph is compiled whole."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from aot import through_aot
from torch import Tensor, nn
from torch.fx import GraphModule

from fastft.compat import aot
from fastft.rewriter.lowering.lower import lower
from fastft.rewriter.lowering.plan_builder import should_plan
from fastft.rewriter.options import Options
from fastft.rewriter.passes import rewrite
from fastft.rewriter.report.data import GraphReport
from models.families import FAMILIES, Family, Step, batch, build, step
from models.test_families import check

DEPTH = 4  # enough layers for several of each kind
# Every second layer attends to all tokens; of a configuration's own, one in six.
KINDS = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)}}
DEEP = [replace(family, sizes=family.sizes | KINDS.get(family.name, {})) for family in FAMILIES]
LLAMA, GEMMA3 = DEEP[0], DEEP[5]
QUICK = (LLAMA, GEMMA3)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def backend(reports: list[GraphReport], **options: Any) -> Callable:
    """fastft, its reports kept."""

    def compile_graph(gm: GraphModule, example_inputs: list[Any]) -> Callable:
        reports.append(rewrite(gm))
        chosen = Options(**{"lower": "eager", **options})
        return lower(gm, example_inputs, chosen, reports[-1], plan=should_plan(gm, chosen))

    return compile_graph


@pytest.fixture(params=["aot", pytest.param("eager", marks=pytest.mark.slow)])
def lowering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The option that lowers in a way that takes seconds."""
    monkeypatch.setattr(aot, "compile_fx", through_aot)
    return {"lower": "eager" if request.param == "eager" else "inductor"}


def assert_same(actual: Step, expected: Step, rtol: float) -> None:
    """Loss, logits and every gradient, relative to the largest value of each."""
    assert actual.gradients.keys() == expected.gradients.keys() != set()
    pairs = {name: (actual.gradients[name], value) for name, value in expected.gradients.items()}
    pairs |= {"logits": (actual.logits, expected.logits), "loss": (actual.loss, expected.loss)}
    for name, (mine, other) in pairs.items():
        assert mine.dtype == other.dtype
        assert (mine - other).abs().max() <= rtol * other.abs().max(), name


def variants() -> list[Any]:
    """Llama in every variant, other structures in two, other families in one; the quick ones are not slow."""
    return [
        pytest.param(
            family,
            nf4,
            checkpoint,
            marks=[] if family in QUICK and not (nf4 or checkpoint) else [pytest.mark.slow],
            id=name,
        )
        for family in DEEP
        for nf4 in (False, True)
        for checkpoint in (False, True)
        if family is LLAMA or (nf4 and checkpoint) or (family.name in ("gemma3", "phi3") and nf4 == checkpoint)
        for name in ["-".join([family.name, "nf4" if nf4 else "plain", "checkpoint" if checkpoint else "keep"])]
    ]


@pytest.mark.parametrize(("family", "nf4", "checkpoint"), variants())
def test_layers_are_shared_and_train_as_in_one_graph(family: Family, nf4: bool, checkpoint: bool) -> None:
    """Captured once; the same graph then runs in regions, and whole."""
    model = build(family, nf4=nf4, checkpoint=checkpoint, train_norms=True, layers=DEPTH)
    reports: list[GraphReport] = []
    in_regions, whole = True, 0

    def both(gm: GraphModule, example_inputs: list[Any]) -> Callable:
        outlined = backend(reports)(gm, example_inputs)

        def run(*inputs: Any) -> Any:
            nonlocal whole
            whole += not in_regions
            return outlined(*inputs) if in_regions else gm.forward(*inputs)

        return run

    compiled = torch.compile(model, backend=both)
    actual = step(compiled, batch(padded=True), model)
    in_regions = False
    assert_same(actual, step(compiled, batch(padded=True), model), rtol=1e-6)
    assert whole == len(reports) > 0
    most = max(region.calls for report in reports for region in report.regions)
    assert most >= DEPTH // 2


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "layers.2.mlp.down_proj" in name).mul_(-2)


def swap(model: nn.Module) -> None:
    """Two layers with each other's weights."""
    layers = [
        dict(model.get_submodule(f"base_model.model.model.layers.{number}").named_parameters()) for number in (0, 3)
    ]
    for name, first in layers[0].items():
        last = layers[1][name]
        first.data, last.data = last.data, first.data


def load(model: nn.Module) -> None:
    model.load_state_dict({name: value.sin() for name, value in model.state_dict().items()})


def test_parameters_are_read_at_every_call(lowering: dict[str, str]) -> None:
    model, reports = build(LLAMA, nf4=False, checkpoint=False, train_norms=True, layers=4), []
    compiled = torch.compile(model, backend=backend(reports, **lowering))
    before = step(compiled, batch(padded=False), model)
    for change in (change_in_place, swap, load):
        change(model)
        actual, expected = step(compiled, batch(padded=False), model), step(model, batch(padded=False), model)
        assert_same(actual, expected, rtol=1e-4)
        assert (actual.logits - before.logits).abs().max() > 0.05 * before.logits.abs().max()
        before = actual
    assert len(reports) == 1  # not compiled again


@pytest.mark.parametrize("budget", ["min", pytest.param(None, marks=pytest.mark.slow)])
def test_calls_do_not_share_state(lowering: dict[str, str], budget: str | None) -> None:
    """Two forwards before their backwards, the first of which then goes backward twice."""
    model = build(LLAMA, nf4=False, checkpoint=False, train_norms=True, layers=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = [batch(padded=padded) for padded in (True, False)]
    inputs[1]["attention_mask"] = torch.ones_like(inputs[0]["attention_mask"])

    def gradients(function: Callable) -> list[Tensor]:
        first, second = (function(**one).loss for one in inputs)
        return [
            gradient
            for loss, again in ((first, True), (second, False), (first, False))
            for gradient in torch.autograd.grad(loss, trained, retain_graph=again)
        ]

    actual = gradients(torch.compile(model, backend=backend([], memory_budget=budget, **lowering)))
    for mine, other in zip(actual, gradients(model), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def saved_bytes(layers: int, **options: Any) -> int:
    """What a forward keeps for backward: each storage once; no parameters, no buffers, no states of the generator.

    Torch keeps such a state for each attention that it will run again, whether or not it draws random numbers.
    """
    torch._dynamo.reset()
    model = build(LLAMA, nf4=False, checkpoint=False, train_norms=True, layers=layers)
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    compiled = torch.compile(model, backend=backend([], lower="inductor", **options))
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.uint8 and (pointer := tensor.untyped_storage().data_ptr()) not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compiled(**batch(padded=False))
    assert output.loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("lower_by", "budget"),
    [
        ("aot", "min"),
        pytest.param("aot", None, marks=SLOW),
        pytest.param("inductor", "min", marks=SLOW),
    ],
)
def test_the_leanest_plan_keeps_little_of_each_layer(
    lower_by: str, budget: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lower_by == "aot":
        monkeypatch.setattr(aot, "compile_fx", through_aot)
    hidden_state_bytes = 2 * 16 * 64 * 4  # [B, S, D] of float32
    grown_bytes = saved_bytes(6, memory_budget=budget) - saved_bytes(4, memory_budget=budget)
    if budget == "min":
        assert 2 * hidden_state_bytes <= grown_bytes < 5 * hidden_state_bytes
    else:
        assert grown_bytes > 10 * hidden_state_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("budget", [None, "max-speed", "min"])
@pytest.mark.parametrize("family", [LLAMA, GEMMA3], ids=lambda family: family.name)
def test_on_the_gpu(family: Family, budget: str | None) -> None:
    """Regions in bfloat16 through Inductor, against float64 and torch's own error."""
    model = build(
        family, nf4=True, checkpoint=False, train_norms=True, layers=DEPTH, dtype=torch.bfloat16, device="cuda"
    )
    reports: list[GraphReport] = []
    compiled = torch.compile(model, backend=backend(reports, memory_budget=budget, lower="inductor"))
    check(model, compiled, batch(padded=True, device="cuda"), torch.compile(model))
    assert max(region.calls for report in reports for region in report.regions) >= DEPTH // 2
