"""Groups of projections without Dynamo: which are merged, and that values and gradients stay what they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lifting import calls, frozen, normal, reasons, rules
from recording import record
from torch import Tensor
from torch.fx import GraphModule

from fastft.rewriter.passes import rewrite
from fastft.rewriter.report.data import GraphReport

WIDTH, RANK = 8, 2
GROUP = "lora_linear.group"


class Layer:
    """A frozen weight with an adapter."""

    def __init__(self, out: int, seed: int, bias: bool = False, scale: float = 0.5) -> None:
        self.w, self.bias = frozen(out, WIDTH, seed=seed), frozen(out, seed=seed + 1) if bias else None
        self.a, self.b = normal(RANK, WIDTH, seed=seed + 2), normal(out, RANK, seed=seed + 3)
        self.scale = scale

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.bias)

    def delta(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b) * self.scale

    def __call__(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x)


Q, K, V = Layer(8, 0), Layer(8, 10, bias=True, scale=2.0), Layer(4, 20, bias=True)
GATE = frozen(4, WIDTH, seed=30)
X = normal(2, 3, WIDTH, seed=40)


def merged(function: Callable[[Tensor], Any], x: Tensor = X) -> tuple[GraphModule, GraphReport]:
    """A function rewritten, with the values, layouts and gradients that it had."""
    gm, recording = record(function, x)
    report = rewrite(gm)
    gm.graph.lint()
    gm.recompile()
    given = [x, *recording.inputs[1:]]
    original = lambda *values: function(values[0])  # noqa: E731
    expected, gradients = _run(original, given)
    found, mine = _run(gm.forward, given)
    for one, other in zip(found + mine, expected + gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.stride() == other.stride()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    return gm, report


def _run(function: Callable, given: list[Tensor]) -> tuple[list[Any], list[Any]]:
    """Outputs, and gradients of all that need one, None where there are none."""
    torch.manual_seed(0)
    returned = function(*given)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    needing = [one for one in outputs if one.requires_grad]
    upstream = [torch.linspace(-1, 1, one.numel()).view_as(one).to(one.dtype) for one in needing]
    trained = [one for one in given if one.requires_grad]
    return outputs, list(torch.autograd.grad(needing, trained, upstream, allow_unused=True))


def groups(report: GraphReport) -> int:
    return rules(report)[1].count(GROUP)


def widths(gm: GraphModule) -> list[list[int]]:
    """The columns of each group."""
    ops = gm.graph.find_nodes(op="call_function", target=torch.ops.fastft.lora_linear)
    return [list(node.args[10]) for node in ops]


def joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, -1)


MERGED: dict[str, tuple[Callable[[Tensor], Any], list[list[int]]]] = {
    "two": (lambda x: joined(Q(x).tanh(), K(x)), [[8, 8]]),
    "two the other way round": (lambda x: joined(K(x).tanh(), Q(x)), [[8, 8]]),
    "three": (lambda x: joined(Q(x), V(x).tanh(), K(x)), [[8, 4, 8]]),
    "one without an adapter": (lambda x: joined(F.linear(x, GATE), V(x)), [[4, 4]]),
    "one alone": (lambda x: K(x), [[8]]),
    "one after the other": (lambda x: V(Q(x)), [[8], [4]]),
    "results that are returned": (lambda x: (Q(x), V(x)), [[8, 4]]),
    "results as views": (lambda x: (Q(x).view(2, 3, 2, 4).transpose(1, 2), V(x)[:, 1:]), [[8, 4]]),
    "an adapter of another input": (lambda x: joined(Q(x), V.base(x) + V.delta(x * 2)), [[8, 4]]),
    "casts on the way": (lambda x: joined(Q(x.double().float()), V(x)), [[8, 4]]),
    "an adapter that is computed later": (lambda x: joined(Q(x), V.base(x) + V.delta(x.tanh())), [[8, 4]]),
    "two adapters": (lambda x: joined(Q(x) + K.delta(x), V(x)), [[8, 4]]),
    "dropout": (lambda x: joined(Q(x), V.base(x) + V.delta(F.dropout(x, 0.5))), [[8, 4]]),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGED)
def test_what_is_merged(name: str) -> None:
    function, expected = MERGED[name]
    gm, report = merged(function)
    assert widths(gm) == expected
    assert groups(report) == len(expected)


def rounded(x: Tensor) -> Tensor:
    return joined(Q(x), V(x.bfloat16().float()))


def counted(x: Tensor) -> Tensor:
    return joined(Q(x), V((4 * x).to(torch.int32).float()))


def other_random_numbers(x: Tensor) -> Tensor:
    q = F.dropout(Q(x), 0.5)
    return joined(q, V.base(x) + V.delta(F.dropout(x, 0.5)))


APART: dict[str, tuple[Callable[[Tensor], Any], list[list[int]]]] = {
    "another rounding": (rounded, [[8], [4]]),
    "an integer between": (counted, [[8], [4]]),
    "another input": (lambda x: joined(Q(x), V(x * 2)), [[8], [4]]),
    "other random numbers": (other_random_numbers, [[8], [4]]),
    "a result that nothing uses": (lambda x: (K(x), Q(x))[1], [[8]]),
    "a result used detached": (lambda x: Q(x).sum() + K(x).detach().sum(), [[8]]),
    "no adapters": (lambda x: joined(F.linear(x, GATE), F.linear(x, V.w)), []),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_stays_apart(name: str) -> None:
    function, expected = APART[name]
    assert widths(merged(function)[0]) == expected


def a_source_written_to(x: Tensor) -> Tensor:
    h = (x * 1).double()
    q = Q(h.float())
    h.exp_()
    return joined(q, V(h.float()))


def an_input_written_to(x: Tensor) -> Tensor:
    h = x * 1
    q = Q.base(h)
    h.exp_()
    return q + Q.delta(h)


def an_alias_written_to(x: Tensor) -> Tensor:
    """By a tensor that has a count of writes of its own."""
    h = x * 1
    q = Q(h)
    h.data.add_(1)
    return joined(q, V(h))


def a_later_source_written_to(x: Tensor) -> Tensor:
    """What an adapter reads is computed later, from what was changed by then."""
    scale = torch.ones(WIDTH)
    q = Q(x)
    scale.exp_()
    return joined(q, V.base(x) + V.delta(x * scale))


WRITTEN = (a_source_written_to, an_input_written_to, a_later_source_written_to)


@pytest.mark.parametrize("function", WRITTEN, ids=lambda one: one.__name__)
def test_what_is_written_to_is_left_alone(function: Callable[[Tensor], Tensor]) -> None:
    gm, report = merged(function)
    assert [8, 4] not in widths(gm)
    assert any("written to" in reason for reason in reasons(report))


def test_a_write_behind_an_alias() -> None:
    gm, recording = record(an_alias_written_to, X.detach())
    report = rewrite(gm)
    gm.recompile()
    torch.testing.assert_close(gm(X.detach(), *recording.inputs[1:])[0], an_alias_written_to(X.detach()))
    assert [8, 4] not in widths(gm)
    assert any("add_ writes to a value of the group" in reason for reason in reasons(report))


def test_no_mode_is_switched_between() -> None:
    gm, _ = record(lambda x: joined(Q(x), V(x)), X)
    second = list(gm.graph.find_nodes(op="call_function", target=F.linear))[3]
    with gm.graph.inserting_before(second):
        gm.graph.call_function(torch._C._set_grad_enabled, (True,))
    report = rewrite(gm)
    assert [8, 4] not in widths(gm)
    assert any("is called halfway" in reason for reason in reasons(report))


def test_results_that_need_no_gradient_get_none() -> None:
    """A layer that nothing trains is no sibling of one that is trained."""
    x = X.detach()
    plain = Layer(4, 50)
    gm, _ = merged(lambda x: (Q(x), F.linear(x, plain.w)), x)
    assert widths(gm) == [[8]]


def test_a_cast_without_gradients_is_another_input() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            other = x.double()
        return joined(Q(x.double().float()), V(other.float()))

    gm, _ = record(function, X)
    rewrite(gm)
    assert [8, 4] not in widths(gm)


def strided(x: Tensor) -> tuple[Tensor, Tensor]:
    return Q(x).sum(), K(x).as_strided((2, 3), (1, 7)).square().sum()


def test_layouts_that_are_looked_at_stay() -> None:
    """Columns of one result are copied where anything may see how they lie."""
    for function in (strided, lambda x: (Q(x), K(x))):
        gm, _ = merged(function)
        assert widths(gm) == [[8, 8]]
        assert "contiguous" in calls(gm)
    gm, _ = merged(lambda x: joined(Q(x).tanh(), K(x).tanh()))
    assert "contiguous" not in calls(gm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_in_float32(dtype: torch.dtype) -> None:
    """peft keeps adapters in float32 where the layer is in 16 bits."""
    w, x = frozen(8, WIDTH, dtype=dtype), frozen(2, 3, WIDTH, dtype=dtype)

    def function(x: Tensor) -> Tensor:
        return F.linear(x, w) + (F.linear(F.linear(x.float(), Q.a), Q.b) * 0.5).to(dtype)

    gm, recording = record(function, x)
    rewrite(gm)
    gm.recompile()
    (found,) = gm(x, *recording.inputs[1:])
    assert found.dtype == dtype
    torch.testing.assert_close(found, function(x), rtol=2e-2, atol=5e-2)
