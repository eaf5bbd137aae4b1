"""What is traced in place of transformers' own code for images, against that code: tables, positions, attention."""

import functools
import importlib
import inspect
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import vision_utils
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from fastft.compat import transformers_substitutes as substitutes
from fastft.compat.substitutions import Substitution
from fastft.compat.transformers_substitutes import SUBSTITUTIONS
from fastft.compat.vision_tables import vision_tables

PATCH = 2  # pixels
CLASSES = {
    "qwen2_vl": modeling_qwen2_vl.Qwen2VLModel,
    "qwen2_5_vl": modeling_qwen2_5_vl.Qwen2_5_VLModel,
    "qwen3_vl": modeling_qwen3_vl.Qwen3VLModel,
}


def original_of(one: Substitution) -> Callable:
    """The function itself, without what decorators put around it."""
    module, _, name = one.original.partition(":")
    return inspect.unwrap(functools.reduce(getattr, name.split("."), importlib.import_module(module)))


@pytest.mark.parametrize("one", [one for one in SUBSTITUTIONS if one.applies()], ids=lambda one: one.original)
def test_the_original_is_there_and_takes_no_more(one: Substitution) -> None:
    """It is found by the names that it has of itself, and the substitute can be called as it is."""
    original = original_of(one)
    assert f"{original.__module__}:{original.__qualname__}" == one.original
    theirs, mine = (inspect.signature(function).parameters for function in (original, one.substitute))
    names = [name for name in mine if name != "original"]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine.values())
    assert open_ended or set(theirs) <= set(names)
    by_place = [name for name in names if mine[name].kind is mine[name].POSITIONAL_OR_KEYWORD]
    if one.original.endswith(("forward", "features", "_process", "window_attn", "_check")):  # called by place
        assert list(theirs)[: len(by_place)] == by_place


def test_each_is_for_one_range_of_versions() -> None:
    ranges: dict[str, list[tuple[float, ...]]] = {}
    for one in SUBSTITUTIONS:
        since, until = (tuple(map(float, version.split("."))) for version in (one.since, one.until))
        assert all(until <= start or end <= since for start, end in ranges.get(one.original, []))
        ranges.setdefault(one.original, []).append((since, until))


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tensor, int]:
    """One to four images or videos, and how many patches in a row become one token."""
    merge, sides = draw(st.integers(1, 3)), st.integers(1, 7)
    rows = draw(st.lists(st.tuples(st.integers(1, 3), sides, sides), min_size=1, max_size=4))
    return torch.tensor([[frames, merge * height, merge * width] for frames, height, width in rows]), merge


@given(drawn=grids(), window=st.integers(1, 4), side=st.integers(2, 6), aligned=st.booleans())
def test_tables_of_a_tower(drawn: tuple[Tensor, int], window: int, side: int, aligned: bool) -> None:
    grid, merge = drawn
    mode = "bilinear" if window % 2 else "bicubic"
    tower = SimpleNamespace(
        spatial_merge_size=merge, window_size=window * merge * PATCH, patch_size=PATCH, num_grid_per_side=side,
        interpolation_mode=mode, interpolation_align_corners=aligned,
    )  # fmt: skip
    windows = vision_utils.get_vision_window_index(grid, merge, tower.window_size, PATCH)
    interpolated = vision_utils.get_vision_interpolation_indices_and_weights(grid, side, mode, aligned, merge)
    expected = {
        "position_ids": vision_utils.get_vision_position_ids(grid, merge),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
        "window_index": windows[0],
        "cu_window_seqlens": windows[1],
        "interp_indices": interpolated[0],
        "interp_weights": interpolated[1],
    }
    actual = vision_tables(tower, grid, int(grid.prod(-1).sum()))
    assert actual.keys() == expected.keys()
    for name, table in actual.items():
        ends = name.startswith("cu_")  # then empty segments follow
        mine = table.unique_consecutive() if ends else table
        assert mine.dtype == expected[name].dtype
        assert torch.equal(mine, expected[name]), name


def test_grids_of_another_number_of_patches() -> None:
    tower = SimpleNamespace(spatial_merge_size=2)
    with pytest.raises(RuntimeError, match="grids"):
        vision_tables(tower, torch.tensor([[1, 4, 4]]), 20)


