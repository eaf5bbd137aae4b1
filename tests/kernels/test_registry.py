"""What holds for every op in torch.ops.fastft: the registry finds them, so a new op is tested when it is made."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from compare import assert_same_metadata
from strategies import DEVICES, DTYPES, INTERPRETING
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from fastft.kernels import REGISTRY

OPS = sorted(REGISTRY)
every_op = pytest.mark.parametrize("name", OPS)
on_devices = pytest.mark.parametrize("device", DEVICES)


def examples(name: str, device: str) -> Iterator[tuple]:
    for dtype in DTYPES:
        yield from REGISTRY[name].examples(dtype, torch.device(device))


def clones(arguments: tuple) -> tuple:
    return tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, arguments)


@contextmanager
def poison() -> Iterator[None]:
    """torch.empty is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_every_op_is_registered() -> None:
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastft::")}
    assert names == set(REGISTRY)


@every_op
def test_there_are_examples(name: str) -> None:
    for dtype in DTYPES:
        assert len(list(REGISTRY[name].examples(dtype, torch.device("cpu")))) >= 3


@pytest.mark.skipif(INTERPRETING, reason="says nothing of the kernels, and is slow there")
@every_op
@on_devices
def test_opcheck(name: str, device: str) -> None:
    for arguments in REGISTRY[name].examples(torch.float32, torch.device(device)):
        torch.library.opcheck(REGISTRY[name].op, arguments)


@every_op
@on_devices
def test_agrees_with_the_reference(name: str, device: str) -> None:
    for arguments in examples(name, device):
        actual, expected = (tree_leaves(f(*arguments)) for f in (REGISTRY[name].op, REGISTRY[name].reference))
        for mine, value in zip(actual, expected, strict=True):
            eps = torch.finfo(mine.dtype).eps  # a rounding may go the other way, and leave two steps of difference
            torch.testing.assert_close(mine, value, rtol=2 * eps, atol=8 * eps * value.abs().max().item())


@every_op
@on_devices
def test_fake_results_are_as_the_real_ones(name: str, device: str) -> None:
    for arguments in examples(name, device):
        real = tree_leaves(REGISTRY[name].op(*arguments))
        with torch._subclasses.FakeTensorMode() as mode:
            moved = tree_map(lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v, arguments)
            fake = tree_leaves(REGISTRY[name].op(*moved))
        for mine, value in zip(fake, real, strict=True):
            assert_same_metadata(mine, value)


@every_op
@on_devices
def test_inputs_are_neither_written_nor_returned(name: str, device: str) -> None:
    for arguments in examples(name, device):
        before = clones(arguments)
        results = tree_leaves(REGISTRY[name].op(*arguments))
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        for value, kept in zip(tree_leaves(arguments), tree_leaves(before), strict=True):
            assert torch.equal(value, kept) if isinstance(value, torch.Tensor) else value == kept
        storages = [tensor.untyped_storage().data_ptr() for tensor in (*tensors, *results)]
        assert len({*storages}) == len(results) + len({*storages[: len(tensors)]})


@every_op
@on_devices
def test_every_element_is_written(name: str, device: str) -> None:
    for arguments in examples(name, device):
        with poison():
            results = tree_leaves(REGISTRY[name].op(*arguments))
        assert all(torch.isfinite(result).all() for result in results)


@every_op
@on_devices
def test_two_runs_give_the_same_bits(name: str, device: str) -> None:
    for arguments in examples(name, device):
        first, second = (tree_leaves(REGISTRY[name].op(*arguments)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_op
def test_flops_grow_with_the_input(name: str) -> None:
    counts = {}
    for arguments in REGISTRY[name].examples(torch.float32, torch.device("cpu")):
        with FlopCounterMode(display=False) as counter:
            REGISTRY[name].op(*arguments)
        counts[arguments[0].numel()] = counter.get_total_flops()
    ordered = [counts[size] for size in sorted(counts)]
    assert ordered[0] > 0
    assert ordered == sorted(set(ordered))
