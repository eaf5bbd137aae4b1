"""Decoders of many architectures, all of them trained, then NF4 with LoRA on all projections."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastft.variants import variant
from models.breadth import LAYERS, Case, Made, built, config, sizes, text

# Keys and values of low rank (MLA).
LOW_RANK = {
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
DENSE = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": LAYERS,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 160}
SHARED_KEYS = {  # the last three layers take the keys and values of the fourth and fifth
    "sliding_window": 16, "num_hidden_layers": 8, "num_kv_shared_layers": 3,
    "layer_types": ["sliding_attention"] * 4 + ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"],
}  # fmt: skip
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
    "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
}  # fmt: skip
CAUSAL = "AutoModelForCausalLM"


def low_rank(**more: Any) -> dict[str, Any]:
    return sizes("head_dim", **{**LOW_RANK, **more})


def decoder(
    name: str, config_class: str, settings: dict[str, Any], auto: str = "AutoModelForCausalLM", **told: Any
) -> Case:
    """A decoder, all of it trained."""
    return Case(
        name, lambda: Made(built(config(config_class, **settings), auto), text()), needs=(config_class,), **told
    )


def gemma3_with_types() -> Made:
    """As Gemma 3 of 4B and more is trained on text alone: its mask asks which tokens are an image's."""
    model = built(
        config(
            "Gemma3Config", text_config=sizes(**WINDOWS),
            vision_config={
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 56, "patch_size": 14,
            },
            mm_tokens_per_image=4, image_token_index=150, boi_token_index=151, eoi_token_index=152,
        ),
        "Gemma3ForConditionalGeneration",
    )  # fmt: skip
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    return Made(model, text(token_type_ids=lambda ids: ids * 0))


def embedding_gemma() -> Made:
    batches = text()
    for batch in batches:
        del batch["labels"]
    settings = sizes(**WINDOWS, use_bidirectional_attention=True)
    return Made(built(config("Gemma3TextConfig", **settings), "AutoModel"), batches)


TRAINED_WHOLE = (
    decoder("Gemma 3", "Gemma3TextConfig", sizes(**WINDOWS)),
    Case("Gemma 3 of 4B and more, text alone", gemma3_with_types, needs=("Gemma3Config",)),
    Case("EmbeddingGemma", embedding_gemma, needs=("Gemma3TextConfig",)),
    decoder("Gemma 4", "Gemma4TextConfig", sizes(**SHARED_KEYS, **PER_LAYER, global_head_dim=32), shared=5),
    decoder(
        "Gemma 3n", "Gemma3nTextConfig",
        sizes(
            **SHARED_KEYS, **PER_LAYER, laurel_rank=8, activation_sparsity_pattern=[0.0] * 8
        ) | {"intermediate_size": [128] * 8},
        shared=7,  # two of which are projections of one before the layers
    ),
    decoder("DeepSeek V2 Lite", "DeepseekV2Config", low_rank(**DENSE, q_lora_rank=None)),
    decoder("DeepSeek V3", "DeepseekV3Config", low_rank(**DENSE, q_lora_rank=64)),
    decoder(
        "GLM 4.7 Flash", "Glm4MoeLiteConfig", low_rank(**DENSE, q_lora_rank=64, mlp_layer_types=["dense"] * LAYERS)
    ),
    decoder("Youtu", "YoutuConfig", low_rank(q_lora_rank=64)),
    decoder("MiniCPM 3", "MiniCPM3Config", low_rank(q_lora_rank=64)),
    decoder(
        "Phi 4 mini", "Phi3Config",
        sizes("head_dim", partial_rotary_factor=0.75, original_max_position_embeddings=64, rope_parameters=LONG_ROPE),
    ),
    decoder(
        "Llama 4", "Llama4TextConfig",
        sizes(intermediate_size_mlp=128, num_local_experts=2, moe_layers=[], attention_chunk_size=16),
        shared=3,
    ),
    decoder("nanochat", "NanoChatConfig", sizes(), ops="rms_norm rotary attention"),
    decoder(
        "Qwen3-Next", "Qwen3NextConfig",
        sizes(
            **DELTA, mlp_only_layers=list(range(LAYERS)), num_experts=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        shared=3,
    ),
    decoder("Qwen3.5", "Qwen3_5TextConfig", sizes(**DELTA), shared=3),
    decoder(
        "GPT-OSS", "GptOssConfig", sizes(**WINDOWS, num_local_experts=2, num_experts_per_tok=1),
        ops="rms_norm rotary attention glu experts",
    ),
    decoder(
        "Bamba", "BambaConfig",
        sizes(
            "head_dim", attn_layer_indices=[3], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
            mamba_chunk_size=8,
        ),
        shared=3, slow=True,
    ),
    decoder(
        "Zamba 2", "Zamba2Config",
        sizes(
            "head_dim", num_key_value_heads=4, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8,
            mamba_headdim=16, n_mamba_heads=8, chunk_size=8, use_mem_rope=True, adapter_rank=8,
        ),
        ops="rms_norm rotary attention glu lora", shared=2, slow=True,
    ),
    decoder(
        "Jamba", "JambaConfig",
        sizes(
            "head_dim", attn_layer_period=4, attn_layer_offset=3, expert_layer_period=100, expert_layer_offset=99,
            num_experts=2, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False,
        ),
        ops="rms_norm attention glu", shared=3, slow=True,
    ),
    decoder(
        "T5 1.1", "T5Config",
        {
            "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": LAYERS, "num_heads": 4, "vocab_size": 160,
            "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0,
        },
        "AutoModelForSeq2SeqLM",
        ops="rms_norm attention glu", shared=6, slow=True,
    ),
    decoder(
        "BART", "BartConfig",
        {
            "d_model": 64, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 160,
            "max_position_embeddings": 128, "dropout": 0.0, "pad_token_id": 0,
        },
        "AutoModelForSeq2SeqLM",
        ops="layer_norm attention", shared=8,
    ),
    decoder(
        "BLOOM", "BloomConfig", {"hidden_size": 64, "n_layer": LAYERS, "n_head": 4, "vocab_size": 160},
        ops="layer_norm attention",
    ),
    decoder(
        "MPT", "MptConfig",
        {"d_model": 64, "n_layers": LAYERS, "n_heads": 4, "vocab_size": 160, "max_seq_len": 128, "expansion_ratio": 2},
        ops="layer_norm attention",
    ),
    decoder(
        "Falcon with ALiBi", "FalconConfig",
        {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 160, "alibi": True},
        ops="layer_norm attention",
    ),
)  # fmt: skip


def in_four_bits(make: Callable[[], Made]) -> Callable[[], Made]:
    def made() -> Made:
        whole = make()
        return replace(whole, model=variant(whole.model, "nf4", "lora", 4).train())

    return made


def with_adapters(case: Case) -> Case:
    """The same, NF4 and LoRA."""
    return replace(
        case, name=f"{case.name}, NF4 and LoRA", make=in_four_bits(case.make), ops=f"{case.ops} lora lora_linear",
        shared=FROZEN.get(case.name, case.shared), needs=(*case.needs, "bitsandbytes", "peft"), slow=True,
    )  # fmt: skip


# Behind frozen embeddings the first layer's input needs no gradient, which makes it a kind of its own where layers are
# not traced once.
FROZEN = {"Gemma 3 of 4B and more, text alone": 2, "Gemma 4": 4, "Falcon with ALiBi": 3}
DECODERS = (*TRAINED_WHOLE, *(with_adapters(case) for case in TRAINED_WHOLE))
