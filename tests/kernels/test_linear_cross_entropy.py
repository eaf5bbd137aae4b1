"""fastft::linear_cross_entropy against torch's linear and cross_entropy, and what is true of this op alone."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import FORWARD, GRADIENT, assert_close_to_truth, makes_new_tensors, poison
from hypothesis import assume, example, given
from hypothesis import strategies as st
from op_calls import nearby
from strategies import DEVICES, DTYPES, INTERPRETING, LAYOUTS, UPSTREAM, Spec, dtypes, seeds, upstream
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.kernels import REGISTRY
from fastft.kernels.chunked_head import Head
from fastft.kernels.head_call import DIFFERENTIABLE as NAMES
from fastft.kernels.linear_cross_entropy import Arguments, fill_rows

SUM, EACH, HIDDEN, BASE, ROWS = "sum", "none", ("hidden",), ("hidden", "weight"), ("hidden", "lora_s")
on_devices = pytest.mark.parametrize("device", DEVICES)
sooner_or_later = pytest.mark.parametrize("ahead", [(), ("hidden",), NAMES], ids=["later", "partly", "ahead"])
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
    exact: bool = False  # whether the adapter is float32 beside anything
    layout: str = "contiguous"
    sizes: tuple[float, float] = (1.0, 1.0)  # of hidden and weight
    seed: int = 0
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    scale: float = 1.0
    softcap: float = 0.0
    chunk_bytes: int = 2**9

    def build(self, device: str) -> tuple[Tensors, Tensor]:
        """Those of NAMES that there are, and labels, of which a fifth or more is ignore_index."""

        def made(at: int, *shape: int, size: float = 1.0) -> Tensor:
            dtype = torch.float32 if at > 2 and self.exact else self.dtype
            return Spec(shape, dtype, self.layout, self.seed + at, size).build(device)

        tensors = {"hidden": made(0, *self.rows, self.features, size=self.sizes[0])}
        tensors["weight"] = made(1, self.classes, self.features, size=self.sizes[1])
        if self.biased:
            tensors["bias"] = made(2, self.classes)
        if self.rank:
            tensors |= {"lora_s": made(3, *self.rows, self.rank), "lora_b": made(4, self.classes, self.rank)}
        labels = Spec(self.rows, torch.int64, seed=self.seed, below=self.classes).build(device)
        return tensors, labels.masked_fill(labels == -100, self.ignore_index)

    def arguments(self, given: Tensors, labels: Tensor) -> tuple[Any, ...]:
        hidden, weight, *others = (given.get(name) for name in NAMES)
        numbers = (self.ignore_index, self.label_smoothing, self.z_loss, self.scale, self.softcap, self.chunk_bytes)
        return (hidden, weight, labels, *others, *numbers)

    def fused(self, given: Tensors, labels: Tensor, reduction: str, ahead: Names = ()) -> Tensor:
        marks = [name in ahead and name in given for name in NAMES]
        loss = torch.ops.fastft.linear_cross_entropy(*self.arguments(given, labels), reduction != "none", marks)[0]
        return loss / (labels != self.ignore_index).sum() if reduction == "mean" else loss

    def eager(self, given: Tensors, labels: Tensor, reduction: str, ahead: Names = ()) -> Tensor:
        """What a model calls: logits, and what they are a sum of, in their dtype as in autocast; the loss wide."""
        logits = F.linear(given["hidden"], given["weight"]) + given.get("bias", 0.0)
        if "lora_s" in given:
            logits = logits + F.linear(given["lora_s"].to(logits.dtype), given["lora_b"].to(logits.dtype))
        y = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, self.classes) * self.scale
        y = self.softcap * torch.tanh(y / self.softcap) if self.softcap else y
        numbers = {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
        loss = F.cross_entropy(y, labels.reshape(-1), reduction=reduction, **numbers)
        kept = labels.reshape(-1) != self.ignore_index
        z = self.z_loss * torch.logsumexp(y, -1).square().masked_fill(~kept, 0.0)
        if reduction == EACH:
            return (loss + z).view(labels.shape)
        return loss + z.sum() / (kept.sum() if reduction == "mean" else 1)


def evaluate(
    loss_of: Callable, given: Tensors, labels: Tensor, reduction: str, needs: Names, grad: Any = 1.0, ahead: Names = ()
) -> list[Tensor]:
    """The loss, and the gradients of what needs one, given that of the loss."""
    leaves = {name: one.detach().requires_grad_(name in needs) for name, one in given.items()}
    loss = loss_of(leaves, labels, reduction, ahead)
    grad = torch.as_tensor(grad, dtype=loss.dtype, device=loss.device).expand(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, [leaves[name] for name in needs], grad)]


def doubles(given: Tensors) -> Tensors:
    return {name: one.double() for name, one in given.items()}


def check(problem: Problem, device: str, reduction: str, needs: Names, grad: Any = 1.0, ahead: Names = ()) -> None:
    """Against eager's own error, here and at inputs close by, as a single number may be right by luck."""
    given, labels = problem.build(device)
    asked = (labels, reduction, needs, grad)

    def measured(seed: int) -> list[tuple[Tensor, Tensor]]:
        values = {name: nearby(one, seed) if seed else one for name, one in given.items()}
        return list(zip(*(evaluate(problem.eager, one, *asked) for one in (values, doubles(values))), strict=True))

    here, *around = (measured(seed) for seed in range(24))
    unit = abs(problem.scale) * torch.as_tensor(grad).abs().max().item()  # of a logit: a probability less 1
    terms = unit * max(1.0, *(one.abs().max().item() for one in given.values()))
    for at, mine in enumerate(evaluate(problem.fused, given, *asked, ahead)):
        limits = (GRADIENT, terms) if at else (FORWARD,)
        assert_close_to_truth(mine, *here[at], *limits, others=[one[at] for one in around])


