"""Experts at sizes of several tiles: every kind of routing, against float64, with all gradients.

On a CPU the ops run their reference, in Triton's interpreter (test_interpreter.py) and on a GPU their kernels.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from compare import FORWARD, GRADIENT, assert_close_to_truth
from hypothesis import example, given
from hypothesis import strategies as st
from op_calls import examples
from strategies import DEVICES, DTYPES
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft.kernels import REGISTRY, expert_load, expert_order
from fastft.kernels.expert_call import ExpertCall

ROUTINGS = ("uniform", "skewed", "one", "none of some", "beyond")
DIFFERENTIABLE = ("x", "weight", "bias", "lora_a", "lora_b", "top_k_weights")
on_devices = pytest.mark.parametrize("device", DEVICES)


def chosen(kind: str, tokens: int, top_k: int, experts: int) -> Tensor:
    """The experts of each token [tokens, top_k]."""
    generator = torch.Generator().manual_seed(tokens)
    if kind == "uniform":
        return (torch.arange(tokens * top_k).view(tokens, top_k) * 7) % experts
    if kind == "one":
        return torch.full((tokens, top_k), experts // 2)
    drawn = torch.rand(tokens, top_k, generator=generator)
    if kind == "skewed":
        return (drawn**8 * experts).long()
    if kind == "none of some":
        return (drawn * experts).long() // 3 * 3
    return (drawn * (experts + 2)).long() - 1  # some below 0, some above the last


@on_devices
@given(
    kind=st.sampled_from(ROUTINGS), tokens=st.sampled_from((1, 37, 256, 700)), top_k=st.integers(1, 8),
    experts=st.sampled_from((1, 5, 128, 600)),
)  # fmt: skip
@example(kind="uniform", tokens=700, top_k=4, experts=600)  # more blocks of slots than are summed at a time
def test_order_is_that_of_a_stable_sort(device: str, kind: str, tokens: int, top_k: int, experts: int) -> None:
    index = chosen(kind, tokens, top_k, experts)
    found = torch.ops.fastft.expert_order(index.to(device), experts)
    for mine, expected in zip(found, expert_order.reference(index, experts), strict=True):
        assert torch.equal(mine.cpu(), expected)
    assert torch.equal(found[0][found[1].long()].cpu(), torch.arange(index.numel(), dtype=torch.int32))


@on_devices
def test_what_experts_got_is_added_up(device: str) -> None:
    before = expert_load.totals().get(5, [0] * 5)
    for kind in ("skewed", "beyond"):
        torch.ops.fastft.expert_order(chosen(kind, 300, 2, 5).to(device), 5)
    ids = torch.cat([chosen(kind, 300, 2, 5).flatten() for kind in ("skewed", "beyond")])
    expected = [int((ids == expert).sum()) for expert in range(5)]
    assert [after - one for after, one in zip(expert_load.totals()[5], before, strict=True)] == expected


def draw(kind: str, tokens: int, K: int, N: int, E: int, top_k: int, rank: int, gathers: bool) -> dict[str, Any]:
    """Arguments in float64; a layer that does not gather combines."""
    generator = torch.Generator().manual_seed(K + N)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    order, place, ends = expert_order.reference(chosen(kind, tokens, top_k, E), E)
    return {
        "x": normal(tokens if gathers else tokens * top_k, K), "weight": normal(E, N, K) / K**0.5, "absmax": [],
        "bias": normal(E, N), "lora_a": normal(E, rank, K) / K**0.5,
        "lora_b": normal(E, N, rank) / rank**0.5,
        "top_k_weights": None if gathers else torch.rand(tokens, top_k, generator=generator).double(),
        "order": order, "place": place, "ends": ends, "features": N, "scale": 0.5, "top_k": top_k,
        "transposed": False, "gathers": gathers, "blocksize": 0, "quant_type": "",
    }  # fmt: skip


def computed(values: dict[str, Any], function: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
    """y and the gradients of all tensors."""
    given = {
        name: value.detach().to(device, dtype if value.is_floating_point() else None, copy=True).requires_grad_(
            name in DIFFERENTIABLE
        ) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }  # fmt: skip
    y, _ = function(*(given[name] for name in ExpertCall._fields))
    wanted = [given[name] for name in DIFFERENTIABLE if given[name] is not None]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [one.detach().cpu() for one in (y, *torch.autograd.grad(y, wanted, grad.to(device, dtype)))]


@on_devices
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_several_tiles(device: str, kind: str, gathers: bool, dtype: torch.dtype) -> None:
    from fastft.kernels.expert_linear import reference

    rank = 40 if kind == "uniform" else 24  # more, and fewer, than a step takes
    values = draw(kind, tokens=150, K=80, N=264, E=3, top_k=2, rank=rank, gathers=gathers)
    values = {
        name: value.to(dtype).double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in values.items()
    }
    truth = computed(values, reference, torch.float64, "cpu")
    eager = computed(values, reference, dtype, "cpu")
    mine = computed(values, torch.ops.fastft.expert_linear, dtype, device)
    for at, (one, right, plain) in enumerate(zip(mine, truth, eager, strict=True)):
        assert_close_to_truth(one, plain, right, GRADIENT if at else FORWARD)


@on_devices
@pytest.mark.parametrize("axes", [*itertools.permutations(range(3))], ids=str)
def test_weights_and_adapters_of_any_strides(device: str, axes: tuple[int, ...]) -> None:
    """Laid out with these axes one behind the other, experts innermost too, as some adapters have them."""
    values = draw("uniform", tokens=12, K=80, N=72, E=8, top_k=2, rank=8, gathers=True)
    plain = computed(values, torch.ops.fastft.expert_linear, DTYPES[-1], device)
    back = [axes.index(axis) for axis in range(3)]
    for name in ("weight", "lora_a", "lora_b"):
        values[name] = values[name].permute(axes).contiguous().permute(back)
    for one, other in zip(computed(values, torch.ops.fastft.expert_linear, DTYPES[-1], device), plain, strict=True):
        torch.testing.assert_close(one, other)


@on_devices
def test_rows_of_no_expert_are_zero_and_get_no_gradient(device: str) -> None:
    values = draw("one", tokens=9, K=16, N=32, E=3, top_k=2, rank=4, gathers=True)
    values["ends"] = torch.zeros_like(values["ends"])
    y, *gradients = computed(values, torch.ops.fastft.expert_linear, torch.float32, device)
    assert not y.any()
    assert not any(gradient.any() for gradient in gradients)


@on_devices
def test_an_expert_s_numbers_stay_its_own(device: str) -> None:
    """Tiles reach into what lies beside an expert's rows and weights: whatever is there, NaN too, goes nowhere."""
    values = draw("uniform", tokens=50, K=72, N=40, E=4, top_k=1, rank=4, gathers=True)
    clean = computed(values, torch.ops.fastft.expert_linear, DTYPES[-1], device)[0]
    values["weight"][2] = float("nan")
    y = computed(values, torch.ops.fastft.expert_linear, DTYPES[-1], device)[0]
    order, ends = values["order"], values["ends"]
    inside = torch.zeros(len(order), dtype=torch.bool)
    inside[ends[1] : ends[2]] = True
    assert y[inside].isnan().all()
    assert torch.equal(y[~inside], clean[~inside])


