"""What a mixture of experts keeps for backward: no weight of any size but its 4 bits, and the same for any routing."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fastft
from fastft.rewriter.memory import pareto, planner
from fastft.rewriter.runtime import controller
from fastft.rewriter.runtime.planned_graph import Planned

LAYERS, E, TOP_K, HIDDEN, WIDTH = 3, 16, 2, 64, 192
B, S = 2, 16
ROWS = B * S * TOP_K
SMALLER = E * WIDTH * HIDDEN  # elements of down_proj of all experts; gate_up_proj has twice as many


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward of another test waits for a backward."""
    monkeypatch.setattr(controller, "alive", weakref.WeakSet())


def model_of() -> nn.Module:
    """Experts in 4 bits with adapters, in layers with adapters on attention."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, vocab_size=64, num_experts=E, num_experts_per_tok=TOP_K, use_cache=False,
    )  # fmt: skip
    targets = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(Qwen3MoeForCausalLM(config).requires_grad_(False), lora)
    assert sum("experts" in name for name in fastft.quantize_(model).layers) == 2 * LAYERS
    return model.train()


def batch(kind: str = "random") -> dict[str, Tensor]:
    """Random tokens, or one token alone, which always chooses the same experts where attention adds nothing to it."""
    ids = torch.randint(1, 64, (B, S), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids if kind == "random" else torch.full_like(ids, 7), "labels": ids.clone()}


def compiled(model: nn.Module, budget: Any) -> Callable:
    options = {"lower": "eager", "strict": True, "memory_budget": budget}
    return torch.compile(model, backend="fastft", options=options)


def planned() -> Planned:
    (one,) = controller.alive
    return one


def saved_by(call: Callable, model: nn.Module, inputs: dict[str, Tensor]) -> Counter[tuple[int, tuple[int, ...]]]:
    """Count what a forward keeps beside the model: by bytes and shape.  The user's hooks see it all."""
    states = [one.quant_state for one in (*model.modules(), *model.parameters()) if hasattr(one, "quant_state")]
    statistics = [one for state in states for part in (state, state.state2) for one in (part.absmax, part.code)]
    held = (*model.parameters(), *model.buffers(), *statistics, *(state.offset for state in states))
    own = {one.untyped_storage().data_ptr() for one in held}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = call(**inputs).loss
    loss.backward()
    return Counter((one.untyped_storage().nbytes(), tuple(one.shape)) for one in kept.values())


def loads() -> list[list[Tensor]]:
    """How many rows each expert of each layer has, for each kind of batch."""
    model, found = model_of(), list[Tensor]()
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda *given: found.append(given[2][2].flatten().bincount(minlength=E)))
    for kind in ("random", "same"):
        model(**batch(kind))
    return [found[:LAYERS], found[LAYERS:]]


@pytest.mark.parametrize("budget", ["max-speed", pytest.param("min", marks=pytest.mark.slow)])
def test_what_is_saved(budget: str) -> None:
    """Nothing of a weight's size, so no W + delta; a layer's rows once each; all as planned; alike for any routing."""
    random, same = loads()
    assert min((load > 0).sum() for load in random) > E // 2
    assert max((load > 0).sum() for load in same) == TOP_K
    model = model_of()
    call = compiled(model, budget)
    call(**batch()).loss.backward()
    plan, graphs = planned().controller.plan, len(fastft.compilations().graphs)
    saved, *others = (saved_by(call, model, batch(kind)) for kind in ("random", "same", "random"))
    assert all(other == saved for other in others)
    assert planned().controller.plan is plan
    assert len(fastft.compilations().graphs) == graphs
    assert max(size for size, _ in saved) < SMALLER  # one byte for each element
    rows = Counter(shape for _, shape in saved.elements() if shape[:1] == (ROWS,) and len(shape) == 2)
    at_most = {(ROWS, 2 * WIDTH): 1, (ROWS, WIDTH): budget == "max-speed", (ROWS, 4): 2}
    assert not rows - Counter({shape: times * LAYERS for shape, times in at_most.items()})
    assert rows[ROWS, 2 * WIDTH] == LAYERS  # the peak is in the first layer's own backward
    assert plan is not None
    parts = next(moment.parts for moment in plan.moments if moment.label.startswith("backward"))
    expected = parts["kept activations"] + parts["between layers"]
    assert sum(size * times for (size, _), times in saved.items()) == pytest.approx(expected, rel=0.06)


@pytest.mark.slow
def test_bits_are_the_same_under_any_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto, "LEAST_OFFLOAD", 1)
    model = model_of()

    def gradients(call: Callable) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        for kind in ("random", "same"):
            call(**batch(kind)).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients(model)
    call = compiled(model, "max-speed")
    fastest = gradients(call)
    for one, other in zip(fastest, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())
    own = planned().controller
    high = own.plan.peak_bytes
    low = planner.plan(planned().sequence, own.facts, 0).peak_bytes
    assert low < high
    plans = {planned().choices}
    for budget in ("min", (low + high) // 2):
        fastft.set_memory_budget(budget)
        assert all(map(torch.equal, gradients(call), fastest)), budget
        assert own.plan.peak_bytes <= (low if budget == "min" else budget)
        plans.add(planned().choices)
    assert len(plans) == 3
    with pytest.raises(fastft.BudgetError, match="at the least"):
        planner.plan(planned().sequence, own.facts, low - 1)
