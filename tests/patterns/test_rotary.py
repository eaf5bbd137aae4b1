"""Which expressions become fastft::rotary, which do not, and for what reason."""

from collections.abc import Callable

import pytest
import torch
from choices import in_pairs
from lifting import assert_right, compiled, frozen, lifted, normal, ops, reasons, rules, told
from torch import Tensor

from fastft.patterns import rotary as patterns
from fastft.patterns.rotary import rotate_half

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = {rule.reference.__name__: rule for rule in patterns.RULES}
B, H, S, D = 2, 3, 5, 16
WIDTH = {
    "half_of_a_part": 8,
    "interleaved_part": 8,
    "half_by_parts": D // 2,
    "interleaved_to_halves": D // 2,
}  # of cos and sin, if not a head's
LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {  # x [B, H, S, D] as models have it
    "contiguous": lambda dtype: normal(B, H, S, D, dtype=dtype),
    "transposed": lambda dtype: _leaf(frozen(B, S, H, D, dtype=dtype).transpose(1, 2)),
    "a slice of each head": lambda dtype: _leaf(frozen(B, S, H, 3 * D, dtype=dtype)[..., D : 2 * D].transpose(1, 2)),
    "a slice of the projection": lambda dtype: _leaf(
        frozen(B, S, 3 * H * D, dtype=dtype)[..., H * D : 2 * H * D].view(B, S, H, D).transpose(1, 2)
    ),
}


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_()


COMPLEX = {"complex_product": (B, 1, S), "complex_product_positions_first": (B, S)}  # axes of the angles


