"""The strategies draw what they promise; the comparison rejects what it should."""

import itertools

import pytest
import torch
from choices import pairwise
from compare import RoundedOtherwise, assert_close_to_truth, assert_same_metadata
from hypothesis import find, given
from hypothesis import strategies as st
from strategies import LAYOUTS, UPSTREAM, Spec, layouts, lengths, requires_grad, seeds, shapes, specs, upstream


@given(shapes(largest_row=100, most_rows=20, most_axes=4))
def test_shapes_are_bounded(shape: tuple[int, ...]) -> None:
    assert 1 <= len(shape) <= 4
    assert torch.Size(shape[:-1]).numel() <= 20
    assert 1 <= shape[-1] <= 100


@pytest.mark.parametrize("wanted", [1, 2, 63, 64, 65, 251])
def test_lengths_reach(wanted: int) -> None:
    assert find(lengths(300), lambda length: length == wanted) == wanted


@given(specs())
def test_a_spec_builds_its_tensor_again_and_again(spec: Spec) -> None:
    first, second = spec.build(), spec.build()
    assert first.shape == spec.shape
    assert first.dtype == spec.dtype
    assert first.stride() == second.stride()
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert eval(repr(spec), {"Spec": Spec, "torch": torch}) == spec


def test_layouts_are_what_they_are_called() -> None:
    built = {layout: Spec((2, 3, 4, 5), torch.float32, layout).build() for layout in LAYOUTS}
    assert built["contiguous"].is_contiguous()
    assert built["transposed"].transpose(1, 2).is_contiguous()
    assert built["sliced"].stride() == (12 * 23, 4 * 23, 23, 1)
    assert built["chunked"].stride() == (3 * 45, 45, 5, 1)
    assert built["expanded"].stride(0) == 0
    assert built["columns"].stride()[-2:] == (1, 4)


@given(shapes(), st.sampled_from(UPSTREAM), seeds)
def test_upstream_gradients_fit(shape: tuple[int, ...], kind: str, seed: int) -> None:
    y = torch.zeros(shape, dtype=torch.float16)
    gradient = upstream(y, kind, seed)
    assert gradient.shape == y.shape
    assert gradient.dtype == y.dtype


def test_upstream_gradients_are_what_they_are_called() -> None:
    y = torch.zeros(2, 3, 4, 5)
    strides = {kind: upstream(y, kind).stride() for kind in UPSTREAM}
    assert strides["random"] == y.stride()
    assert strides["expanded"] == (0, 0, 0, 1)
    assert strides["strided"][-1] == 2
    assert strides["transposed"] == (60, 5, 15, 1)
    assert strides["sum"] == (0, 0, 0, 0)


@given(requires_grad(3))
def test_something_requires_grad(flags: tuple[bool, ...]) -> None:
    assert len(flags) == 3
    assert any(flags)


@given(layouts())
def test_layouts_are_known(layout: str) -> None:
    assert layout in LAYOUTS


def test_the_comparison_accepts_eagers_own_error() -> None:
    truth = torch.randn(100, dtype=torch.float64)
    eager = truth.to(torch.bfloat16)
    assert_close_to_truth(eager, eager, truth, 1.0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3.0])
def test_the_comparison_rejects_one_wrong_element(wrong: float) -> None:
    truth = torch.randn(100, dtype=torch.float64).clamp(-2, 2)
    eager = truth.to(torch.bfloat16)
    actual = eager.clone()
    actual[17] = wrong
    with pytest.raises(AssertionError):
        assert_close_to_truth(actual, eager, truth, 3.0)


def test_the_comparison_rejects_a_slight_error_everywhere() -> None:
    truth = torch.randn(10_000, dtype=torch.float64)
    eager = truth.float()
    with pytest.raises(AssertionError, match="largest"):
        assert_close_to_truth(eager * (1 + 4e-6), eager, truth, 3.0)
    eager[17] += 0.1  # where eager is bad at one element, that does not excuse all of them
    with pytest.raises(AssertionError, match="root mean square"):
        assert_close_to_truth(truth.float() + 0.05, eager, truth, 3.0)


def test_the_comparison_rejects_other_dtypes_shapes_and_strides() -> None:
    truth = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close_to_truth(truth.half(), truth.float(), truth, 2.0)
    with pytest.raises(AssertionError):
        assert_close_to_truth(truth.half()[:1], truth.half()[:1], truth, 2.0)
    with pytest.raises(AssertionError, match="stride"):
        assert_same_metadata(truth, truth.t().contiguous().t())
    assert_same_metadata(truth[:1], truth.t().contiguous().t()[:1, :].contiguous())


def test_other_roundings_show_where_terms_cancel() -> None:
    x = torch.rand(1000, dtype=torch.float64) + 1.0
    with RoundedOtherwise(0):
        difference = x * 3.0 - x * 3.0
        view = x.reshape(10, 100)
    eps = torch.finfo(torch.float32).eps
    assert 2 * eps < difference.abs().max() < 2 * 6 * eps
    assert torch.equal(view.flatten(), x)


def test_any_two_choices_meet_in_few_combinations() -> None:
    rows = [row for row in itertools.product(range(4), "abc", (False, True), "xyz") if row[:2] != (0, "a")]
    chosen = pairwise(rows, enumerate, [rows[5]])
    pairs_of = lambda found: {pair for row in found for pair in itertools.combinations(enumerate(row), 2)}  # noqa: E731
    assert pairs_of(chosen) == pairs_of(rows)
    assert rows[5] in chosen
    assert 12 <= len(chosen) <= 18 < len(rows)