RICH = Problem(rank=2, biased=True, label_smoothing=0.1, z_loss=0.1, scale=0.5, softcap=5.0)
EXACT = replace(RICH, rows=(3, 5), dtype=torch.float64)
DISTINCT = [layout for layout in LAYOUTS if layout != "expanded"]  # rows that are equal err alike, nearby ones do not
PROBLEMS = st.builds(
    Problem, rows=st.lists(st.integers(1, 4), max_size=3).map(tuple), features=st.integers(1, 40),
    classes=st.integers(1, 300), rank=st.sampled_from((0, 1, 3, 16)), biased=st.booleans(), dtype=dtypes,
    exact=st.booleans(), layout=st.sampled_from(DISTINCT), sizes=st.sampled_from(((1.0, 1.0), (0.03, 1.0), (5.0, 1.0))),
    seed=seeds, ignore_index=st.sampled_from((-100, -1, 0, 2**40)), label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    z_loss=st.sampled_from((0.0, 1e-3, 0.1)), scale=st.sampled_from((1.0, 0.125, -2.0)),
    softcap=st.sampled_from((0.0, 2.0, 30.0)), chunk_bytes=st.sampled_from((1, 2**10, 2**13, 2**30)),
)  # fmt: skip
SUBSETS = st.sets(st.sampled_from(NAMES)).map(sorted)


@on_devices
@given(PROBLEMS, st.sampled_from((SUM, EACH, "mean")), SUBSETS, SUBSETS, st.sampled_from(UPSTREAM))
@example(replace(RICH, rows=()), EACH, BASE, HIDDEN, "random")
@example(replace(RICH, rows=(1,), classes=1), SUM, BASE, NAMES, "random")
def test_matches_torch(device: str, problem: Problem, reduction: str, needs: Names, ahead: Names, kind: str) -> None:
    given, labels = problem.build("cpu")
    assume(reduction != "mean" or (labels != problem.ignore_index).any())
    loss = torch.empty(labels.shape if reduction == EACH else (), device=device)
    needs = [name for name in needs if name in given] or BASE
    check(problem, device, reduction, needs, upstream(loss, kind, problem.seed), ahead)


