"""fastft.quantize_: what becomes 4-bit and what does not, that it computes what bitsandbytes would, saving, loading."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastft


class Net(nn.Module):
    """Written by hand: two layers, one with a bias, a shared one, a trainable one, and one of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128, bias=False)
        self.second = nn.Linear(128, 64)
        self.embedding = nn.Embedding(64, 64)
        self.tied = nn.Linear(64, 64, bias=False)
        self.tied.weight = self.embedding.weight
        self.odd = nn.Linear(52, 64)
        self.other = nn.modules.linear.NonDynamicallyQuantizableLinear(64, 64)
        self.requires_grad_(False)
        self.trained = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) + self.trained(x)


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_frozen_layers_become_four_bit(quant_type: str, double_quant: bool) -> None:
    net, x = Net(), torch.randn(3, 64)
    done = fastft.quantize_(net, quant_type, double_quant=double_quant)
    assert done.layers == ("first", "second")
    assert {name: reason.split(",")[0] for name, reason in done.skipped.items()} == {
        "tied": "its weight is shared with another module",
        "odd": "a row of 52 is no whole number of blocks of 64",
        "other": "it is a NonDynamicallyQuantizableLinear",
        "trained": "its weight is trainable",
    }
    assert "trained: its weight is trainable" in str(done)
    weights = [dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in (net.first, net.second)]
    expected = torch.relu(x @ weights[0].T) @ weights[1].T + net.second.bias + net.trained(x)
    torch.testing.assert_close(net(x), expected)
    assert net.first.weight.quant_state.nested == double_quant


def test_values_are_near_those_before() -> None:
    net, x = Net(), torch.randn(3, 64)
    before = net(x)
    fastft.quantize_(net)
    assert 0 < (net(x) - before).norm() < 0.2 * before.norm()


def test_nothing_is_quantised_twice() -> None:
    net = Net()
    fastft.quantize_(net)
    assert fastft.quantize_(net).layers == ()


def test_a_model_in_which_nothing_becomes_four_bit_is_not_called_so() -> None:
    model = llama().requires_grad_(True)
    assert fastft.quantize_(model).layers == ()
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_loaded_in_4bit", False)


def test_a_layer_is_freed_before_the_next() -> None:
    """No 16-bit weight outlives its own layer's turn."""
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))).requires_grad_(False)
    import weakref

    old = [weakref.ref(layer.weight) for layer in net]
    alive: list[int] = []
    original = torch.nn.Module.__setattr__

    def watched(self: nn.Module, name: str, value: Any) -> None:
        original(self, name, value)
        if isinstance(value, Linear4bit):
            alive.append(sum(one() is not None for one in old))

    nn.Module.__setattr__ = watched  # type: ignore[method-assign]
    try:
        fastft.quantize_(net)
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]
    assert alive == [3, 2, 1]  # as each is replaced, only its own 16-bit weight and those still to come are there


def test_saving_and_loading_a_model_written_by_hand(tmp_path: Path) -> None:
    net, other, x = Net(), Net(), torch.randn(3, 64)
    fastft.quantize_(net)
    fastft.quantize_(other)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert torch.equal(net(x), other(x))


def test_saving_and_loading_a_transformers_model(tmp_path: Path) -> None:
    model, ids = llama(), torch.arange(8)[None]
    done = fastft.quantize_(model)
    assert len(done.layers) == 14
    assert done.skipped == {"lm_head": "it is the head"}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, Linear4bit)
    model.train()  # in eval mode, on a CPU, bitsandbytes packs weights anew and computes in bfloat16
    assert torch.equal(model(ids).logits, loaded.requires_grad_(False).train()(ids).logits)


def test_peft_before_and_after(tmp_path: Path) -> None:
    """Adapters around quantised layers, and layers quantised inside their adapters, are the same model."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ids = torch.arange(8)[None]
    inside = get_peft_model(llama(), config)
    state = copy.deepcopy({name: value for name, value in inside.state_dict().items() if "lora_" in name})
    fastft.quantize_(inside)
    around = llama()
    fastft.quantize_(around)
    around = get_peft_model(around, config)
    around.load_state_dict(state, strict=False)
    layer = inside.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer) is type(around.base_model.model.model.layers[0].mlp.up_proj)
    assert torch.equal(inside(ids).logits, around(ids).logits)
    inside.save_pretrained(tmp_path)
    merged = inside.merge_and_unload()  # PEFT's own for 4-bit layers: de-quantised, added, quantised again
    assert torch.isfinite(merged(ids).logits).all()


def test_a_wrong_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="use 'nf4'"):
        fastft.quantize_(Net(), "int4")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_that_another_stream_is_still_writing() -> None:
    net = nn.Sequential(nn.Linear(1024, 1024, bias=False)).cuda().requires_grad_(False)
    expected = net[0].weight.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        net[0].weight.zero_()
        torch.cuda._sleep(2**28)  # about 0.1 s
        net[0].weight.copy_(expected)
        fastft.quantize_(net)
        weight: Any = net[0].weight
        found = dequantize_4bit(weight.data, weight.quant_state)
    torch.cuda.synchronize()
    assert (found - expected).norm() < 0.2 * expected.norm()
