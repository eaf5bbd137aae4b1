"""Models of vision and language: tower and decoder in one graph, for any images, with eager's loss and gradients."""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastft
from fastft.rewriter.report.advice import advice
from fastft.rewriter.report.history import recorded

IMAGE, VIDEO, START, END = 150, 151, 152, 153  # tokens
LAYERS = 4
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160,
    "num_hidden_layers": LAYERS, "pad_token_id": 0, "max_position_embeddings": 128,
}  # fmt: skip
TURNS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "depth": LAYERS, "num_heads": 2, "out_hidden_size": 32}
SIGLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
FEATURES = 3 * 2 * 4 * 4  # of a patch


def qwen2_5_vl() -> nn.Module:
    tower = TOWER | {"patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [3]}
    config = transformers.Qwen2_5_VLConfig(text_config=TEXT | TURNS, vision_config=tower, **TOKENS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> nn.Module:
    tower = TOWER | {"patch_size": 4, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    text = TEXT | TURNS | {"head_dim": 8}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def llava() -> nn.Module:
    vision, text = transformers.CLIPVisionConfig(**SIGLIP), transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4
    )
    return transformers.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    vision = transformers.SiglipVisionConfig(**SIGLIP, vision_use_head=False)
    text = transformers.GemmaConfig(**TEXT, head_dim=8)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    text = TEXT | {"head_dim": 8, "sliding_window": 16}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.SmolVLMConfig(text_config=text, vision_config=SIGLIP, image_token_id=IMAGE, scale_factor=2)
    return transformers.SmolVLMForConditionalGeneration(config)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return make().train()


def seen(grids: Sequence[Sequence[int]], features: int, kind: int = 1, by_frame: bool = False) -> dict[str, Tensor]:
    """A row for each image, or each video, of these grids."""
    draw, token = torch.Generator().manual_seed(len(grids)), (IMAGE, VIDEO)[kind - 1]
    runs = [
        (frames, height * width // 4) if by_frame else (1, frames * height * width // 4)
        for frames, height, width in grids
    ]
    rows = [3 * [9] + times * [START, *length * [token], END] + [7, 8] for times, length in runs]
    longest = max(map(len, rows)) + 1
    mask = torch.tensor([len(row) * [1] + (longest - len(row)) * [0] for row in rows])
    ids = torch.tensor([row + (longest - len(row)) * [0] for row in rows])
    ids = torch.where(ids == 9, torch.randint(10, 100, ids.shape, generator=draw), ids)
    grid = torch.tensor(grids)
    pixels = torch.randn(int(grid.prod(-1).sum()), features, generator=draw)
    names = ("pixel_values", "image_grid_thw") if kind == 1 else ("pixel_values_videos", "video_grid_thw")
    labels = ids.masked_fill((mask == 0) | (ids == token), -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": (ids == token) * kind}
    return inputs | dict(zip(names, (pixels, grid), strict=True))


def pictured(rows: int, length: int = 12) -> dict[str, Tensor]:
    """Rows with one image of four tokens each."""
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(10, 100, (rows, length), generator=draw)
    ids[:, 2:6] = IMAGE
    pixels = torch.randn(rows, 3, SIGLIP["image_size"], SIGLIP["image_size"], generator=draw)
    labels = ids.masked_fill(ids == IMAGE, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def step(model: Callable, inputs: dict[str, Tensor], of: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    of.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in of.named_parameters() if one.grad is not None}


def check(model: nn.Module, compiled: Callable, inputs: dict[str, Tensor]) -> None:
    """Loss and every gradient against eager's; a bias of keys has none in exact maths."""
    (loss, gradients), (expected, exact) = step(compiled, inputs, model), step(model, inputs, model)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == exact.keys()
    largest = max(one.abs().max() for one in exact.values())
    for name, one in exact.items():
        assert (gradients[name] - one).norm() <= 1e-4 * (one.norm() + 1e-3 * largest), name


OPTIONS = {"lower": "eager", "strict": True}
QWEN = {  # batches: grids, and whether they are of videos
    qwen2_5_vl: [([[1, 4, 8], [1, 6, 10]], 1), ([[1, 4, 4], [1, 10, 8], [1, 4, 6]], 1)],
    qwen3_vl: [([[1, 4, 8], [1, 6, 4]], 1), ([[1, 4, 4], [1, 10, 8], [1, 4, 6]], 1)],
}


@pytest.mark.parametrize("make", QWEN, ids=lambda make: make.__name__)
def test_images_of_any_size_are_one_graph(make: Callable[[], nn.Module]) -> None:
    model = built(make)
    with recorded() as reports:
        run = torch.compile(model, backend="fastft", options=OPTIONS)
        for grids, kind in QWEN[make]:
            check(model, run, seen(grids, FEATURES, kind))
    (report,) = reports
    lifted = Counter(one.rule for one in report.lifted)
    assert lifted["rotary.half"] == 4 * LAYERS
    assert lifted["attention.dot_product_masked"] == 2 * LAYERS
    assert lifted["linear_cross_entropy.cross_entropy"] == 1
    assert Counter(mask.rule for mask in report.masks) == {"range": LAYERS, "causal, padding": LAYERS}
    assert not report.whole
    calls = Counter({region.module.split(".")[1]: region.calls for region in report.regions if region.calls > 1})
    assert calls["visual"] >= 2
    assert calls["language_model"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("make", QWEN, ids=lambda make: make.__name__)
def test_videos(make: Callable[[], nn.Module]) -> None:
    model, more = built(make), {}
    if make is qwen2_5_vl:
        more = {"second_per_grid_ts": torch.tensor([0.5, 1.5])}
    with recorded() as reports:
        run = torch.compile(model, backend="fastft", options=OPTIONS)
        check(model, run, seen([[2, 4, 4], [3, 4, 6]], FEATURES, 2, by_frame=make is qwen3_vl) | more)
    assert len(reports) == 1


def test_tokens_that_are_not_as_many_as_features() -> None:
    inputs = pictured(2)
    inputs["input_ids"][0, 0] = IMAGE
    run = torch.compile(built(llava), backend="fastft", options=OPTIONS)
    with pytest.raises(RuntimeError, match="a check of transformers"):
        run(**inputs)


@pytest.mark.slow
def test_other_attention_in_the_tower_is_left_to_transformers() -> None:
    model = built(qwen3_vl)
    model.model.visual.set_attn_implementation("eager")
    check(model, torch.compile(model, backend="fastft", options=OPTIONS), seen([[1, 4, 4], [1, 4, 6]], FEATURES))


@pytest.mark.parametrize(
    "make", [llava, gemma3, pytest.param(paligemma, marks=pytest.mark.slow)], ids=lambda make: make.__name__
)
def test_a_tower_for_images_of_one_size(make: Callable[[], nn.Module]) -> None:
    """Tower and decoder are one graph; for batches of any size, but for LLaVA's, which lists its images."""
    model = built(make)
    with recorded() as reports:
        run = torch.compile(model, backend="fastft", options=OPTIONS)
        for rows in (2, 3)[: 1 + (make is not llava)]:
            inputs = pictured(rows)
            if make is not llava:
                inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
            check(model, run, inputs)
    assert len(reports) == 1


def test_other_backends_trace_the_originals() -> None:
    model, graphs = built(llava), []
    torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm)(**pictured(2))
    assert len(graphs) > 1


@pytest.mark.slow
def test_what_still_breaks_is_told_with_its_line() -> None:
    """How many images of a batch are padding is data."""
    inputs = pictured(2)
    inputs["input_ids"][:, 3:6] = 9  # of four patches one token is made
    inputs["pixel_values"] = inputs["pixel_values"][:, None]
    report = fastft.explain(built(smolvlm), **inputs)
    assert report.breaks
    assert all("modeling_smolvlm.py" in at and advice(reason) for reason, at in report.breaks)