@st.composite
def batches(draw: st.DrawFn, by_frame: bool) -> dict[str, Any]:
    """Rows of text, images and videos, with padding anywhere."""
    merge = draw(st.integers(1, 2))
    found: dict[int, list[list[int]]] = {1: [], 2: []}
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(1, 3))):
        row: list[int] = []
        for kind in draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)):
            row += [0] * (1 if kind else draw(st.integers(1, 4)))
            if kind:
                frames = draw(st.integers(1, 3)) if kind == 2 else 1
                height, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
                found[kind].append([frames, merge * height, merge * width])
                run = [kind] * (height * width)
                row += [0, *run] * frames if by_frame else run * frames
        rows.append(row)
    length = max(map(len, rows)) + draw(st.integers(0, 2))
    kinds, mask = torch.full((len(rows), length), draw(st.integers(0, 2))), torch.zeros(len(rows), length).long()
    for at, row in enumerate(rows):
        places = sorted(draw(st.permutations(range(length)))[: len(row)])
        kinds[at, places], mask[at, places] = torch.tensor(row), 1
    grid = {kind: torch.tensor(one) if one else None for kind, one in found.items()}
    seconds = draw(st.sampled_from([None, [draw(st.floats(0.1, 2)) for _ in found[2]]])) if found[2] else None
    return {"merge": merge, "kinds": kinds, "mask": mask, "images": grid[1], "videos": grid[2], "seconds": seconds}


@pytest.mark.parametrize("family", CLASSES)
def test_positions_of_tokens(family: str) -> None:
    model = CLASSES[family]
    (index,) = [
        one for one in SUBSTITUTIONS if one.applies() and one.original.endswith(f"{model.__name__}.get_rope_index")
    ]

    @given(drawn=batches("by_frame" in index.substitute.__name__))
    def check(drawn: dict[str, Any]) -> None:
        vision = SimpleNamespace(spatial_merge_size=drawn["merge"], tokens_per_second=3)
        self = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
        self.get_vision_position_ids = MethodType(model.get_vision_position_ids, self)
        ids, kinds = torch.zeros_like(drawn["kinds"]), drawn["kinds"]
        more = {"second_per_grid_ts": drawn["seconds"]} if family == "qwen2_5_vl" else {}
        given = {"image_grid_thw": drawn["images"], "video_grid_thw": drawn["videos"], **more}
        expected = model.get_rope_index(self, ids, kinds, attention_mask=drawn["mask"], **given)
        actual = index.substitute(self, ids, kinds, attention_mask=drawn["mask"], **given)
        for mine, theirs in zip(actual, expected, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)

    check()


@pytest.mark.parametrize("wrong", ["no grid", "more tokens", "fewer tokens", "more images"])
def test_tokens_that_do_not_fit_their_grids(wrong: str) -> None:
    kinds = torch.tensor([[0, 1, 1, 1, 1, 0, 1]] if wrong == "more images" else [[0, 1, 1, 1, 1, 0, 0]])
    rows = {"more tokens": 2, "fewer tokens": 6}.get(wrong, 4)
    grid = None if wrong == "no grid" else torch.tensor([[1, rows, 4]])
    self = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)))
    with pytest.raises(RuntimeError):
        substitutes.rope_index(self, kinds, kinds, grid)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_segments(padded: bool) -> None:
    """Beside the original, which calls attention once for each segment."""
    config = modeling_qwen3_vl.Qwen3VLVisionConfig(hidden_size=16, num_heads=2)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    module = modeling_qwen3_vl.Qwen3VLVisionAttention(config).double()
    states = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    turns = torch.randn(12, 4).repeat(1, 2)
    segments = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    given = segments if not padded else torch.cat((segments, torch.full((9,), 12, dtype=torch.int32)))
    results = []
    for out in (
        module(states, cu_seqlens=segments, position_embeddings=(turns.cos(), turns.sin())),
        substitutes.vision_attention(_never, module, states, given, (turns.cos(), turns.sin()), max_seqlen=None),
    ):
        results.append([out, *torch.autograd.grad(out.square().sum(), [states, *module.parameters()])])
    for mine, theirs in zip(*results[::-1], strict=True):
        torch.testing.assert_close(mine, theirs)


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("the original is called")


def test_other_attention_is_the_original() -> None:
    self = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    told = substitutes.vision_attention(
        lambda *args, **kwargs: (args, kwargs), self, 1, cu_seqlens=2, position_embeddings=3, max_seqlen=4
    )
    assert told == ((self, 1, 2), {"position_embeddings": 3, "max_seqlen": 4})


def test_features_added_to_hidden_states() -> None:
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    embeds = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]).bool()
    results = []
    for process in (modeling_qwen3_vl.Qwen3VLTextModel._deepstack_process, substitutes.deepstack):
        out = process(None, hidden, mask, embeds)
        results.append([out, *torch.autograd.grad(out.square().sum(), [hidden, embeds])])
    for mine, theirs in zip(*results[::-1], strict=True):
        assert torch.equal(mine, theirs)


def test_a_check_is_still_one() -> None:
    check = substitutes.torch_compilable_check
    check(torch.tensor([True, True]), "")
    check(lambda: torch.tensor(True), lambda: "")
    check(True, "")
    for wrong in (torch.tensor([True, False]), lambda: torch.tensor(False), False):
        with pytest.raises(RuntimeError):
            check(wrong, "")
