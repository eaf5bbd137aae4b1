"""Which expressions become fastft::lora_add and then part of a fastft::lora_linear, which do not, and why."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lifting import Capture, assert_right, calls, compiled, frozen, lifted, normal, ops, reasons, rules
from torch import Tensor, nn

from fastft.patterns import lora as patterns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = {rule.reference.__name__: rule for rule in patterns.RULES if rule.replacement is not None}
B, S, IN, OUT, RANK = 2, 5, 24, 16, 3
GROUP = "lora_linear.group"


def factors(transposed: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    a, b = normal(RANK, IN, dtype=dtype, seed=1), normal(OUT, RANK, dtype=dtype, seed=2)
    return (
        (a.detach().T.contiguous().requires_grad_(), b.detach().T.contiguous().requires_grad_())
        if transposed
        else (a, b)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_every_reference_becomes_one_op_with_its_layer(name: str, dtype: torch.dtype) -> None:
    reference = RULES[name].reference
    numbers = (0.5,) * (0 if name.endswith("unscaled") else 1)

    def function(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *bias: Tensor) -> Tensor:
        return reference(F.linear(x, weight), x, a, b, *bias, *numbers)

    def biased(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return function(x, weight, a, b, bias)

    def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return function(x, weight, a, b)

    values = [
        normal(B, S, IN, dtype=dtype),
        frozen(OUT, IN, dtype=dtype, seed=3),
        *factors(name.startswith("multiplied"), dtype),
    ]
    if "biased" in name:
        values.append(normal(OUT, dtype=dtype, seed=4))
    gm, report = lifted(biased if "biased" in name else plain, *values)
    first = name.removesuffix("_and_cast").removeprefix("cast_and_")  # a cast that changes nothing is none
    assert rules(report) == ([f"lora.{first}"], [GROUP])
    assert (ops(gm), reasons(report)) == (["lora_linear"], [])
    assert_right(gm, function, values)


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "added the other way": lambda x, w, a, b: F.linear(F.linear(x, a), b) * 0.5 + F.linear(x, w),
    "scaled from the left": lambda x, w, a, b: F.linear(x, w) + 0.5 * F.linear(F.linear(x, a), b),
    "by a method": lambda x, w, a, b: F.linear(x, w).add(F.linear(F.linear(x, a), b).mul(0.5)),
    "scaled by a whole number": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a), b) * 2,
    "a clone of the result": lambda x, w, a, b: F.linear(x, w).clone() + F.linear(F.linear(x, a), b) * 0.5,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    values = [normal(B, S, IN), frozen(OUT, IN, seed=3), *factors()]
    gm, report = lifted(SPELLINGS[name], *values)
    assert (ops(gm), rules(report)[1], reasons(report)) == (["lora_linear"], [GROUP], [])
    assert_right(gm, SPELLINGS[name], values)


@pytest.mark.parametrize(
    ("cast", "biased"),
    [("sum", False), ("sum", True), ("what is added", False), ("what is added", True), ("product", False)],
)
@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_factors_in_another_dtype(base: torch.dtype, adapter: torch.dtype, cast: str, biased: bool) -> None:
    """As PEFT's layers cast: the input to the factors' dtype, the sum, or what is added, to the layer's."""

    def function(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        result = F.linear(x, weight)
        product = F.linear(F.linear(x.to(a.dtype), a), b, *((bias,) if biased else ()))
        if cast == "product":
            return result + product.to(result.dtype) * 0.5
        added = product * 0.5
        return (result + added).to(result.dtype) if cast == "sum" else result + added.to(result.dtype)

    values = [normal(B, S, IN, dtype=base), frozen(OUT, IN, dtype=base, seed=3), *factors(dtype=adapter)]
    values.append(normal(OUT, dtype=adapter, seed=4))
    gm, report = lifted(function, *values)
    assert (ops(gm), rules(report)[1], reasons(report)) == (["lora_linear"], [GROUP], [])
    assert_right(gm, function, values)


def product_used_twice(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    down = F.linear(x, a)
    return F.linear(x, w) + F.linear(down, b) * 0.5 + down.sum()


def of_another_input(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(F.linear(x.relu(), a), b) * 0.5


def activated_between(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(F.relu(F.linear(x, a)), b) * 0.5


def not_added(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) * (F.linear(F.linear(x, a), b) * 0.5)


def scaled_by_a_tensor(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * b[0, 0]


def result_used_twice(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    result = F.linear(x, w)
    return (result + F.linear(F.linear(x, a), b) * 0.5) * result


def subtracted(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.linear(x, a), b) * 0.5 - F.linear(x, w)


def first_factor_with_a_bias(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(F.linear(x, a, a[:, 0]), b) * 0.5


def written_in_place(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = x * 1.0
    result = F.linear(h, w)
    h.add_(1.0)
    return result + F.linear(F.linear(h, a), b) * 0.5


LEFT = [
    product_used_twice, activated_between, first_factor_with_a_bias, not_added, scaled_by_a_tensor,
    written_in_place,
]  # fmt: skip


@pytest.mark.parametrize("function", LEFT, ids=lambda one: one.__name__)
def test_what_is_no_adapter_is_left_alone(function: Callable) -> None:
    values = [normal(B, S, IN), frozen(OUT, IN, seed=3), *factors()]
    gm, report = lifted(function, *values)
    assert (ops(gm), rules(report)) == ([], ([], []))
    assert_right(gm, function, values)


def test_an_adapter_of_another_input_is_part_of_the_op() -> None:
    values = [normal(B, S, IN), frozen(OUT, IN, seed=3), *factors()]
    gm, report = lifted(of_another_input, *values)
    assert (ops(gm), rules(report)[1]) == (["lora_linear"], [GROUP])
    assert_right(gm, of_another_input, values)


@pytest.mark.parametrize("function", [result_used_twice, subtracted], ids=lambda one: one.__name__)
def test_an_adapter_without_its_layer_is_taken_apart_again(function: Callable) -> None:
    values = [normal(B, S, IN), frozen(OUT, IN, seed=3), *factors()]
    gm, _ = lifted(function, *values)
    assert "fastft.lora_linear" not in calls(gm)
    assert_right(gm, function, values)


def test_two_layers_of_an_mlp_are_no_adapter() -> None:
    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w) + F.linear(F.linear(x, a), b) * 0.5

    values = [normal(B, S, IN), frozen(OUT, IN), normal(OUT, IN, seed=1), normal(OUT, OUT, seed=2)]
    gm, report = lifted(function, *values)
    assert ops(gm) == []
    assert reasons(report) == [f"a rank of {OUT} between {IN} and {OUT} is not low"]
    assert_right(gm, function, values)


class Handwritten(nn.Module):
    """LoRA as a user writes it: Parameters, no PEFT."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(IN, OUT).requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(IN, RANK))
        self.lora_b = nn.Parameter(torch.randn(RANK, OUT))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.dropout(x) @ self.lora_a @ self.lora_b * 2.0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_written_by_hand(dropout: float) -> None:
    module, captures = Handwritten(dropout), list[Capture]()
    run = compiled(module, captures)
    x = normal(B, S, IN)
    found = []
    for function in (module, run):
        torch.manual_seed(1)
        y = function(x)
        y.square().sum().backward()
        found.append([y.detach(), *(value.grad for value in (x, module.lora_a, module.lora_b))])
        x.grad, module.lora_a.grad, module.lora_b.grad = None, None, None
    ((gm, report),) = captures
    assert (ops(gm), rules(report)) == (["lora_linear"], (["lora.multiplied"], [GROUP]))
    for mine, other in zip(found[1], found[0], strict=True):
        assert (mine - other).norm() <= 1e-6 * other.norm()
