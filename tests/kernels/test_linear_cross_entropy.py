"""fastft::linear_cross_entropy against torch's own linear and cross_entropy, and what is true of this op alone.

test_ops.py holds it to its reference.  Here float64 is the truth, and the call's own dtype gives the tolerance.  Where
autograd and chunks matter and rounding does not, all is float64 and compared for equality, or nearly.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import FORWARD, GRADIENT, RoundedOtherwise, assert_close_to_truth, makes_new_tensors
from hypothesis import assume, given
from hypothesis import strategies as st
from op_calls import nearby
from strategies import DEVICES, INTERPRETING, LAYOUTS, LOW, UPSTREAM, Spec, dtypes, requires_grad, seeds, upstream
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft.kernels import REGISTRY
from fastft.kernels.linear_cross_entropy import BY_ROW, Arguments, fill_rows
from fastft.kernels.linear_cross_entropy import DIFFERENTIABLE as NAMES
from fastft.kernels.registry import wide

ENTRY = REGISTRY["fastft::linear_cross_entropy"]
ROWS = tuple(name for name, by_row in zip(NAMES, BY_ROW, strict=True) if by_row)
BASE = ("hidden", "weight")
on_devices = pytest.mark.parametrize("device", DEVICES)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """The numbers of a call."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    scale: float = 1.0
    softcap: float = 0.0
    chunk_bytes: int = 2**9


@dataclass(frozen=True)
class Problem:
    """A call: prints as the code that builds it."""

    rows: tuple[int, ...] = (7,)
    features: int = 8
    classes: int = 19
    rank: int = 0
    biased: bool = False
    dtype: torch.dtype = torch.float32
    adapter: torch.dtype = torch.float32
    layout: str = "contiguous"
    sizes: tuple[float, float] = (1.0, 1.0)  # of hidden and weight
    seed: int = 0
    options: Options = Options()

    def tensors(self, device: str) -> Tensors:
        """Those of NAMES that there are."""
        specs = [
            Spec((*self.rows, self.features), self.dtype, self.layout, self.seed, self.sizes[0]),
            Spec((self.classes, self.features), self.dtype, self.layout, self.seed + 1, self.sizes[1]),
            Spec((self.classes,), self.dtype, seed=self.seed + 2),
            Spec((*self.rows, self.rank), self.adapter, self.layout, self.seed + 3),
            Spec((self.classes, self.rank), self.adapter, seed=self.seed + 4),
        ]
        present = (True, True, self.biased, self.rank > 0, self.rank > 0)
        return {name: spec.build(device) for name, spec, is_there in zip(NAMES, specs, present, strict=True) if is_there}

    def labels(self, device: str) -> Tensor:
        """A fifth of them is ignore_index, or more."""
        labels = Spec(self.rows, torch.int64, seed=self.seed, below=self.classes).build(device)
        return labels.masked_fill(labels == -100, self.options.ignore_index)

    def arguments(self, given: Tensors, labels: Tensor) -> tuple[Any, ...]:
        """But for what is to be returned."""
        hidden, weight, *others = (given.get(name) for name in NAMES)
        return (hidden, weight, labels, *others, *astuple(self.options))

    def fused(self, given: Tensors, labels: Tensor, reduction: str, ahead: Sequence[str] = ()) -> Tensor:
        marks = [name in ahead and name in given for name in NAMES]
        loss = torch.ops.fastft.linear_cross_entropy(*self.arguments(given, labels), reduction != "none", marks)[0]
        return loss / (labels != self.options.ignore_index).sum() if reduction == "mean" else loss

    def eager(self, given: Tensors, labels: Tensor, reduction: str) -> Tensor:
        """What a model calls: the logits rounded to their dtype, the rest wide."""
        o = self.options
        logits = F.linear(given["hidden"], given["weight"], given.get("bias"))
        if "lora_s" in given:
            dtype = torch.promote_types(given["lora_s"].dtype, given["lora_b"].dtype)
            logits = (logits + F.linear(given["lora_s"].to(dtype), given["lora_b"].to(dtype))).to(logits.dtype)
        y = logits.to(wide(logits.dtype)).reshape(-1, self.classes) * o.scale
        y = o.softcap * torch.tanh(y / o.softcap) if o.softcap else y
        flat = labels.reshape(-1)
        loss = F.cross_entropy(y, flat, None, None, o.ignore_index, None, reduction, o.label_smoothing)
        kept = flat != o.ignore_index
        z = o.z_loss * torch.logsumexp(y, -1).square().masked_fill(~kept, 0.0)
        if reduction == "none":
            return (loss + z).view(labels.shape)
        return loss + (z.sum() / kept.sum() if reduction == "mean" else z.sum())


