"""Projections of 4-bit weights in the forms that bitsandbytes has had, and what only looks like one."""

import operator
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from lifting import Capture, calls, compiled, reasons, rules
from torch import Tensor, nn

from fastft.rewriter.passes import rewrite

RULE = "lora_linear.four_bit"
IN, OUT = 128, 64


class Weight(nn.Module):
    """A 4-bit weight [OUT, IN], with a bias."""

    def __init__(
        self, nested: bool = True, dtype: torch.dtype = torch.float32, storage: torch.dtype = torch.uint8
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        packed, self.state = quantize_4bit(
            torch.randn(OUT, IN, dtype=dtype) / 8, quant_type="nf4", compress_statistics=nested, quant_storage=storage
        )
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(OUT, dtype=dtype), requires_grad=False)

    @property
    def value(self) -> Tensor:
        return dequantize_4bit(self.packed, self.state)


class Net(nn.Module):
    def __init__(self, weight: Weight, function: Callable[[Weight, Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.function = weight, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.weight, x)


def check(net: Net, x: Tensor, tolerance: float = 2e-6) -> Capture:
    """Result and gradients as the unmodified function has them."""
    captures: list[Capture] = []
    run, found = compiled(net, captures), []
    for function in (net, run):
        net.zero_grad(set_to_none=True)
        given = x.detach().requires_grad_(x.requires_grad)
        y = function(given)
        if y.requires_grad:
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
        found.append({"y": y.detach(), "x": given.grad, "bias": net.weight.bias.grad})
    for name, mine in found[1].items():
        other = found[0][name]
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert (mine.shape, mine.dtype) == (other.shape, other.dtype), name
            assert (mine.double() - other.double()).norm() <= tolerance * other.double().norm(), name
    (capture,) = captures
    return capture


def as_now(weight: Weight, x: Tensor) -> Tensor:
    return bitsandbytes.matmul_4bit(x, weight.packed, weight.state, bias=weight.bias)


class Before50(torch.autograd.Function):
    """matmul_4bit as it was before 0.50."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor, state: Any) -> Tensor:
        ctx.state = state
        ctx.save_for_backward(packed)
        return F.linear(x, dequantize_4bit(packed, state).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return torch.matmul(grad, dequantize_4bit(packed, ctx.state).to(grad.dtype)), None, None, None


def before_50(weight: Weight, x: Tensor) -> Tensor:
    return Before50.apply(x, weight.packed, weight.bias, weight.state)


def by_hand(weight: Weight, x: Tensor) -> Tensor:
    return F.linear(x, weight.value.to(x.dtype), weight.bias)


def turned_twice(weight: Weight, x: Tensor) -> Tensor:
    return F.linear(x, weight.value.t().t())


def by_keyword(weight: Weight, x: Tensor) -> Tensor:
    return F.linear(x, weight.value, bias=weight.bias)


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    "function", [as_now, before_50, by_hand, turned_twice, by_keyword], ids=lambda one: one.__name__
)
def test_every_form_is_one_op(function: Callable, nested: bool, needs_grad: bool) -> None:
    x = torch.randn(2, 5, IN, requires_grad=needs_grad)
    gm, report = check(Net(Weight(nested), function), x)
    assert rules(report)[0] == [RULE], reasons(report)
    left = [name for name in calls(gm) if name not in ("fastft.lora_linear", "getitem")]
    assert left == [], "what de-quantised the weight is gone"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [as_now, before_50], ids=lambda one: one.__name__)
def test_low_precision(function: Callable, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True)
    _, report = check(Net(Weight(dtype=dtype), function), x, 2e-2)
    assert rules(report)[0] == [RULE], reasons(report)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_stored_as_other_numbers(storage: torch.dtype) -> None:
    _, report = check(Net(Weight(storage=storage), as_now), torch.randn(2, 5, IN, requires_grad=True))
    assert rules(report)[0] == [RULE], reasons(report)


def test_a_trainable_bias() -> None:
    net = Net(Weight(), as_now)
    net.weight.bias.requires_grad_()
    _, report = check(net, torch.randn(2, 5, IN, requires_grad=True))
    assert rules(report)[0] == [RULE], reasons(report)


def transposed(weight: Weight, x: Tensor) -> Tensor:
    return F.linear(x[..., :OUT], weight.value.t())


def used_twice(weight: Weight, x: Tensor) -> Tensor:
    value = weight.value
    return F.linear(x, value) + value.sum()


def changed(weight: Weight, x: Tensor) -> Tensor:
    return F.linear(x, weight.value * 2.0)


def rounded_first(weight: Weight, x: Tensor) -> Tensor:
    return F.linear(x, weight.value.half().float())


def permuted(weight: Weight, x: Tensor) -> Tensor:
    packed = weight.packed.view(64, -1).t().contiguous()
    return F.linear(x, dequantize_4bit(packed.view(-1, 1), weight.state))


def test_bytes_in_another_order() -> None:
    _, report = check(Net(Weight(), permuted), torch.randn(2, 5, IN, requires_grad=True))
    assert rules(report)[0] == [RULE]


def offset_twice(weight: Weight, x: Tensor) -> Tensor:
    state = weight.state
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(
        state.absmax, state.state2.absmax, state.state2.code, 256, torch.float32
    )
    absmax = torch.add(absmax, state.offset, alpha=2)
    return F.linear(
        x, torch.ops.bitsandbytes.dequantize_4bit(weight.packed, absmax, 64, "nf4", [OUT, IN], torch.float32)
    )


def broadcast_bias(weight: Weight, x: Tensor) -> Tensor:
    return F.linear(x, weight.value, weight.bias[:1])


OTHERS = [transposed, used_twice, changed, rounded_first, offset_twice, broadcast_bias]


@pytest.mark.parametrize("function", OTHERS, ids=lambda one: one.__name__)
def test_what_only_looks_like_one(function: Callable) -> None:
    gm, report = check(Net(Weight(), function), torch.randn(2, 5, IN, requires_grad=True))
    assert rules(report)[0] == []
    assert reasons(report)
    assert "fastft.lora_linear" not in calls(gm)


def of(gradient: Callable[[Tensor, Tensor, Any], Any]) -> Callable:
    """A function of its own backward: (grad, packed, state) -> gradients of x, the bytes and the bias."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor, state: Any) -> Tensor:
            ctx.state = state
            ctx.save_for_backward(packed)
            return F.linear(x, dequantize_4bit(packed, state), bias)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return (*gradient(grad, ctx.saved_tensors[0], ctx.state), None)

    return lambda weight, x: Own.apply(x, weight.packed, weight.bias, weight.state)


def test_results_that_nobody_uses() -> None:
    """torch 2.11 takes every result out of an autograd.Function that runs in a checkpoint."""
    x = torch.randn(2, 5, IN, requires_grad=True)
    captures: list[Capture] = []

    def backend(gm: Any, _: object) -> Callable:
        (node,) = [one for one in gm.graph.nodes if "autograd_function_apply" in str(one.target)]
        with gm.graph.inserting_after(node):
            gm.graph.call_function(operator.getitem, (node, 1))
        captures.append((gm, rewrite(gm)))
        return gm.forward

    net = Net(Weight(), as_now)
    torch._dynamo.reset()
    y = torch.compile(net, backend=backend)(x)
    ((gm, report),) = captures
    assert rules(report)[0] == [RULE], reasons(report)
    assert [name for name in calls(gm) if name not in ("fastft.lora_linear", "getitem")] == []
    torch.testing.assert_close(y, net(x))


BACKWARDS: dict[str, Callable] = {
    "doubled": lambda grad, packed, state: (2.0 * grad @ dequantize_4bit(packed, state), None, None),
    "rounded": lambda grad, packed, state: (
        (grad @ dequantize_4bit(packed, state)).to(torch.int32).float(),
        None,
        None,
    ),
    "of another gradient": lambda grad, packed, state: (grad.abs() @ dequantize_4bit(packed, state), None, None),
    "none for a trainable bias": lambda grad, packed, state: (grad @ dequantize_4bit(packed, state), None, None),
    "another bias's": lambda grad, packed, state: (grad @ dequantize_4bit(packed, state), None, grad.sum((0, 1)) * 2.0),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_backward_of_its_own_is_kept(name: str) -> None:
    net = Net(Weight(), of(BACKWARDS[name]))
    net.weight.bias.requires_grad_("bias" in name)
    gm, report = check(net, torch.randn(2, 5, IN, requires_grad=True))
    assert reasons(report)
    assert "autograd_function_apply" in calls(gm), "what is lifted is lifted inside its forward"


def test_ops_that_write_are_kept() -> None:
    """FX takes a call without users for dead; an optimizer's step has none."""

    def step(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> Tensor:
        torch.ops.bitsandbytes.optimizer_update_32bit(
            "adam",
            gradient,
            parameter,
            first,
            second,
            None,
            0.0,
            0.0,
            0.9,
            0.99,
            0.0,
            0.0,
            1e-8,
            0.0,
            1,
            0.1,
            1.0,
            False,
        )
        return parameter * 1.0

    def fresh() -> list[Tensor]:
        return [torch.ones(64), torch.full((64,), 0.5), torch.zeros(64), torch.zeros(64)]

    eager, mine = fresh(), fresh()
    step(*eager)
    compiled(step, [])(*mine)
    assert not torch.equal(eager[0], torch.ones(64)), "the step does something"
    assert all(torch.equal(one, other) for one, other in zip(mine, eager, strict=True))
