"""fastft::linear_token_statistics against torch's log_softmax in float64, and what is true of this op alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import FORWARD, GRADIENT, assert_close_to_truth
from hypothesis import example, given
from hypothesis import strategies as st
from op_calls import nearby
from strategies import DEVICES, LAYOUTS, Spec, dtypes, seeds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.kernels.chunked_head import Head
from fastft.kernels.head_call import BY_ROW
from fastft.kernels.head_call import DIFFERENTIABLE as NAMES

RESULTS = ("log_probs", "entropy", "lse", "mean_logits", "log_sum_sq_probs", "is_top1")
ROWS = ("hidden", "lora_s")
on_devices = pytest.mark.parametrize("device", DEVICES)
ahead_or_not = pytest.mark.parametrize("ahead", [False, True], ids=["later", "ahead"])
Tensors, Names = dict[str, Tensor], Sequence[str]


@dataclass(frozen=True)
class Problem:
    """Tensors and numbers of a call: prints as the code that builds it."""

    rows: tuple[int, ...] = (7,)
    features: int = 8
    classes: int = 19
    rank: int = 0
    biased: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    size: float = 1.0
    seed: int = 0
    ignore_index: int = -100
    scale: float = 1.0
    softcap: float = 0.0
    chunk_bytes: int = 2**9

    def build(self, device: str) -> tuple[Tensors, Tensor]:
        """Those of NAMES that there are, and labels, of which some are ignore_index."""

        def made(at: int, *shape: int, size: float = 1.0) -> Tensor:
            return Spec(shape, self.dtype, self.layout, self.seed + at, size).build(device)

        tensors = {"hidden": made(0, *self.rows, self.features, size=self.size)}
        tensors["weight"] = made(1, self.classes, self.features)
        if self.biased:
            tensors["bias"] = made(2, self.classes)
        if self.rank:
            tensors |= {"lora_s": made(3, *self.rows, self.rank), "lora_b": made(4, self.classes, self.rank)}
        labels = Spec(self.rows, torch.int64, seed=self.seed, below=self.classes).build(device)
        return tensors, labels.masked_fill(labels == -100, self.ignore_index)

    def fused(self, given: Tensors, labels: Tensor, ahead: bool = False) -> list[Tensor]:
        hidden, weight, *others = (given.get(name) for name in NAMES)
        marks = [ahead and row and name in given for name, row in zip(NAMES, BY_ROW, strict=True)]
        numbers = (self.ignore_index, self.scale, self.softcap, self.chunk_bytes)
        return torch.ops.fastft.linear_token_statistics(hidden, weight, labels, *others, *numbers, marks)[:6]

    def eager(self, given: Tensors, labels: Tensor, ahead: bool = False) -> list[Tensor]:
        """By torch's own functions of logits, which are rounded to their dtype as in a model."""
        logits = F.linear(given["hidden"], given["weight"]) + given.get("bias", 0.0)
        if "lora_s" in given:
            logits = logits + F.linear(given["lora_s"], given["lora_b"])
        y = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        y = self.softcap * torch.tanh(y / self.softcap) if self.softcap else y
        ignored = labels == self.ignore_index
        index = labels.masked_fill(ignored, 0)
        log_p = torch.log_softmax(y, -1)
        entropy = (
            torch.special.entr(log_p.exp()).sum(-1) if y.dtype == torch.float64 else -(log_p.exp() * log_p).sum(-1)
        )
        results = [log_p.gather(-1, index[..., None])[..., 0], entropy, torch.logsumexp(y, -1), y.mean(-1)]
        results.append(torch.logsumexp(2.0 * log_p, -1))
        best = (y.argmax(-1) == index) & ~ignored
        return [*(one.masked_fill(ignored, 0.0) for one in results), best]


def evaluate(
    function: Callable, given: Tensors, labels: Tensor, needs: Names, upstream: Sequence[Tensor | None],
    ahead: bool = False,
) -> list[Tensor]:  # fmt: skip
    """The five results that are numbers, and the gradients of what needs one; upstream: of log_probs, entropy, lse."""
    leaves = {name: one.detach().requires_grad_(name in needs) for name, one in given.items()}
    results = function(leaves, labels, ahead)
    pairs = [(one, grad.to(one.dtype)) for one, grad in zip(results, upstream, strict=False) if grad is not None]
    wanted = [leaves[name] for name in needs]
    gradients = torch.autograd.grad([one for one, _ in pairs], wanted, [grad for _, grad in pairs])
    return [*(one.detach() for one in results[:5]), *gradients]


