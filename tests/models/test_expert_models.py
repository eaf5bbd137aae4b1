"""Mixtures of experts that people train: one graph whatever tokens choose, layers of one kind, and right."""

import copy
import itertools
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fastft
from fastft.compat.expert_substitutes import RULE
from fastft.rewriter.context import SWITCHED_OFF
from fastft.rewriter.lowering import cuda_graph_policy
from fastft.rewriter.report import history
from fastft.rewriter.rows import by_expert
from models.breadth import LAYERS, built, config, sizes
from models.test_experts import exact

CHOSEN = {"num_experts_per_tok": 2}
LOW_RANK = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
PLAIN = {"intermediate_size": 64, **CHOSEN}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-MoE": ("Qwen3MoeConfig", sizes(num_experts=8, moe_intermediate_size=64, **CHOSEN)),
    "Mixtral": ("MixtralConfig", sizes(num_local_experts=4) | PLAIN),
    "GPT-OSS": ("GptOssConfig", sizes(num_local_experts=4, sliding_window=16) | PLAIN),
    "OLMoE": ("OlmoeConfig", sizes("head_dim", num_experts=8) | PLAIN),
    "Granite-MoE": ("GraniteMoeConfig", sizes("head_dim", num_local_experts=4) | PLAIN),
    "DeepSeek V3": (
        "DeepseekV3Config",
        sizes("head_dim", n_routed_experts=8, moe_intermediate_size=64, **GROUPS) | LOW_RANK | CHOSEN
        | {"num_hidden_layers": LAYERS + 1},
    ),
}  # fmt: skip
ATTENTION = ["q_proj", "v_proj", "o_proj", "q_b_proj", "kv_b_proj"]
WEIGHTS = ("gate_up_proj", "down_proj")
TRAINED = {"whole": (False, False), "attention": (True, False), "experts": (False, True), "both": (True, True)}


def made(family: str, trained: str, nf4: bool = False, **settings: Any) -> nn.Module:
    name, given = FAMILIES[family]
    model = built(config(name, **given, **settings))
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 3 or "gate.weight" in parameter_name or "router" in parameter_name:
            nn.init.normal_(parameter, std=0.2)
    on_attention, on_experts = TRAINED[trained]
    experts = [path for path, module in model.named_modules() if "gate_up_proj" in module._parameters]
    experts = [path for path in experts if model.get_submodule(path).gate_up_proj.dim() == 3]
    if nf4:
        model.requires_grad_(False)
        fastft.quantize_(model)
    if on_attention or on_experts:
        names = [f"{path}.{weight}" for path, weight in itertools.product(experts, WEIGHTS)]
        targets = {"target_modules": ATTENTION if on_attention else [], "target_parameters": names * on_experts}
        settings = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(model, peft.LoraConfig(**settings, **targets))
    return model.train()


def batch(length: int) -> dict[str, Tensor]:
    ids = torch.randint(10, 100, (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def results(call: Any, of: nn.Module, **given: Any) -> dict[str, Tensor]:
    of.zero_grad(set_to_none=True)
    loss = call(**given).loss
    loss.backward()
    gradients = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def check(model: nn.Module, least_calls: int, experts: bool = True, **given: Any) -> None:
    """Two batches of two lengths by one graph, with results as the model's own."""
    torch._dynamo.reset()
    history._graphs.clear()
    eager = exact(model)
    call = torch.compile(model, backend="fastft", options={"lower": "eager", "strict": True})
    for length in (24, 19):
        expected = results(eager, eager, **batch(length), **given)
        actual = results(call, model, **batch(length), **given)
        assert actual.keys() == expected.keys()
        for name, want in expected.items():
            torch.testing.assert_close(
                actual[name], want, rtol=1e-3, atol=1e-4 * max(want.abs().max().item(), 1e-4),
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip
    (graph,) = fastft.compilations().graphs
    assert max(region.calls for region in graph.regions) >= least_calls
    products = 2 * LAYERS if experts else 0
    assert [one.rule for one in graph.lifted].count(RULE) == products
    assert ("experts.base_layer.base_layer" in str(graph.lifted)) == any("experts.lora_A" in name for name in expected)
    assert not [miss for miss in graph.near_misses if miss.rule == RULE]


PLACE = "base_model.model.model.layers.1.mlp.experts.base_layer.base_layer"
QUICK = {("Qwen3-MoE", "experts", False), ("GPT-OSS", "both", True), ("DeepSeek V3", "both", True)}
CASES = [
    pytest.param(family, trained, nf4, marks=[] if (family, trained, nf4) in QUICK else [pytest.mark.slow])
    for family in FAMILIES for trained, nf4 in (*((one, False) for one in TRAINED), ("attention", True), ("both", True))
    if family in ("Qwen3-MoE", "GPT-OSS") or (trained != "whole" and (trained, nf4) != ("attention", True))
]  # fmt: skip


def test_rows_of_experts_decide_on_cuda_graphs_where_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is then a call of a nested graph."""
    found: list[int] = []
    decide = cuda_graph_policy.capturable

    def noted(gm: Any, *args: Any, **kwargs: Any) -> Any:
        found.extend(by_expert.elements(gm))
        return decide(gm, *args, **kwargs)

    monkeypatch.setattr(cuda_graph_policy, "capturable", noted)
    torch._dynamo.reset()
    model = made("Qwen3-MoE", "experts")
    call = torch.compile(model, backend="fastft", options={"lower": "eager", "strict": True})
    call(**batch(24)).loss.backward()
    chosen = CHOSEN["num_experts_per_tok"] * batch(24)["input_ids"].numel()
    config = model.config
    assert set(found) == {chosen * config.hidden_size, chosen * config.moe_intermediate_size}


@pytest.mark.parametrize(("family", "trained", "nf4"), CASES)
def test_one_graph_and_regions(family: str, trained: str, nf4: bool) -> None:
    check(made(family, trained, nf4), LAYERS // 2 if family == "GPT-OSS" else LAYERS)


@pytest.mark.slow
def test_4_bits_where_the_model_loops_over_experts() -> None:
    """A class that torch makes of a parametrized module is not transformers', but its base is."""
    check(made("Qwen3-MoE", "both", nf4=True, experts_implementation="eager"), LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen3-MoE", "Mixtral"])
def test_the_loss_that_balances_experts(family: str) -> None:
    """What collects the router's logits changes a list in each layer, so that every layer is traced."""
    check(made(family, "both"), LAYERS - 1, output_router_logits=True)


@pytest.mark.parametrize(
    ("disabled", "products"), [("experts", 0), (f"experts@{PLACE}", 2 * LAYERS - 2), ("op:expert_linear", 0)]
)
@pytest.mark.slow
def test_switched_off_in_all_layers_or_in_one(disabled: str, products: int) -> None:
    model = made("Qwen3-MoE", "both")
    eager = copy.deepcopy(model)
    expected = results(eager, eager, **batch(24))
    torch._dynamo.reset()
    history._graphs.clear()
    options = {"lower": "eager", "strict": True, "disable": [disabled]}
    actual = results(torch.compile(model, backend="fastft", options=options), model, **batch(24))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    (graph,) = fastft.compilations().graphs
    assert [one.rule for one in graph.lifted].count(RULE) == products
    misses = [miss for miss in graph.near_misses if miss.rule == RULE]
    assert {miss.reason for miss in misses} == {SWITCHED_OFF}
    assert len(misses) == 2 * (2 * LAYERS - products)  # an adapter is added, then a product computed