class Peak(TorchDispatchMode):
    """The most bytes of tensors that are made within it and there at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        results = func(*args, **(kwargs or {}))
        for one in tree_leaves(results):
            storage = one.untyped_storage()
            if storage._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for reference, size in self.made.values() if not reference.expired()))
        return results


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated around kernels, without these; for a card of which nothing is asked."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from fastft.kernels import expert_call, expert_order_triton, expert_plan

    nothing = lambda *args, **kwargs: None  # noqa: E731
    for name in ("product", "outer", "combine", "spread", "weigh"):
        monkeypatch.setattr(expert_plan, name, nothing)
    monkeypatch.setattr(expert_call, "dequantize_into", nothing)
    monkeypatch.setattr(expert_order_triton, "on_grid", lambda *args: nothing)


def allocated(op: str, arguments: Sequence[Any]) -> tuple[int, int]:
    """What a call of kernels allocates beside its results, and what the planner is told of it."""
    from fastft.kernels import expert_order_triton, expert_plan

    runs = {"order": expert_order_triton.sort, "linear": expert_plan.forward, "linear_backward": expert_plan.backward}
    entry = REGISTRY[f"fastft::expert_{op}"]
    targets = entry.outputs(*arguments)
    with Peak() as peak:
        runs[op](targets, *arguments)
    assert entry.scratch is not None
    return peak.most, entry.scratch(*arguments)


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("op", ["order", "linear", "linear_backward"])
def test_no_call_allocates_more_than_the_planner_is_told(op: str) -> None:
    for call in examples(f"fastft::expert_{op}", torch.float32, count=20):
        most, told = allocated(op, call.arguments(call.tensors("cpu")))
        assert most <= told, call


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("gathers", [True, False])
def test_the_planner_is_told_little_more_than_is_allocated(gathers: bool) -> None:
    """Of a layer of Qwen3-30B-A3B, in 4 bits with adapters of PEFT's layout."""
    T, K, N, E, k, rank = 8192, *((2048, 1536) if gathers else (768, 2048)), 128, 8, 16
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    index = [empty(size, dtype=torch.int32) for size in (T * k, T * k, E)]
    absmax = empty(E * N * K // 64, dtype=torch.float32)
    factors = empty(E, rank, K, dtype=torch.float32), empty(N, rank, E, dtype=torch.float32).permute(2, 0, 1)
    weights = None if gathers else empty(T, k, dtype=torch.float32)
    arguments = [
        empty(T if gathers else T * k, K), empty(E * N * K // 2, 1, dtype=torch.uint8), [absmax], None, *factors,
        weights, *index, N, 2.0, k, False, gathers, 64, "nf4",
    ]  # fmt: skip
    grads = empty(T * k if gathers else T, N), empty(T * k, rank)
    needed = [True, False, False, True, True, not gathers]
    for op, call in (("linear", arguments), ("linear_backward", [*grads, *arguments, needed])):
        most, told = allocated(op, call)
        assert most <= told <= 1.1 * most
        assert told >= 2 * E * N * K  # the weights in 16 bits are the most of it