@on_devices
@sooner_or_later
@pytest.mark.parametrize("rows", [(0,), (2, 0), (7,)])
def test_nothing_but_ignored_rows(device: str, ahead: Names, rows: tuple[int, ...]) -> None:
    given, labels = replace(RICH, rows=rows).build(device)
    labels = torch.full_like(labels, -100)
    for reduction, shape in ((EACH, rows), (SUM, ())):
        results = evaluate(RICH.fused, given, labels, reduction, NAMES, 1.0, ahead)
        assert results[0].shape == shape
        assert all(torch.equal(one, torch.zeros_like(one)) for one in results)
    assert RICH.eager(given, labels, "mean").isnan()
    assert RICH.fused(given, labels, "mean", ahead).isnan()


@on_devices
@pytest.mark.parametrize("ahead", [(), NAMES])
def test_a_mean_of_nothing_has_a_gradient_of_zero(device: str, ahead: Names) -> None:
    """As in torch: the loss is NaN, but a step changes no weight."""
    given, labels = Problem().build(device)
    for loss_of in (Problem().eager, Problem().fused):
        gradients = evaluate(loss_of, given, torch.full_like(labels, -100), "mean", BASE, 1.0, ahead)[1:]
        assert all(torch.equal(one, torch.zeros_like(one)) for one in gradients)


@sooner_or_later
@pytest.mark.parametrize("labels", [(19,), (-1, 3), (5, 2**40, -7), (-100, -101)])
def test_a_label_out_of_range_raises_as_in_torch(labels: Sequence[int], ahead: Names) -> None:
    problem, wrong = Problem((len(labels),)), torch.tensor(labels)
    with pytest.raises(IndexError) as expected:
        problem.eager(problem.build("cpu")[0], wrong, SUM)
    with pytest.raises(IndexError, match=f"^{re.escape(str(expected.value))}$"):
        problem.fused(problem.build("cpu")[0], wrong, SUM, ahead)


SCRIPT = """import torch, fastft.kernels
x, w, labels = torch.ones(3, 8, device="cuda"), torch.ones(19, 8, device="cuda"), torch.tensor([1, 19, -100]).cuda()
{}
torch.cuda.synchronize()"""
OP = "linear_cross_entropy(x, w, labels, None, None, None, -100, 0.0, 0.0, 1.0, 0.0, 2**20, True, [False] * 5)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("call", ["torch.nn.functional.cross_entropy(x @ w.T, labels)", f"torch.ops.fastft.{OP}"])
def test_a_label_out_of_range_is_an_assertion_on_a_gpu(call: str) -> None:
    """Of which the host learns with a later call; in a process of its own, as the context is lost."""
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(call)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@on_devices
@sooner_or_later
@pytest.mark.parametrize("rows", [4, 300])
def test_a_scaled_loss_in_float16(device: str, ahead: Names, rows: int) -> None:
    """By what torch's GradScaler begins with: finite where eager is, and as near."""
    check(Problem((rows,), 16, 101, dtype=torch.float16, chunk_bytes=2**14), device, "mean", BASE, 2.0**16, ahead)


@on_devices
@sooner_or_later
def test_small_probabilities_in_float16(device: str, ahead: Names) -> None:
    """1 / 50 000 is not a normal number there, and classes that no label names have no other gradient."""
    problem = Problem((8,), 8, 50_000, dtype=torch.float16, sizes=(1.0, 0.02), chunk_bytes=2**20)
    given, labels = problem.build(device)
    unnamed = torch.ones(50_000, dtype=torch.bool, device=device).index_fill(0, labels.clamp(min=0), False)
    actual, eager, truth = (
        evaluate(loss_of, values, labels, "mean", ("weight",), 2.0**16, ahead)[1][unnamed]
        for loss_of, values in ((problem.fused, given), (problem.eager, given), (problem.eager, doubles(given)))
    )
    assert_close_to_truth(actual, eager, truth, FORWARD)


@on_devices
@pytest.mark.parametrize(("factor", "size"), [(2.0**17, 0.03), (3e-7, 1000.0)])
def test_the_gradient_of_a_sum_need_not_be_a_float16(device: str, factor: float, size: float) -> None:
    """A loss's scale is beyond the largest of them, and 1 / (tokens of many steps) has few bits."""
    problem = Problem(dtype=torch.float16, sizes=(1e-3 / size, size))
    given, labels = problem.build(device)
    found = evaluate(problem.fused, given, labels, SUM, ("hidden",), factor, BASE)[1].double()
    truth = evaluate(problem.eager, doubles(given), labels, SUM, ("hidden",), factor)[1]
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-3 * truth.abs().max().item())


