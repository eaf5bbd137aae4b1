"""Masks in which the tokens of one image see each other: ranges where ids number runs, dense where they do not."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_reading import Reading, only, sdpa
from torch import Tensor
from torch.fx import GraphModule
from transformers import masking_utils as hf
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask as numbered

LENGTH = 12
WINDOWS = (0, 3, 20)


def overlaid(window: int, ids: Callable = numbered) -> Callable:
    """Causal, perhaps within a window, and what is inside of an image sees all of the image."""
    causal = hf.sliding_window_causal_mask_function(window) if window else hf.causal_mask_function
    return sdpa(lambda kinds: hf.or_masks(causal, hf.blockwise_overlay(ids(kinds))))


def windowed(window: int) -> Callable:
    """The same with a window around all."""
    near = hf.sliding_window_overlay(window)
    return sdpa(
        lambda kinds: hf.and_masks(hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(numbered(kinds))), near)
    )


READINGS: dict[str, Reading] = {}


def reading(name: str, function: Callable) -> Reading:
    """A mask read once, for all the tensors it is then given."""

    def backend(gm: GraphModule, _: object) -> Callable:
        READINGS[name] = Reading(gm, {})
        return READINGS[name].run

    if name not in READINGS:
        torch._dynamo.reset()
        torch.compile(function, backend=backend, dynamic=False)(torch.ones(2, LENGTH, dtype=torch.long))
    return READINGS[name]


@pytest.mark.parametrize("window", WINDOWS)
@given(kinds=st.lists(st.integers(0, 1), min_size=2 * LENGTH, max_size=2 * LENGTH))
def test_whatever_the_images(window: int, kinds: list[int]) -> None:
    for name, function in {"overlaid": overlaid(window), "windowed": windowed(window or 2)}.items():
        read = reading(f"{name} {window}", function)
        read.run(torch.tensor(kinds).reshape(2, LENGTH))
        (one,) = read.seen()  # which holds the arguments to the mask
        assert "runs" in one.kind
        assert {"query_ids", "key_ids"}.isdisjoint(one.given)


def test_any_length() -> None:
    read = only(overlaid(0), torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 0]] * 2), dynamic=True)
    assert "runs" in read.kind


def shifted_wrongly(kinds: Tensor) -> Tensor:
    inside = kinds == 1
    begins = inside & ~torch.nn.functional.pad(inside, (2, 0))[:, :-2]
    return torch.where(inside, torch.cumsum(begins.int(), 1) - 1, -1)


def not_shifted(kinds: Tensor) -> Tensor:
    inside = kinds == 1
    begins = inside & ~torch.nn.functional.pad(inside, (0, 1))[:, :-1]
    return torch.where(inside, torch.cumsum(begins.int(), 1) - 1, -1)


def counted_from_one(kinds: Tensor) -> Tensor:
    inside = kinds == 1
    begins = inside & ~torch.nn.functional.pad(inside, (1, 0), value=True)[:, :-1]
    return torch.where(inside, torch.cumsum(begins.int(), 1) - 1, -1)


def of_others(kinds: Tensor) -> Tensor:
    inside, other = kinds == 1, kinds == 0
    begins = inside & ~torch.nn.functional.pad(other, (1, 0))[:, :-1]
    return torch.where(inside, torch.cumsum(begins.int(), 1) - 1, -1)


def begun_by_others(kinds: Tensor) -> Tensor:
    inside, other = kinds == 1, kinds == 0
    begins = other & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, torch.cumsum(begins.int(), 1) - 1, -1)


def numbered_otherwise(kinds: Tensor) -> Tensor:
    inside = kinds == 1
    begins = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, torch.cumsum(begins.int(), 1) - 2, -1)


def all_of_a_kind(kinds: Tensor) -> Tensor:
    return torch.where(kinds == 1, 0, -1)


NO_RUNS = (
    shifted_wrongly, not_shifted, counted_from_one, of_others, begun_by_others, numbered_otherwise, all_of_a_kind,
)  # fmt: skip


@pytest.mark.parametrize("ids", NO_RUNS, ids=lambda function: function.__name__)
def test_what_is_no_run_stays_dense(ids: Callable) -> None:
    """Two images of one number, or one of two numbers, are no range."""
    kinds = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0, 1]])
    read = only(overlaid(0, ids), kinds)
    assert isinstance(read.found, str)


def test_a_union_without_the_query_stays_dense() -> None:
    strictly = lambda b, h, q, k: k < q  # noqa: E731
    read = only(
        sdpa(lambda kinds: hf.or_masks(strictly, hf.blockwise_overlay(numbered(kinds)))), torch.tensor([[0, 1, 1, 0]])
    )
    assert isinstance(read.found, str)


def begun_less_often(kinds: Tensor) -> Tensor:
    inside = kinds == 1
    begins = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    begins.logical_and_(kinds.cumsum(-1) != 3)
    return torch.where(inside, torch.cumsum(begins.int(), 1) - 1, -1)


def ended_early(kinds: Tensor) -> Tensor:
    inside = kinds == 1
    begins = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    inside.logical_and_(kinds.cumsum(-1) != 4)
    return torch.where(inside, torch.cumsum(begins.int(), 1) - 1, -1)


def joined(kinds: Tensor) -> Tensor:
    inside = kinds == 1
    previous = torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    previous.logical_or_(kinds.cumsum(-1) == 3)
    return torch.where(inside, torch.cumsum((inside & ~previous).int(), 1) - 1, -1)


@pytest.mark.parametrize("ids", [begun_less_often, ended_early, joined], ids=lambda f: f.__name__)
def test_what_is_written_on_the_way_stays_dense(ids: Callable) -> None:
    read = only(overlaid(0, ids), torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1, 1]]))
    assert "writes to what it is made of" in str(read.found)


def rolled(kinds: Tensor) -> Tensor:
    """As a model writes it, and as the rewriter makes a write functional."""
    inside = kinds == 1
    turned = torch.roll(inside, shifts=1, dims=-1)
    previous = torch.select_scatter(turned, torch.full_like(turned[..., 0], False), 1, 0)
    return torch.where(inside, torch.cumsum((inside & ~previous).int(), dim=1) - 1, -1)


def rolled_whole(kinds: Tensor) -> Tensor:
    """What is inside at the end goes on at the beginning."""
    inside = kinds == 1
    begins = inside & ~torch.roll(inside, shifts=1, dims=-1)
    return torch.where(inside, torch.cumsum(begins.int(), dim=1) - 1, -1)


def rolled_otherwise(kinds: Tensor) -> Tensor:
    inside = kinds == 1
    turned = torch.roll(inside, shifts=-1, dims=-1)
    previous = torch.select_scatter(turned, torch.full_like(turned[..., 0], False), 1, 0)
    return torch.where(inside, torch.cumsum((inside & ~previous).int(), dim=1) - 1, -1)


@pytest.mark.parametrize(
    ("ids", "known"), [(rolled, True), (rolled_whole, False), (rolled_otherwise, False)], ids=["set", "whole", "other"]
)
def test_ids_of_what_is_rolled(ids: Callable, known: bool) -> None:
    kinds = torch.tensor([[1, 1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0, 1]])
    assert isinstance(only(overlaid(3, ids), kinds).found, str) != known
