"""Functions of libraries that break graphs do not where fastft compiles, nor do they compute anything else there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bitsandbytes.functional
import peft
import pytest
import torch
from compare import assert_same_metadata
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.fx import GraphModule
from training.setting import base

import fastft
from fastft.compat import peft_substitutes, substitutions
from fastft.rewriter import backend

TARGETS = ["q_proj", "v_proj", "up_proj"]
INVOCATION = [20, 21]


class Counting:
    """A backend that runs what it is given, and counts; it has substitutes if it is fastft's."""

    def __init__(self, is_ours: bool) -> None:
        self.traces_layers_once, self.graphs = is_ours, 0

    def __call__(self, gm: GraphModule, _: object) -> Callable:
        self.graphs += 1
        return gm.forward


def results(function: Callable, of: nn.Module, **batch: Any) -> list[Tensor]:
    """The loss and all gradients."""
    of.zero_grad(set_to_none=True)
    loss = function(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in of.parameters() if p.grad is not None)]


def compiled(model: Callable, is_ours: bool) -> tuple[Callable, Counting]:
    torch._dynamo.reset()
    counting = Counting(is_ours)
    return torch.compile(model, backend=counting), counting


def assert_equal_within_rounding(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 1
    for got, want in zip(actual, expected, strict=True):
        assert_same_metadata(got, want)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * max(1.0, want.abs().max().item()))
    assert any(want.abs().max() > 0 for want in expected[1:])


def batch(*, seed: int = 0, **more: Any) -> dict[str, Tensor]:
    ids = torch.randint(30, 64, (2, 12), generator=torch.Generator().manual_seed(seed))
    for (row, start), tokens in more.pop("invocations", {}).items():
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
    return {"input_ids": ids, "labels": ids, **more}


def adapted(config: Any, quantized: dict[str, Any] | None = None) -> nn.Module:
    """A small model with an adapter that changes what it computes."""
    torch.manual_seed(0)
    model = base(layers=2).requires_grad_(False)
    if quantized is not None:
        fastft.quantize_(model, **quantized)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


CONFIGS: dict[str, tuple[Any, Any]] = {
    "DoRA": (peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True), None),
    "DoRA beside NF4": (peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True), {}),
    "DoRA beside FP4, not nested": (
        peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True), {"quant_type": "fp4", "double_quant": False},
    ),
    "LoHa": (peft.LoHaConfig(r=4, target_modules=TARGETS), None),
    "LoKr": (peft.LoKrConfig(r=4, target_modules=TARGETS), None),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "FP4" in name else []) for name in CONFIGS]
)
def test_one_graph_that_computes_the_same(name: str) -> None:
    model = adapted(*CONFIGS[name])
    expected = results(model, model, **batch())
    run, counting = compiled(model, is_ours=True)
    assert_equal_within_rounding(results(run, model, **batch()), expected)
    assert counting.graphs == 1
    other, others = compiled(model, is_ours=False)
    results(other, model, **batch())
    assert others.graphs > 1, "the original breaks the graph no more: the substitute can go"


def weight_of(layer: nn.Module) -> Tensor:
    return dequantize_module_weight(layer)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_weights_of_four_bits_whatever_holds_them(storage: torch.dtype, nested: bool) -> None:
    layer = bitsandbytes.nn.Linear4bit(
        64, 32, bias=False, quant_type="nf4", quant_storage=storage, compress_statistics=nested
    )
    layer = layer.to("cpu")
    assert layer.weight.dtype == storage
    run, counting = compiled(weight_of, is_ours=True)
    assert torch.equal(run(layer), dequantize_module_weight(layer))
    assert counting.graphs == 1


class Wrapped(nn.Module):
    """What HQQ's layers look like: a weight of their own making, and a method that gives it."""

    W_q = None

    def dequantize(self) -> Tensor:
        return torch.full((2, 2), 3.0)


def test_what_the_substitute_does_not_know_is_left_to_the_original() -> None:
    run, _ = compiled(weight_of, is_ours=True)
    assert torch.equal(run(Wrapped()), torch.full((2, 2), 3.0))
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(_Described(torch.ones(2, 2)))
    expected = dequantize_module_weight(layer)
    run, _ = compiled(weight_of, is_ours=True)
    assert torch.equal(run(layer), expected)