class Calls(TorchDispatchMode):
    """Each op that ran, and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func, func(*args, **(kwargs or {}))))
        return self.seen[-1][1]


@on_devices
@pytest.mark.parametrize(
    ("reduction", "ahead", "needs", "again"),
    [
        (SUM, NAMES, NAMES, False), (SUM, NAMES, ("bias",), False), (SUM, ROWS, NAMES, True), (SUM, (), BASE, True),
        (EACH, ROWS, ROWS, False), (EACH, NAMES, HIDDEN, False), (EACH, NAMES, BASE, True), (EACH, HIDDEN, ROWS, True),
        (SUM, HIDDEN, HIDDEN, False), (EACH, HIDDEN, HIDDEN, False),
    ],
)  # fmt: skip
def test_backward_scales_or_computes(device: str, reduction: str, ahead: Names, needs: Names, again: bool) -> None:
    """By whatever gradient comes, from two calls, of one twice.  Kept are labels and what is ahead, or the inputs."""
    given, labels = EXACT.build(device)
    flipped, gradient = labels.flip(0), Spec((3, 5) if reduction == EACH else (), torch.float64).build(device)
    leaves, kept = {name: one.detach().requires_grad_(name in needs) for name, one in given.items()}, []
    with Calls() as calls, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        first, second = (EXACT.fused(leaves, which, reduction, ahead) for which in (labels, flipped))
        first.backward(gradient, retain_graph=True)
        second.backward(gradient)
        first.backward(gradient)
    ran = [func._opname for func, _ in calls.seen if func.namespace == "fastft"]
    assert ran == ["linear_cross_entropy"] * 2 + ["linear_cross_entropy_backward"] * (3 if again else 0)
    pointers = [{one.data_ptr() for one in those} for those in (kept, (labels, flipped, *leaves.values()))]
    shapes = [labels.shape, *(one.shape for name, one in given.items() if name in ahead)] * 2
    assert pointers[0] == pointers[1] if again else [one.shape for one in kept] == shapes
    assert [name for name in NAMES if leaves[name].grad is not None] == list(needs)
    twice, once = (evaluate(EXACT.eager, given, which, reduction, needs, gradient) for which in (labels, flipped))
    for name, a, b in zip(needs, twice[1:], once[1:], strict=True):
        torch.testing.assert_close(leaves[name].grad, 2.0 * a + b)


@on_devices
@sooner_or_later
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_matter(device: str, ahead: Names, dtype: torch.dtype) -> None:
    """But for the last bits, in products of other shapes; a sum over chunks rounded to 16 bits each time loses more."""
    rows = 80 if INTERPRETING else 200  # a launch for each
    whole = replace(RICH, rows=(rows,), dtype=dtype, chunk_bytes=2**30)
    given, labels = whole.build(device)
    gradient, steps = torch.linspace(-1.0, 1.0, rows), 16 if dtype == torch.float32 else 2
    expected, *others = (
        evaluate(one.fused, given, labels, EACH, NAMES, gradient, ahead)
        for one in (whole, replace(whole, chunk_bytes=1), replace(whole, chunk_bytes=64 * 4 * 70))
    )
    for mine, right in (pair for found in others for pair in zip(found, expected, strict=True)):
        allowed = steps * torch.finfo(mine.dtype).eps * right.abs().max().item()
        torch.testing.assert_close(mine, right, rtol=0, atol=allowed)


@sooner_or_later
@pytest.mark.parametrize("content", [torch.nan, torch.inf])
def test_what_ignored_rows_hold_is_not_looked_at(ahead: Names, content: float) -> None:
    """On a CPU, where they are left out."""
    given, labels = replace(RICH, rows=(20,)).build("cpu")
    ignored = labels == -100
    spoilt = {name: one.masked_fill(ignored[:, None], content) if name in ROWS else one for name, one in given.items()}
    found, expected = (evaluate(RICH.fused, one, labels, SUM, NAMES, 0.5, ahead) for one in (spoilt, given))
    assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))
    assert all((found[1 + NAMES.index(name)][ignored] == 0.0).all() for name in ROWS)


@on_devices
@pytest.mark.parametrize("classes", [200, 257])
def test_what_lies_behind_a_row_of_logits_is_not_looked_at(device: str, classes: int) -> None:
    """More rows and classes than a tile of oneDNN's, which multiplies what is behind a row with zero."""
    with poison():
        for dtype in DTYPES:
            problem = Problem(rows=(50,), features=64, classes=classes, dtype=dtype, chunk_bytes=2**20)
            check(problem, device, SUM, BASE, ahead=NAMES)


