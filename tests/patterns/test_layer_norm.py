"""Which expressions become fastft::layer_norm, which do not, and for what reason."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from choices import in_pairs
from lifting import assert_right, compiled, frozen, lifted, normal, ops, reasons, rules, told
from torch import Tensor, nn

from fastft.patterns import layer_norm as patterns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = {rule.reference.__name__: rule for rule in patterns.RULES}
WRITTEN_OUT = ("cohere", "rounded_first")
B, S, D = 2, 5, 16
LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "contiguous": lambda dtype: normal(B, S, D, dtype=dtype),
    "transposed heads": lambda dtype: frozen(B, S, 3, D, dtype=dtype).transpose(1, 2).requires_grad_(),
    "as a convolution leaves it": lambda dtype: frozen(B, D, S, dtype=dtype).transpose(1, 2).requires_grad_(),
    "a slice": lambda dtype: frozen(B, S, 3 * D, dtype=dtype)[..., D : 2 * D].requires_grad_(),
    "one row": lambda dtype: normal(D, dtype=dtype),
}


def parameters(name: str, dtype: torch.dtype) -> list[Tensor]:
    """A weight and a bias, as far as the reference has them."""
    count = len(RULES[name].shapes) - 1
    return [normal(D, dtype=dtype, seed=1 + index) for index in range(count)]


def with_eps(name: str) -> Callable:
    """The reference as a function of its tensors, which can be traced."""
    reference = RULES[name].reference
    functions: dict[int, Callable] = {
        1: lambda x: reference(x, 1e-5),
        2: lambda x, w: reference(x, w, 1e-5),
        3: lambda x, w, b: reference(x, w, b, 1e-5),
    }
    return functions[len(RULES[name].shapes)]


def taken(name: str, x_dtype: torch.dtype, weight_dtype: torch.dtype, layout: str) -> bool:
    """Whether torch takes these dtypes together."""
    return name in WRITTEN_OUT or not parameters(name, weight_dtype) or weight_dtype in (x_dtype, torch.float32)


@in_pairs(taken, name=RULES, x_dtype=DTYPES, weight_dtype=DTYPES, layout=LAYOUTS)
def test_every_reference_becomes_one_op_and_stays_right(
    name: str, x_dtype: torch.dtype, weight_dtype: torch.dtype, layout: str
) -> None:
    function = with_eps(name)
    values = [LAYOUTS[layout](x_dtype), *parameters(name, weight_dtype)]
    gm, report = lifted(function, *values)
    if name == "rounded_first" and x_dtype != torch.float32:
        assert ops(gm) == []
        assert len(reasons(report)) == 1
        return
    assert ops(gm) == ["layer_norm"], reasons(report)
    assert reasons(report) == []
    assert_right(gm, function, values)


def by_hand(x: Tensor, w: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6))


def as_cohere(x: Tensor, w: Tensor) -> Tensor:
    mean = x.mean(2, True)
    variance = torch.square(x - mean).mean(dim=-1, keepdim=True)
    return ((x - mean) * (variance + 1e-6).rsqrt()).mul(w)


def rooted_first(x: Tensor, w: Tensor) -> Tensor:
    x = x.sub(x.mean(dim=-1, keepdim=True))
    return torch.rsqrt(1e-6 + (x * x).mean((-1,), keepdim=True)) * x * w


SPELLINGS: dict[str, tuple[str, Callable]] = {
    "torch": ("torch_layer_norm", lambda x, w: F.layer_norm(x, (D,), w, w)),
    "a list of sizes": ("torch_layer_norm", lambda x, w: F.layer_norm(x, [D], w, w, 1e-6)),
    "x's own size": ("torch_layer_norm", lambda x, w: F.layer_norm(x, x.shape[-1:], w, w)),
    "a weight's shape": ("torch_layer_norm", lambda x, w: F.layer_norm(x, w.shape, bias=w, weight=w, eps=1e-6)),
    "by keyword": ("torch_layer_norm", lambda x, w: F.layer_norm(x, normalized_shape=(D,), eps=1e-6, weight=w, bias=w)),
    "without a bias": ("without_bias", lambda x, w: F.layer_norm(x, (D,), w)),
    "bias is None": ("without_bias", lambda x, w: F.layer_norm(x, (D,), w, None, 1e-6)),
    "without a weight": ("without_weight", lambda x, w: F.layer_norm(x, (D,)) + w),
    "without a weight, by keyword": ("without_weight", lambda x, w: F.layer_norm(x, (D,), None, None, eps=1e-6) + w),
    "by hand": ("rounded_first", by_hand),
    "by hand, centred twice": ("cohere", as_cohere),
    "by hand, the root first": ("rounded_first", rooted_first),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    rule, function = SPELLINGS[name]
    values = [normal(B, S, D), normal(D, seed=1)]
    gm, report = lifted(function, *values)
    assert ops(gm) == ["layer_norm"], reasons(report)
    assert rules(report)[0] in ([f"layer_norm.{rule}"], ["layer_norm.cohere"])  # in float32 the two are one
    assert_right(gm, function, values)


def over_two_axes(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, (S, D)) * w


def over_two_axes_with_a_weight(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, (S, D), w.expand(S, D), w.expand(S, D))


def only_a_bias(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), None, w)


def eps_is_a_tensor(x: Tensor, w: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + w[0]))


def with_one_degree_less(x: Tensor, w: Tensor) -> Tensor:
    return w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6))


def divided_by_the_deviation(x: Tensor, w: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return w * centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)


def mean_of_another_axis(x: Tensor, w: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6))


def centred_by_another_axis(x: Tensor, w: Tensor) -> Tensor:
    """An RMSNorm of what was centred along positions."""
    centred = x - x.mean(1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6))


def mean_added(x: Tensor, w: Tensor) -> Tensor:
    centred = x + x.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6))


def uncentred_scaled(x: Tensor, w: Tensor) -> Tensor:
    variance = (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-6))


def variance_used_elsewhere(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(variance + 1e-6)), variance


def centred_used_elsewhere(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of what is left is an RMSNorm of its own, whose input is known."""
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)), centred.exp()


