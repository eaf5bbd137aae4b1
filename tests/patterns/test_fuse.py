"""What is merged of what was lifted: additions with norms, queries with keys, norms with rotary embeddings."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from choices import in_pairs
from lifting import assert_right, compiled, lifted, normal, ops, reasons, rules
from torch import Tensor, nn

from fastft.patterns import rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, S, D = 2, 5, 16
ADD, INNER, AFTER = "add_rms_norm.before_a_block", "add_rms_norm.around_an_addition", "add_rms_norm.after_a_block"
NORM = rms_norm.llama
STYLES = {"llama": rms_norm.llama, "gemma": rms_norm.gemma, "gpt_oss": rms_norm.gpt_oss}


def stream(x_dtype: torch.dtype = torch.float32, other: torch.dtype | None = None) -> list[Tensor]:
    """A branch and a residual stream, and two weights."""
    residual = normal(B, S, D, dtype=other or x_dtype, seed=1)
    return [normal(B, S, D, dtype=x_dtype), residual, *(normal(D, dtype=x_dtype, seed=seed) for seed in (2, 3))]


def before(x: Tensor, r: Tensor, w: Tensor, v: Tensor, norm: Callable = NORM) -> tuple[Tensor, Tensor]:
    total = x + r
    return norm(total, w, 1e-5) * v, total


def after(x: Tensor, r: Tensor, w: Tensor, v: Tensor, norm: Callable = NORM) -> Tensor:
    return (norm(x, w, 1e-5) + r) * v


def around(x: Tensor, r: Tensor, w: Tensor, v: Tensor, norm: Callable = NORM) -> tuple[Tensor, Tensor]:
    total = norm(x, v, 1e-5) + r
    return norm(total, w, 1e-6), total


SHAPES = {  # a function, the op it becomes, and by which rule
    "before": (before, "add_rms_norm", ADD),
    "after": (after, "rms_norm_add", AFTER),
    "around": (around, "rms_norm_add_rms_norm", INNER),
}


@in_pairs(name=SHAPES, style=STYLES, x_dtype=DTYPES, residual_dtype=DTYPES)
def test_an_addition_and_its_norms_become_one_op(
    name: str, style: str, x_dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    """The total is used by the norm and by the stream: its gradient is that of both."""
    shape, op, rule = SHAPES[name]
    function = lambda x, r, w, v: shape(x, r, w, v, STYLES[style])  # noqa: E731
    values = stream(x_dtype, residual_dtype)
    gm, report = lifted(function, *values)
    assert reasons(report) == []
    assert_right(gm, function, values)
    total = torch.promote_types(x_dtype, residual_dtype)
    if (name, style) == ("around", "gpt_oss") and total == torch.float32 != x_dtype:
        # in float32 the outer norm may as well be Llama's, and both of a sandwich have to round alike
        assert ops(gm) == ["rms_norm_add", "rms_norm"]
    else:
        assert ops(gm) == [op], (report.lifted, reasons(report))
        assert rules(report)[1] == [rule]


def other_order(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    total = r.add(x)
    return NORM(total, w, 1e-5), total


def norm_first_in_the_sum(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.add(r, NORM(x, w, 1e-5))


def after_a_dropout_of_nothing(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    total = F.dropout(r + F.dropout(x, 0.0), p=0.5, training=False)
    return NORM(total, w, 1e-5), total


def a_dropout_between(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.dropout(NORM(x, w, 1e-5), p=0.0) + r


def total_used_no_more(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return NORM(x + r, w, 1e-5)


def torch_norm(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    total = x + r
    return F.rms_norm(total, (D,), w, 1e-5), total


def a_chain(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    first = x + r
    second = first + NORM(first, w, 1e-5).exp()
    return second + NORM(second, v, 1e-5).exp()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (other_order, ["add_rms_norm"]),
        (norm_first_in_the_sum, ["rms_norm_add"]),
        (after_a_dropout_of_nothing, ["add_rms_norm"]),
        (a_dropout_between, ["rms_norm_add"]),
        (total_used_no_more, ["add_rms_norm"]),
        (torch_norm, ["add_rms_norm"]),
        (a_chain, ["add_rms_norm"] * 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_spellings(function: Callable, expected: list[str]) -> None:
    values = stream()
    gm, report = lifted(function, *values)
    assert ops(gm) == expected, reasons(report)
    assert_right(gm, function, values)


def two_norms_of_a_sum(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    total = x + r
    return NORM(total, w, 1e-5).exp() + NORM(total, v, 1e-5).exp()


def norm_used_twice(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    y = NORM(x, w, 1e-5)
    return y + r, y.exp()


def norm_added_to_its_input(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return x + NORM(x, w, 1e-5)


def sum_with_itself(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return NORM(x + x, w, 1e-5)


def other_offset(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    total = rms_norm.gpt_oss(x, v, 1e-5) + r
    return rms_norm.gemma(total, w, 1e-5), total


def other_rounding(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    total = rms_norm.torch_rms_norm(x, v, 1e-5) + r
    return rms_norm.llama(total, w, 1e-5), total


def scaled_sum(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return NORM(torch.add(r, x, alpha=2), w, 1e-5)


def scaled_sum_after(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.add(r, NORM(x, w, 1e-5), alpha=0.5)


def difference(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return NORM(r - x, w, 1e-5)


def broadcast_residual(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return NORM(x + r[:1], w, 1e-5)


def broadcast_branch(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return NORM(x[0], w, 1e-5) + r


def bias_added(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return NORM(x + v, w, 1e-5)


def number_added(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return NORM(x + 1.5, w, 1e-5)


def added_in_place(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return NORM((x * 1.5).add_(r), w, 1e-5)


def real_dropout(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.dropout(x, 1.0) + NORM(r, w, 1e-5).exp()


def weight_of_the_total(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    total = x + r
    weight = total.mean((0, 1)) + w
    return NORM(total, weight, 1e-5), total


def weight_after_the_total_is_used(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    total = x + r
    shown = total.exp()
    weight = w * v
    return NORM(total, weight, 1e-5), shown


PLAIN, TOOK_ONE = ["rms_norm"], ["add_rms_norm", "rms_norm"]
APART = [  # what must not be merged, or only in part, and what is left
    (two_norms_of_a_sum, TOOK_ONE),
    (norm_used_twice, PLAIN),
    (norm_added_to_its_input, ["rms_norm_add"]),
    (sum_with_itself, ["add_rms_norm"]),
    (other_offset, ["rms_norm_add", "rms_norm"]),
    (other_rounding, ["rms_norm_add", "rms_norm"]),
    (scaled_sum, PLAIN),
    (scaled_sum_after, PLAIN),
    (difference, PLAIN),
    (broadcast_residual, PLAIN),
    (broadcast_branch, PLAIN),
    (bias_added, PLAIN),
    (number_added, PLAIN),
    (added_in_place, []),
    (real_dropout, PLAIN),
    (weight_of_the_total, PLAIN),
    (weight_after_the_total_is_used, PLAIN),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("function", "expected"), APART, ids=[case[0].__name__ for case in APART])
def test_what_differs_is_not_merged(function: Callable, expected: list[str], dtype: torch.dtype) -> None:
    values = stream(dtype)
    gm, _ = lifted(function, *values)
    assert ops(gm) == expected
    assert_right(gm, function, values)


def norm_added_to_itself(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    y = NORM(x, w, 1e-5)
    return y + y


def inner_norm_added_to_itself(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    y = NORM(x, v, 1e-5)
    total = y + y
    return NORM(total, w, 1e-5), total


@pytest.mark.parametrize("function", [norm_added_to_itself, inner_norm_added_to_itself])
def test_what_is_computed_inside_is_no_argument(function: Callable) -> None:
    """The residual would be a value that the op replaces."""
    values = stream()
    gm, _ = lifted(function, *values)
    assert "rms_norm_add" not in ops(gm)
    assert_right(gm, function, values)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(D, eps=1e-5), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.RMSNorm(D, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@pytest.mark.parametrize("across_layers", [False, True])
def test_an_addition_and_the_next_layers_norm(across_layers: bool) -> None:
    torch.manual_seed(0)
    model, x = Layers(), normal(B, S, D)
    captures: list = []
    y = compiled(model, captures, outline=not across_layers)(x)
    ((gm, report),) = captures
    assert rules(report)[0] == ["rms_norm.torch_rms_norm"] * 4
    if across_layers:
        assert ops(gm) == ["rms_norm"] + ["add_rms_norm"] * 3
        assert [one.module for one in report.fused] == ["layers.1.norm", "layers.2.norm", "norm"]
    else:
        assert (ops(gm), report.fused) == (["rms_norm"] * 4, [])
    trained = [x, *model.parameters()]
    torch.testing.assert_close(y, model(x))
    for mine, eager in zip(*(torch.autograd.grad(one.exp().sum(), trained) for one in (y, model(x))), strict=True):
        torch.testing.assert_close(mine, eager)
