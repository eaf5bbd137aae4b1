"""Experts of transformers, with and without PEFT's adapters and bitsandbytes' 4 bits: one graph, and right.

The truth is the model's own code in float64; of weights in 4 bits, with the numbers that they stand for.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import bitsandbytes.nn.parametrize
import peft
import pytest
import torch
import torch.nn.functional as F
from compare import FORWARD, GRADIENT, assert_close_to_truth
from lifting import Capture, compiled, gradient_like, lifted, rules
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from fastft.compat import expert_substitutes

EXPERTS, TOP_K, WIDTH, INNER = 4, 2, 64, 64
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Experts of transformers' interface, as the flags say that a family has them."""

    flags: dict[str, bool]

    def __init__(self, config: Any, experts: int, **flags: bool) -> None:
        super().__init__()
        self.num_experts = experts
        up = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
        sizes = {up: (INNER * (2 if "gate" in up else 1), WIDTH), "down_proj": (WIDTH, INNER)}
        for name, shape in sizes.items():
            turned = shape[::-1] if flags.get("is_transposed") else shape
            setattr(self, name, nn.Parameter(torch.randn(experts, *turned) / 8))
            if flags.get("has_bias"):
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(experts, shape[0])))
        if flags.get("has_post_expert_norm"):
            self.post_expert_norm = nn.LayerNorm(WIDTH)
        self.act_fn = nn.SiLU()
        self.flags = flags

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        final = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = torch.where(top_k_index == expert)
            rows = self.product("gate_up_proj" if self.has_gate else "up_proj", expert, hidden_states[token])
            rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
            rows = self.product("down_proj", expert, rows)
            if self.flags.get("has_post_expert_norm"):
                rows = self.post_expert_norm(rows)
            final.index_add_(0, token, (rows * top_k_weights[token, place, None]).to(final.dtype))
        return final

    def product(self, name: str, expert: int, rows: Tensor) -> Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return F.linear(rows, weight.T if self.is_transposed else weight, bias)


class Block(nn.Module):
    """A router and its experts."""

    def __init__(self, implementation: str = "grouped_mm", experts: int = EXPERTS, **flags: bool) -> None:
        super().__init__()
        torch.manual_seed(0)

        class Family(Experts):
            def __init__(self, config: Any) -> None:
                super().__init__(config, experts, **flags)

            forward = _copied(Experts.forward)  # the decorator changes the class
            __module__ = "transformers.models.of_these_tests"  # others' own forwards are not read

        family = use_experts_implementation(**flags)(Family)
        self.router = nn.Parameter(torch.randn(experts, WIDTH) / 8)
        self.register_buffer("bias", torch.zeros(experts))
        self.experts = family(SimpleNamespace(_experts_implementation=implementation))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = F.softmax(F.linear(tokens.to(self.router.dtype), self.router) + self.bias, -1)
        weights, index = scores.topk(min(TOP_K, len(self.router)))
        return self.experts(tokens, index, weights.to(tokens.dtype)).view_as(x)


def _copied(function: Callable) -> Callable:
    def forward(self: Any, *args: Any) -> Tensor:
        return function(self, *args)

    return forward


