"""What is traced in place of code of transformers that reads numbers from tensors: towers, positions, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.compat.substitutions import Substitution
from fastft.compat.vision_tables import merged, require, rope_positions, vision_tables

# Families whose towers, and the features that are made of them, are of the same code.
_QWEN = {
    "qwen2_vl": ("Qwen2VLModel", "VisionAttention"),
    "qwen2_5_vl": ("Qwen2_5_VLModel", "Qwen2_5_VLVisionAttention"),
    "qwen3_vl": ("Qwen3VLModel", "Qwen3VLVisionAttention"),
    "qwen3_vl_moe": ("Qwen3VLMoeModel", "Qwen3VLMoeVisionAttention"),
    "qwen3_5": ("Qwen3_5Model", "Qwen3_5VisionAttention"),
    "qwen3_5_moe": ("Qwen3_5MoeModel", "Qwen3_5MoeVisionAttention"),
}
_BY_FRAME = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")  # text stands between the frames of a video
_DEEPSTACK = {"qwen3_vl": "Qwen3VLTextModel", "qwen3_vl_moe": "Qwen3VLMoeTextModel"}


def torch_compilable_check(cond: Any, msg: Any = None, error_type: type[Exception] = ValueError) -> None:
    """Check on the device what is a tensor, so that nothing waits for it; raise RuntimeError where it is false."""
    cond = cond() if callable(cond) else cond
    if isinstance(cond, Tensor):
        require(cond, "a check of transformers failed: see what the model says without torch.compile")
    else:
        torch._check(cond)


def maybe_install_capturing_hooks(original: Callable, model: Any) -> bool:
    """Install the hooks that collect hidden states, as the first call does; tell whether they were not there."""
    missing = not getattr(model, "_output_capturing_hooks_installed", False)
    if missing:
        original(model)
    return missing


def get_image_features(
    original: Callable, self: Any, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any
) -> Any:
    """Return what the tower makes of all images; the features are one part, instead of one for each image."""
    if not _with_sdpa(self.visual) or pixel_values.dim() != 2 or image_grid_thw is None:
        return original(self, pixel_values, image_grid_thw, **kwargs)
    count, size = pixel_values.shape
    torch._check(size == self.visual.patch_embed.proj.weight[0].numel())  # not a size that changes
    torch._check(count % self.visual.spatial_merge_size**2 == 0)
    tables = vision_tables(self.visual, image_grid_thw, count) | kwargs
    output = self.visual(pixel_values.type(self.visual.dtype), grid_thw=image_grid_thw, return_dict=True, **tables)
    output.pooler_output = (output.pooler_output,)
    return output


def get_image_features_in_parts(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the same where features of other layers are in parts too."""
    output = get_image_features(original, self, *args, **kwargs)
    features = output.deepstack_features
    output.deepstack_features = [one if isinstance(one, tuple) else (one,) for one in features]
    return output


def get_video_features(
    original: Callable, self: Any, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: Any
) -> Any:
    """Return what the tower makes of all videos, as of images."""
    return get_image_features(original, self, pixel_values_videos, video_grid_thw, **kwargs)


def _with_sdpa(part: Any) -> bool:
    return part.config._attn_implementation == "sdpa"


