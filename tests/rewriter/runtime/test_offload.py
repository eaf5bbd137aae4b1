"""Tensors on the host: they come back as they were, whoever goes backward when, and the pool is bounded."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft.rewriter.runtime.offload import Offloader, Pool

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda:0", marks=[pytest.mark.gpu, on_gpu])]
on_devices = pytest.mark.parametrize("device", DEVICES)
MIB = 2**20


class Square(torch.autograd.Function):
    """x * x, which saves x and something else in other layouts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, (x * 2).t().contiguous().t(), x.sum())
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, double, _ = ctx.saved_tensors
        assert torch.equal(x * 2, double)
        return grad * (x + double / 2)


def stack(offloader: Offloader, x: Tensor, layers: int = 4) -> Tensor:
    offloader.begin()
    for number in range(layers):
        (x,) = offloader.call(lambda one: (Square.apply(one) + 0.5,), (x,), {0, 1} if number < layers - 1 else set())
    offloader.wait()
    return x


def leaf(device: str, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(64, 33, dtype=torch.float64).to(device).requires_grad_()


def expected(x: Tensor) -> Tensor:
    y = x
    for _ in range(4):
        y = y * y + 0.5
    return torch.autograd.grad(y.sum(), x)[0]


@on_devices
def test_gradients_are_those_of_keeping(device: str) -> None:
    offloader, x = Offloader(torch.device(device), 64 * MIB), leaf(device)
    for _ in range(3):
        (grad,) = torch.autograd.grad(stack(offloader, x).sum(), x)
        torch.testing.assert_close(grad, expected(x), rtol=1e-12, atol=0)


@on_devices
def test_forwards_may_come_before_backwards_and_backwards_twice(device: str) -> None:
    offloader = Offloader(torch.device(device), 64 * MIB)
    leaves = [leaf(device, seed) for seed in range(3)]
    results = [stack(offloader, x).sum() for x in leaves]
    for x, y in list(zip(leaves, results, strict=True))[::-1]:
        for again in (True, False):
            (grad,) = torch.autograd.grad(y, x, retain_graph=again)
            torch.testing.assert_close(grad, expected(x), rtol=1e-12, atol=0)


@on_devices
def test_buffers_come_back_and_are_reused(device: str) -> None:
    offloader, x = Offloader(torch.device(device), 64 * MIB), leaf(device)
    y = stack(offloader, x)
    total = offloader.pool.total_bytes
    assert total >= 6 * x.numel() * 8
    del y  # a forward without a backward
    gc.collect()
    assert sum(len(free) for free in offloader.pool.free.values()) == 6
    torch.autograd.grad(stack(offloader, x).sum(), x)
    assert offloader.pool.total_bytes == total


@on_devices
def test_a_full_pool_leaves_tensors_where_they_are(device: str) -> None:
    x = leaf(device)
    offloader = Offloader(torch.device(device), 3 * 2**15)  # of 16,896 bytes three fit
    (grad,) = torch.autograd.grad(stack(offloader, x).sum(), x)
    torch.testing.assert_close(grad, expected(x), rtol=1e-12, atol=0)
    assert offloader.pool.total_bytes <= 3 * 2**15


def test_hooks_of_the_user_are_left_in_charge() -> None:
    offloader, x = Offloader(torch.device("cpu"), 64 * MIB), leaf("cpu")
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: seen.append(one.shape) or one, lambda one: one):
        y = stack(offloader, x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected(x), rtol=1e-12, atol=0)
    assert len(seen) >= 12
    assert offloader.pool.total_bytes == 0


def test_the_pool_counts_what_pinned_memory_takes() -> None:
    pool = Pool(100, pinned=False)
    one = pool.take(33)
    assert one is not None
    assert pool.total_bytes == 64
    assert pool.take(33) is None
    pool.give(one)
    assert pool.take(33) is one
    pool.give(one)
    assert pool.take(65) is None  # 128 as torch allocates it
    assert pool.total_bytes == 0
    assert pool.take(64) is not None


@pytest.mark.gpu
@on_gpu
def test_memory_is_freed_on_the_device() -> None:
    x = torch.rand(2**20, dtype=torch.float64, device="cuda").requires_grad_()
    held = {}
    for limit in (0, 2**30):
        offloader = Offloader(torch.device("cuda", 0), limit)
        before = torch.cuda.memory_allocated()
        y = stack(offloader, x, layers=8)
        held[limit] = torch.cuda.memory_allocated() - before
        torch.autograd.grad(y.sum(), x)
    assert held[2**30] < held[0] - 10 * x.numel() * 8


def test_lengths_that_change_share_buffers() -> None:
    """Pinning memory takes a second for a model's layers, so a new length may not ask for all of it again."""
    offloader, taken = Offloader(torch.device("cpu"), 64 * MIB), []
    for rows in (64, 61, 63, 64, 57, 59):
        x = leaf("cpu")[:rows].detach().requires_grad_()
        (grad,) = torch.autograd.grad(stack(offloader, x).sum(), x)
        torch.testing.assert_close(grad, expected(x), rtol=1e-12, atol=0)
        gc.collect()
        taken.append(offloader.pool.total_bytes)
    assert set(taken[1:]) == {taken[1]}  # the first pass's last tensors are let go in the second
