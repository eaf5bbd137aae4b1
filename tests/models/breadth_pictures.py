"""Models that see and hear, compiled whole and trained whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.breadth import LAYERS, Case, Made, built, config, noise, sizes, text

IMAGE, SIZE, PATCH = 150, 56, 14
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "image_size": SIZE, "patch_size": PATCH,
}  # fmt: skip
GRID = [1, 8, 8]
QWEN_TOKENS = {
    "image_token_id": IMAGE, "vision_start_token_id": 151, "vision_end_token_id": 152, "video_token_id": 153,
}  # fmt: skip
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "depth": LAYERS, "num_heads": 2, "out_hidden_size": 64}


def with_picture(tokens: int, **more: Any) -> list[dict[str, Tensor]]:
    return text(image=IMAGE, at=slice(4, 4 + tokens), **more)


def is_image(ids: Tensor) -> Tensor:
    return (ids == IMAGE).long()


def gemma3() -> Made:
    settings = sizes(sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2)
    model = config(
        "Gemma3Config", text_config=settings, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=151, eoi_token_index=152,
    )  # fmt: skip
    batches = with_picture(4, token_type_ids=is_image, pixel_values=noise(2, 3, SIZE, SIZE))
    return Made(built(model, "Gemma3ForConditionalGeneration"), batches)


def qwen(name: str, patch: int, text_sizes: dict[str, Any], **vision: Any) -> Made:
    model = config(
        f"{name}Config", text_config={**text_sizes, "rope_parameters": QWEN_ROPE},
        vision_config={**TOWER, "patch_size": patch, "spatial_merge_size": 2, **vision}, **QWEN_TOKENS,
    )  # fmt: skip
    patches = GRID[1] * GRID[2]
    batches = with_picture(
        patches // 4, pixel_values=noise(2 * patches, 3 * 2 * patch**2), image_grid_thw=torch.tensor([GRID, GRID]),
        mm_token_type_ids=is_image,
    )  # fmt: skip
    for batch in batches:
        batch["input_ids"][:, 3] = QWEN_TOKENS["vision_start_token_id"]
    return Made(built(model, f"{name}ForConditionalGeneration"), batches)


def qwen2_5_vl() -> Made:
    return qwen("Qwen2_5_VL", 14, sizes("head_dim"), window_size=56, fullatt_block_indexes=[3])


def qwen3_vl() -> Made:
    return qwen("Qwen3VL", 16, sizes(), deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=64)


def llava() -> Made:
    model = config(
        "LlavaConfig", text_config=config("LlamaConfig", **sizes()), vision_config=config("CLIPVisionConfig", **VISION),
        image_token_index=IMAGE, image_seq_length=16,
    )  # fmt: skip
    return Made(built(model, "LlavaForConditionalGeneration"), with_picture(16, pixel_values=noise(2, 3, SIZE, SIZE)))


def llava_onevision() -> Made:
    """A picture and one crop of it: 16 tokens each, and 4 that begin lines."""
    model = config(
        "LlavaOnevisionConfig", text_config=config("Qwen2Config", **sizes("head_dim")),
        vision_config=config("SiglipVisionConfig", **VISION, vision_use_head=False), image_token_index=IMAGE,
        image_grid_pinpoints=[[SIZE, SIZE], [2 * SIZE, SIZE], [SIZE, 2 * SIZE]], video_token_index=153,
    )  # fmt: skip
    batches = text(
        image=IMAGE, at=slice(-36, None), pixel_values=noise(2, 2, 3, SIZE, SIZE),
        image_sizes=torch.tensor([[SIZE, SIZE]] * 2),
    )  # fmt: skip
    return Made(built(model, "LlavaOnevisionForConditionalGeneration"), [longer(batch, 36) for batch in batches])


def longer(batch: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The tokens of a picture before the text, in place of those in it."""
    ids = torch.cat([torch.full((2, tokens), IMAGE), batch["input_ids"].where(batch["input_ids"] != IMAGE, 9)], 1)
    labels = ids.where((ids != IMAGE) & (ids != 0), -100)
    return {**batch, "input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


def smolvlm() -> Made:
    model = config(
        "SmolVLMConfig", text_config=config("LlamaConfig", **sizes()), vision_config=VISION, image_token_id=IMAGE,
        scale_factor=2,
    )  # fmt: skip
    batches = with_picture(4, pixel_values=noise(2, 1, 3, SIZE, SIZE))
    return Made(built(model, "SmolVLMForConditionalGeneration"), batches)


def paligemma() -> Made:
    model = config(
        "PaliGemmaConfig",
        text_config=config("Gemma2Config", **sizes(query_pre_attn_scalar=16, sliding_window=16)),
        vision_config=config("SiglipVisionConfig", **VISION, vision_use_head=False), image_token_index=IMAGE,
        image_token_id=IMAGE, projection_dim=64,
    )  # fmt: skip
    batches = with_picture(
        16, pixel_values=noise(2, 3, SIZE, SIZE), token_type_ids=lambda ids: (torch.arange(ids.shape[1]) > 21) + 0 * ids
    )
    return Made(built(model, "PaliGemmaForConditionalGeneration"), batches)


def mistral3() -> Made:
    model = config(
        "Mistral3Config", text_config=config("MistralConfig", **sizes()),
        vision_config=config("PixtralVisionConfig", **VISION, head_dim=16), image_token_index=IMAGE,
        spatial_merge_size=2,
    )  # fmt: skip
    batches = with_picture(4, pixel_values=noise(2, 3, SIZE, SIZE), image_sizes=torch.tensor([[SIZE, SIZE]] * 2))
    return Made(built(model, "Mistral3ForConditionalGeneration"), batches)


def whisper() -> Made:
    model = config(
        "WhisperConfig", vocab_size=160, d_model=64, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
        num_mel_bins=16, max_source_positions=32, max_target_positions=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    batches = [{"input_features": noise(2, 16, 64), "labels": batch["labels"]} for batch in text()]
    return Made(built(model, "WhisperForConditionalGeneration"), batches)


SEEN = "rms_norm layer_norm rotary attention glu"


def picture(name: str, make: Callable[[], Made], needs: str, **told: Any) -> Case:
    return Case(name, make, **{"shared": 2 * LAYERS, "ops": SEEN, "needs": (needs,), "slow": True, **told})


PICTURES = (
    picture(  # one layer of its tower attends to all of a picture
        "Qwen2.5-VL", qwen2_5_vl, "Qwen2_5_VLConfig", ops="rms_norm rotary attention glu", shared=2 * LAYERS - 1
    ),
    picture("Qwen3-VL", qwen3_vl, "Qwen3VLConfig", shared=10),  # three of them mergers; one layer has no picture added
    picture("Gemma 3 with a picture", gemma3, "Gemma3Config"),
    picture("LLaVA", llava, "LlavaConfig"),
    picture("LLaVA-OneVision", llava_onevision, "LlavaOnevisionConfig"),
    picture("SmolVLM", smolvlm, "SmolVLMConfig"),
    picture("PaliGemma 2", paligemma, "PaliGemmaConfig"),
    picture("Mistral 3", mistral3, "Mistral3Config", ops="rms_norm rotary attention glu"),
    picture("Whisper", whisper, "WhisperConfig", ops="layer_norm attention", slow=False),
)