def evaluate(
    loss_of: Callable[[Tensors], Tensor], given: Tensors, needs: Sequence[str], gradient: Tensor
) -> list[Tensor]:
    """The loss, and the gradients of what needs one."""
    leaves = {name: one.detach().requires_grad_(name in needs) for name, one in given.items()}
    loss = loss_of(leaves)
    return [loss.detach(), *torch.autograd.grad(loss, [leaves[name] for name in needs], gradient.to(loss.dtype))]


def check(
    problem: Problem, device: str, reduction: str, ahead: Sequence[str], needs: Sequence[str], gradient: Tensor
) -> None:
    """Against eager's own error, here and at inputs close by, as one number may be right by luck."""
    given, labels = problem.tensors(device), problem.labels(device)
    actual = evaluate(partial(problem.fused, labels=labels, reduction=reduction, ahead=ahead), given, needs, gradient)

    def eager(values: Tensors, dtype: torch.dtype | None = None) -> list[Tensor]:
        loss_of = partial(problem.eager, labels=labels.to(values["hidden"].device), reduction=reduction)
        moved = {name: one.to(dtype or one.dtype) for name, one in values.items()}
        return evaluate(loss_of, moved, needs, gradient.to(values["hidden"].device))

    def measured(seed: int) -> list[tuple[Tensor, Tensor]]:
        values = {name: nearby(one, seed) if seed else one for name, one in given.items()}
        return list(zip(eager(values), eager(values, torch.float64), strict=True))

    def disturbed(seed: int) -> list[tuple[Tensor, Tensor]]:
        on_cpu = {name: one.cpu() for name, one in given.items()}  # whose backward runs in this thread
        exact = eager(on_cpu, torch.float64)
        with RoundedOtherwise(seed):
            return list(zip(eager(on_cpu, torch.float64), exact, strict=True))

    here, *around = (measured(seed) for seed in range(24))
    around += [disturbed(seed) for seed in range(4)]
    for at, (mine, (low, truth)) in enumerate(zip(actual, here, strict=True)):
        others = [one[at] for one in around]
        assert_close_to_truth(mine, low, truth, GRADIENT if at else FORWARD, others=others)