def doubles(given: Tensors) -> Tensors:
    return {name: one.double() for name, one in given.items()}


def check(problem: Problem, device: str, needs: Names, upstream: Sequence[Tensor | None], ahead: bool) -> None:
    """Against eager's own error, here and at inputs close by, as a single number may be right by luck."""
    given, labels = problem.build(device)

    def measured(seed: int) -> list[tuple[Tensor, Tensor]]:
        values = {name: nearby(one, seed) if seed else one for name, one in given.items()}
        found = (evaluate(problem.eager, one, labels, needs, upstream) for one in (values, doubles(values)))
        return list(zip(*found, strict=True))

    here, *around = (measured(seed) for seed in range(24))
    terms = abs(problem.scale) * max(1.0, *(one.abs().max().item() for one in given.values()))
    terms *= max([one.abs().max().item() for one in upstream if one is not None and one.numel()], default=1.0)
    largest = max([pair[1].abs().max().item() for pair in here[:5] if pair[1].numel()], default=1.0)
    for at, mine in enumerate(evaluate(problem.fused, given, labels, needs, upstream, ahead)):
        limits = (GRADIENT, terms * max(1.0, largest)) if at >= 5 else (FORWARD, largest)
        assert_close_to_truth(mine, *here[at], *limits, others=[one[at] for one in around])


RICH = Problem(rank=2, biased=True, scale=0.7, softcap=5.0)
DISTINCT = [layout for layout in LAYOUTS if layout != "expanded"]
PROBLEMS = st.builds(
    Problem, rows=st.lists(st.integers(1, 4), max_size=3).map(tuple), features=st.integers(1, 40),
    classes=st.integers(1, 300), rank=st.sampled_from((0, 1, 3)), biased=st.booleans(), dtype=dtypes,
    layout=st.sampled_from(DISTINCT), size=st.sampled_from((1.0, 0.03, 3.0)), seed=seeds,
    ignore_index=st.sampled_from((-100, -1, 2**40)), scale=st.sampled_from((1.0, 1 / 0.7, 0.125, -2.0)),
    softcap=st.sampled_from((0.0, 2.0, 30.0)), chunk_bytes=st.sampled_from((1, 2**10, 2**30)),
)  # fmt: skip
KINDS = ("none", "zero", "some", "random")


def upstreams(problem: Problem, kinds: Sequence[str], device: str) -> list[Tensor | None]:
    """A gradient of log_probs, entropy and lse each: none, zeros, zeros but for every other row, or random."""
    found: list[Tensor | None] = []
    for at, kind in enumerate(kinds):
        grad = Spec(problem.rows, torch.float32, seed=problem.seed + 7 * at).build(device)
        if kind == "some":
            grad = grad * (torch.arange(grad.numel(), device=device).view(grad.shape) % 2)
        found.append(None if kind == "none" else grad * 0.0 if kind == "zero" else grad)
    return found


@on_devices
@given(PROBLEMS, st.sets(st.sampled_from(NAMES)).map(sorted), st.tuples(*[st.sampled_from(KINDS)] * 3), st.booleans())
@example(replace(RICH, rows=()), ["hidden"], ("random", "random", "random"), True)
@example(replace(RICH, rows=(3, 5)), list(NAMES), ("random", "some", "some"), True)
@example(replace(RICH, rows=(3, 5)), list(ROWS), ("random", "some", "zero"), True)
@example(Problem(rows=(2, 5), dtype=torch.float16), ["hidden"], ("random", "zero", "none"), True)
@example(Problem(rows=(1,), classes=1), ["hidden"], ("random", "random", "none"), False)
def test_matches_torch(device: str, problem: Problem, needs: Names, kinds: Sequence[str], ahead: bool) -> None:
    needs = [name for name in needs if name in problem.build("cpu")[0]] or ["hidden"]
    given = upstreams(problem, ("random", *kinds[1:]) if set(kinds) == {"none"} else kinds, device)
    check(problem, device, needs, given, ahead)