def inputs(name: str, x: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What a rule's reference takes: x [B, H, S, D], or with positions first, and angles."""
    if name not in COMPLEX:
        return [x, *angles(dtype, WIDTH.get(name, D))]
    if name == "complex_product_positions_first":
        x = _leaf(x.detach().transpose(1, 2))
    cos, sin = angles(width=D // 2, shape=COMPLEX[name])
    return [x, torch.complex(1.5 * cos, sin)]  # a pair may be scaled too


def angles(dtype: torch.dtype = torch.float32, width: int = D, shape: tuple[int, ...] = (B, 1, S)) -> list[Tensor]:
    """cos and sin, of another angle for each element: nothing promises that those of a pair are equal."""
    angle = frozen(*shape, width, seed=2)
    return [angle.cos().to(dtype), angle.sin().to(dtype)]


@in_pairs(name=RULES, x_dtype=DTYPES, angle_dtype=DTYPES, layout=LAYOUTS)
def test_every_reference_becomes_one_op_and_stays_right(
    name: str, x_dtype: torch.dtype, angle_dtype: torch.dtype, layout: str
) -> None:
    values = inputs(name, LAYOUTS[layout](x_dtype), angle_dtype)
    gm, report = lifted(RULES[name].reference, *values)
    assert len(report.lifted) == 1, reasons(report)
    assert reasons(report) == []
    assert ops(gm) == ["rotary"]
    assert_right(gm, RULES[name].reference, values)


@pytest.mark.parametrize("name", RULES)
def test_the_rule_is_the_one_named_after_the_reference(name: str) -> None:
    values = inputs(name, normal(B, H, S, D, dtype=torch.bfloat16), torch.bfloat16)
    _, report = lifted(RULES[name].reference, *values)
    assert rules(report)[0] == [f"rotary.{name}"]


@pytest.mark.parametrize("name", [name for name in RULES if name != "complex_product_positions_first"])
@pytest.mark.parametrize("shape", [(B, S, 1), (1, S, 1), (S, 1), (B, S, H)], ids=str)
def test_heads_after_positions(name: str, shape: tuple[int, ...]) -> None:
    """x [B, S, H, D], and angles of every rank that broadcasts."""
    turned = angles(width=D // 2 if name in COMPLEX else WIDTH.get(name, D), shape=shape)
    values = [normal(B, S, H, D), *([torch.complex(*turned)] if name in COMPLEX else turned)]
    gm, report = lifted(RULES[name].reference, *values)
    assert ops(gm) == ["rotary"], reasons(report)
    assert_right(gm, RULES[name].reference, values)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : D // 2], x[..., D // 2 :]


def by_chunk(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def by_torch_chunk(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, 3)
    return x * cos + torch.cat([b.neg(), a], 3) * sin


def by_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.split(D // 2, -1)
    return (x * cos).add(torch.cat([-b, a], axis=-1).mul(sin))


def by_split_into_list(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.split(x, [D // 2, D // 2], dim=-1)
    return x * cos + torch.cat([-b, a], -1) * sin


def by_indexed_chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    parts = x.chunk(2, -1)
    return x * cos + torch.cat((torch.negative(parts[1]), parts[0]), -1) * sin


def by_full_slices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[:, :, :, D // 2 :], x[:, :, :, 0 : D // 2]), 3) * sin


def by_slices_to_the_end(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.concat((-x[..., D // 2 : D], x[..., : D // 2]), -1) * sin


def by_slices_from_the_end(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., -D // 2 :], x[..., : -D // 2]), -1) * sin


def by_narrow(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x.narrow(-1, D // 2, D // 2), x.narrow(-1, 0, D // 2)), -1) * sin


def by_unbind(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.reshape(B, H, S, 2, D // 2).unbind(-2)
    return x * cos + torch.cat((-b, a), -1) * sin


def other_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return sin * rotate_half(x) + cos * x


def by_functions(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(torch.mul(x, cos), torch.mul(rotate_half(x), sin))


def by_keyword(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.chunk(input=x, chunks=2, dim=-1)
    return x * cos + torch.cat(tensors=(-b, a), dim=-1) * sin


def minus_one_times(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((b * -1, a), -1) * sin


def every_two_in_full(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[:, :, :, ::2], x[:, :, :, 1::2]
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


def every_two_from_zero(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack((-x[..., 1::2], x[..., 0::2]), dim=4).flatten(3) * sin


def every_two_flattened_to(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1)
    return x * cos + torch.flatten(turned, start_dim=-2, end_dim=-1) * sin


def by_parts_written_out(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=-1)
    cos, sin = cos[..., : D // 2], sin[..., : D // 2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def by_parts_in_the_other_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = halves(x)
    cos, sin = cos[..., : D // 2], sin[..., : D // 2]
    return torch.cat([torch.sub(cos * a, sin * b), a * sin + b * cos], -1)


SPELLINGS = [
    by_chunk,
    by_torch_chunk,
    by_split,
    by_indexed_chunks,
    by_full_slices,
    other_order,
    by_functions,
    every_two_in_full,
    every_two_from_zero,
    every_two_flattened_to,
    by_parts_written_out,
    by_parts_in_the_other_order,
]


@pytest.mark.parametrize("function", SPELLINGS, ids=lambda function: function.__name__)
def test_spellings(function: Callable) -> None:
    values = [normal(B, H, S, D), *angles()]
    gm, report = lifted(function, *values)
    assert ops(gm) == ["rotary"], reasons(report)
    assert_right(gm, function, values)


UNKNOWN = [
    by_split_into_list,
    by_slices_to_the_end,
    by_slices_from_the_end,
    by_narrow,
    by_keyword,
    by_unbind,
    minus_one_times,
]


@pytest.mark.parametrize("function", UNKNOWN, ids=lambda function: function.__name__)
def test_spellings_that_are_not_known_run_as_they_are(function: Callable) -> None:
    gm, report = lifted(function, normal(B, H, S, D), *angles())
    assert (ops(gm), report.lifted) == ([], [])


def test_angles_unsqueezed_for_each_use_or_once() -> None:
    def once(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return patterns.half(x, cos, sin)

    def inside(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos[:, None] + rotate_half(x) * sin[:, None, :, :]

    for function in (once, inside):
        values = [normal(B, H, S, D), *angles(shape=(B, S))]
        gm, report = lifted(function, *values)
        assert ops(gm) == ["rotary"], reasons(report)
        assert_right(gm, function, values)


def no_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = halves(x)
    return x * cos + torch.cat((b, a), -1) * sin


def taken_away(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos - rotate_half(x) * sin


def swapped_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = halves(x)
    return x * cos + torch.cat((-a, b), -1) * sin


def joined_along_positions(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return x * cos + torch.cat((-b, a), 1) * sin


def other_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 6:], x[..., :6]), -1) * sin


def overlapping_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 4:12], x[..., : D // 2]), -1) * sin


def another_tensor(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.exp() * cos + rotate_half(x) * sin


def odd_and_even_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2) * sin


def stacked_the_other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -2).flatten(-2) * sin


def turned_used_elsewhere(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = rotate_half(x)
    return x * cos + turned * sin, turned


def product_used_elsewhere(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    product = x * cos
    return product + rotate_half(x) * sin, product.exp()


def written_between(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x * 1.5
    turned = rotate_half(x)
    x.add_(1.0)
    return x * cos + turned * sin


def added_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos).add_(rotate_half(x) * sin)


NEGATIVE = [  # what must not be lifted, and what the reason says; None: nothing is near
    (no_sign, None),
    (taken_away, "expected add(mul(…), mul(…)), found neg(getitem)"),
    (swapped_halves, "found getitem(x, (Ellipsis, slice(None, 8, None)))"),
    (joined_along_positions, "expected cat(neg(…), getitem(…), -1), found cat(neg, getitem, -3)"),
    (other_halves, "found getitem(x, (Ellipsis, slice(6, None, None)))"),
    (overlapping_halves, "found getitem(x, (Ellipsis, slice(4, 12, None)))"),
    (another_tensor, "two values where the reference has one: exp(x) and x"),
    (odd_and_even_swapped, "found getitem(x, (Ellipsis, slice(None, None, 2)))"),
    (stacked_the_other_way, "expected stack(neg(…), getitem(…), -1), found stack(neg, getitem, -2)"),
    (turned_used_elsewhere, "cat is also used by the graph's output"),
    (product_used_elsewhere, "mul is also used by exp"),
    (written_between, "mul is written to in place"),
    (added_in_place, "expected add(mul(…), mul(…)), found neg(getitem)"),
]


@pytest.mark.parametrize(("function", "reason"), NEGATIVE, ids=[case[0].__name__ for case in NEGATIVE])
def test_a_near_miss_is_left_alone_and_explained(function: Callable, reason: str | None) -> None:
    values = [normal(B, H + 1, S, D), *angles()]
    gm, report = lifted(function, *values)
    assert (ops(gm), report.lifted) == ([], [])
    assert len(report.near_misses) == (reason is not None)
    assert all(reason in one for one in told(report))
    torch.testing.assert_close(gm(*values), function(*values))


def test_a_reason_names_no_object_of_ours() -> None:
    """An open size of the pattern is spelt for people."""
    _, report = lifted(swapped_halves, normal(B, H, S, D), *angles())
    assert "object at 0x" not in reasons(report)[0]


UNFIT = {  # shapes and gradients for which the same expression is not what the op does
    "an odd head": (lambda: [normal(B, H, S, 7), *angles(width=7)], "7 elements to rotate are no pairs"),
    "trained angles": (lambda: [normal(B, H, S, D), *map(_leaf, angles())], "gives cos no gradient"),
    "only the angles are trained": (lambda: [frozen(B, H, S, D), *map(_leaf, angles())], "gives cos no gradient"),
    "a trained sin": (lambda: [normal(B, H, S, D), angles()[0], _leaf(angles()[1])], "gives sin no gradient"),
    "x broadcasts": (lambda: [normal(1, H, S, D), *angles()], "The expanded size of the tensor (1) must match"),
    "angles of a higher rank": (lambda: [normal(H, S, D), *angles()], "x (3, 5, 16), but cos (2, 1, 5, 16)"),
    "one angle for all": (lambda: [normal(B, H, S, D), *angles(width=1)], "cos has size 1 in dimension D"),
    "cos and sin of other shapes": (
        lambda: [normal(B, H, S, D), angles()[0], angles(shape=(S,))[1]],
        "cos (2, 1, 5, 16), but sin (5, 16)",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_the_op_cannot_do_is_declined(name: str) -> None:
    values, reason = UNFIT[name][0](), UNFIT[name][1]
    gm, report = lifted(patterns.half, *values)
    assert (ops(gm), report.lifted) == ([], [])
    assert [reason in one for one in reasons(report)] == [True], reasons(report)


@pytest.mark.parametrize("name", ["half_by_parts", "interleaved_to_halves"])
def test_one_angle_for_all_pairs_is_not_one_pair(name: str) -> None:
    """cos [..., 1] broadcasts over the pairs in the reference; the op would rotate the first pair alone."""
    values = [normal(B, H, S, D), *angles(width=1)]
    gm, _ = lifted(RULES[name].reference, *values)
    assert ops(gm) == []
    torch.testing.assert_close(gm(*values), RULES[name].reference(*values))


@pytest.mark.parametrize("turned", [patterns.half, patterns.half_by_parts], ids=["half", "by_parts"])
def test_pairs_that_are_taken_apart_before_they_are_turned(turned: Callable) -> None:
    """As DeepSeek V3 did at first: what is rotated is the copy."""

    def function(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(x.view(B, H, S, D // 2, 2).transpose(4, 3).reshape(B, H, S, D), cos, sin)

    values = [normal(B, H, S, D), *angles(width=WIDTH.get(turned.__name__, D))]
    gm, report = lifted(function, *values)
    assert ops(gm) == ["rotary"], reasons(report)
    assert_right(gm, function, values)


def first_of_pairs_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat((b * cos + a * sin, a * cos - b * sin), -1)


def turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos - a * sin), -1)


def overlapping_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., : D // 2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@pytest.mark.parametrize("function", [first_of_pairs_last, turned_back, overlapping_pairs])
def test_what_is_nearly_taken_apart_runs_as_it_is(function: Callable) -> None:
    gm, report = lifted(function, normal(B, H, S, D), *angles(width=D // 2))
    assert (ops(gm), report.lifted) == ([], [])


@pytest.mark.parametrize("name", ["half_widened", "interleaved_widened", "interleaved_widened_late"])
def test_float64_is_rounded_where_the_user_rounds_it(name: str) -> None:
    values = [normal(B, H, S, D, dtype=torch.float64) / 3, *angles()]
    gm, _ = lifted(RULES[name].reference, *values)
    actual = gm(*values)
    torch.testing.assert_close(actual, RULES[name].reference(*values), rtol=1e-5, atol=1e-6)
    assert torch.equal(actual, actual.float().double())


def test_sin_in_the_place_of_cos_is_another_rotation_and_right() -> None:
    """Nothing tells a cosine from a sine: the op takes what stands in its place."""
    swapped = lambda x, cos, sin: patterns.half(x, sin, cos)  # noqa: E731
    values = [normal(B, H, S, D), *angles()]
    gm, _ = lifted(swapped, *values)
    assert_right(gm, swapped, values)


def test_gradients_switched_off_halfway_are_respected() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with torch.no_grad():
            turned = rotate_half(x)
        return x * cos + turned * sin

    captures: list = []
    values = [normal(B, H, S, D), *angles()]
    y = compiled(function, captures)(*values)
    ((_, report),) = captures
    assert reasons(report) == ["_set_grad_enabled is called halfway"]
    torch.testing.assert_close(y, function(*values))


def test_angles_shared_by_many_and_used_elsewhere_are_inputs() -> None:
    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return patterns.half(q, cos, sin).exp(), patterns.half(k, cos, sin).exp(), cos * sin

    values = [normal(B, H, S, D), normal(B, 1, S, D), *angles(shape=(B, S))]
    gm, report = lifted(function, *values)
    assert rules(report) == (["rotary.half"] * 2, ["rotary.queries_and_keys"])
    assert_right(gm, function, values)