@st.composite
def options(draw: st.DrawFn, classes: int) -> Options:
    return Options(
        draw(st.sampled_from((-100, -1, 0, classes - 1, 2**40))),
        draw(st.sampled_from((0.0, 0.1, 1.0))),
        draw(st.sampled_from((0.0, 1e-3, 0.5))),
        draw(st.sampled_from((1.0, 0.125, -2.0))),
        draw(st.sampled_from((0.0, 2.0, 30.0))),
        draw(st.sampled_from((1, 2**10, 2**13, 2**30))),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    classes = draw(st.integers(1, 300))
    return Problem(
        tuple(draw(st.lists(st.integers(1, 4), max_size=3))),
        draw(st.integers(1, 40)),
        classes,
        draw(st.sampled_from((0, 1, 3, 16))),
        draw(st.booleans()),
        draw(dtypes),
        draw(dtypes),
        draw(st.sampled_from(LAYOUTS)),
        (draw(st.sampled_from((1.0, 0.03, 5.0))), 1.0),
        draw(seeds),
        draw(options(classes)),
    )


@on_devices
@given(
    problems(), st.sampled_from(("none", "sum", "mean")), requires_grad(5), st.lists(st.sampled_from(NAMES)),
    st.sampled_from(UPSTREAM),
)  # fmt: skip
def test_matches_torch(
    device: str, problem: Problem, reduction: str, wanted: tuple[bool, ...], ahead: list[str], kind: str
) -> None:
    labels = problem.labels("cpu")
    assume(reduction != "mean" or (labels != problem.options.ignore_index).any())
    there = problem.tensors("cpu")
    needs = [name for name, need in zip(NAMES, wanted, strict=True) if need and name in there] or BASE
    shape = labels.shape if reduction == "none" else ()
    check(problem, device, reduction, ahead, needs, upstream(torch.empty(shape, device=device), kind, problem.seed))


RICH = Options(label_smoothing=0.1, z_loss=0.1, scale=0.5, softcap=5.0)


@on_devices
@pytest.mark.parametrize("ahead", [(), NAMES], ids=["later", "ahead"])
def test_all_labels_are_ignored(device: str, ahead: Sequence[str]) -> None:
    problem = Problem(rank=2, biased=True, options=RICH)
    given, labels = problem.tensors(device), torch.full((7,), -100, device=device)
    results = evaluate(partial(problem.fused, labels=labels, reduction="sum", ahead=ahead), given, NAMES, torch.ones(()))
    assert all(torch.equal(one, torch.zeros_like(one)) for one in results)
    assert problem.eager(given, labels, "mean").isnan()
    assert problem.fused(given, labels, "mean", ahead).isnan()


@on_devices
@pytest.mark.parametrize("ahead", [(), BASE], ids=["later", "ahead"])
def test_a_mean_of_nothing_has_no_gradient(device: str, ahead: Sequence[str]) -> None:
    """As in torch: the loss is NaN, yet a step of training changes nothing."""
    problem = Problem()
    given, labels, one = problem.tensors(device), torch.full((7,), -100, device=device), torch.ones((), device=device)
    for loss_of in (problem.eager, partial(problem.fused, ahead=ahead)):
        gradients = evaluate(partial(loss_of, labels=labels, reduction="mean"), given, BASE, one)[1:]
        assert all(torch.equal(one, torch.zeros_like(one)) for one in gradients)


@on_devices
@pytest.mark.parametrize("ahead", [(), NAMES], ids=["later", "ahead"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_one_token_one_class_and_no_rows(device: str, ahead: Sequence[str], reduction: str) -> None:
    for problem in (Problem((), options=RICH), Problem((1,), classes=1), Problem((5,), 3, 1, options=RICH)):
        gradient = torch.ones(problem.rows if reduction == "none" else (), device=device)
        check(problem, device, reduction, ahead, BASE, gradient)
    for rows in ((0,), (2, 0)):
        problem = Problem(rows, rank=2, biased=True)
        gradient = torch.ones(rows if reduction == "none" else (), device=device)
        loss_of = partial(problem.fused, labels=problem.labels(device), reduction=reduction, ahead=ahead)
        results = evaluate(loss_of, problem.tensors(device), NAMES, gradient)
        assert results[0].shape == gradient.shape
        assert all(torch.equal(one, torch.zeros_like(one)) for one in results)


@pytest.mark.parametrize("labels", [(19,), (-1, 3), (5, 2**40, -7), (-100, -101)])
@pytest.mark.parametrize("ahead", [(), BASE], ids=["later", "ahead"])
def test_a_label_out_of_range_raises_as_in_torch(labels: Sequence[int], ahead: Sequence[str]) -> None:
    problem = Problem((len(labels),))
    given, classes = problem.tensors("cpu"), torch.tensor(labels)
    with pytest.raises(IndexError) as expected:
        problem.eager(given, classes, "sum")
    with pytest.raises(IndexError, match=f"^{re.escape(str(expected.value))}$"):
        problem.fused(given, classes, "sum", ahead)


OUT_OF_RANGE = """
import torch, fastft.kernels
x, w, labels = torch.ones(3, 8, device="cuda"), torch.ones(19, 8, device="cuda"), torch.tensor([1, 19, -100]).cuda()
{call}
print("launched")
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "call",
    [
        "torch.nn.functional.cross_entropy(x @ w.T, labels)",
        "torch.ops.fastft.linear_cross_entropy("
        "x, w, labels, None, None, None, -100, 0.0, 0.0, 1.0, 0.0, 2**20, True, [False] * 5)",
    ],
    ids=["torch", "fastft"],
)
def test_a_label_out_of_range_is_an_assertion_on_the_device(call: str) -> None:
    """In a process of its own, as the context is lost; and without waiting for the device."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_RANGE.format(call=call)], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == "launched\n", done.stderr[-2000:]
    assert "device-side assert" in done.stderr


@on_devices
@pytest.mark.parametrize("rows", [4, 300])
@pytest.mark.parametrize("ahead", [(), ("weight",), BASE], ids=["later", "partly", "ahead"])
def test_a_scaled_loss_in_float16(device: str, rows: int, ahead: Sequence[str]) -> None:
    """Neither overflows where eager does not nor loses more than eager: 2**16 is where torch's GradScaler begins."""
    problem = Problem((rows,), 16, 101, dtype=torch.float16, options=Options(chunk_bytes=2**14))
    check(problem, device, "mean", ahead, BASE, torch.tensor(2.0**16, device=device))


@on_devices
@pytest.mark.parametrize("ahead", [(), BASE], ids=["later", "ahead"])
def test_small_probabilities_are_not_lost_in_float16(device: str, ahead: Sequence[str]) -> None:
    """1 of 50 000 is not a normal number there; the rows of weight that no label names have nothing else."""
    problem = Problem((8,), 8, 50_000, dtype=torch.float16, sizes=(1.0, 0.02), options=Options(chunk_bytes=2**30))
    given, labels, gradient = problem.tensors(device), problem.labels(device), torch.tensor(2.0**16, device=device)
    unnamed = torch.ones(50_000, dtype=torch.bool, device=device).index_fill(0, labels.clamp(min=0), False)
    actual, eager, truth = (
        evaluate(partial(loss_of, labels=labels, reduction="mean"), values, ("weight",), gradient)[1][unnamed]
        for loss_of, values in (
            (partial(problem.fused, ahead=ahead), given),
            (problem.eager, given),
            (problem.eager, {name: one.double() for name, one in given.items()}),
        )
    )
    assert_close_to_truth(actual, eager, truth, FORWARD)
    assert ((actual == 0.0) <= (eager == 0.0)).all()


@on_devices
@pytest.mark.parametrize(("factor", "size"), [(2.0**17, 0.03), (3e-7, 1000.0)])
def test_the_gradient_of_the_sum_need_not_be_a_float16(device: str, factor: float, size: float) -> None:
    """A scale of the loss and one over a number of tokens are factors that float16 has not, or has as one of few."""
    problem = Problem(dtype=torch.float16, sizes=(1e-3 / size, size))
    given, labels = problem.tensors(device), problem.labels(device)
    loss_of = partial(problem.fused, labels=labels, reduction="sum", ahead=BASE)
    found = evaluate(loss_of, given, ("hidden",), torch.tensor(factor, device=device))[1]
    exact = {name: one.double() for name, one in given.items()}
    truth = evaluate(partial(problem.eager, labels=labels, reduction="sum"), exact, ("hidden",), torch.tensor(factor))[1]
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-3 * truth.abs().max().item())


class Seen(TorchDispatchMode):
    """The names of what ran, the shapes of products, and the elements of each new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.products: list[torch.Size] = []
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func._opname)
        if func is torch.ops.aten.mm.out:
            self.products.append(result.shape)
        if makes_new_tensors(func):
            self.elements += [one.numel() for one in tree_leaves(result) if isinstance(one, Tensor)]
        return result


FULL = Problem((3, 5), rank=2, biased=True, dtype=torch.float64, adapter=torch.float64, options=RICH)


@on_devices
@pytest.mark.parametrize(
    ("reduction", "ahead", "needs", "again"),
    [
        ("sum", NAMES, NAMES, False),
        ("sum", NAMES, ("bias",), False),
        ("sum", ("hidden",), BASE, True),
        ("sum", ROWS, NAMES, True),
        ("sum", (), ("lora_b",), True),
        ("none", ROWS, ROWS, False),
        ("none", NAMES, ("lora_s",), False),
        ("none", NAMES, ("weight",), True),
        ("none", ("hidden",), ROWS, True),
    ],
)
def test_what_is_ahead_is_scaled_and_the_rest_is_computed_again(
    device: str, reduction: str, ahead: Sequence[str], needs: Sequence[str], again: bool
) -> None:
    """By whatever gradient comes, twice if asked twice."""
    given, labels = FULL.tensors(device), FULL.labels(device)
    gradient = upstream(torch.empty(() if reduction == "sum" else (3, 5), dtype=torch.float64, device=device), "random")
    expected = evaluate(partial(FULL.eager, labels=labels, reduction=reduction), given, needs, gradient)
    leaves = {name: one.detach().requires_grad_(name in needs) for name, one in given.items()}
    with Seen() as seen:
        loss = FULL.fused(leaves, labels, reduction, ahead)
        loss.backward(gradient, retain_graph=True)
        loss.backward(gradient)
    assert [name for name in seen.names if name == "linear_cross_entropy_backward"] == [
        "linear_cross_entropy_backward"
    ] * (2 if again else 0)
    for name, right in zip(needs, expected[1:], strict=True):
        torch.testing.assert_close(leaves[name].grad, 2.0 * right)
    assert all(leaves[name].grad is None for name in given if name not in needs)


@on_devices
@pytest.mark.parametrize("ahead", [(), ("hidden",), NAMES], ids=["later", "partly", "ahead"])
def test_gradients_add_up_over_calls(device: str, ahead: Sequence[str]) -> None:
    weight = replace(FULL, seed=9).tensors(device)["weight"]
    found, expected = (weight.clone().requires_grad_() for _ in range(2))
    for seed, factor in ((1, 0.25), (2, 3.0)):
        problem = replace(FULL, seed=seed)
        given, labels = problem.tensors(device), problem.labels(device)
        (problem.fused({**given, "weight": found}, labels, "mean", ahead) * factor).backward()
        (problem.eager({**given, "weight": expected}, labels, "mean") * factor).backward()
    torch.testing.assert_close(found.grad, expected.grad)


@on_devices
@pytest.mark.parametrize("ahead", [(), NAMES], ids=["later", "ahead"])
def test_chunks_do_not_matter(device: str, ahead: Sequence[str]) -> None:
    """Nearly: a product of other shapes, and a sum in another order, may differ in float32's last bits."""
    whole, one_row, few = (
        Problem((300,), 24, 83, 3, True, options=replace(RICH, chunk_bytes=size)) for size in (2**30, 1, 83 * 4 * 70)
    )
    gradient, labels = torch.linspace(-1.0, 1.0, 300, device=device), whole.labels(device)
    expected, *found = (
        evaluate(
            partial(one.fused, labels=labels, reduction="none", ahead=ahead), one.tensors(device), NAMES, gradient
        )
        for one in (whole, one_row, few)
    )
    for results in found:
        for at, (mine, right) in enumerate(zip(results, expected, strict=True)):
            steps = 64 if at and not BY_ROW[at - 1] else 8
            allowed = steps * torch.finfo(torch.float32).eps * right.abs().max().item()
            torch.testing.assert_close(mine, right, rtol=0, atol=allowed)


@pytest.mark.parametrize("ahead", [(), NAMES], ids=["later", "ahead"])
@pytest.mark.parametrize("content", [torch.nan, torch.inf])
def test_what_ignored_rows_hold_is_not_looked_at(ahead: Sequence[str], content: float) -> None:
    """On a CPU, where they are left out."""
    problem = Problem((20,), rank=2, biased=True, options=RICH)
    given, labels = problem.tensors("cpu"), problem.labels("cpu")
    ignored = labels == -100
    spoilt = {name: one.masked_fill(ignored[:, None], content) if name in ROWS else one for name, one in given.items()}
    loss_of = partial(problem.fused, labels=labels, reduction="sum", ahead=ahead)
    found, expected = (evaluate(loss_of, values, NAMES, torch.tensor(0.5)) for values in (spoilt, given))
    assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))
    assert all((found[1 + NAMES.index(name)][ignored] == 0.0).all() for name in ROWS)