class Calls(TorchDispatchMode):
    """The names of fastft's ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastft":
            self.ops.append(func._opname)
        return func(*args, **(kwargs or {}))


@on_devices
@pytest.mark.parametrize(
    ("needs", "ahead", "kinds", "again"),
    [
        (ROWS, True, ("random", "none", "none"), False),  # scaled
        (ROWS, True, ("random", "zero", "none"), True),
        (NAMES, True, ("random", "none", "none"), True),  # summed gradients
        (ROWS, False, ("random", "none", "none"), True),
        (("lora_s",), True, ("random", "none", "none"), False),
    ],
)
def test_backward_scales_or_computes(device: str, needs: Names, ahead: bool, kinds: Sequence[str], again: bool) -> None:
    problem = replace(RICH, rows=(3, 5), dtype=torch.float64)
    given, labels = problem.build(device)
    with Calls() as calls:
        found = evaluate(problem.fused, given, labels, needs, upstreams(problem, kinds, device), ahead)
    assert calls.ops == ["linear_token_statistics"] + ["linear_token_statistics_backward"] * again
    for mine, right in zip(
        found, evaluate(problem.eager, given, labels, needs, upstreams(problem, kinds, device)), strict=True
    ):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize(
    ("ahead", "kinds", "rows"),
    [
        (True, ("random", "zero", "zero"), 0),
        (True, ("random", "some", "none"), 2),
        (False, ("some", "zero", "none"), 2),
        (False, ("random", "zero", "none"), 4),
        (True, ("zero", "random", "none"), 4),
    ],
)
def test_backward_computes_no_more_logits_than_it_needs(
    monkeypatch: pytest.MonkeyPatch, ahead: bool, kinds: Sequence[str], rows: int
) -> None:
    """Rows with a gradient of nothing but log_probs are ready; those without any have none; ignored ones neither."""
    problem = Problem(rows=(6,), chunk_bytes=2**20)
    given, _ = problem.build("cpu")
    labels = torch.tensor([1, 2, -100, 4, 5, -100])
    grads = upstreams(problem, kinds, "cpu")
    leaf = given["hidden"].requires_grad_()
    results = problem.fused({**given, "hidden": leaf}, labels, ahead)
    pairs = [(one, grad) for one, grad in zip(results, grads, strict=False) if grad is not None]
    computed, logits_of = [], Head._logits
    monkeypatch.setattr(Head, "_logits", lambda *args: computed.append(len(args[1])) or logits_of(*args))
    torch.autograd.grad([one for one, _ in pairs], leaf, [grad for _, grad in pairs])
    assert sum(computed) == rows


@on_devices
def test_the_others_have_no_gradient(device: str) -> None:
    given, labels = RICH.build(device)
    results = RICH.fused({name: one.requires_grad_() for name, one in given.items()}, labels, True)
    assert [one.requires_grad for one in results] == [True] * 3 + [False] * 3


@on_devices
@pytest.mark.parametrize("classes", [19, 5000])
def test_the_first_of_equal_logits_is_the_top(device: str, classes: int) -> None:
    """As argmax says, in whatever block of a kernel they are."""
    weight = torch.zeros(classes, 4, device=device)
    weight[[3, 7, classes - 1]] = 1.0
    given = {"hidden": torch.ones(6, 4, device=device), "weight": weight}
    labels = torch.tensor([3, 7, classes - 1, 0, -100, 3], device=device)
    expected = torch.tensor([True, False, False, False, False, True], device=device)
    problem = Problem(classes=classes)
    assert torch.equal(problem.fused(given, labels)[5], expected)
    assert torch.equal(problem.eager(given, labels)[5], expected)
    assert torch.equal(problem.fused({**given, "weight": -weight}, labels)[5], labels == 0)


@on_devices
@ahead_or_not
@pytest.mark.parametrize("rows", [(0,), (2, 0), (7,)])
def test_nothing_but_ignored_rows(device: str, ahead: bool, rows: tuple[int, ...]) -> None:
    """Zeros, and gradients of zero whatever comes from above."""
    problem = replace(RICH, rows=rows)
    given, labels = problem.build(device)
    labels = torch.full_like(labels, -100)
    grads = [torch.full(rows, torch.inf, device=device)] * 3
    for upstream in (grads, [grads[0], None, None]):
        for one in evaluate(problem.fused, given, labels, ROWS, upstream, ahead):
            assert torch.equal(one, torch.zeros_like(one))
    assert not problem.fused(given, labels)[5].any()


@ahead_or_not
@pytest.mark.parametrize("content", [torch.nan, torch.inf])
def test_what_ignored_rows_hold_is_not_looked_at(ahead: bool, content: float) -> None:
    given, labels = replace(RICH, rows=(20,)).build("cpu")
    problem, ignored = replace(RICH, rows=(20,)), labels == -100
    spoilt = {name: one.masked_fill(ignored[:, None], content) if name in ROWS else one for name, one in given.items()}
    grads = upstreams(problem, ("random", "some", "none"), "cpu")
    found, expected = (evaluate(problem.fused, one, labels, NAMES, grads, ahead) for one in (spoilt, given))
    assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))


@on_devices
@pytest.mark.parametrize("classes", [19, 5000])
def test_a_row_that_is_not_a_number_stays_so(device: str, classes: int) -> None:
    given, labels = Problem(classes=classes).build(device)
    labels = labels.clamp(min=0)
    given["hidden"][2] = torch.nan
    found = evaluate(Problem(classes=classes).fused, given, labels, ["hidden"], [torch.ones(7, device=device)] * 3)
    for one in found:
        assert one[2].isnan().all()
        assert not one[:2].isnan().any()


@on_devices
def test_a_bias_may_rule_classes_out(device: str) -> None:
    """All of a kernel's block, too: their mean is no number, all else is that of the other classes."""
    problem = Problem(classes=5000, biased=True)
    given, labels = problem.build(device)
    given["bias"][:-8] = -torch.inf
    labels = torch.where(labels == -100, labels, labels % 8)
    few = {"hidden": given["hidden"], "weight": given["weight"][-8:], "bias": given["bias"][-8:]}
    grads = upstreams(problem, ("random", "random", "random"), device)
    found = evaluate(problem.fused, given, torch.where(labels == -100, labels, labels + 4992), ["hidden"], grads)
    right = evaluate(Problem(classes=8).eager, few, labels, ["hidden"], grads)
    for at in (0, 1, 2, 4, 5):
        torch.testing.assert_close(found[at], right[at], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[3], torch.where(labels == -100, 0.0, -torch.inf).to(found[3].dtype))


