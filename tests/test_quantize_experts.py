"""fastft.quantize_ of experts: which parameters, that all of eager mode goes on, adapters, saving, loading, moving."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fastft

IDS = torch.arange(16).view(2, 8)
EXPERTS = ("gate_up_proj", "down_proj")
TARGETS = [f"mlp.experts.{name}" for name in EXPERTS]


class Experts(nn.Module):
    """Written by hand: two matrices an expert, of which each token goes through all."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 128, 64) / 8)
        self.down = nn.Parameter(torch.randn(3, 64, 128) / 11)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eni->ben", x, self.up)
        return torch.einsum("ben,ein->bi", torch.relu(hidden), self.down)


class Net(nn.Module):
    """Experts, and 3-D parameters that are none, cannot be, or may not."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.convolution = nn.Conv1d(64, 64, 64)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(64, 64, 64))
        self.positions = nn.Parameter(torch.randn(1, 4, 64))
        self.vectors = nn.Parameter(torch.randn(4, 1, 64))
        self.position_embedding_table = nn.Parameter(torch.randn(2, 4, 64))  # one for each axis of an image
        self.odd = nn.Parameter(torch.randn(2, 64, 52))
        self.fine = nn.Parameter(torch.randn(2, 4, 64, dtype=torch.float64))
        self.empty = nn.Parameter(torch.empty(2, 4, 64, device="meta"))
        self.first = nn.Parameter(torch.randn(2, 4, 64))
        self.second = self.first
        self.requires_grad_(False)
        self.trained = nn.Parameter(torch.randn(2, 4, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


def moe(implementation: str = "grouped_mm") -> Any:
    """Build two layers of four experts, of which each token takes two; adapters of their own come by ``lora``."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, vocab_size=64, num_experts=4, num_experts_per_tok=2, experts_implementation=implementation,
        use_cache=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.gate.weight, std=0.1)
    return model


def lora(model: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=TARGETS, init_lora_weights=False)
    return get_peft_model(model, config)


def experts(model: Any, layer: int = 0) -> Any:
    """Return the experts of a layer, whatever is around them."""
    module = model.get_submodule(
        f"{'base_model.model.' if isinstance(model, PeftModel) else ''}model.layers.{layer}.mlp"
    )
    return module.experts.get_base_layer() if isinstance(model, PeftModel) else module.experts


