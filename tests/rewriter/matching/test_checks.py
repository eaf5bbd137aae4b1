"""The matcher and the checks after it, on rules of our own: what is replaced, and what is declined and why."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lifting import calls, reasons, run
from recording import record
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.context import Context
from fastft.rewriter.matching.apply import lift
from fastft.rewriter.matching.rule import Rule

X, W = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.randn(4).requires_grad_()


def gated(x: Tensor, w: Tensor) -> Tensor:
    return torch.sub(torch.sigmoid(x.float()).to(x.dtype) * w, x)


def becomes(x: Tensor, w: Tensor) -> Tensor:
    return torch.special.expit(x.float()).to(x.dtype) * w - x


def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return s, s * w


def become_both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.special.expit(x)
    return s, s * w


def averaged(x: Tensor) -> Tensor:
    return torch.sigmoid(x) / x.shape[-1]


def rule(reference: Callable = gated, replacement: Callable = becomes, **given: Any) -> Rule:
    shapes = {"x": "... D", "w": "D"} if "w" in reference.__annotations__ else {"x": "... D"}
    return Rule(reference, replacement, torch.sigmoid, shapes=shapes, **given)


GATED = rule(dtype_from=("x",))
Change = Callable[[GraphModule], None]


def lifted(
    function: Callable, *values: Tensor, rules: Sequence[Rule] = (GATED,), change: Change | None = None
) -> tuple[GraphModule, list[str]]:
    """What a function's graph becomes, after it is changed by hand; why not, where nothing was lifted."""
    gm, recording = record(function, *values)
    before = [*recording.inputs]
    if change is not None:
        change(gm)
    context = Context(rules=rules)
    lift(gm, context)
    report = context.report
    gm.graph.lint()
    gm.recompile()
    assert len(report.lifted) == calls(gm).count("special_expit")
    if change is None:
        expected, gradients = run(function, values)
        found, mine = run(lambda *given: gm(*given, *before[len(values) :]), values)
        for one, other in zip(found + mine, expected + gradients, strict=True):
            torch.testing.assert_close(one, other)
    return gm, reasons(report)


def is_lifted(function: Callable, *values: Tensor, count: int = 1, **given: Any) -> bool:
    gm, why = lifted(function, *values, **given)
    return calls(gm).count("special_expit") == count and why == []


def refused(reason: str, function: Callable, *values: Tensor, **given: Any) -> bool:
    gm, why = lifted(function, *values, **given)
    return "special_expit" not in calls(gm) and len(why) == 1 and reason in why[0]


