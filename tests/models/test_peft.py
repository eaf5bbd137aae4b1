"""Adapters of PEFT on plain and 4-bit layers: whatever they are, the projections of a layer form four groups."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from compare import FORWARD, GRADIENT, assert_close_to_truth, assert_same_metadata
from hypothesis import given
from hypothesis import strategies as st
from lifting import Capture, compiled, reasons
from op_calls import nearby
from peft import LoraConfig, PeftModel, get_peft_model
from strategies import DEVICES
from torch import Tensor, nn

import fastft
from models.families import Double, in_double

GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
LAYERS = [name for group in GROUPS for name in group]
HIDDEN, INNER = 64, 128
on_devices = pytest.mark.parametrize("device", DEVICES)


class Block(nn.Module):
    """A layer without its attention."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        for name, width in {"q": HIDDEN, "k": 32, "v": 32, "o": HIDDEN, "gate": INNER, "up": INNER}.items():
            self.add_module(name, nn.Linear(HIDDEN, width, bias=bias))
        self.down = nn.Linear(INNER, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o(torch.tanh(q) * torch.cat([k, v], -1))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class Setup:
    """A model.  base: "" or a quant_type, " nested" if its statistics are quantised; stream: the dtype of x."""

    base: str = "nf4 nested"
    dtype: torch.dtype = torch.float32
    stream: torch.dtype = torch.float32
    autocast: bool = False
    bias: bool = False
    ranks: tuple[int, ...] = (4,) * len(LAYERS)  # of each of LAYERS; 0 for no adapter
    dropout: float = 0.0
    rslora: bool = False
    adapters: int = 1
    low_adapters: bool = False  # in dtype and not in float32

    def build(self, device: str = "cpu", **more: Any) -> PeftModel:
        torch.manual_seed(0)
        model: Any = Block(self.bias).requires_grad_(False).to(self.dtype)
        if self.base:
            quant_type, *nested = self.base.split()
            fastft.quantize_(model, quant_type, double_quant=bool(nested))
        model = model.to(device)
        for number in range(self.adapters):
            by_layer = {name: rank + number for name, rank in zip(LAYERS, self.ranks, strict=True) if rank}
            config = LoraConfig(
                r=8, lora_alpha=12, target_modules=list(by_layer), rank_pattern=by_layer, use_rslora=self.rslora,
                lora_dropout=self.dropout, init_lora_weights=False, **more,
            )  # fmt: skip
            if number == 0:
                model = get_peft_model(model, config, autocast_adapter_dtype=not self.low_adapters)
            else:
                model.add_adapter(str(number), config, autocast_adapter_dtype=not self.low_adapters)
        model.base_model.set_adapter(["default", *map(str, range(1, self.adapters))])
        return model.to(device).train()

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """How often each rule applies: lifted, fused.  4-bit siblings are a group without adapters too."""
        adapted = {name for name, rank in zip(LAYERS, self.ranks, strict=True) if rank}
        groups = [group for group in GROUPS if adapted.intersection(group) or (self.base and len(group) > 1)]
        lifted = Counter({"glu.silu": 1, "lora": self.adapters * len(adapted)})
        lifted += Counter({"lora_linear.four_bit": len(LAYERS)} if self.base else {})
        cast = self.base and self.dtype != self.stream and adapted.isdisjoint(("gate", "up"))  # each half by itself
        halves = ("gate", "up") in groups and not cast
        return lifted, Counter({"lora_linear.group": len(groups), "glu.halves": int(halves)}) + Counter()


def values(model: Callable, x: Tensor, upstream: Tensor, of: nn.Module, autocast: bool = False) -> dict[str, Tensor]:
    """The output and every gradient."""
    of.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # of dropout
    with torch.autocast(x.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
        y = model(x)
    y.backward(upstream.to(y.dtype))
    gradients = {name: parameter.grad for name, parameter in of.named_parameters() if parameter.grad is not None}
    return {"output": y.detach(), "x": x.grad, **gradients}


def assert_right(compiled: Callable, model: nn.Module, setup: Setup, device: str = "cpu") -> None:
    """Output and gradients as near to the truth as the unmodified model's, whose error is measured nearby too."""
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(2)).to(setup.stream).to(device)
    upstream = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(3)).to(device) / 64  # for float16
    exact_model = in_double(model)

    def measured(x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with Double():
            exact = values(exact_model, x.double(), upstream, exact_model)
        return values(model, x, upstream, model, setup.autocast), exact

    (eager, exact), *around = (measured(nearby(x, seed) if seed else x) for seed in range(4))
    actual = values(compiled, x, upstream, model, setup.autocast)
    assert actual.keys() == eager.keys() == exact.keys()
    for name, value in actual.items():
        assert_same_metadata(value, eager[name])
        factor, others = FORWARD if name == "output" else GRADIENT, [(one[name], right[name]) for one, right in around]
        try:
            assert_close_to_truth(value, eager[name], exact[name], factor, others=others)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def found(captures: list[Capture]) -> tuple[Counter[str], Counter[str]]:
    """How often each rule applied; what adds LoRA counts as one rule, however PEFT writes it."""
    lifted = Counter(
        one.rule if not one.rule.startswith("lora.") else "lora" for _, report in captures for one in report.lifted
    )
    return lifted, Counter(one.rule for _, report in captures for one in report.fused)


def check(setup: Setup, device: str = "cpu") -> None:
    model, captures = setup.build(device), []  # type: ignore[var-annotated]
    assert_right(compiled(model, captures), model, setup, device)
    assert found(captures) == setup.counts(), [reasons(report) for _, report in captures]


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    base = draw(st.sampled_from(("", "nf4", "nf4 nested", "fp4")))
    autocast = dtype != torch.float16 and draw(st.booleans())  # autocast to bfloat16 cannot concatenate float16
    streams = (dtype, torch.float32) if base else (dtype,)  # a plain layer takes x in its own dtype
    ranks = draw(st.lists(st.sampled_from((0, 1, 4, 7, 16)), min_size=7, max_size=7).filter(any))
    return Setup(
        base, dtype, draw(st.sampled_from(streams)), autocast, draw(st.booleans()), tuple(ranks),
        draw(st.sampled_from((0.0, 0.3))), draw(st.booleans()), draw(st.sampled_from((1, 2))), draw(st.booleans()),
    )  # fmt: skip


@on_devices
@given(setup=setups())
def test_whatever_the_adapters(device: str, setup: Setup) -> None:
    check(setup, device)


@on_devices
@pytest.mark.parametrize("base", ["", "nf4 nested"])
def test_adapters_switched_disabled_and_merged_after_compilation(device: str, base: str) -> None:
    """One compiled model follows what PEFT does to it."""
    setup = Setup(base, adapters=2)
    model, captures = setup.build(device), []  # type: ignore[var-annotated]
    layers = model.base_model
    run = compiled(model, captures)
    states: dict[str, Callable[[], Any]] = {
        "both": lambda: None,
        "one": lambda: layers.set_adapter("default"),
        "the other": lambda: layers.set_adapter("1"),
        "none": layers.disable_adapter_layers,
        "enabled again": layers.enable_adapter_layers,
        "merged": model.merge_adapter,
        "unmerged": model.unmerge_adapter,
        "deleted": lambda: (layers.set_adapter("default"), model.delete_adapter("1")),
    }
    lifted: dict[str, int] = {}
    for name, change in states.items():
        change()
        seen = len(captures)
        try:
            assert_right(run, model, setup, device)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        if len(captures) > seen:  # or it is compiled already
            lifted[name] = found(captures[seen:])[0]["lora"]
    assert {"both": 14, "one": 7, "the other": 7, "none": 0}.items() <= lifted.items()


def saved_for_backward(run: Callable, x: Tensor) -> list[Tensor]:
    """What autograd keeps."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run(x)
    return kept


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_no_weight_is_saved_in_more_than_four_bits(device: str, dtype: torch.dtype, lower: str) -> None:
    model = Setup(dtype=dtype, stream=dtype).build(device)
    x = torch.randn(3, 7, HIDDEN, dtype=dtype, device=device, requires_grad=True)  # no activation has a weight's size
    torch._dynamo.reset()
    run = torch.compile(model, backend="fastft", options={"lower": lower, "strict": True})
    sizes = {module.in_features * module.out_features for module in model.modules() if isinstance(module, Linear4bit)}
    assert len(sizes) == 3
    kept = saved_for_backward(run, x)
    assert [one for one in kept if one.dtype == torch.uint8], "the weights themselves are kept"
    assert not [(one.dtype, one.shape) for one in kept if one.element_size() > 1 and one.numel() in sizes]
    plain = saved_for_backward(in_double(model).to(dtype), x)
    assert sizes <= {one.numel() for one in plain}, "a model without 4-bit weights is seen to keep them"


class InAutocast(nn.Module):
    """A model whose forward is wrapped in autocast, as accelerate does before it compiles."""

    def __init__(self, model: nn.Module, device: str, checkpointed: bool) -> None:
        super().__init__()
        self.model, self.device, self.checkpointed = model, device, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            if self.checkpointed:
                return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)
            return self.model(x)


@on_devices
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("base", ["", "nf4 nested"])
def test_autocast_inside_the_graph(device: str, base: str, checkpointed: bool) -> None:
    setup = Setup(base)
    model, captures = InAutocast(setup.build(device), device, checkpointed), []  # type: ignore[var-annotated]
    plain = Setup(base, autocast=True)
    assert_right(compiled(model, captures), model, plain, device)
    assert found(captures) == setup.counts()


def trainable_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            parameter.requires_grad_()


@on_devices
@pytest.mark.parametrize(
    "setup", [Setup("", bias=True), Setup("", torch.bfloat16, torch.bfloat16, bias=True), Setup(bias=True)]
)
def test_trainable_weights_and_biases(device: str, setup: Setup) -> None:
    model, captures = setup.build(device), []  # type: ignore[var-annotated]
    trainable_weights(model)
    assert_right(compiled(model, captures), model, setup, device)
    assert found(captures) == setup.counts()


OTHERWISE: dict[str, dict[str, Any]] = {
    "a module that is trained whole": {"target_modules": ["q", "v"], "modules_to_save": ["o"]},
    "DoRA": {"target_modules": LAYERS, "use_dora": True},
    "a factor with a bias": {"target_modules": LAYERS, "lora_bias": True},
    "PiSSA": {"target_modules": LAYERS, "init_lora_weights": "pissa"},
}
CASES = [(name, "") for name in OTHERWISE] + [("DoRA", "nf4 nested"), ("a factor with a bias", "nf4 nested")]


@on_devices
@pytest.mark.parametrize(("name", "base"), CASES)
def test_other_settings_of_peft(device: str, name: str, base: str) -> None:
    """Right, and told of if they are not lifted.  PEFT neither trains nor decomposes a 4-bit weight."""
    setup = Setup(base, ranks=(0,) * len(LAYERS), adapters=0)
    torch.manual_seed(0)
    block: Any = Block().requires_grad_(False)
    if base:
        fastft.quantize_(block)
    settings = {"init_lora_weights": False, **OTHERWISE[name]}
    model, captures = get_peft_model(block, LoraConfig(r=4, **settings)).to(device).train(), []  # type: ignore[var-annotated]
    assert_right(compiled(model, captures), model, setup, device)
    told = {reason for _, report in captures for reason in reasons(report)}
    lifted = found(captures)[0]["lora"]
    if name != "DoRA":  # whose graph PEFT breaks
        assert (lifted, told) == (2 if "whole" in name else 7, set())


DORA = [
    Setup("", bias=True), Setup("nf4"), Setup("fp4", adapters=2),
    Setup("", torch.bfloat16, torch.bfloat16, bias=True), Setup("nf4", torch.bfloat16, torch.bfloat16, bias=True),
    Setup(dtype=torch.bfloat16, low_adapters=True, stream=torch.bfloat16), Setup("", autocast=True, bias=True),
    Setup(dtype=torch.bfloat16, stream=torch.bfloat16, autocast=True, bias=True), Setup(dropout=0.3, bias=True),
    Setup("", ranks=(1, 4, 7, 16, 0, 3, 2)),
]  # fmt: skip


@on_devices
@pytest.mark.parametrize("setup", DORA, ids=str)
def test_dora(device: str, setup: Setup) -> None:
    """Its products are those of LoRA and one with the layer's, its norms are ops; with dropout PEFT computes twice."""
    model, captures = setup.build(device, use_dora=True), []  # type: ignore[var-annotated]
    with torch.no_grad():  # magnitudes that are not just the norms
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= torch.linspace(0.5, 1.5, parameter.numel(), device=device)
    assert_right(compiled(model, captures, substituted=True), model, setup, device)
    assert len(captures) == 1
    lifted, fused = found(captures)
    adapted = sum(rank > 0 for rank in setup.ranks)
    assert lifted["dora.weight_norm"] == adapted * setup.adapters
    count = 0 if setup.dropout else adapted * setup.adapters
    assert lifted["dora.scaled"] + lifted["dora.scaled_biased"] == count
    assert fused["lora_linear.group"] == (2 if setup.dropout else 4)  # 4-bit siblings are a group without adapters too
    if setup.dropout:
        assert {reason for _, report in captures for reason in reasons(report)} == {
            "with dropout the layer is computed once more, of another input"
        }