@on_devices
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits(device: str, size: float) -> None:
    """One class has all of the probability: what is near 0 is not the difference of two large numbers."""
    hidden, weight = torch.tensor([[1.0], [-1.0]], device=device), torch.tensor([[1.0], [0.0], [-1.0]], device=device)
    given, labels = {"hidden": hidden, "weight": weight * size}, torch.tensor([0, 2], device=device)
    log_probs, entropy, lse, _, squares, top = Problem().fused(given, labels)
    for one in (log_probs, entropy, squares):
        assert torch.equal(one, torch.zeros_like(one))
    assert torch.equal(lse, torch.full_like(lse, size))
    assert top.all()


@ahead_or_not
@pytest.mark.parametrize("label", [19, -1, 2**40])
def test_a_label_out_of_range_raises_as_in_torch(label: int, ahead: bool) -> None:
    given, labels = Problem().build("cpu")
    labels[3] = label
    with pytest.raises(IndexError, match=f"^Target {label} is out of bounds.$"):
        Problem().fused(given, labels, ahead)


def test_a_gradient_summed_over_rows_cannot_be_ahead() -> None:
    given, labels = Problem().build("cpu")
    numbers = (None, None, None, -100, 1.0, 0.0, 2**10, [False, True, False, False, False])
    with pytest.raises(RuntimeError, match="summed over rows"):
        torch.ops.fastft.linear_token_statistics(given["hidden"], given["weight"], labels, *numbers)
