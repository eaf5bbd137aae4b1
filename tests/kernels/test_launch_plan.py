"""One plan for calls of many sizes: the same bits as the op itself, and a size that decides otherwise gets its own."""

import gc
import linecache
import re
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_calls import Call, examples
from strategies import CUDA, DEVICES, DTYPES, INTERPRETING
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft.kernels import REGISTRY, attention_engines
from fastft.kernels.core import launch_plan
from fastft.kernels.core.launch_plan import Described, Named, Plan
from fastft.kernels.core.launch_recorder import constant, is_aligned, setting

OPS = sorted(name for name, entry in REGISTRY.items() if entry.planned)
BY_BITSANDBYTES = ("fastft::dequantize_4bit", "fastft::lora_linear", "fastft::lora_linear_backward")
LEADING = ((2, 3), (3, 7), (1, 9))


def described(calls: Sequence[Sequence[Any]]) -> list[Any]:
    """Describe the arguments of these calls: sizes in which they differ are named, by what they are in each call."""
    names: dict[tuple[int, ...], str] = {}

    def size(sizes: tuple[int, ...]) -> int | str:
        if len(set(sizes)) == 1:
            return sizes[0]
        return names.setdefault(sizes, f"n{len(names)}")

    def strides(tensors: Sequence[Tensor], shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if not all(tensor.is_contiguous() for tensor in tensors):
            return tuple(size(each) for each in zip(*(tensor.stride() for tensor in tensors), strict=True))
        found: list[int | str] = [1]
        for one in reversed(shape[1:]):
            known = found[0]
            found.insert(0, known * one if isinstance(known, int) and isinstance(one, int) else f"{known}*{one}")
        return tuple(found[: len(shape)])

    def describe(alike: Sequence[Any]) -> Any:
        first = alike[0]
        if isinstance(first, Tensor):
            shape = tuple(size(each) for each in zip(*(tensor.shape for tensor in alike), strict=True))
            return Described(first.dtype, str(first.device), shape, strides(alike, shape), all(map(is_aligned, alike)))
        if isinstance(first, (list, tuple)):
            return [describe(inner) for inner in zip(*alike, strict=True)]
        assert all(value == first for value in alike)
        return first

    return [describe(alike) for alike in zip(*calls, strict=True)]


def at_sizes(name: str, dtype: torch.dtype, case: int) -> list[Call]:
    """One case at several leading sizes."""
    count = len(REGISTRY[name].cases)
    return [list(examples(name, dtype, count=count, leading=leading))[case] for leading in LEADING]


def check(call: Call, plan: Plan, device: str) -> None:
    values = call.arguments(call.tensors(device))
    for one, other in zip(tree_leaves(plan(*values)), tree_leaves(call.entry.compute(*values)), strict=True):
        # A compiled kernel that knows less of its arguments may add up in another order.
        largest = float(other.abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
        atol = 4 * largest * torch.finfo(other.dtype).eps if device == "cuda" else 0
        torch.testing.assert_close(one, other, rtol=0, atol=atol, equal_nan=True)
        longer = [axis for axis, size in enumerate(one.shape) if size > 1]
        assert [one.stride(axis) for axis in longer] == [other.stride(axis) for axis in longer]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("device", DEVICES if INTERPRETING else [CUDA])  # references alone are recorded on a CPU
@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETING else DTYPES)
def test_one_plan_gives_the_bits_of_the_op_at_every_size(name: str, device: str, dtype: torch.dtype) -> None:
    with attention_engines.only_triton(), torch.no_grad():
        for case in range(len(REGISTRY[name].cases))[DTYPES.index(dtype) :: 4 if INTERPRETING else 2 * len(DTYPES)]:
            calls = at_sizes(name, dtype, case)
            plan = Plan(REGISTRY[name].compute, described([call.arguments(call.tensors(device)) for call in calls]))
            for call in calls:
                check(call, plan, device)
            assert not plan.unrecorded or name in BY_BITSANDBYTES, (
                "its tables are made each time, and few rows are its own GEMM's"
            )


def planned(compute: Callable[..., Any], *calls: Sequence[Any]) -> Plan:
    """A plan that was called with the arguments of each call; their sizes are named where they differ."""
    plan = Plan(compute, described(calls), "fastft_tests::an_op")
    for arguments in calls:
        plan(*arguments)
    return plan


def test_a_comparison_of_sizes_makes_another_function_and_nothing_else_does() -> None:
    calls = []

    def compute(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 2 if x.shape[0] > 10 else x * torch.sym_max(3, x.shape[0] // 4)

    plan = planned(compute, *[(torch.ones(length, 3),) for length in (2, 5, 7, 12, 30, 1)])
    assert len(plan.variants) == 3  # up to 10, more than 10, and 1
    assert len(calls) == 3 * 2  # recorded, and called
    for length in range(1, 40):
        expected = 2.0 if length > 10 else max(3.0, length // 4)
        assert torch.equal(plan(torch.ones(length, 3)), torch.full((length, 3), expected))
    assert len(calls) == 3 * 2


def test_a_number_that_changes_decides_as_a_size_does_and_may_be_negative() -> None:
    def compute(x: Tensor, number: int) -> Tensor:
        if number == attention_engines.NO_RANGES:
            return x - 1
        return x * 2 if number == attention_engines.AS_GIVEN else x + 0

    x = torch.arange(6.0)
    plan = Plan(compute, [Described(x.dtype, "cpu", (6,), (1,), True), Named("n0")])
    for number in (5, -1, 9, 0, -1, 3):
        assert torch.equal(plan(x, number), compute(x, number))
    assert len(plan.variants) == 3
    assert not plan.unrecorded


def test_sizes_that_decide_too_often_are_left_to_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_plan, "MOST_VARIANTS", 4)

    def compute(x: Tensor) -> Tensor:
        return x * int(x.shape[0])

    lengths = [*range(2, 12), *range(2, 12)]
    plan = planned(compute, *[(torch.ones(length),) for length in lengths])
    assert len(plan.variants) <= 4
    for length in lengths:
        assert torch.equal(plan(torch.ones(length)), torch.full((length,), float(length)))
    assert len(files_of("fastft_tests::an_op")) <= 4
    del plan
    gc.collect()
    assert files_of("fastft_tests::an_op") == []


def test_calls_that_depend_on_values_run_as_the_op_does() -> None:
    def compute(x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x * 3

    plan = planned(compute, (torch.ones(3),), (torch.ones(4),))
    assert len(plan.unrecorded) == len(plan.variants) == 1
    assert torch.equal(plan(-torch.ones(3)), -3 * torch.ones(3))


def test_what_cannot_be_recorded_is_left_to_the_op_for_such_sizes_alone() -> None:
    calls = []

    def compute(x: Tensor) -> Tensor:
        calls.append(1)
        if x.shape[0] < 8:
            return x * float(x[0, 0])
        return x * 2

    plan = planned(compute, *[(torch.ones(length, 2),) for length in (3, 20, 5, 9)])
    assert len(plan.variants) == 2
    assert len(plan.unrecorded) == 1
    before = len(calls)
    for length in (4, 12, 30):
        assert torch.equal(plan(torch.ones(length, 2)), torch.full((length, 2), 1.0 if length < 8 else 2.0))
    assert len(calls) == before + 1


def test_tensors_from_elsewhere_are_not_written_down_unless_they_are_constants() -> None:
    elsewhere, always = torch.ones(3), constant(torch.full((3,), 2.0))
    by_elsewhere, by_always = (lambda x: x + elsewhere), (lambda x: x.clone().mul_(3))
    assert len(planned(by_elsewhere, (torch.ones(3),)).unrecorded) == 1
    assert not planned(by_always, (torch.ones(3),)).unrecorded
    assert always.sum() == 6


def test_a_setting_that_changes_makes_another_function() -> None:
    doubles = [True]
    read = lambda: doubles[0]  # noqa: E731

    def compute(x: Tensor) -> Tensor:
        return x * 2 if setting(read) else x * 3

    plan = planned(compute, (torch.ones(3),), (torch.ones(4),))
    assert torch.equal(plan(torch.ones(3)), torch.full((3,), 2.0))
    doubles[0] = False
    assert torch.equal(plan(torch.ones(3)), torch.full((3,), 3.0))
    assert len(plan.variants) == 2
    assert not plan.unrecorded


def test_under_autocast_the_op_runs_as_it_is_written() -> None:
    calls = []

    def compute(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 2

    plan = planned(compute, (torch.ones(3),))
    before = len(calls)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plan(torch.ones(3)), torch.full((3,), 2.0))
    assert len(calls) == before + 1


def test_equal_descriptions_are_one_plan() -> None:
    x = Described(torch.float32, "cpu", ("n0", 16), (16, 1), True)
    weight = Described(torch.float32, "cpu", (16,), (1,), True)
    one = launch_plan.plan("fastft::rms_norm", x, weight, 1e-6, 0.0, True)
    assert launch_plan.plan("fastft::rms_norm", x, weight, 1e-6, 0.0, True) is one
    assert launch_plan.plan("fastft::rms_norm", x, weight, 1e-6, 0.0, False) is not one


def files_of(name: str) -> list[str]:
    """The generated files of an op whose lines Python knows."""
    return [file for file in linecache.cache if re.fullmatch(rf"<launch plan \d+ of {name}>", file)]


def test_a_traceback_has_the_line_of_the_call_that_failed() -> None:
    def compute(x: Tensor) -> Tensor:
        return torch.cat([x.double(), x.double()]).exp()

    plan = planned(compute, (torch.zeros(2),))
    (function,) = plan.variants
    file = function.__code__.co_filename
    with pytest.raises(RuntimeError, match="None") as raised:
        function(None)
    linecache.checkcache()  # as the traceback module does
    assert f'File "{file}", line 2, in planned' in (told := "".join(traceback.format_exception(raised.value)))
    assert "(a0" in told.split(file)[1]
    plan.variants.clear()
    assert file in files_of("fastft_tests::an_op"), "while somebody holds the function"
    del function, raised
    gc.collect()  # the exception's frames
    assert file not in files_of("fastft_tests::an_op")


class Living(TorchDispatchMode):
    """How many tensors live at the most, of those that calls have made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made.append(weakref.ref(result))
        self.most = max(self.most, len({id(one) for made in self.made if (one := made()) is not None}))
        return result


def test_what_is_read_for_the_last_time_is_freed() -> None:
    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        out, kept = x.new_empty(8, 4), []
        for _ in range(6):
            kept.append(x.exp())
            out[:, 1:3].copy_(kept[-1][:, :2])
        unused = x.view(-1)
        return out, x.sin() if unused.shape[0] else x

    x = torch.randn(8, 4)
    plan, expected = planned(compute, (x,)), compute(x)
    with Living() as living:
        actual = plan(x)
    assert all(torch.equal(one[:, 1:3], other[:, 1:3]) for one, other in zip(actual, expected, strict=True))
    assert living.most <= 5  # the result, a product, a view of each; in the end two results


def test_writing_in_place_and_into_parts() -> None:
    def compute(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        out = x.new_zeros(x.shape[0], 6)
        for at, weight in enumerate(weights):
            torch.mm(x, weight, out=out[:, 3 * at : 3 * at + 3])
        whole = out[0 : x.shape[0]]
        whole.addmm_(x, torch.cat(weights, 1))
        return [out, out.t().contiguous(), *torch.sort(whole)]

    make = lambda rows: (torch.randn(rows, 4), [torch.randn(4, 3), torch.randn(4, 3)])  # noqa: E731
    plan = planned(compute, make(4), make(9))
    assert not plan.unrecorded
    assert len(plan.variants) == 1
    for given in (make(4), make(9), make(6)):
        for one, other in zip(plan(*given), compute(*given), strict=True):
            assert torch.equal(one, other)


def test_an_error_while_recording_is_the_callers_and_the_next_call_is_right() -> None:
    def compute(x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise torch.OutOfMemoryError("full")
        return x + 1

    plan = planned(compute, (torch.zeros(2),), (torch.zeros(5),))
    with pytest.raises(torch.OutOfMemoryError):
        plan(torch.zeros(3))
    for length in (2, 5, 6):
        assert torch.equal(plan(torch.zeros(length)), torch.ones(length))


def test_arguments_that_share_memory_may_lie_elsewhere_the_next_time() -> None:
    def compute(left: Tensor, right: Tensor) -> Tensor:
        whole = torch.empty(6)
        for part, one in zip(whole.split(2), (left, right, left), strict=True):
            part.copy_(one[1:3])
        return whole

    buffer = torch.arange(32.0)
    plan = planned(compute, (buffer[0:4], buffer[8:12]))
    assert not plan.unrecorded
    for given in ((buffer[4:8], buffer[16:20]), (buffer[24:28], buffer[4:8]), (buffer[4:8], buffer[4:8])):
        assert torch.equal(plan(*given), torch.cat([given[0][1:3], given[1][1:3], given[0][1:3]]))


def test_a_view_that_counts_from_the_begin_of_its_storage_is_not_written_down() -> None:
    buffer = torch.arange(16.0)
    compute = lambda x: x.as_strided((2,), (1,), x.storage_offset()) + 1  # noqa: E731
    plan = planned(compute, (buffer[4:8],))
    assert len(plan.unrecorded) == 1
    assert torch.equal(plan(buffer[8:12]), torch.tensor([9.0, 10.0]))


def test_a_recording_has_its_own_threads_calls_alone() -> None:
    def elsewhere() -> None:
        torch.ones(1).mul_(2)

    def compute(x: Tensor) -> Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return x + 1

    plan = planned(compute, (torch.zeros(2),))
    assert not plan.unrecorded
    (function,) = plan.variants
    assert "mul" not in "".join(linecache.cache[function.__code__.co_filename][2])
    assert torch.equal(plan(torch.zeros(2)), torch.ones(2))