@on_devices
def test_ignored_rows_of_a_chunk(device: str) -> None:
    """As on a GPU, where they are in a chunk, and products that leave them out write nothing there."""
    options, upstream = RICH, torch.ones(4, device=device)
    labels = torch.tensor([3, -100, 0, -100], device=device)
    logits = Spec((4, 70), torch.float32).build(device)
    rest = logits[::2].clone()
    logits[1] = torch.nan
    loss, expected = torch.empty(4, device=device), torch.empty(2, device=device)
    call = Arguments(logits, logits, labels, None, None, None, *astuple(options))
    fill_rows(logits, labels, upstream, loss, call, 1.0, True)
    fill_rows(rest, labels[::2], upstream[::2], expected, call, 1.0, True)
    assert torch.equal(loss[::2], expected)
    assert torch.equal(logits[::2], rest)
    assert (loss[1::2] == 0.0).all()
    assert (logits[1::2] == 0.0).all()


@on_devices
@pytest.mark.parametrize("classes", [70, 5000])
def test_classes_may_be_ruled_out(device: str, classes: int) -> None:
    """By a bias of minus infinity; in a kernel all of a block may be."""
    problem = Problem(classes=classes, biased=True)
    given, labels = problem.tensors(device), problem.labels(device)
    labels, last = labels.where(labels == -100, classes - 1 - labels % 8), classes - 10
    given["bias"][:last] = -torch.inf
    one = torch.ones((), device=device)
    found, expected = (
        evaluate(partial(loss_of, labels=labels, reduction="sum"), given, ("hidden", "weight"), one)
        for loss_of in (problem.fused, problem.eager)
    )
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def filled(problem: Problem, needs: Sequence[str]) -> tuple[list[Tensor], Seen]:
    """Results with gradients ahead, and what happened."""
    values = (
        *problem.arguments(problem.tensors("cpu"), torch.zeros(problem.rows, dtype=torch.int64)),
        True, [name in needs for name in NAMES],
    )  # fmt: skip
    results = ENTRY.outputs(*values)
    with Seen() as seen:
        ENTRY.fill(results, values)
    return results, seen