def plain(model: Any, quantized: Any) -> Any:
    """Give a 16-bit model the de-quantised weights of another."""
    there = dict(quantized.named_modules())
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        module: Any = there[path]
        if isinstance(module, Linear4bit):
            parameter.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            parameter.data = getattr(module, own).detach().clone()
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_equal_steps(model: Any, expected: Any, steps: int = 3) -> None:
    """Loss and gradients of all adapters are those of the same weights in full, step by step."""
    for _ in range(steps):
        mine, theirs = gradients(model), gradients(expected)
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(mine[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
        for one in (model, expected):
            torch.optim.SGD(one.parameters(), lr=0.1).step()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_experts_become_four_bit(quant_type: str, double_quant: bool) -> None:
    net, x = Net().eval(), torch.randn(5, 64)
    before = net(x)
    done = fastft.quantize_(net, quant_type, double_quant=double_quant)
    assert done.layers == ("experts.up", "experts.down")
    assert done.skipped == {
        "normed.parametrizations.weight.original0": "it has a parametrization already",
        "normed.parametrizations.weight.original1": "it has a parametrization already",
        "positions": "it is no stack of matrices",
        "position_embedding_table": "it holds embeddings, as its name says",
        "vectors": "it is no stack of matrices",
        "odd": "a row of 52 is no whole number of blocks of 64",
        "fine": "it is torch.float64",
        "empty": "it has no values yet",
        "first": "it is shared with another module",
        "trained": "it is trainable",
    }
    held = net.experts.parametrizations
    weights = [dequantize_4bit(held[name].original, held[name][0].quant_state) for name in ("up", "down")]
    expected = torch.einsum("ben,ein->bi", torch.relu(torch.einsum("bi,eni->ben", x, weights[0])), weights[1])
    torch.testing.assert_close(net(x), expected)
    assert 0 < (net(x) - before).norm() < 0.2 * before.norm()
    assert held.up[0].quant_state.nested == double_quant
    assert not any(module.training for module in net.modules())
    assert fastft.quantize_(net).layers == ()


def test_parts() -> None:
    assert all(
        name.endswith("_proj") and "experts" not in name for name in fastft.quantize_(moe(), parts=["layers"]).layers
    )
    model = moe()
    assert {name.rpartition(".")[2] for name in fastft.quantize_(model, parts=["experts"]).layers} == set(EXPERTS)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    with pytest.raises(ValueError, match="are not of"):
        fastft.quantize_(moe(), parts=["heads"])


def test_more_values_than_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastft.quantize_experts, "MOST_VALUES", 3 * 128 * 64 - 1)
    done = fastft.quantize_(Experts().requires_grad_(False))
    assert done.skipped == dict.fromkeys(("up", "down"), f"bitsandbytes counts no more than {3 * 128 * 64 - 1} values")


def test_parameters_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No 16-bit weight outlives its own turn."""
    import weakref

    net = nn.Sequential(Experts(), Experts()).requires_grad_(False)
    old = [weakref.ref(parameter) for parameter in net.parameters()]
    alive: list[int] = []
    original = parametrize.register_parametrization

    def watched(*args: Any, **kwargs: Any) -> nn.Module:
        alive.append(sum(one() is not None for one in old))
        return original(*args, **kwargs)

    monkeypatch.setattr(parametrize, "register_parametrization", watched)
    fastft.quantize_(net)
    assert alive == [3, 2, 1, 0]  # when each has its 4-bit form, only those still to come are there


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_adapters_around_four_bit_experts(implementation: str, recwarn: pytest.WarningsRecorder) -> None:
    """All adapters learn in eager mode what they would beside the de-quantised weights, one step after another."""
    model = lora(moe(implementation))
    assert len(fastft.quantize_(model).layers) == 2 * 4 + 2 * 2
    expected = plain(lora(moe(implementation)), model)
    assert_equal_steps(model, expected)
    held = experts(model).parametrizations
    assert [len(held[name]) for name in EXPERTS] == [1, 1]
    assert not [one for one in recwarn if "LoRA parametrization" in str(one.message)]
    with model.disable_adapter(), expected.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)


def test_adapters_put_on_later() -> None:
    """PEFT wraps parameters that are 4-bit already, if it is told their whole names, and in the order of these."""
    before, model = lora(moe()), moe()
    fastft.quantize_(before)
    fastft.quantize_(model)
    names = [f"model.layers.{layer}.{target}" for layer in (0, 1) for target in TARGETS]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names))
    adapters = [name for name, parameter in before.named_parameters() if parameter.requires_grad]
    for name in adapters:
        model.get_parameter(other_way_round(name)).data = before.get_parameter(name).detach().clone()
    for _ in range(2):
        mine, theirs = gradients(model), gradients(before)
        for name in adapters:
            torch.testing.assert_close(mine[other_way_round(name)], theirs[name])


def other_way_round(name: str) -> str:
    """Return what an adapter is called if the one is inside that was outside."""
    inside, outside = "experts.base_layer.lora", "experts.lora"
    return name.replace(inside, outside) if inside in name else name.replace(outside, inside)


def test_two_adapters_at_once() -> None:
    model, expected = lora(moe()), lora(moe())
    for one in (model, expected):
        torch.manual_seed(2)
        second = LoraConfig(r=2, target_modules=[], target_parameters=TARGETS, init_lora_weights=False)
        one.add_adapter("second", second)
        one.base_model.set_adapter(["default", "second"])
    fastft.quantize_(model, parts=["experts"])
    assert_equal_steps(model, plain(expected, model))


def test_compiled_without_adapters_it_is_one_graph() -> None:
    model = moe()
    fastft.quantize_(model, parts=["experts"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)


def test_compiled_by_what_knows_no_adapters_of_experts() -> None:
    """Whoever compiles PEFT's wrappers as they are gets each adapter once, in every step."""
    torch.manual_seed(0)
    net = nn.Sequential(Experts()).requires_grad_(False)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.up", "0.down"], init_lora_weights=False)
    model, x = get_peft_model(net, config), torch.randn(5, 64)
    fastft.quantize_(model)
    compiled = torch.compile(model, backend="eager")
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(2):
        mine, theirs = (torch.autograd.grad(one(x).square().sum(), adapters) for one in (compiled, model))
        for gradient, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(gradient, expected)


def test_checkpointing_and_a_forward_that_fails() -> None:
    """Nothing is left behind by a forward that ends before its time."""
    model = lora(moe())
    fastft.quantize_(model)
    expected = plain(lora(moe()), model)
    module = experts(model)

    def fail(*_: Any) -> None:
        raise KeyError("not this time")

    hook = module.act_fn.register_forward_hook(fail)
    with pytest.raises(KeyError):
        model(IDS)
    hook.remove()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_steps(model.train(), expected.train())
    assert parametrize._cache == {}
    assert parametrize._cache_enabled == 0


def test_adapters_are_saved_as_without_quantisation(tmp_path: Path) -> None:
    model, other = lora(moe()), lora(moe())
    fastft.quantize_(model)
    model.save_pretrained(tmp_path / "four_bit")
    other.save_pretrained(tmp_path / "plain")
    names = ["adapter_model.safetensors", "adapter_config.json"]
    files = [[(tmp_path / folder / name).read_bytes() for name in names] for folder in ("four_bit", "plain")]
    assert files[0] == files[1]


def test_what_peft_and_transformers_cannot_do_is_refused(tmp_path: Path) -> None:
    model = lora(moe())
    fastft.quantize_(model)
    with pytest.raises(NotImplementedError, match="16 bits"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match=r"state_dict\(\)"), pytest.raises(ValueError, match="not serializable"):
        model.get_base_model().save_pretrained(tmp_path)
    merged = lora(moe())
    merged.merge_adapter()
    left = [reason for name, reason in fastft.quantize_(merged, parts=["experts"]).skipped.items()]
    assert left == ["the adapter 'default' is merged into its weight: unmerge it first"] * 4


def test_a_parameter_of_experts_alone() -> None:
    """What concerns one parameter of a module is nothing to its other."""
    model = lora(moe())
    experts(model).down_proj.requires_grad_(True)
    layer = model.base_model.model.model.layers[0].mlp
    wrappers = {one.parameter_name: one for one in (layer.experts, layer.experts.base_layer)}
    wrappers["down_proj"].merge()
    done = fastft.quantize_(model, parts=["experts"])
    assert [name.rpartition(".")[2] for name in done.layers] == ["gate_up_proj", *EXPERTS]
    assert list(done.skipped.values()) == ["it is trainable"]
    wrappers["down_proj"].unmerge()
    wrappers["down_proj"].merge()
    with pytest.raises(NotImplementedError):
        wrappers["gate_up_proj"].merge()


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_saving_and_loading(tmp_path: Path, storage: torch.dtype) -> None:
    model, other = moe(), moe()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_().mul_(2)
    fastft.quantize_(model, storage=storage)
    fastft.quantize_(other)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt")
    assert {"", ".absmax", ".nested_absmax", ".quant_state.bitsandbytes__nf4"} <= {
        name.removeprefix("model.layers.0.mlp.experts.up_proj".replace("up", "gate_up")) for name in state
    }
    other.load_state_dict(state)
    for name in EXPERTS:
        mine, theirs = (experts(one).parametrizations[name] for one in (model, other))
        assert torch.equal(mine.original.view(torch.uint8).view(-1), theirs.original.view(-1))
        assert torch.equal(mine[0].quant_state.absmax, theirs[0].quant_state.absmax)
        assert torch.equal(getattr(experts(model), name), getattr(experts(other), name))
    torch.testing.assert_close(model.train()(IDS).logits, other.train()(IDS).logits)


def test_a_state_of_another_shape_or_in_16_bits_is_an_error() -> None:
    turned = Experts()
    turned.up, turned.down = nn.Parameter(torch.randn(3, 64, 128)), nn.Parameter(torch.randn(3, 128, 64))
    turned.requires_grad_(False)
    fastft.quantize_(turned)
    target = Experts().requires_grad_(False)
    fastft.quantize_(target)
    before = target.up
    for state in (turned.state_dict(), Experts().state_dict()):
        with pytest.raises(RuntimeError, match="size mismatch"):
            target.load_state_dict(state)
    assert torch.equal(target.up, before)


def test_moving_takes_the_statistics_along() -> None:
    net = Experts().requires_grad_(False)
    fastft.quantize_(net)
    twin, weight = copy.deepcopy(net), net.up
    assert (net.half().up.dtype, net.bfloat16().up.dtype) == (torch.float32, torch.float32)
    assert torch.equal(net.up, weight)
    net.to("meta")
    state = net.parametrizations.up[0].quant_state
    assert {one.device.type for one in (state.absmax, state.code, state.offset, state.state2.absmax)} == {"meta"}
    assert torch.equal(twin.up, weight)


def test_storage_that_was_cast_is_an_error() -> None:
    net = Experts().requires_grad_(False)
    fastft.quantize_(net, storage=torch.bfloat16)
    net.float()
    with pytest.raises(RuntimeError, match="was its storage cast"):
        net(torch.randn(2, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    """Quantised there, from another stream, or moved there, all is where it is read."""
    moved, there = lora(moe()).bfloat16(), lora(moe()).bfloat16().cuda()
    weights = [getattr(experts(moved), name).clone() for name in EXPERTS]
    fastft.quantize_(moved)
    four_bit = [getattr(experts(moved), name) for name in EXPERTS]
    moved.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        fastft.quantize_(there)
        found = [getattr(experts(there), name) for name in EXPERTS]
    torch.cuda.synchronize()
    for name, weight, before, other in zip(EXPERTS, weights, four_bit, found, strict=True):
        torch.testing.assert_close(getattr(experts(moved), name).cpu(), before)
        assert (other.cpu() - weight).norm() < 0.2 * weight.norm()
    for model in (moved, there):
        model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)
