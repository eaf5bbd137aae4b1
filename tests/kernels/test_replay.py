"""Calls done again: the same bits as the first time, and nothing is done again that is not sure to be the same."""

import ctypes
import gc
import linecache
import re
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_calls import Call, examples
from strategies import DEVICES, DTYPES, INTERPRETING
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft.kernels import REGISTRY, attention_engines
from fastft.kernels.core import registry, replay
from fastft.kernels.core.replay import Replayed, constant, kind_of, on_grid

OPS = sorted(name for name, entry in REGISTRY.items() if entry.replayed)
BY_BITSANDBYTES = ("fastft::dequantize_4bit", "fastft::lora_linear", "fastft::lora_linear_backward")


def with_other_values(call: Call) -> Call:
    return replace(call, specs=tuple((name, replace(spec, seed=spec.seed + 97)) for name, spec in call.specs))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_op_gives_the_same_when_it_is_replayed(name: str, device: str, dtype: torch.dtype) -> None:
    with attention_engines.only_triton(), torch.no_grad():
        for call in examples(name, dtype, count=len(REGISTRY[name].cases)):
            replayed = Replayed(call.entry.compute)
            values = call.arguments(call.tensors(device))
            expected = tree_leaves(replayed(*values))
            recorded = tree_leaves(replayed(*values))
            (function,) = replayed.functions.values()
            on_triton = device != "cpu" or INTERPRETING
            assert function is not None or (name in BY_BITSANDBYTES and not on_triton), "its tables are made each time"
            other = with_other_values(call)
            others = other.arguments(other.tensors(device))
            assert kind_of(others) == kind_of(values)
            again, truth = tree_leaves(replayed(*others)), tree_leaves(call.entry.compute(*others))
            for one, two in zip([*expected, *again], [*recorded, *truth], strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
                assert one.stride() == two.stride()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("device", DEVICES)
def test_ops_are_replayed_when_they_are_called(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below autograd, where PyTorch's calls are others than above it, and in float64, which no kernel of ours takes."""
    monkeypatch.setattr(registry, "REPLAYED_ON", {device})
    with attention_engines.only_triton():
        for call in examples(name, torch.float64):
            values = call.arguments(call.tensors(device))
            expected = tree_leaves(call.entry.compute(*values))
            for _ in range(4):
                for one, two in zip(tree_leaves(call.entry.op(*values)), expected, strict=True):
                    torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def thrice(compute: Callable[..., Any], *arguments: Any) -> Replayed:
    replayed = Replayed(compute)
    for _ in range(3):
        replayed(*arguments)
    return replayed


def test_calls_that_depend_on_values_are_never_replayed() -> None:
    def compute(x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x * 3

    replayed = thrice(compute, torch.ones(3))
    assert list(replayed.functions.values()) == [None]
    assert torch.equal(replayed(-torch.ones(3)), -3 * torch.ones(3))


def test_tensors_from_elsewhere_are_not_replayed_unless_they_are_constants() -> None:
    elsewhere, always = torch.ones(3), constant(torch.full((3,), 2.0))
    assert list(thrice(lambda x: x + elsewhere, torch.ones(3)).functions.values()) == [None]
    replayed = thrice(lambda x: x + always, torch.ones(3))
    assert None not in replayed.functions.values()
    assert torch.equal(replayed(torch.zeros(3)), always)


def test_another_kind_of_arguments_is_another_function() -> None:
    calls = []

    def compute(x: Tensor, scales: list[float], others: list[Tensor]) -> Tensor:
        calls.append(1)
        return x.clone().mul_(scales[0] * x.shape[0] + len(others))

    replayed = Replayed(compute)
    x, buffer = torch.ones(4, 4), torch.ones(64)
    kinds: list[tuple[Any, ...]] = [
        (x, [2.0], []), (x[:2], [2.0], []), (x.T[:, :2], [2.0], []), (x.double(), [2.0], []), (x, [3.0], []),
        (x, [2.0], [x]), (buffer[1:17].view(4, 4), [2.0], []),
    ]  # fmt: skip
    for arguments in kinds * 3:
        assert torch.equal(
            replayed(*arguments), arguments[0] * (arguments[1][0] * len(arguments[0]) + len(arguments[2]))
        )
    assert len(calls) == 2 * len(kinds)
    assert len(replayed.functions) == len(kinds)


def test_kinds_that_keep_coming_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_KINDS", 3)
    replayed = Replayed(lambda x: x + 1)
    for length in [*range(10), *range(10)] * 2:
        for _ in range(2):
            assert torch.equal(replayed(torch.zeros(length)), torch.ones(length))
        assert len(replayed.met) <= 3
        assert len(replayed.functions) <= 3
        assert len(files_of("an op")) <= 3
    del replayed
    assert files_of("an op") == []


def files_of(name: str) -> list[str]:
    """The generated files of an op whose lines Python knows."""
    return [file for file in linecache.cache if re.fullmatch(rf"<replay \d+ of {name}>", file)]


def test_a_traceback_has_the_line_of_the_call_that_failed() -> None:
    def compute(x: Tensor) -> Tensor:
        return torch.cat([x.double(), x.double()]).exp()

    replayed = Replayed(compute, "fastft_tests::twice")
    for _ in range(2):
        replayed(torch.zeros(2))
    (file,) = files_of("fastft_tests::twice")
    (function,) = replayed.functions.values()
    assert function is not None
    with pytest.raises(RuntimeError, match="None") as raised:
        function(None)
    linecache.checkcache()  # as the traceback module does
    assert f'File "{file}", line 2, in replay' in (told := "".join(traceback.format_exception(raised.value)))
    assert "(a0" in told.split(file)[1]
    replayed.functions.clear()
    assert files_of("fastft_tests::twice") == [file], "while somebody holds the function"
    del function, raised
    gc.collect()  # the exception's frames
    assert files_of("fastft_tests::twice") == []


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

    replayed, x = thrice(compute, torch.randn(8, 4)), torch.randn(8, 4)
    expected = compute(x)
    with Living() as living:
        actual = replayed(x)
    assert all(torch.equal(one[:, 1:3], other[:, 1:3]) for one, other in zip(actual, expected, strict=True))
    assert living.most <= 5  # the result, a product, a view of each; in the end two results
    assert len(living.made) == 6 * 3 + 3  # a view that nobody reads is not made, and one that is read often once


def test_writing_in_place_and_into_parts() -> None:
    def compute(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        out = x.new_zeros(4, 6)
        for at, weight in enumerate(weights):
            torch.mm(x, weight, out=out[:, 3 * at : 3 * at + 3])
        whole = out[0:4]
        whole.addmm_(x, torch.cat(weights, 1))
        return [out, out.t().contiguous(), *torch.sort(whole)]

    make = lambda: (torch.randn(4, 4), [torch.randn(4, 3), torch.randn(4, 3)])  # noqa: E731
    replayed = thrice(compute, *make())
    assert None not in replayed.functions.values()
    given = make()
    for one, other in zip(replayed(*given), compute(*given), strict=True):
        assert torch.equal(one, other)


def test_an_error_while_recording_is_the_callers_and_the_next_call_is_right() -> None:
    fails = [False, True, False, False]

    def compute(x: Tensor) -> Tensor:
        if fails.pop(0):
            raise torch.OutOfMemoryError("full")
        return x + 1

    replayed = Replayed(compute)
    replayed(torch.zeros(2))
    with pytest.raises(torch.OutOfMemoryError):
        replayed(torch.zeros(2))
    for _ in range(4):
        assert torch.equal(replayed(torch.zeros(2)), torch.ones(2))
    assert fails == [False]


class Kernel:
    """As Triton's: compiled when it is launched, and what was compiled takes constants in their places."""

    arg_names = ("x", "n", "scale", "BLOCK")

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(x: Tensor, n: int, scale: float, *, BLOCK: int, num_warps: int) -> Any:
            x.mul_(scale)
            self.launches.append(("compiled", grid, n, scale, BLOCK, num_warps))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(address: int, n: int, scale: float, block: int) -> None:
            ctypes.c_float.from_address(address).value *= scale
            self.kernel.launches.append(("again", grid, n, scale, block))

        return launch


def test_kernels_are_launched_again_as_they_were_compiled() -> None:
    kernel = Kernel()

    def compute(x: Tensor, scale: float) -> Tensor:
        out = x.clone()
        on_grid(kernel, (3, 2))(out[1:], 7, scale, BLOCK=16, num_warps=4)
        return out

    replayed = thrice(compute, torch.ones(2), 0.5)
    assert torch.equal(replayed(torch.full((2,), 4.0), 0.5), torch.tensor([4.0, 2.0]))
    first, again = ("compiled", (3, 2), 7, 0.5, 16, 4), ("again", (3, 2, 1), 7, 0.5, 16)
    assert kernel.launches == [first, first, again, again]


def test_arguments_that_share_memory_may_lie_elsewhere_the_next_time() -> None:
    kernel = Kernel()

    def compute(left: Tensor, right: Tensor) -> Tensor:
        whole = torch.empty(6)
        for part, one in zip(whole.split(2), (left, right, left), strict=True):
            part.copy_(one[1:3])
            on_grid(kernel, (1,))(part, 2, 3.0, BLOCK=4, num_warps=1)
        return whole

    buffer = torch.arange(32.0)
    replayed = thrice(compute, buffer[0:4], buffer[8:12])
    assert None not in replayed.functions.values()
    for given in ((buffer[4:8], buffer[16:20]), (buffer[24:28], buffer[4:8])):
        actual = replayed(*given)
        expected = torch.cat([given[0][1:3], given[1][1:3], given[0][1:3]])
        expected[::2] *= 3.0
        assert torch.equal(actual, expected)


def test_a_tensor_that_was_given_twice_may_be_two_the_next_time() -> None:
    def compute(x: Tensor, y: Tensor, others: list[Tensor]) -> Tensor:
        return x + 2 * y + 3 * others[0] + 5 * others[1]

    x = torch.randn(4)
    replayed = thrice(compute, x, x, [x, x])
    assert None not in replayed.functions.values()
    different = [torch.randn(4) for _ in range(4)]
    assert torch.equal(replayed(*different[:2], different[2:]), compute(*different[:2], different[2:]))


def test_a_view_that_counts_from_the_begin_of_its_storage_is_not_replayed() -> None:
    buffer = torch.arange(16.0)
    replayed = thrice(lambda x: x.as_strided((2,), (1,), x.storage_offset()) + 1, buffer[4:8])
    assert list(replayed.functions.values()) == [None]
    assert torch.equal(replayed(buffer[8:12]), torch.tensor([9.0, 10.0]))


def test_an_op_within_an_op_is_one_call() -> None:
    kernel = Kernel()

    @torch.library.custom_op("fastft_tests::scaled_by_a_kernel", mutates_args=())
    def scaled(x: Tensor) -> Tensor:
        out = x.clone()
        on_grid(kernel, (1,))(out, 1, 2.0, BLOCK=1, num_warps=1)
        return out

    replayed = thrice(lambda x: scaled(x) + 1, torch.ones(2))
    assert None not in replayed.functions.values()
    before = len(kernel.launches)
    assert torch.equal(replayed(torch.ones(2)), torch.full((2,), 3.0))
    assert len(kernel.launches) == before + 1


def test_a_recording_has_its_own_threads_calls_alone() -> None:
    kernel = Kernel()

    def elsewhere() -> None:
        on_grid(kernel, (9,))(torch.ones(1), 1, 1.0, BLOCK=1, num_warps=1)

    def compute(x: Tensor) -> Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return x + 1

    replayed = thrice(compute, torch.zeros(2))
    before = len(kernel.launches)
    assert torch.equal(replayed(torch.zeros(2)), torch.ones(2))
    assert len(kernel.launches) == before