def tokens(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


def results(call: Callable, of: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a call returns, and all gradients, by name."""
    of.zero_grad(set_to_none=True)
    given = x.detach().requires_grad_()
    y = call(given)
    y.backward(gradient_like(y))
    gradients = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": given.grad, **gradients}


def exact(model: nn.Module) -> nn.Module:
    """The same in float64, with the numbers that 4 bits stand for."""
    model = copy.deepcopy(model)
    for module in [module for module in model.modules() if "parametrizations" in module._modules]:
        values = {name: getattr(module, name).detach() for name in module.parametrizations}
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
    return model


def assert_right(model: nn.Module, call: Callable, x: Tensor, autocast: Any = nullcontext) -> None:
    """Results as near to float64's as the model's own, forward and backward."""
    plain = exact(model)
    with autocast():
        eager = results(plain, plain, x)
        mine = results(call, model, x)
    double = copy.deepcopy(plain).double()
    for module in double.modules():
        if isinstance(module, Experts):
            module.config = SimpleNamespace(_experts_implementation="eager")  # torch's grouped product has no float64
    truth = results(double, double, x.double())
    assert mine.keys() == eager.keys() == truth.keys()
    for name, want in truth.items():
        factor = FORWARD if name == "y" else GRADIENT
        assert_close_to_truth(mine[name], eager[name], want, factor, want.abs().max().item())


def ready(model: nn.Module) -> tuple[Callable, list[Capture]]:
    captures: list[Capture] = []
    return compiled(model, captures, substituted=True), captures


def taken(captures: list[Capture]) -> int:
    """How many products of experts are ops, in the only graph."""
    ((_, report),) = captures
    return rules(report)[0].count(expert_substitutes.RULE)


FLAGS: dict[str, tuple[str, dict[str, bool]]] = {
    "grouped": ("grouped_mm", {}),
    "batched": ("batched_mm", {}),
    "one by one": ("eager", {}),
    "transposed, with biases": ("eager", {"is_transposed": True, "has_bias": True}),
    "without a gate": ("batched_mm", {"has_gate": False, "has_bias": True}),
}


@pytest.mark.parametrize("name", FLAGS)
def test_what_the_interface_says(name: str) -> None:
    implementation, flags = FLAGS[name]
    model = Block(implementation, **flags)
    call, captures = ready(model)
    for step in range(2):
        assert_right(model, call, tokens(step))
    model.bias[:2] = 1e4  # two experts get all tokens, two none
    assert_right(model, call, tokens(2))
    assert taken(captures) == 2


@pytest.mark.skipif(
    "has_post_expert_norm" not in use_experts_implementation.__kwdefaults__, reason="transformers has no such experts"
)
def test_a_norm_behind_the_experts() -> None:
    model = Block(has_post_expert_norm=True)
    call, captures = ready(model)
    assert_right(model, call, tokens())
    assert taken(captures) == 2


def adapt(model: nn.Module, targets: list[str] = TARGETS, *names: str, r: int = 3, frozen: bool = True) -> nn.Module:
    """Adapters of random numbers, under each of the names."""
    model.requires_grad_(not frozen)
    for seed, name in enumerate(names or ("default",)):
        torch.manual_seed(seed + 1)
        config = peft.LoraConfig(r=r + seed, lora_alpha=5, target_parameters=targets, init_lora_weights=False)
        peft.inject_adapter_in_model(config, model, name)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.requires_grad_(True)
    return model


def wrappers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, peft.tuners.lora.layer.ParamWrapper))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["grouped", "transposed, with biases", "without a gate"])
def test_adapters(name: str, frozen: bool) -> None:
    implementation, flags = FLAGS[name]
    up = "experts.gate_up_proj" if flags.get("has_gate", True) else "experts.up_proj"
    model = adapt(Block(implementation, **flags), [up, "experts.down_proj"], frozen=frozen)
    call, captures = ready(model)
    for step in range(2):
        assert_right(model, call, tokens(step))
    assert taken(captures) == 2
    assert "baddbmm" not in captures[0][0].code


def test_several_adapters_at_once() -> None:
    model = adapt(Block(), TARGETS, "first", "second")
    for wrapper in wrappers(model):
        wrapper.set_adapter(["first", "second"])
    call, captures = ready(model)
    assert_right(model, call, tokens())
    assert taken(captures) == 2


def test_adapters_of_one_weight_and_of_a_bias() -> None:
    model = adapt(Block("eager", is_transposed=True, has_bias=True), ["experts.down_proj", "experts.gate_up_proj_bias"])
    call, captures = ready(model)
    assert_right(model, call, tokens())
    assert taken(captures) == 2


def test_one_expert_whose_delta_is_added_as_that_of_a_matrix() -> None:
    """PEFT adds it turned, which fits where a weight is square."""
    model = adapt(Block("eager", experts=1, is_transposed=True), ["experts.down_proj"])
    call, captures = ready(model)
    assert_right(model, call, tokens())
    assert taken(captures) == 2


def frozen_adapters(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.router.requires_grad_(True)


def without_adapters(model: nn.Module) -> None:
    for wrapper in wrappers(model):
        wrapper.enable_adapters(False)


def merged(model: nn.Module) -> None:
    for wrapper in wrappers(model):
        wrapper.merge()


def none_active(model: nn.Module) -> None:
    for wrapper in wrappers(model):
        wrapper._active_adapter = []


@pytest.mark.parametrize("change", [frozen_adapters, without_adapters, merged, none_active])
def test_adapters_that_change_nothing_or_are_not_trained(change: Callable[[nn.Module], None]) -> None:
    model = adapt(Block(), frozen=False)
    change(model)
    call, captures = ready(model)
    assert_right(model, call, tokens())
    assert taken(captures) == 2


def test_adapters_that_are_switched_off_later() -> None:
    model = adapt(Block())
    call, _ = ready(model)
    assert_right(model, call, tokens())
    without_adapters(model)
    model.router.requires_grad_(True)
    assert_right(model, call, tokens())


def in_4_bits(model: nn.Module, nested: bool = True, quant_type: Any = "nf4") -> nn.Module:
    for name in [name for name in WEIGHTS if hasattr(model.experts, name)]:
        bitsandbytes.nn.parametrize.replace_parameter_4bit(model.experts, name, nested, quant_type)
    return model


@pytest.mark.parametrize(("nested", "quant_type"), [(False, "nf4"), (True, "nf4"), (True, "fp4")])
def test_weights_in_4_bits(nested: bool, quant_type: str) -> None:
    """PEFT itself adds its delta once more in each forward: it looks for another class when it takes it away."""
    model = adapt(in_4_bits(Block(is_transposed=True, has_bias=True), nested, quant_type))
    call, captures = ready(model)
    for step in range(2):
        assert_right(model, call, tokens(step))
    assert taken(captures) == 2
    assert "dequantize" not in captures[0][0].code
    assert bitsandbytes.nn.parametrize.P._cache_enabled == 0


def test_a_hook_of_the_users_beside_those_for_4_bits() -> None:
    model = in_4_bits(Block().requires_grad_(False))
    model.experts.register_forward_hook(lambda module, args, output: output * 2.0)
    call, captures = ready(model)
    torch.testing.assert_close(call(tokens()), model(tokens()), rtol=1e-4, atol=1e-4)
    assert taken(captures) == 2


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_16_bits_with_adapters_in_float32(implementation: str) -> None:
    model = adapt(Block(implementation).to(torch.bfloat16))
    for wrapper in wrappers(model):
        wrapper.lora_A.float(), wrapper.lora_B.float()
    call, captures = ready(model)
    assert_right(model, call, tokens(dtype=torch.bfloat16))
    assert taken(captures) == 2


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(implementation: str, dtype: torch.dtype) -> None:
    model = adapt(Block(implementation))
    model.experts.to(dtype)
    call, captures = ready(model)
    assert_right(model, call, tokens(), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert taken(captures) == 2


def test_autocast_leaves_float64_alone() -> None:
    model = Block("eager").double()
    call, captures = ready(model)
    assert_right(model, call, tokens(dtype=torch.float64), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert taken(captures) == 2


class Handwritten(nn.Module):
    """A mixture of experts of no library."""

    def __init__(self, experts: int = EXPERTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Parameter(torch.randn(experts, WIDTH) / 8)
        self.experts = nn.Module()
        self.experts = Dense(experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, F.softmax(F.linear(x, self.router), -1))


class Dense(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, INNER, WIDTH) / 8)
        self.down_proj = nn.Parameter(torch.randn(experts, WIDTH, INNER) / 8)
        self.flat = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        rows = F.silu(torch.einsum("bsd,eid->bsei", x, self.gate_up_proj))
        return torch.einsum("bsei,edi,bse->bsd", rows, self.down_proj, scores) + F.linear(x, self.flat)


@pytest.mark.parametrize("experts", [1, EXPERTS])
def test_adapters_of_a_module_of_no_library(experts: int) -> None:
    model = adapt(Handwritten(experts), [*TARGETS, "experts.flat"])
    call, captures = ready(model)
    for step in range(2):
        assert_right(model, call, tokens(step))
    assert taken(captures) == 0


class Tied(Dense):
    """One weight under two names, of which one has an adapter."""

    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self.same = self.flat

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        return super().forward(x, scores) + F.linear(torch.tanh(x), self.same)


def test_an_adapter_of_one_of_two_names() -> None:
    model = Handwritten()
    model.experts = Tied(EXPERTS)
    model = adapt(model, ["experts.flat"])
    call, captures = ready(model)
    assert_right(model, call, tokens())
    assert taken(captures) == 0


@pytest.mark.parametrize("adapted", [False, True])
def test_experts_that_are_left(adapted: bool) -> None:
    """One graph, and the report says that they are."""
    model = Block()
    model.experts._is_expert_parallel = True
    model = adapt(model) if adapted else model
    call, captures = ready(model)
    assert_right(model, call, tokens())
    assert taken(captures) == 0
    misses = [miss for miss in captures[0][1].near_misses if miss.rule == expert_substitutes.RULE]
    assert len(misses) == (4 if adapted else 2)


def test_products_that_are_added_elsewhere_are_no_experts() -> None:
    x = torch.randn(2, 4, 4, requires_grad=True)
    _, report = lifted(lambda a, b: torch.baddbmm(a, b, b), x, x)
    assert not report.near_misses


class Halved(Experts):
    """Experts of no family of transformers', whose own forward is not what the interface says."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, EXPERTS)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = self._apply_gate(torch.einsum("td,eid->tei", hidden_states, self.gate_up_proj))
        scores = torch.zeros(len(rows), EXPERTS).to(rows).scatter(1, top_k_index, top_k_weights.to(rows.dtype))
        return torch.einsum("tei,edi,te->td", rows, self.down_proj, scores) / 2


@pytest.mark.parametrize("adapted", [False, True])
def test_a_forward_of_the_user_s(adapted: bool) -> None:
    model = Block()
    model.experts = use_experts_implementation(Halved)(SimpleNamespace(_experts_implementation="eager"))
    model = adapt(model) if adapted else model
    call, captures = ready(model)
    assert_right(model, call, tokens())
    assert taken(captures) == 0


class Scaled(Block):
    """Its gate reads a parameter of its own, [E, D]."""

    def __init__(self) -> None:
        super().__init__("grouped_mm")
        family = type(self.experts)
        self.experts.scale = nn.Parameter(torch.randn(EXPERTS, INNER))
        family._apply_gate = _scaled_gate


def _scaled_gate(self: Any, rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return self.act_fn(gate) * up * self.scale.sum(0)


def test_an_adapter_of_a_parameter_that_the_gate_reads() -> None:
    """PEFT's own code runs, whose graph breaks, and nothing of it is lost."""
    model = adapt(Scaled(), ["experts.scale"])
    call, captures = ready(model)
    assert_right(model, call, tokens())
    assert len(captures) > 1
