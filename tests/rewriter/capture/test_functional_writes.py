"""Writes to what a graph made become calls that make new tensors; what may be seen from elsewhere stays as it is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lifting import calls, normal
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import tensors_in, value_of
from fastft.rewriter.capture.functional_writes import functionalize
from fastft.rewriter.fx.effects import maybe_mutated_args

X, Y, ROW = normal(2, 3, 8), normal(2, 3, 8, seed=1), normal(8, seed=2)


def compiled(function: Callable, captures: list[GraphModule]) -> Callable:
    def backend(gm: GraphModule, _: object) -> Callable:
        functionalize(gm)
        gm.graph.lint()
        gm.recompile()
        captures.append(gm)
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=False)


def results(function: Callable, values: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, gradients, and the inputs as they are afterwards."""
    values = copy.deepcopy(values)
    outputs = tensors_in(function(*values))
    trained = [output for output in outputs if output.requires_grad]
    upstream = [torch.randn(one.shape, generator=torch.Generator().manual_seed(3)) for one in trained]
    gradients = torch.autograd.grad(trained, values, upstream, materialize_grads=True) if trained else []
    return [*outputs, *values], list(gradients)


def check(function: Callable, *values: Tensor) -> GraphModule:
    """To the bit, with the strides and the aliasing of the original."""
    captures: list[GraphModule] = []
    actual, expected = results(compiled(function, captures), values), results(function, values)
    for mine, other in zip(actual[0], expected[0], strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()
        assert mine.requires_grad == other.requires_grad
    for mine, other in zip(actual[1], expected[1], strict=True):
        assert torch.equal(mine, other)
    shares = lambda outputs: [[_same(a, b) for b in outputs] for a in outputs]  # noqa: E731
    assert shares(actual[0]) == shares(expected[0])
    (gm,) = captures
    return gm


def _same(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def writes(gm: GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if maybe_mutated_args(node)]


def assert_functional(gm: GraphModule) -> None:
    assert writes(gm) == []
    made = [one for node in gm.graph.nodes if node.op != "placeholder" for one in tensors_in(value_of(node))]
    assert not any(map(fake_tensors.written_to, made))


def in_place(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z += y
    z *= 0.5
    z.sub_(x).clamp_(-1, 1)
    return z


def through_a_view(x: Tensor, y: Tensor) -> Tensor:
    z = (x @ y.mT).permute(1, 2, 0)
    z += x[0, :, :3][..., None] * 1
    return z * 2


def of_a_part(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z[1:] += y[1:]
    return z * y


def two_parts(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    part = z[..., 2:5]
    part.mul_(y[..., 2:5])
    z[:, 1] = 3.0
    return z + part.sum()


def filled(x: Tensor, y: Tensor) -> Tensor:
    z = x.new_empty(2, 3, 12)
    z[..., :8].copy_(x)
    z[..., 8:].copy_(y[:, :1, :4])
    return z.tanh()


def filled_backwards(x: Tensor, y: Tensor) -> Tensor:
    z = torch.empty(2, 5, 8)
    z[:, 2:] = x
    z[:, :2] = y[:, :2].double()
    return z.tanh()


def filled_twice(x: Tensor, y: Tensor) -> Tensor:
    z = torch.empty(2, 3, 8)
    z[..., :4] = x[..., :4]
    z[..., 4:] = x[..., 4:]
    before = z.exp()
    z[..., :4] = y[..., :4]
    return before + z


def cast_to_itself(x: Tensor, y: Tensor) -> Tensor:
    z = (x * 2).contiguous().float()
    z += y
    return z.contiguous().type_as(x) + z


def flags(x: Tensor, y: Tensor) -> Tensor:
    inside = x[..., 0] > 0
    previous = torch.roll(inside, 1, -1)
    previous[..., 0] = False
    previous &= inside
    return torch.where(previous[..., None], x, y)


def rounded(x: Tensor, y: Tensor) -> Tensor:
    z = x.bfloat16() * 2
    z *= y.detach()
    return z.float()


def returned_twice(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x * 2
    w = z.add_(y)
    return z, w


def read_first_without_gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x * 2
    part = z[..., :3]
    z += y
    with torch.no_grad():
        total = part.sum()
    return part * 2, total


def read_first_under_a_transform(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = x * 2
    part = z[1:]
    z += y
    return torch.func.grad(lambda one: (one * part).sum())(y), part, part * 3


def taken_apart_before(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x * 2
    left, right = z.chunk(2, -1)
    total = left + right
    z += y
    return z, total


KNOWN = (
    in_place, through_a_view, of_a_part, two_parts, filled, filled_backwards, filled_twice, cast_to_itself, flags,
    rounded, returned_twice, read_first_without_gradient, read_first_under_a_transform, taken_apart_before,
)  # fmt: skip


@pytest.mark.parametrize("function", KNOWN, ids=lambda function: function.__name__)
def test_what_is_known_is_functional(function: Callable) -> None:
    assert_functional(check(function, X, Y))


@pytest.mark.parametrize(
    ("function", "joined"), [(filled, 1), (filled_backwards, 1), (filled_twice, 1), (of_a_part, 0)]
)
def test_an_empty_tensor_that_is_filled_is_a_concatenation(function: Callable, joined: int) -> None:
    gm = check(function, X, Y)
    assert calls(gm).count("cat") == joined
    assert "empty" not in " ".join(calls(gm))


def input_itself(x: Tensor, y: Tensor) -> Tensor:
    z = x.detach()
    z += 1
    return z * y


def seen_by_another_view(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    turned = z.mT
    z += y
    return turned * 2


def of_a_view_with_gaps(x: Tensor, y: Tensor) -> Tensor:
    z = (x * 2).mT[:, :3]
    z += y.mT[:, :3]
    return z * 2


def without_gradient(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    with torch.no_grad():
        z.mul_(3)
    return z * y


def behind_autograd(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.data.mul_(3)
    return z * y


def many_axes(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z[0, 1:] = y[0, 1:]
    return z


def by_mask(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z[:, [0, 2]] = y[:, [0, 2]]
    return z


def another_function(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2).addcmul_(y, y).sigmoid_()


def with_a_hole(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros(2, 3, 8)
    z[..., :3] = x[..., :3]
    z[..., 5:] = y[..., 5:]
    return z


def in_inference_mode(x: Tensor, y: Tensor) -> Tensor:
    """What is made there, autograd could not save."""
    z = torch.zeros(8)
    with torch.inference_mode():
        z.add_(1)
    return x * z


def returned_by_a_checkpoint(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x * 2
    flat = checkpoint(lambda one: one.view(-1), z, use_reentrant=False)
    total = flat + 1
    z += y
    return total, z


DECLINED = (
    input_itself, seen_by_another_view, of_a_view_with_gaps, without_gradient, behind_autograd, many_axes, by_mask,
    another_function, in_inference_mode, returned_by_a_checkpoint,
)  # fmt: skip


@pytest.mark.parametrize("function", DECLINED, ids=lambda function: function.__name__)
def test_what_is_not_known_stays(function: Callable) -> None:
    assert writes(check(function, X, Y))


def not_to_the_end(x: Tensor, y: Tensor) -> Tensor:
    """Along the first axis, where what is joined would have the strides of the whole."""
    z = torch.empty(3, 3, 8)
    z[:1] = x[:1]
    z[1:2] = y[1:]
    return z[:2] * 2


@pytest.mark.parametrize("function", [with_a_hole, not_to_the_end], ids=lambda function: function.__name__)
def test_what_is_not_all_written_is_no_concatenation(function: Callable) -> None:
    gm = check(function, X, Y)
    assert_functional(gm)
    assert "cat" not in calls(gm)


def test_what_another_class_may_hold_stays() -> None:
    """Its values are read twice, and are the same memory."""

    def function(nested: Tensor, row: Tensor) -> Tensor:
        values = nested.values()
        values += 1
        return nested.values() * 2 + row

    captures: list[GraphModule] = []
    made = lambda: torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged)  # noqa: E731
    assert torch.equal(compiled(function, captures)(made(), ROW), function(made(), ROW))
    assert writes(captures[0])


PARTIAL = ("set", "add part", "copy", "number")


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, Any]]:
    step = st.one_of(
        st.tuples(st.sampled_from(("add", "mul", "clamp")), st.just(None)),
        st.tuples(
            st.sampled_from(("set", "add part", "copy", "number")), st.tuples(st.integers(0, 2), st.integers(0, 3))
        ),
        st.tuples(st.sampled_from(("read", "read part")), st.integers(0, 2)),
    )
    return draw(st.lists(step, min_size=1, max_size=6))


def run(program: list[tuple[str, Any]]) -> Callable:
    """A function that writes and reads in the order of a program."""

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        z, kept = x * 2, []
        for name, at in program:
            if name in PARTIAL:
                dim, start = at
                index = (slice(None),) * dim + (slice(min(start, z.shape[dim] - 1), None),)
            if name == "add":
                z += y
            elif name == "mul":
                z.mul_(y)
            elif name == "clamp":
                z.clamp_(-2.0, 2.0)
            elif name == "set":
                z[index] = y[index]
            elif name == "number":
                z[index] = 0.5
            elif name == "add part":
                z[index] += y[index]
            elif name == "copy":
                z[index].copy_(y[index])
            else:
                kept.append(z.tanh() if name == "read" else z[..., at].tanh())
        return [*kept, z]

    return function


@given(program=programs())
def test_whatever_the_order(program: list[tuple[str, Any]]) -> None:
    assert_functional(check(run(program), X, Y))
