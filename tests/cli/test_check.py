"""``fastft check``: what is built of a hub id, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers
from wrong_rules import wrong

from fastft import models, variants
from fastft.cli import main
from fastft.small import small, with_layers

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 320, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
IMAGE = 300


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch._dynamo.reset()


def saved(config: Any, folder: str = "model") -> str:
    config.save_pretrained(folder)
    return folder


def llava() -> Any:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, num_hidden_layers=5),
        vision_config=transformers.CLIPVisionConfig(**VISION, num_hidden_layers=4),
        image_token_index=IMAGE, image_seq_length=4,
    )  # fmt: skip


def test_a_right_and_a_wrong_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", "tiny-llama", "--layers", "2", "--seq-len", "16", "--rank", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("as in eager", "1 graph", "layers.* ×2", "rms_norm", "causal"):
        assert words in printed
    with wrong("glu.silu"):
        assert main(arguments) == 1
    assert "NOT as in eager" in capsys.readouterr().out


def test_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    Path("script.py").write_text("from small_stack import Stack, X\n\ndef make():\n    return Stack(), (X,)\n")
    assert main(["check", "script.py"]) == 0
    assert "layers.* ×3" in capsys.readouterr().out


@pytest.mark.parametrize("adapter", variants.ADAPTERS)
def test_adapters_are_on_every_linear_layer_and_learn(adapter: str) -> None:
    name = saved(transformers.LlamaConfig(**TEXT, num_hidden_layers=3))
    model, (first, second) = small(name, layers=2, adapter=adapter, rank=4, lengths=(8, 12))
    assert (first["input_ids"].shape, second["input_ids"].shape) == ((2, 8), (2, 12))
    model(**first).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert all(
        any(f"layers.{layer}." in name and one in name for name in trained) for layer in (0, 1) for one in projections
    )
    assert len(model.get_decoder().layers if adapter == "none" else model.base_model.model.model.layers) == 2


@pytest.mark.parametrize("quantization", [name for name in variants.QUANTIZATIONS if name != "none"])
def test_weights_in_fewer_bits(quantization: str) -> None:
    name = saved(transformers.LlamaConfig(**{**TEXT, "hidden_size": 64, "intermediate_size": 64}, num_hidden_layers=1))
    model, (batch,) = small(name, layers=1, quantization=quantization, lengths=(8,))
    classes = {type(module).__name__ for module in model.modules()}
    assert ("Linear8bitLt" if quantization == "int8" else "Linear4bit") in classes
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    model(**batch).loss.backward()


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_experts_have_adapters_and_four_bits(quantization: str) -> None:
    """PEFT puts adapters around experts whatever the layers are held in; 8 bits are of layers alone."""
    model, (batch,) = small(saved(mixture()), layers=1, rank=2, quantization=quantization, lengths=(8,))
    model(**batch).loss.backward()
    outer = model.base_model.model.model.layers[0].mlp.experts
    for wrapper in (outer, outer.base_layer):
        assert all(parameter.grad.abs().max() > 0 for parameter in wrapper.lora_A.parameters())
    held = getattr(outer.get_base_layer(), "parametrizations", {})
    assert set(held) == ({"gate_up_proj", "down_proj"} if quantization == "nf4" else set())


def mixture() -> Any:
    return transformers.Qwen3MoeConfig(
        **{**TEXT, "hidden_size": 64, "intermediate_size": 64}, num_hidden_layers=1, moe_intermediate_size=64,
        num_experts=4, num_experts_per_tok=2, head_dim=16,
    )  # fmt: skip


def test_every_part_has_few_layers() -> None:
    config = with_layers(transformers.Qwen3VLConfig(
        text_config={"num_hidden_layers": 12}, vision_config={"depth": 24, "deepstack_visual_indexes": [8, 16, 23]}
    ), 6)  # fmt: skip
    assert config.text_config.num_hidden_layers == config.vision_config.depth == 6
    assert config.vision_config.deepstack_visual_indexes == [2, 4, 5]
    gemma = with_layers(transformers.Gemma3nTextConfig(), 6)
    assert len(gemma.layer_types) == len(gemma.intermediate_size) == len(gemma.activation_sparsity_pattern) == 6
    kinds = gemma.layer_types[: 6 - gemma.num_kv_shared_layers]
    assert set(kinds) == set(gemma.layer_types)
    deep = with_layers(transformers.DeepseekV3Config(), 6)
    assert (deep.num_hidden_layers, deep.n_routed_experts, deep.n_routed_experts % deep.n_group) == (6, 16, 0)
    whisper = with_layers(transformers.WhisperConfig(encoder_layers=12, decoder_layers=3), 6)
    assert (whisper.encoder_layers, whisper.decoder_layers) == (6, 3)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(
            **{**TEXT, "num_attention_heads": 2}, num_hidden_layers=3, architectures=["BertForSequenceClassification"]
        ),
        transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=160, decoder_start_token_id=0
        ),
        transformers.WhisperConfig(
            vocab_size=160, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=32,
            max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        llava(),
        transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**TEXT, num_hidden_layers=3),
            vision_config={**VISION, "num_hidden_layers": 3}, mm_tokens_per_image=4, image_token_index=IMAGE,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_kinds_of_models(config: Any) -> None:
    """Each gets a batch that it computes a loss of."""
    model, (batch,) = small(saved(config), layers=2, adapter="none", lengths=(16,))
    assert IMAGE not in batch.get("input_ids", torch.zeros(1))
    model(**batch).loss.backward()


def test_a_picture() -> None:
    name = saved(llava())
    tokenizer = models.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(name)  # fmt: skip
    config = llava()
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    saved(config)
    model, (first, second) = small(name, layers=2, image=True, lengths=(4, 8))
    assert first["pixel_values"].shape[0] == 2
    assert ((first["labels"] == -100) == (first["input_ids"] == config.image_token_index)).all()
    assert first["input_ids"].shape[1] < second["input_ids"].shape[1]
    model(**second).loss.backward()


def test_what_takes_no_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    name = saved(transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_attention_heads=2, image_size=32))
    assert main(["check", name]) == 2
    assert "takes no tokens; make a model and a batch for it in a SCRIPT.py" in capsys.readouterr().err


def test_what_fails_in_eager(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("no such mask")

    monkeypatch.setattr(transformers.LlamaModel, "forward", fail)
    assert main(["check", "tiny-llama"]) == 2
    assert "does not train on random tokens (RuntimeError: no such mask)" in capsys.readouterr().err


def test_what_fills_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    wide = {**TEXT, "hidden_size": 2**20, "intermediate_size": 2**24, "head_dim": 2**18}
    assert main(["check", saved(transformers.LlamaConfig(**wide)), "--layers", "4"]) == 2
    assert "pass fewer --layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "./no/such/folder"], ["check the path"]),
        (["check", "tiny-lama"], ["did you mean 'tiny-llama'?"]),
        (["check", "nobody/no-such-model"], ["hub cannot be reached"]),
        (["check", "tiny-llama", "--adapter", "lorra"], ["--adapter", "dora"]),
        (["check", "tiny-llama", "--quantization", "int3"], ["--quantization", "int8"]),
        (["check", "tiny-llama", "--layers", "0"], ["--layers", "above zero"]),
        (["check", "tiny-llama", "--images"], ["--images", "did you mean --image?"]),
        (["check", "tiny-llama", "--image"], ["--image", "processor"]),
        (["check", "tiny-llama", "--quantization", "nf4", "--adapter", "none"], ["--adapter"]),
        (["check", "tiny-llama", "--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["check", "missing.py"], ["no script"]),
    ],
    ids=lambda value: " ".join(value) if value[0] == "check" else "",
)
def test_malformed(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert len(printed.strip().splitlines()) == 1, printed
    assert all(word in printed for word in words), printed
