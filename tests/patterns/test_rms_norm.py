"""Which expressions become fastft::rms_norm, which do not, and for what reason."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from choices import in_pairs
from compare import FORWARD, GRADIENT, assert_close_to_truth
from lifting import assert_right, calls, compiled, lifted, told
from torch import Tensor

from fastft.patterns import rms_norm as patterns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = {rule.reference.__name__: rule for rule in patterns.RULES if "weight" in rule.shapes}
UNSCALED = {rule.reference.__name__: rule for rule in patterns.RULES if rule.replacement and set(rule.shapes) == {"x"}}


def inputs(x_dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator).to(x_dtype).requires_grad_()
    weight = torch.randn(16, generator=generator).to(weight_dtype or x_dtype).requires_grad_()
    return x, weight


@in_pairs(name=RULES, x_dtype=DTYPES, weight_dtype=DTYPES)
def test_every_reference_becomes_one_op_and_stays_right(
    name: str, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    rule, values = RULES[name], inputs(x_dtype, weight_dtype)
    function = lambda x, weight: rule.reference(x, weight, 1e-5)  # noqa: E731
    gm, report = lifted(function, *values)
    assert len(report.lifted) == 1
    assert report.near_misses == []
    assert calls(gm) == ["fastft.rms_norm", "getitem"]
    exact = [value.detach().double().requires_grad_() for value in values]
    truth = function_in_double(name)(*exact, 1e-5)
    eager, actual = function(*values), gm(*values)
    assert_close_to_truth(actual, eager, truth.detach(), FORWARD)
    grad_output = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    for mine, other, right in zip(
        torch.autograd.grad(actual, values, grad_output.to(actual.dtype)),
        torch.autograd.grad(eager, values, grad_output.to(eager.dtype)),
        torch.autograd.grad(truth, exact, grad_output.to(eager.dtype).double()),
        strict=True,
    ):
        assert_close_to_truth(mine, other, right, GRADIENT)


def function_in_double(name: str) -> Callable:
    """The mathematics of a reference, without its roundings."""
    offset = 1.0 if name == "gemma" else 0.0
    return lambda x, weight, eps: x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (offset + weight)


@pytest.mark.parametrize("name", UNSCALED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_without_a_weight(name: str, dtype: torch.dtype) -> None:
    function = lambda x: UNSCALED[name].reference(x, 1e-5)  # noqa: E731
    values = [inputs(dtype)[0]]
    gm, report = lifted(function, *values)
    assert [one.rule for one in report.lifted] == [f"rms_norm.{name}"]
    assert calls(gm) == ["fastft.rms_norm", "getitem"]
    assert_right(gm, function, values, lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt())


def scaled_by_a_matrix(x: Tensor, w: Tensor) -> Tensor:
    return w.expand(5, 16) * patterns.unscaled(x, 1e-6)


def unscaled_too(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = patterns.unscaled(x, 1e-6)
    return w * y, y


@pytest.mark.parametrize("function", [scaled_by_a_matrix, unscaled_too])
def test_a_scale_that_is_none_of_the_ops_is_left_beside_it(function: Callable) -> None:
    values = inputs()
    gm, report = lifted(function, *values)
    assert [one.rule for one in report.lifted] == ["rms_norm.unscaled"]
    assert_right(gm, function, values)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1), (torch.bfloat16, 0)], ids=str)
def test_what_is_float32_between_casts_is_left_to_inductor(dtype: torch.dtype, count: int) -> None:
    """Mamba 2's gated norm: an op would read and write float32 where one kernel reads and writes bfloat16."""

    def function(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
        h = x.float() * F.silu(gate.float())
        groups = h.view(2, 5, 4, 4)
        unit = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * unit.view(2, 5, 16).to(x.dtype)

    x, w = inputs(dtype)
    values = [x, x.detach().flip(0).requires_grad_(), w]
    gm, _ = lifted(function, *values)
    assert calls(gm).count("fastft.rms_norm") == count
    assert_right(gm, function, values)


def test_in_float32_gemma_is_gemma() -> None:
    """Its 1 + weight could be taken for Llama's weight."""
    _, report = lifted(lambda x, w: patterns.gemma(x, w, 1e-6), *inputs())
    assert [one.rule for one in report.lifted] == ["rms_norm.gemma"]


SPELLINGS = {
    "variance named": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "rsqrt first": lambda x, w: torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * x * w,
    "eps first": lambda x, w: w * (x * torch.rsqrt(1e-6 + (x * x).mean(2, True))),
    "mul method": lambda x, w: x.mul((x**2).mean(-1, keepdim=True).add(1e-6).rsqrt()).mul(w),
    "eps an int": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1)),
    "torch": lambda x, w: F.rms_norm(x, [16], w, 1e-6),
    "torch, eps left out": lambda x, w: F.rms_norm(x, (16,), w),
    "torch, by keyword": lambda x, w: torch.rms_norm(x, (16,), eps=1e-6, weight=w),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    values = inputs()
    gm, report = lifted(SPELLINGS[name], *values)
    assert len(report.lifted) == 1, report
    assert calls(gm) == ["fastft.rms_norm", "getitem"]
    torch.testing.assert_close(gm(*values), SPELLINGS[name](*values))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return patterns.llama(x, weight, 1e-6)