SPELLINGS = {
    "as it is": gated,
    "operands exchanged": lambda x, w: torch.sub(w * torch.sigmoid(x.float()).to(x.dtype), x),
    "by operators": lambda x, w: x.float().sigmoid().type_as(x).mul(w) - x,
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings_are_lifted(name: str, dtype: torch.dtype) -> None:
    assert is_lifted(SPELLINGS[name], X.to(dtype).requires_grad_(), W.detach().to(dtype).requires_grad_())


def test_twice_in_a_graph() -> None:
    assert is_lifted(lambda x, w: gated(gated(x, w), w), X, W, count=2)


OTHERS = {
    "another input": lambda x, w: torch.sub(torch.sigmoid(x.float()).to(x.dtype) * w, x * 1),
    "the other way round": lambda x, w: torch.sub(x, torch.sigmoid(x.float()).to(x.dtype) * w),
    "a factor beside it": lambda x, w: torch.sub(torch.sigmoid(x.float()).to(x.dtype) * w, x, alpha=2),
    "another function": lambda x, w: torch.add(torch.sigmoid(x.float()).to(x.dtype) * w, x),
    "another function inside": lambda x, w: torch.sub(torch.sigmoid(x.float()).to(x.dtype) + w, x),
    "more axes": lambda x, w: torch.sub(torch.sigmoid(x.float()).to(x.dtype) * w.expand(3, 4), x),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_match(name: str) -> None:
    assert "special_expit" not in calls(lifted(OTHERS[name], X, W)[0])


def weighted(x: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(x) * w


def test_the_larger_match_is_taken() -> None:
    small = Rule(lambda x: torch.sigmoid(x), lambda x: torch.special.expit(x), torch.sigmoid, {"x": "..."})
    large = rule(weighted, lambda x, w: torch.special.expit(x).multiply(w))
    for rules in ((small, large), (large, small)):
        assert "multiply" in calls(lifted(weighted, X, W, rules=rules)[0])


def inner_returned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x.float())
    return torch.sub(s.to(x.dtype) * w, x), s


def inner_used(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x.float())
    return torch.sub(s.to(x.dtype) * w, x), s.exp()


def test_inner_values_are_used_inside_alone() -> None:
    low = X.bfloat16(), W.detach().bfloat16()
    assert refused("sigmoid is also used by the graph's output", inner_returned, *low)
    assert refused("sigmoid is also used by exp", inner_used, *low)


def written_after(x: Tensor, w: Tensor) -> Tensor:
    x = x * 1
    y = gated(x, w)
    x.add_(1)
    return y


def written_behind(x: Tensor, w: Tensor) -> Tensor:
    """By an alias that has a count of writes of its own."""
    x = x * 1
    s = torch.sigmoid(x)
    x.data.add_(1)
    return s * w * x


def test_nothing_is_written_to() -> None:
    assert refused("is written to in place", written_after, X, W.detach())
    whole = Rule(lambda x, w: torch.sigmoid(x) * w * x, lambda x, w: torch.special.expit(x) * w * x, torch.sigmoid,
                 {"x": "... D", "w": "D"})  # fmt: skip
    assert refused("add_ writes to a value of the match", written_behind, X, W.detach(), rules=[whole])


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("write", ["first", "second", "none"])
def test_inputs_in_one_storage_are_written_together(at: int, write: str) -> None:
    """Making fake ones of them counts as a write to the second; each counts its own."""
    values: list[Tensor] = []

    def function(first: Tensor, second: Tensor) -> Tensor:
        total = first.sum() + second.sum()
        if write != "none":
            (first if write == "first" else second).mul_(2)
        return total

    def backend(gm: GraphModule, _: object) -> Callable:
        values.extend(value_of(node) for node in gm.graph.find_nodes(op="placeholder"))
        return gm.forward

    torch._dynamo.reset()
    whole = torch.ones(8)
    torch.compile(function, backend=backend)(whole[at:].data, whole[at:].data)
    first, second = values
    assert second._version > 0
    assert fake_tensors.written_to(second) == (write != "none")
    assert not fake_tensors.written_to(first) or write != "none"


def node_of(gm: GraphModule, name: str) -> Node:
    return next(
        node for node in gm.graph.nodes if name in str(node.target) or name == getattr(node.target, "__name__", "")
    )


@pytest.mark.parametrize("mode", [torch._C._set_grad_enabled, torch.amp.autocast_mode._exit_autocast])
def test_no_mode_is_switched(mode: Any) -> None:
    def switch(gm: GraphModule) -> None:
        with gm.graph.inserting_after(node_of(gm, "sigmoid")):
            gm.graph.call_function(mode, (False,))

    assert refused("is called halfway", gated, X, W, change=switch)


def test_transforms_are_left_alone() -> None:
    def batched(gm: GraphModule) -> None:
        with gm.graph.inserting_before(node_of(gm, "sigmoid")):
            gm.graph.call_function(torch._C._functorch._vmap_increment_nesting, (1, "error"))

    assert refused("torch.func", gated, X, W, change=batched)


def test_numbers_that_depend_on_sizes() -> None:
    """Any number may be one, until the sizes are known."""
    average = rule(averaged, lambda x: torch.special.expit(x) / x.shape[-1])
    assert is_lifted(lambda x: torch.sigmoid(x) / 4, X, rules=[average])
    assert refused("traced at these shapes the reference differs", lambda x: torch.sigmoid(x) / 5, X, rules=[average])


def test_inner_values_are_those_of_the_reference() -> None:
    def change(**changes: Any) -> Change:
        def of_sigmoid(gm: GraphModule) -> None:
            node = node_of(gm, "sigmoid")
            value = value_of(node)
            with value.fake_mode:
                shape = changes.get("shape", value.shape)
                fake_tensors.set_value(node, torch.empty(shape, dtype=changes.get("dtype", value.dtype)))

        return of_sigmoid

    low = X.bfloat16(), W.detach().bfloat16()
    for changes in ({"dtype": torch.float64}, {"shape": (4, 3)}):
        assert refused("sigmoid gives float", gated, *low, change=change(**changes))
    assert is_lifted(gated, *low, change=change())


REPLACED: dict[str, tuple[Callable, str]] = {
    "another dtype": (lambda x, w: becomes(x, w).double(), "the replacement gives float64[3, 4]"),
    "another layout": (lambda x, w: becomes(x, w).t().contiguous().t(), "the replacement is laid out as"),
    "fewer rows": (lambda x, w: becomes(x, w)[:2], "the replacement is laid out as"),
    "another shape": (lambda x, w: becomes(x, w)[None], "the replacement is laid out as"),
    "no gradient": (lambda x, w: becomes(x, w.detach()), "the replacement gives w no gradient"),
    "no gradients at all": (lambda x, w: becomes(x.detach(), w.detach()), "could not be checked"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLACED)
def test_the_replacement_is_like_what_it_replaces(name: str) -> None:
    replacement, reason = REPLACED[name]
    assert refused(reason, gated, X, W, rules=[rule(gated, replacement)])


def test_what_was_found_for_frozen_weights_is_not_said_of_others() -> None:
    """Gradients are part of what a verdict depends on."""
    without = rule(gated, lambda x, w: becomes(x, w.detach()))

    def function(x: Tensor, w: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
        return gated(x, w), gated(x, trained)

    gm, why = lifted(function, X, W.detach(), W, rules=[without])
    assert calls(gm).count("special_expit") == 1
    assert len(why) == 1
    assert "w no gradient" in why[0]


def test_named_dimensions_are_equal() -> None:
    square = Rule(gated, becomes, torch.sigmoid, {"x": "D D", "w": "D"})
    assert refused("x has size 4 in dimension D and x has 3", gated, X, W, rules=[square])
    declining = rule(decline_if=lambda x, w: "no weight" if w is not None else None)
    assert refused("no weight", gated, X, W, rules=[declining])


def test_the_first_result_may_be_used_before_the_second_is_there() -> None:
    pair = rule(both, become_both)

    def between(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(x)
        t = s.exp()
        return t, s * w

    assert is_lifted(between, X, W, rules=[pair])


def test_arguments_are_known_where_the_replacement_is_put() -> None:
    pair = rule(both, become_both)

    def late(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(x)
        return s, s * s.sum(0)

    def later(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(x)
        t = s.exp()
        return t, s * w.exp()

    assert refused("a result is used before", late, X, W, rules=[pair])
    assert refused("a result is used before", later, X, W, rules=[pair])
