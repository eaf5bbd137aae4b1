"""What holds for every op: the registry finds them and says how they are called, so a new op needs no test of its own.

On a CPU the ops run their reference, in Triton's interpreter (test_interpreter.py) and on a GPU their kernels.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compare import (
    FORWARD,
    GRADIENT,
    RoundedOtherwise,
    assert_close_to_truth,
    assert_same_metadata,
    makes_new_tensors,
    poison,
)
from hypothesis import given
from hypothesis import strategies as st
from op_calls import Call, calls, examples, nearby
from strategies import DEVICES, DTYPES, INTERPRETING, LOW, upstream
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from fastft.kernels import REGISTRY, attention_engines, dequantize_4bit
from fastft.kernels.core.registry import bytes_moved

OPS = sorted(REGISTRY)
ROUND_INSIDE = ("fastft::attention", "fastft::attention_backward")  # to the rows' dtype, where references are wide
every_op = pytest.mark.parametrize("name", OPS)
every_differentiable_op = pytest.mark.parametrize("name", [name for name in OPS if REGISTRY[name].gradients])
on_devices = pytest.mark.parametrize("device", DEVICES)
same_bits = pytest.mark.usefixtures("ours_alone")
compiled_only = pytest.mark.skipif(INTERPRETING, reason="says nothing of the kernels, and is slow there")


@pytest.fixture
def ours_alone() -> Iterator[None]:
    """No kernels of torch's own, which an op may call and whose gradients have other bits each time."""
    with attention_engines.only_triton():
        yield


def outputs_of(function: Callable, call: Call, tensors: dict[str, Tensor]) -> list[Tensor]:
    results = function(*call.arguments(tensors))
    return [results] if isinstance(results, Tensor) else list(results)