@on_devices
def test_ignored_rows_in_a_chunk(device: str) -> None:
    """As on a GPU, where not all of them are left out."""
    logits, upstream = Spec((4, 70), torch.float32).build(device), torch.ones(4, device=device)
    labels, rest = torch.tensor([3, -100, 0, -100], device=device), logits[::2].clone()
    logits[1] = torch.nan
    loss, expected = torch.empty(4, device=device), torch.empty(2, device=device)
    call = Arguments(*RICH.arguments({"hidden": logits, "weight": logits}, labels))
    fill_rows(logits, labels, upstream, loss, call, 1.0, True)
    fill_rows(rest, labels[::2], upstream[::2], expected, call, 1.0, True)
    for found, right in ((loss, expected), (logits, rest)):
        assert torch.equal(found[::2], right)
        assert (found[1::2] == 0.0).all()


@on_devices
def test_a_bias_may_rule_classes_out(device: str) -> None:
    """All of a kernel's block, too."""
    problem = Problem(classes=5000, biased=True)
    given, labels = problem.build(device)
    given["bias"][:-8] = -torch.inf
    labels = torch.where(labels == -100, labels, 4999 - labels % 8)
    found, expected = (evaluate(one, given, labels, SUM, NAMES[:3]) for one in (problem.fused, problem.eager))
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETING, reason="it makes tensors of its own, of whole blocks")
@given(st.integers(1, 300), st.integers(1, 500), st.integers(0, 300), st.sampled_from((torch.float16, torch.float64)))
def test_a_chunk_takes_chunk_bytes_or_one_row(rows: int, classes: int, most: int, dtype: torch.dtype) -> None:
    """And no less than half of that."""
    problem = Problem((rows,), 1, classes, dtype=dtype, chunk_bytes=(most + 1) * classes * dtype.itemsize - 1)
    given, labels = problem.build("cpu")
    entry = REGISTRY["fastft::linear_cross_entropy"]
    values = (*problem.arguments(given, labels.clamp(min=0)), True, [True, True, False, False, False])
    results = entry.outputs(*values)
    with Calls() as calls:
        entry.fill(results, values)
    chunks = [result.shape[0] for func, result in calls.seen if func is torch.ops.aten.mm.out]
    new = [result.numel() for func, result in calls.seen if makes_new_tensors(func) and isinstance(result, Tensor)]
    assert sum(chunks) == rows
    assert len(chunks) == 1 or 2 * max(chunks) >= max(1, most)
    assert max(new) <= max(max(1, most) * classes, rows, classes)  # hidden and weight are as small


@given(st.integers(1, 300), st.integers(1, 500), st.integers(0, 300), st.sampled_from((torch.float16, torch.bfloat16)))
def test_a_chunk_for_cublas_takes_no_more(rows: int, classes: int, most: int, dtype: torch.dtype) -> None:
    """Where each row begins at a multiple of 64 elements: anywhere but on a CPU."""
    row = -(-classes // 64) * 64
    hidden, weight = (torch.empty(size, 1, dtype=dtype, device="meta") for size in (rows, classes))
    chunk = Head(hidden, weight, None, None, (most + 1) * row * dtype.itemsize - 1)._buffer
    assert (chunk.shape[1], chunk.stride()) == (classes, (row, 1))
    assert chunk.shape[0] <= max(1, most)
    assert chunk.shape[0] == rows or 2 * chunk.shape[0] >= max(1, most)