def extra_user(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    variance = x.pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-6)), variance.exp()


def other_axis(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))


def missing_eps(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


def eps_is_a_tensor(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w))


def eps_inside_the_mean(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt((x.pow(2) + 1e-6).mean(-1, keepdim=True)))


def variance_of_centred(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-6))


def true_variance(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6))


def cube(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6))


def sum_not_mean(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))


def l2_by_keyword(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=2, keepdim=True) + 1e-6) * w


def another_tensor(x: Tensor, w: Tensor) -> Tensor:
    return w * (x.exp() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def mutated_between(x: Tensor, w: Tensor) -> Tensor:
    x = x * 1.5
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    x.add_(1.0)
    return w * (x * rstd)


def mutated_through_a_view(x: Tensor, w: Tensor) -> Tensor:
    x = x * 1.5
    view = x[0]
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    view.zero_()
    return w * (x * rstd)


def mutated_by_foreach(x: Tensor, w: Tensor) -> Tensor:
    x = x * 1.5
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch._foreach_add_([x], 1.0)
    return w * (x * rstd)


def mutated_by_a_flag(x: Tensor, w: Tensor) -> Tensor:
    x = x * 1.5
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    F.relu(x, True)
    return w * (x * rstd)


def mutated_behind_autograd(x: Tensor, w: Tensor) -> Tensor:
    x = x * 1.5
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    x.detach().data.add_(1.0)
    return w * (x * rstd)


def added_to_in_place_afterwards(x: Tensor, w: Tensor) -> Tensor:
    """Legal, as what the user's code saved in low precision may be a copy, where the op would save x itself."""
    x = x * 1.5
    y = w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    return x.add_(y)


def never_scaled(x: Tensor, w: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


NEGATIVE = [  # what must not be lifted, and what the reason says
    (extra_user, "mean is also used by exp"),
    (other_axis, "expected mean(pow(…), -1, True), found mean(pow, -2, True)"),
    (missing_eps, "expected add(mean(…), eps), found mean(pow, -1, True)"),
    (eps_is_a_tensor, "eps is not a number but w"),
    (eps_inside_the_mean, "expected add(mean(…), eps), found mean(add, -1, True)"),
    (variance_of_centred, "two values where the reference has one: sub(x, mean) and x"),
    (true_variance, "expected mean(pow(…), -1, True), found var(x, -1)"),
    (cube, "expected pow(x, 2), found pow(x, 3)"),
    (sum_not_mean, "it is an L2 norm; Inductor computes it with the casts and copies behind it"),
    (l2_by_keyword, "it is an L2 norm; Inductor computes it with the casts and copies behind it"),
    (another_tensor, "two values where the reference has one: x and exp(x)"),
    (mutated_between, "mul is written to in place"),
    (mutated_through_a_view, "mul is written to in place"),
    (mutated_by_foreach, "mul is written to in place"),
    (mutated_by_a_flag, "mul is written to in place"),
    (mutated_behind_autograd, "add_ writes to a value of the match"),
    (added_to_in_place_afterwards, "mul is written to in place"),
    (never_scaled, "the result of rsqrt does not reach mul"),
]


@pytest.mark.parametrize(("function", "reason"), NEGATIVE, ids=[case[0].__name__ for case in NEGATIVE])
def test_a_near_miss_is_left_alone_and_explained(function: Callable, reason: str) -> None:
    gm, report = lifted(function, *inputs())
    assert report.lifted == []
    assert not any(name.startswith("fastft") for name in calls(gm))
    assert told(report) == [reason]


def test_gradients_switched_off_halfway_are_respected() -> None:
    """Symbolic tracing would run the switch, so the graph is captured by torch.compile."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        with torch.no_grad():
            y = w * (x * rstd)
        return y + x

    captures: list = []
    compiled(function, captures)(*inputs())
    assert [miss.reason for _, report in captures for miss in report.near_misses] == [
        "_set_grad_enabled is called halfway"
    ]


def test_in_low_precision_what_is_not_widened_is_another_function() -> None:
    _, report = lifted(SPELLINGS["variance named"], *inputs(torch.bfloat16))
    assert report.lifted == []
    assert len(report.near_misses) == 1


def test_rounding_at_another_place_is_another_function() -> None:
    """The root is rounded to bfloat16 before it scales."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        return w * (x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype))

    _, report = lifted(function, *inputs(torch.bfloat16))
    assert report.lifted == []
    assert len(report.near_misses) == 1


def test_a_frozen_weight_and_a_frozen_input() -> None:
    for frozen in (0, 1):
        values = inputs()
        values[frozen].requires_grad_(False)
        gm, report = lifted(norm, *values)
        assert len(report.lifted) == 1
        gm(*values).sum().backward()
        assert values[frozen].grad is None
        assert values[1 - frozen].grad is not None


def test_layouts_are_kept() -> None:
    """A permuted x gives a permuted y, as PyTorch's own expression does, so that a later view stays legal."""
    x, weight = torch.randn(2, 4, 5, 16).transpose(1, 2), torch.randn(16)
    gm, report = lifted(norm, x, weight)
    assert len(report.lifted) == 1
    assert gm(x, weight).stride() == norm(x, weight).stride() == x.stride()


def test_two_norms_of_one_input_become_two_ops() -> None:
    x, w = inputs()
    gm, report = lifted(lambda x, w: norm(x, w) + norm(x, w + 1), x, w)
    assert len(report.lifted) == 2
    assert [name for name in calls(gm) if name.startswith("fastft")] == ["fastft.rms_norm", "fastft.rms_norm_add"]


AS_WRITTEN = {  # code around a norm that must run as it is written, and norms in odd company
    "a cast, then a write to its source": lambda x, w: _then(w.to(torch.float32), lambda: w.data.zero_(), x),
    "a copy, then a write to its source": lambda x, w: _then(w.to(w.dtype, copy=True), lambda: w.data.zero_(), x),
    "number first with alpha": lambda x, w: torch.add(1.5, x, alpha=2) * norm(x, w),
    "a square at the edge of the range": lambda x, w: (x * 3e38 * x).clamp(max=1) + (x * 1e19 * x * 1e19).clamp(max=1),
    "an axis that moves later": lambda x, w: _unsqueezed(x * 1.0, w),
}


def _then(snapshot: Tensor, write: Callable, x: Tensor) -> Tensor:
    write()
    return x * snapshot


def _unsqueezed(x: Tensor, w: Tensor) -> Tensor:
    y = w[:5].unsqueeze(-1) * x.mean(1, keepdim=True)
    x.unsqueeze_(0)
    return y + x.sum()


@pytest.mark.parametrize("name", AS_WRITTEN)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_lifted_runs_as_it_was_written(name: str, weight_dtype: torch.dtype) -> None:
    function = AS_WRITTEN[name]
    results = []
    for options in (None, {"lower": "eager", "strict": True}):
        torch._dynamo.reset()
        x, w = inputs(torch.float32, weight_dtype)
        run = function if options is None else torch.compile(function, backend="fastft", options=options)
        y = run(x, w)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), (x, w), allow_unused=True)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert (actual is None) == (expected is None)
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_a_weight_cast_without_gradients_gets_none() -> None:
    """The cast is outside autograd, so no gradient may reach the weight through a norm lifted around it."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            scale = w.float()
        return (scale * patterns.unit(x, 1e-6)).to(x.dtype)

    torch._dynamo.reset()
    x, w = inputs(torch.bfloat16)
    y = torch.compile(function, backend="fastft", options={"lower": "eager", "strict": True})(x, w)
    assert torch.autograd.grad(y.sum(), (x, w), allow_unused=True)[1] is None


def test_under_a_transform_the_users_code_runs() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.grad(lambda x: norm(x, w).sum())(x)

    torch._dynamo.reset()
    x, w = (value.detach() for value in inputs())
    compiled = torch.compile(function, backend="fastft", options={"lower": "eager", "strict": True})
    torch.testing.assert_close(compiled(x, w), function(x, w))


def test_forward_mode_keeps_its_tangent() -> None:
    x, w = (value.detach() for value in inputs())
    torch._dynamo.reset()
    compiled = torch.compile(norm, backend="fastft", options={"lower": "eager", "strict": True})
    tangents = []
    for function in (norm, compiled):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangents.append(torch.autograd.forward_ad.unpack_dual(function(dual, w)).tangent)
    torch.testing.assert_close(tangents[1], tangents[0])


def test_float64_is_rounded_where_the_user_rounds_it() -> None:
    x, w = inputs(torch.float64)
    _, report = lifted(norm, x, w)
    assert [miss.reason for miss in report.near_misses] == ["x is float64 and is rounded to float32 first"]


def test_one_odd_tensor_does_not_cost_the_graph() -> None:
    """An empty row has no mean, and a float8 tensor no promotion; the other norm is lifted all the same."""
    x, w = inputs()
    eighth = torch.zeros(4).to(torch.float8_e4m3fn)
    _, report = lifted(lambda x, w, e: (norm(x, w), norm(x[..., :0], w[:0]), e.view(2, 2)), x, w, eighth)
    assert len(report.lifted) == 1
    assert len(report.near_misses) == 1