@given(
    st.integers(1, 700), st.integers(1, 500), st.integers(0, 2**19),
    st.sampled_from((torch.float16, torch.float32, torch.float64)),
)  # fmt: skip
def test_a_chunk_takes_chunk_bytes_or_one_row(rows: int, classes: int, chunk_bytes: int, dtype: torch.dtype) -> None:
    """And rows begin at multiples of 64 elements; nor is it needlessly small."""
    problem = Problem((rows,), 1, classes, dtype=dtype, options=Options(chunk_bytes=chunk_bytes))
    _, seen = filled(problem, BASE)
    at_most = max(1, chunk_bytes // (-(-classes // 64) * 64 * dtype.itemsize))
    assert sum(shape[0] for shape in seen.products) == rows
    assert max(seen.elements) <= max(at_most * -(-classes // 64) * 64, rows, classes)  # hidden and weight are as small
    assert len(seen.products) == 1 or max(shape[0] for shape in seen.products) * 2 >= at_most


@on_devices
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_sums_over_chunks_are_float32(device: str, dtype: torch.dtype) -> None:
    """Of 600 chunks that are all alike; in 16 bits the sum would err by a tenth, or stand still."""
    problem = Problem((600,), 4, 5, 2, True, dtype, dtype, options=Options(chunk_bytes=1))
    given, labels = problem.tensors(device), torch.full((600,), 2, device=device)
    for name in ROWS:
        given[name] = given[name][:1].expand(600, -1)
    marks = [True] * len(NAMES)
    one, _, *summed = torch.ops.fastft.linear_cross_entropy(*problem.arguments(given, labels), True, marks)
    assert one.dtype == torch.float32
    single = {name: value[:1] if name in ROWS else value for name, value in given.items()}
    each, _, *right = torch.ops.fastft.linear_cross_entropy(*problem.arguments(single, labels[:1]), True, marks)
    assert [value.dtype for value in (*summed, *right)] == [torch.float32] * 8
    for mine, other in zip((one, *summed), (each, *right), strict=True):
        torch.testing.assert_close(mine, 600.0 * other, rtol=1e-5, atol=1e-7)


@on_devices
@pytest.mark.parametrize(
    ("reduction", "ahead", "needs", "sizes"),
    [
        ("sum", ("hidden",), ("hidden",), [15 * 8]),
        ("none", ("hidden",), ("hidden",), [15 * 8]),
        ("sum", ROWS, ROWS, [15 * 8, 15 * 2]),
        ("sum", BASE, BASE, [15 * 8, 19 * 8]),
        ("sum", NAMES, (), []),
    ],
)
def test_what_is_kept_for_backward(
    device: str, reduction: str, ahead: Sequence[str], needs: Sequence[str], sizes: list[int]
) -> None:
    """What is ahead, and nothing of the logits' size; the inputs themselves where nothing is."""
    given, labels, kept = FULL.tensors(device), FULL.labels(device), []
    leaves = {name: one.detach().requires_grad_(name in needs) for name, one in given.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        loss = FULL.fused(leaves, labels, reduction, ahead)
        assert [one.numel() for one in kept] == sizes
        kept.clear()
        again = FULL.fused(leaves, labels, reduction)
    assert loss.requires_grad == again.requires_grad == bool(needs)
    inputs = {one.untyped_storage().data_ptr() for one in (labels, *leaves.values())}
    assert {one.untyped_storage().data_ptr() for one in kept} <= inputs