def framed(empty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor like this one, and what lies before and after it: as many rows as a program takes, or more."""
    margin = 64 * max([128, *empty.shape[-1:]])
    buffer = empty.new_full((empty.numel() + 2 * margin,), 7.0)
    return buffer.as_strided(empty.shape, empty.stride(), margin), buffer[:margin], buffer[-margin:]


@every_op
@on_devices
@same_bits
def test_nothing_is_written_around_the_results(name: str, device: str) -> None:
    for call in examples(name, DTYPES[-1]):
        values = call.arguments(call.tensors(device))
        frames = [framed(one) for one in tree_leaves(call.entry.outputs(*values))]
        targets = [target for target, _, _ in frames]
        call.entry.fill(targets, values)
        for _, before, after in frames:
            seven = before.new_full((), 7.0)  # of a bool it is True
            assert (before == seven).all(), "written before the first element"
            assert (after == seven).all(), "written after the last element"
        for target, expected in zip(targets, tree_leaves(call.entry.op(*values)), strict=True):
            assert torch.equal(target, expected)


class Allocated(TorchDispatchMode):
    """The elements of all new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if makes_new_tensors(func):
            self.elements += sum(one.numel() for one in tree_leaves(result) if isinstance(one, Tensor))
        return result


@every_op
def test_nothing_is_allocated_but_the_results(name: str) -> None:
    """Before a kernel runs: what is only looked at for its shape would count in the peak all the same."""
    for call in examples(name, DTYPES[-1], count=len(REGISTRY[name].cases)):
        values = call.arguments(call.tensors("cpu"))
        with Allocated() as allocated:
            results = call.entry.outputs(*values)
        assert allocated.elements <= sum(one.numel() for one in tree_leaves(results))


def leaves(call: Call, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors apart from any graph; those that the call says need a gradient."""
    detached = {
        name: tensor.detach().to((dtype if tensor.is_floating_point() else None) or tensor.dtype)
        for name, tensor in tensors.items()
    }
    return {name: tensor.requires_grad_(name in call.needs) for name, tensor in detached.items()}


def evaluate(function: Callable, call: Call, tensors: dict[str, Tensor], upstreams: Sequence[Tensor | None]) -> Any:
    """Outputs and, where the op has any, gradients for what the call says, given a gradient of each output or None."""
    results = outputs_of(function, call, tensors)
    pairs = [(one, grad) for one, grad in zip(results, upstreams, strict=True) if grad is not None]
    pairs = [(one, grad) for one, grad in pairs if one.requires_grad]  # k's result does not when only q does
    if not pairs:
        return [one.detach() for one in results], []
    given = [grad.to(one.dtype) for one, grad in pairs]
    wanted = [tensors[name] for name in call.needs]
    gradients = torch.autograd.grad([one for one, _ in pairs], wanted, given, allow_unused=True)
    zeros = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(wanted, gradients, strict=True)]
    return [one.detach() for one in results], zeros


@contextmanager
def plain_weights() -> Iterator[None]:
    """References de-quantise by PyTorch: not by the op's own kernel, which the interpreter takes minutes for."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dequantize_4bit, "_on_triton", lambda *_: False)
        yield


def check(call: Call, device: str) -> None:
    """The op against its reference in float64, with the reference's own error in the call's dtypes for a measure."""
    entry, tensors = call.entry, call.tensors(device)
    rounded = call.specs[0][1].dtype if call.op in ROUND_INSIDE else torch.float32
    eps = max(torch.finfo(rounded).eps / 2, torch.finfo(torch.float32).eps)
    given = leaves(call, tensors)
    results = outputs_of(entry.op, call, given)
    upstreams = [upstream(one, call.upstream, at) if one.requires_grad else None for at, one in enumerate(results)]
    assert any(one is not None for one in upstreams) == bool(call.needs)
    actual = evaluate(entry.op, call, given, upstreams)

    def measured(values: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        low = evaluate(entry.reference, call, leaves(call, values), upstreams)
        exact = evaluate(entry.reference, call, leaves(call, values, torch.float64), upstreams)
        return list(zip([*low[0], *low[1]], [one.double() for one in (*exact[0], *exact[1])], strict=True))

    def disturbed(seed: int) -> list[tuple[Tensor, Tensor]]:
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}  # whose backward runs in this thread
        given = [None if one is None else one.cpu() for one in upstreams]
        exact = evaluate(entry.reference, call, leaves(call, on_cpu, torch.float64), given)
        with RoundedOtherwise(seed, eps):
            noisy = evaluate(entry.reference, call, leaves(call, on_cpu, torch.float64), given)
        return list(zip([*noisy[0], *noisy[1]], [one.double() for one in (*exact[0], *exact[1])], strict=True))

    sizes = [result.numel() for result in (*results, *actual[1])]
    few = min(sizes) <= 64 and max(sizes) <= 2048  # a result of few numbers may be lucky in a few tries
    with plain_weights():
        here, *around = (
            measured({name: nearby(tensor, seed) if seed else tensor for name, tensor in tensors.items()})
            for seed in range(24 if few else 3)
        )
        around += [disturbed(seed) for seed in range(8 if few else 2)]
    empty = entry.outputs(*call.arguments(tensors))
    for mine, other in zip(actual[0], [empty] if isinstance(empty, Tensor) else empty, strict=True):
        assert_same_metadata(mine, other)
    for name, gradient in zip(call.needs, actual[1], strict=True):
        assert gradient.dtype == tensors[name].dtype, name
        assert gradient.shape == tensors[name].shape, name
    own = GRADIENT if "_backward" in call.op else FORWARD  # what a backward op returns are gradients
    factors = [own] * len(actual[0]) + [GRADIENT] * len(actual[1])
    for at, (mine, factor) in enumerate(zip([*actual[0], *actual[1]], factors, strict=True)):
        eager, truth = here[at]
        if mine.dtype == torch.bool:  # which of numbers that are nearly equal is larger is no question of accuracy
            continue
        assert_close_to_truth(mine, eager, truth, factor, others=[one[at] for one in around])


@every_op
@on_devices
@given(data=st.data())
def test_agrees_with_its_reference(name: str, device: str, data: st.DataObject) -> None:
    check(data.draw(calls(name)), device)


@every_op
@on_devices
def test_agrees_in_every_case(name: str, device: str) -> None:
    count = len(REGISTRY[name].cases)
    for number, call in enumerate(itertools.chain(*(examples(name, dtype, count) for dtype in DTYPES))):
        if number % count % len(DTYPES) == number // count:  # each case in one dtype, each dtype in several cases
            check(call, device)


@every_op
@on_devices
def test_agrees_on_long_rows(name: str, device: str) -> None:
    """In every configuration of the kernels, and beyond them where the reference takes over."""
    rows = (64, 130, 700, 2500, 5000, 9000)
    for number, call in enumerate(examples(name, DTYPES[-1], len(rows), rows)):
        # Where they take seconds each; a long row of weights is as many columns, which change no configuration.
        if not INTERPRETING or (number % 2 == 0 and not (call.entry.lists and rows[number] > 1000)):
            check(call, device)


def arguments(name: str, device: str) -> Iterator[tuple]:
    for at, dtype in enumerate(DTYPES):
        for number, call in enumerate(examples(name, dtype)):
            if not INTERPRETING or number % len(DTYPES) == at:  # where they take seconds, each in one dtype
                yield call.arguments(call.tensors(device))


def test_every_op_is_registered() -> None:
    """But for names that torch takes apart again."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastft::")}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    composed = {name for name in names if has_kernel(name, "CompositeImplicitAutograd")}
    assert composed == {"fastft::lora_add"}
    assert names - composed == set(REGISTRY)


@compiled_only
@every_op
@on_devices
def test_opcheck(name: str, device: str) -> None:
    for call in examples(name, torch.float32, 3):
        torch.library.opcheck(call.entry.op, call.arguments(leaves(call, call.tensors(device))))


@compiled_only
@every_op
@on_devices
def test_fake_results_are_as_the_real_ones(name: str, device: str) -> None:
    for values in arguments(name, device):
        real = tree_leaves(REGISTRY[name].op(*values))
        with torch._subclasses.FakeTensorMode() as mode:
            moved = tree_map(lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, values)
            fake = tree_leaves(REGISTRY[name].op(*moved))
        for mine, value in zip(fake, real, strict=True):
            assert_same_metadata(mine, value)


@every_op
@on_devices
def test_inputs_are_neither_written_nor_returned(name: str, device: str) -> None:
    for values in arguments(name, device):
        given = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        before = [value.clone() for value in given]
        results = tree_leaves(REGISTRY[name].op(*values))
        assert all(torch.equal(value, kept) for value, kept in zip(given, before, strict=True))
        inputs = {value.untyped_storage().data_ptr() for value in given}
        storages = {result.untyped_storage().data_ptr() for result in results}
        assert len(storages) == len(results)
        assert inputs.isdisjoint(storages)


@every_op
@on_devices
def test_every_element_is_written(name: str, device: str) -> None:
    for values in arguments(name, device):
        with poison():
            results = tree_leaves(REGISTRY[name].op(*values))
        assert all(torch.isfinite(result).all() for result in results)


@compiled_only
@every_op
@on_devices
@same_bits
def test_two_runs_give_the_same_bits(name: str, device: str) -> None:
    """Sums over rows too: one program after another, whatever the order in which they end."""
    for values in arguments(name, device):
        first, second = (tree_leaves(REGISTRY[name].op(*values)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@compiled_only
@every_op
@on_devices
@same_bits
def test_autocast_changes_nothing(name: str, device: str) -> None:
    """Dtypes are the op's own, in forward and backward; PyTorch's casts are in the graph, where the rules find them."""
    for dtype in DTYPES:
        for call in examples(name, dtype):
            tensors = call.tensors(device)
            plain = outputs_of(call.entry.op, call, tensors)
            floats = [one if one.is_floating_point() else None for one in plain]
            upstreams = [None if one is None else upstream(one, "random", at) for at, one in enumerate(floats)]
            expected = evaluate(call.entry.op, call, leaves(call, tensors), upstreams)
            with torch.autocast(device, dtype=LOW[-1]):
                found = evaluate(call.entry.op, call, leaves(call, tensors), upstreams)
            for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
                assert torch.equal(one, other)


@every_op
@on_devices
def test_no_rows(name: str, device: str) -> None:
    for call in examples(name, torch.float32, 1):
        shapes = call.entry.cases[call.case][0]
        tensors = call.tensors(device)
        pattern = r"(index )?(\.\.\.|B)|T[* ]|order |place "
        leading = {key: value for key, value in tensors.items() if re.match(pattern, shapes[key])}
        empty = {key: value[:0] if key in leading else value for key, value in tensors.items()}
        empty |= {key: torch.zeros_like(value) for key, value in tensors.items() if shapes[key].startswith("ends ")}
        results, gradients = evaluate(
            call.entry.op, call, leaves(call, empty), [None] * len(outputs_of(call.entry.op, call, empty))
        )
        assert results[0].numel() == 0 or not leading or results[0].dim() == 0  # a sum of nothing
        assert not gradients
        needing = leaves(call, empty)
        outputs = [one for one in outputs_of(call.entry.op, call, needing) if one.requires_grad]
        if outputs:
            found = torch.autograd.grad(
                outputs, [needing[key] for key in call.needs], [torch.ones_like(o) for o in outputs]
            )
            assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


@compiled_only
@every_op
def test_flops_grow_with_the_input(name: str) -> None:
    counts = {}
    for call in examples(name, torch.float32):
        given = call.arguments(call.tensors("cpu"))
        with FlopCounterMode(display=False) as counter:
            call.entry.op(*given)
        size = max(value.numel() for value in tree_leaves(given) if isinstance(value, Tensor))
        counts[call.case if call.entry.lists else 0, size] = counter.get_total_flops()
    ordered = [counts[size] for size in sorted(counts)]
    assert min(ordered) > 0
    assert ordered == sorted(set(ordered)) or REGISTRY[name].lists  # whose cases differ in more than sizes


def test_bytes_are_those_of_each_element_once() -> None:
    x, weight = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(8)
    assert bytes_moved([x, weight, 1e-6, None, True]) == 3 * 8 * 2 + 8 * 4
    assert bytes_moved([weight.expand(5, 8)]) == 8 * 4


@compiled_only
@every_differentiable_op
@on_devices
def test_gradcheck(name: str, device: str) -> None:
    for call in examples(name, torch.float64, 2, largest=2):
        tensors = leaves(call, call.tensors(device), torch.float64)

        def differentiable(*values: Tensor, call: Call = call, tensors: dict[str, Tensor] = tensors) -> list[Tensor]:
            results = outputs_of(call.entry.op, call, tensors | dict(zip(call.needs, values, strict=True)))
            return [one for one in results if one.requires_grad]

        assert torch.autograd.gradcheck(differentiable, [tensors[key] for key in call.needs])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_op
def test_more_than_two_to_the_31_elements_apart(name: str) -> None:
    """The rows of the first tensor lie so far apart that the last one begins beyond 2**31 elements."""
    for call in examples(name, torch.bfloat16, 2):
        tensors = call.tensors("cuda")
        first = next(iter(tensors))
        value = tensors[first].contiguous()
        step = 2**31 // max(value.shape[0] - 1, 1) + 64
        strides = (step, *value.stride()[1:])
        storage = torch.empty(step * (value.shape[0] - 1) + value[0].numel(), dtype=value.dtype, device="cuda")
        apart = storage.as_strided(value.shape, strides).copy_(value)
        assert (value.shape[0] - 1) * apart.stride(0) >= 2**31
        close, far = (outputs_of(call.entry.op, call, tensors | {first: one}) for one in (value, apart))
        assert all(torch.equal(one, other) for one, other in zip(close, far, strict=True))
        del storage, apart