class _Described(Tensor):
    """A subclass, as quantised weights are."""


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
def test_adapters_left_out_at_random_are_drawn_by_the_original(config: Any) -> None:
    """With a module_dropout of 1 none is ever applied, and none gets a gradient."""
    model = adapted(config(r=4, target_modules=TARGETS, module_dropout=1.0))
    x = batch()["input_ids"]
    run, counting = compiled(model, is_ours=True)
    with torch.no_grad():
        assert torch.equal(run(input_ids=x).logits, model(input_ids=x).logits)
        assert counting.graphs > 1
        with model.disable_adapter():
            assert torch.equal(run(input_ids=x).logits, model(input_ids=x).logits)


@pytest.mark.parametrize("merged", [False, True])
def test_loha_switched_off_or_merged(merged: bool) -> None:
    model = adapted(CONFIGS["LoHa"][0])
    if merged:
        model.base_model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    run, _ = compiled(model, is_ours=True)
    x = batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(run(input_ids=x).logits, model(input_ids=x).logits)


INVOCATIONS = [
    {(0, 2): INVOCATION, (0, 7): INVOCATION, (1, 10): INVOCATION},  # the last one counts, and it may be at the end
    {(0, 0): INVOCATION, (1, 11): INVOCATION[:1]},  # at the beginning, and not whole
    {},
]


def test_alora_is_a_search_and_one_graph() -> None:
    """PEFT hands the places over by hooks, at which every graph breaks once; other tokens compile nothing again."""
    model = adapted(
        peft.LoraConfig(r=4, target_modules=TARGETS, alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")
    )
    run, counting = compiled(model, is_ours=True)
    counts = []
    for seed, invocations in enumerate(INVOCATIONS):
        given = batch(seed=seed, invocations=invocations)
        expected, actual = results(model, model, **given), results(run, model, **given)
        if invocations:
            assert_equal_within_rounding(actual, expected)
        else:  # then nothing but the base model computes, and gradients are zero
            torch.testing.assert_close(actual[0], expected[0])
            assert not any(gradient.any() for gradient in (*actual[1:], *expected[1:]))
        counts.append(counting.graphs)
    assert counts == [2, 2, 2]
    other, others = compiled(model, is_ours=False)
    results(other, model, **batch(invocations=INVOCATIONS[0]))
    assert others.graphs > 2


def test_offsets_are_the_original_s() -> None:
    from peft.tuners.lora.variants import calculate_alora_offsets

    model = adapted(
        peft.LoraConfig(r=4, target_modules=TARGETS, alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")
    )
    for seed, invocations in enumerate(INVOCATIONS):
        ids = batch(seed=seed, invocations=invocations)["input_ids"]
        expected = calculate_alora_offsets(model.peft_config, "default", ids)
        found = peft_substitutes.invocation_offsets(calculate_alora_offsets, model.peft_config, "default", ids)
        assert found.tolist() == [offset or 0 for offset in expected]


def plain(x: Tensor) -> Tensor:
    return x + 1


def twice(original: Callable, x: Tensor) -> Tensor:
    return 2 * original(x)


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what is installed as it was."""
    for kind in (substitutions.UserFunctionVariable, substitutions.UserMethodVariable):
        monkeypatch.setattr(kind, "call_function", kind.call_function)
    autograd_function = substitutions.AutogradFunctionVariable
    monkeypatch.setattr(autograd_function, "call_apply", autograd_function.call_apply)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("since", "until", "applies"), [("0", "999", True), ("999", "1000", False), ("0", "0.1", False)]
)
def test_a_substitute_is_for_some_versions_and_for_fastft_alone(since: str, until: str, applies: bool) -> None:
    one = substitutions.Substitution(f"{__name__}:plain", "torch", since, until, "for this test", twice)
    unknown = replace(one, package="nobody-has-made-this")
    assert one.applies() is applies
    assert not unknown.applies()
    substitutions.install(backend._is_ours, (one,))
    x = torch.ones(3)
    run, _ = compiled(lambda x: plain(x), is_ours=True)
    assert torch.equal(run(x), 2 * plain(x) if applies else plain(x))
    run, _ = compiled(lambda x: plain(x), is_ours=False)
    assert torch.equal(run(x), plain(x))


OTHERS: dict[str, Any] = {
    "AdaLoRA": peft.AdaLoraConfig(init_r=6, target_r=4, target_modules=TARGETS, total_step=10),
    "OFT": peft.OFTConfig(oft_block_size=16, r=0, target_modules=TARGETS),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "IA3": peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "rsLoRA": peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "lora_bias": peft.LoraConfig(r=4, target_modules=TARGETS, lora_bias=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_need_none(name: str) -> None:
    model = adapted(OTHERS[name])
    expected = results(model, model, **batch())
    run, counting = compiled(model, is_ours=False)
    assert_equal_within_rounding(results(run, model, **batch()), expected)
    assert counting.graphs == 1