def window_order(self: Any, input_tensor: Tensor, window_index: Tensor, seq_len: int) -> Tensor:
    """Put patches [N, D] into the order of windows."""
    at, together = torch.arange(seq_len, device=window_index.device), self.spatial_merge_unit
    return input_tensor[window_index[at // together] * together + at % together]


def vision_attention(
    original: Callable, self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Compute attention within segments as attention of all patches [N, D] under a mask."""
    if not _with_sdpa(self):
        return original(self, hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
    count = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(count, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    cos, sin = (table.unsqueeze(-2).float() for table in position_embeddings)
    query, key = (
        (states.float() * cos + _half_rotated(states.float()) * sin).to(states.dtype) for states in (query, key)
    )
    query, key, value = (states.transpose(0, 1).unsqueeze(0) for states in (query, key, value))
    at = torch.arange(count, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens, at, right=True)
    mask = (at >= cu_seqlens[segment - 1][:, None]) & (at < cu_seqlens[segment][:, None])
    dropout = self.attention_dropout if self.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=self.scaling)
    return self.proj(out.transpose(1, 2).reshape(count, -1))


def _half_rotated(states: Tensor) -> Tensor:
    left, right = states[..., : states.shape[-1] // 2], states[..., states.shape[-1] // 2 :]
    return torch.cat((-right, left), -1)


def deepstack(self: Any, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    """Add features of images [N, D] to the N of the hidden states [B, S, D] that the mask [B, S] has."""
    embeds = visual_embeds.to(hidden_states.device, hidden_states.dtype)
    mask = visual_pos_masks.to(hidden_states.device)[..., None]
    return hidden_states + torch.zeros_like(hidden_states).masked_scatter(mask, embeds)


def compute_3d_position_ids(original: Callable, self: Any, input_ids: Tensor | None = None, **given: Any) -> Any:
    """Return positions of a batch from its beginning on, without asking what the last batch left behind."""
    cache = given.get("cache", given.get("past_key_values"))
    if input_ids is not None and (cache is None or cache.get_seq_length() == 0):
        if given.get("image_grid_thw") is None and given.get("video_grid_thw") is None:
            return None
        if given.get("mm_token_type_ids") is not None:
            read = ("image_grid_thw", "video_grid_thw", "attention_mask", "second_per_grid_ts", "mm_token_type_ids")
            given = {name: given[name] for name in read if name in given}
            position_ids, self.rope_deltas = self.get_rope_index(input_ids, **given)
            return position_ids
    return original(self, input_ids=input_ids, **given)


def rope_index(
    self: Any, input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the positions of tokens [3, B, S], and what they are ahead of the tokens [B, 1]."""
    return _rope_index(self, input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, attention_mask)


def rope_index_by_frame(
    self: Any, input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the same where text stands between the frames of a video."""
    grids = image_grid_thw, video_grid_thw
    return _rope_index(self, input_ids, mm_token_type_ids, *grids, attention_mask, by_frame=True)


def rope_index_in_time(
    self: Any, input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None, second_per_grid_ts: Any = None, attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the same where frames are as far apart as they are in time, second_per_grid_ts [videos] or 1 second."""
    apart = None
    if video_grid_thw is not None:
        seconds = torch.ones_like(video_grid_thw[:, 0]) if second_per_grid_ts is None else second_per_grid_ts
        apart = torch.as_tensor(seconds, device=input_ids.device) * self.config.vision_config.tokens_per_second
    grids = image_grid_thw, video_grid_thw
    return _rope_index(self, input_ids, mm_token_type_ids, *grids, attention_mask, apart=apart)


def rope_index_in_whole_seconds(
    self: Any, input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None, second_per_grid_ts: Any = None, attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the same with seconds rounded towards 0."""
    if second_per_grid_ts is not None:
        second_per_grid_ts = torch.as_tensor(second_per_grid_ts).long()
    grids = image_grid_thw, video_grid_thw
    return rope_index_in_time(self, input_ids, mm_token_type_ids, *grids, second_per_grid_ts, attention_mask)


def _rope_index(
    self: Any, input_ids: Tensor, kinds: Tensor, images: Tensor | None, videos: Tensor | None, mask: Tensor | None,
    **how: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    here = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    merge = self.config.vision_config.spatial_merge_size
    images, videos = (grid if grid is None else merged(grid, merge) for grid in (images, videos))
    positions, ahead = rope_positions(kinds, here, images, videos, **how)
    return positions.to(input_ids.dtype), ahead


def _since_5_17(
    original: str, reason: str, substitute: Callable, since: str = "5.17", until: str = "5.25", **how: Any
) -> Substitution:
    return Substitution(f"transformers.{original}", "transformers", since, until, reason, substitute, **how)


def _of_qwen() -> Iterator[Substitution]:
    """Yield what the families share that came of one code."""
    for family, (model, attention) in _QWEN.items():
        module = f"models.{family}.modeling_{family}"
        parts = "it splits features by numbers that it reads from the grids, of which the tower makes tables"
        features = f"{module}:{model}.get_image_features"
        if family in _DEEPSTACK:
            yield _since_5_17(features, parts, get_image_features, until="5.18")
            yield _since_5_17(features, parts, get_image_features_in_parts, since="5.18")
        else:
            yield _since_5_17(features, parts, get_image_features)
        if family not in _BY_FRAME:
            yield _since_5_17(f"{module}:{model}.get_video_features", parts, get_video_features)
        segments = "it calls attention once for each segment, whose lengths it reads"
        yield _since_5_17(f"{module}:{attention}.forward", segments, vision_attention)
        runs = "it looks for runs of tokens in Python"
        index = f"{module}:{model}.get_rope_index"
        if family == "qwen2_5_vl":
            yield _since_5_17(index, runs, rope_index_in_whole_seconds, until="5.18")
            yield _since_5_17(index, runs, rope_index_in_time, since="5.18")
        else:
            yield _since_5_17(index, runs, rope_index_by_frame if family in _BY_FRAME else rope_index)
        after = "how it goes on depends on what the last batch left behind"
        yield _since_5_17(f"{module}:{model}.compute_3d_position_ids", after, compute_3d_position_ids)
    yield _since_5_17(
        "models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel.permute_input_for_window_attn",
        "torch cannot tell that there are as many patches as before",
        window_order,
    )
    for family, model in _DEEPSTACK.items():
        name = f"models.{family}.modeling_{family}:{model}._deepstack_process"
        yield _since_5_17(name, "how many tokens a mask has is not known", deepstack)


SUBSTITUTIONS: tuple[Substitution, ...] = (
    _since_5_17(
        "utils.import_utils:torch_compilable_check", "it waits for the result of a check on the device",
        torch_compilable_check, since="5.10",
    ),
    _since_5_17(
        "utils.output_capturing:maybe_install_capturing_hooks", "it takes a lock, and changes modules",
        maybe_install_capturing_hooks, at_once=True,
    ),
    *_of_qwen(),
)  # fmt: skip