def written_between(x: Tensor, w: Tensor) -> Tensor:
    x = x * 1.5
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    x.add_(1.0)
    return w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-6))


NEGATIVE = [  # what must not be lifted, and what the reason says; None: nothing is near
    (over_two_axes, None),
    (over_two_axes_with_a_weight, None),
    (only_a_bias, "weight is not a tensor but None"),
    (eps_is_a_tensor, "eps is not a number but getitem(w, 0)"),
    (with_one_degree_less, "expected mean(pow(…), -1, True), found var(x, -1)"),
    (divided_by_the_deviation, None),
    (mean_of_another_axis, "expected mean(pow(…), -1, True), found mean(pow, -2, True)"),
    (uncentred_scaled, "two values where the reference has one: sub(x, mean) and x"),
    (variance_used_elsewhere, "mean is also used by the graph's output"),
    (written_between, "two values where the reference has one: mean(mul, -1, True) and mean(mul, -1, True)"),
]


@pytest.mark.parametrize(("function", "reason"), NEGATIVE, ids=[case[0].__name__ for case in NEGATIVE])
def test_a_near_miss_is_left_alone_and_explained(function: Callable, reason: str | None) -> None:
    values = [normal(B, S, D), normal(D, seed=1)]
    gm, report = lifted(function, *values)
    assert (ops(gm), report.lifted) == ([], [])
    assert told(report) == [reason] * (reason is not None)
    torch.testing.assert_close(gm(*values), function(*values), equal_nan=True)


@pytest.mark.parametrize("function", [centred_by_another_axis, mean_added, centred_used_elsewhere])
def test_an_rms_norm_of_what_was_computed_from_a_mean(function: Callable) -> None:
    values = [normal(B, S, D), normal(D, seed=1)]
    gm, report = lifted(function, *values)
    assert ops(gm) == ["rms_norm"], reasons(report)
    assert_right(gm, function, values)


@pytest.mark.parametrize("name", RULES)
def test_float64_is_rounded_where_the_user_rounds_it(name: str) -> None:
    """torch's own function does not round it; of what is written out, the part that is float32 is a LayerNorm."""
    dtype = torch.float64
    values = [value.detach() / 3 for value in (normal(B, S, D, dtype=dtype), *parameters(name, dtype))]
    gm, report = lifted(with_eps(name), *values)
    narrow = name in WRITTEN_OUT
    torch.testing.assert_close(gm(*values), with_eps(name)(*values), rtol=1e-6 if narrow else 1e-12, atol=1e-12)
    assert gm(*values).dtype == dtype
    assert ops(gm) == ([] if name == "rounded_first" else ["layer_norm"]), reasons(report)


def test_rounding_before_the_scale_is_another_function_in_low_precision() -> None:
    _, report = lifted(
        with_eps("rounded_first"), normal(B, S, D, dtype=torch.bfloat16), normal(D, dtype=torch.bfloat16)
    )
    assert reasons(report) == ["it rounds before it scales, which a LayerNorm does not"]


@pytest.mark.parametrize("trained", range(8))
def test_what_is_frozen_gets_no_gradient(trained: int) -> None:
    values = [frozen(B, S, D), frozen(D, seed=1), frozen(D, seed=2)]
    needs = [bool(trained >> index & 1) for index in range(3)]
    for value, needed in zip(values, needs, strict=True):
        value.requires_grad_(needed)
    gm, _ = lifted(with_eps("torch_layer_norm"), *values)
    assert ops(gm) == ["layer_norm"]
    y = gm(*values)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.sum().backward()
    assert [value.grad is not None for value in values] == needs


@pytest.mark.parametrize(
    ("module", "rule"),
    [
        (nn.LayerNorm(D), "torch_layer_norm"),
        (nn.LayerNorm(D, eps=1e-3, bias=False), "without_bias"),
        (nn.LayerNorm(D, elementwise_affine=False), "without_weight"),
        (nn.LayerNorm((S, D)), None),
    ],
    ids=["affine", "no bias", "no weight", "two axes"],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_module_captured_by_torch(module: nn.Module, rule: str | None, autocast: bool) -> None:
    captures: list = []
    x = normal(B, S, D)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = compiled(module, captures)(x), module(x)
    assert rules(captures[0][1])[0] == [f"layer_norm.{rule}"] * (rule is not None)
    torch.testing.assert_close(y, expected)
    trained = [x, *module.parameters()]
    for mine, eager in zip(*(torch.autograd.grad(one.square().sum(), trained) for one in (y, expected)), strict=True):
        torch.testing.assert_close(mine, eager)


def test_gradients_switched_off_halfway_are_respected() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        with torch.no_grad():
            rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * (centred * rstd)

    captures: list = []
    y = compiled(function, captures)(normal(B, S, D), normal(D))
    assert reasons(captures[0][1]) == ["_set_grad_enabled is called halfway"]
    assert y.requires_grad


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm], ids=["layer_norm", "rms_norm"])
def test_a_mode_that_is_switched_after_the_norm_does_not_matter(norm: Callable) -> None:
    """Nor before it; a match of one call has no halfway."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = norm(x, (D,), w)
        with torch.no_grad():
            z = x.exp()
        return y, z

    captures: list = []
    y, _ = compiled(function, captures)(normal(B, S, D), normal(D))
    assert reasons(captures[0][1]) == []
    assert ops(captures[0][0]) == [norm.__name__]
    assert y.requires_grad
