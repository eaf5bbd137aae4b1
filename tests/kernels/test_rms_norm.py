"""fastft::rms_norm against the spellings models use, in float64 for the truth and in their own dtype for the tolerance.

Runs on the CPU with the reference, in Triton's interpreter (test_interpreter.py starts it), and compiled on a GPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compare import FORWARD, GRADIENT, assert_close_to_truth, assert_same_metadata
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DEVICES,
    DTYPES,
    INTERPRETING,
    LAYOUTS,
    LOW,
    UPSTREAM,
    Spec,
    dtypes,
    lengths,
    requires_grad,
    seeds,
    shapes,
    specs,
    upstream,
    upstreams,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.kernels.core import dispatch, registry

rms_norm = torch.ops.fastft.rms_norm
on_devices = pytest.mark.parametrize("device", DEVICES)


def unit(x: Tensor, eps: float) -> Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * unit(x, eps).to(x.dtype)


def gpt_oss(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (weight * unit(x, eps)).to(x.dtype)


def gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (unit(x, eps) * (1.0 + weight.to(torch.promote_types(x.dtype, torch.float32)))).to(x.dtype)


class Spelling(NamedTuple):
    eager: Callable[[Tensor, Tensor, float], Tensor]
    offset: float
    round_first: bool


SPELLINGS = {
    "llama": Spelling(llama, 0.0, True),
    "gpt_oss": Spelling(gpt_oss, 0.0, False),
    "gemma": Spelling(gemma, 1.0, False),
}
spelled = pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
epsilons = st.sampled_from((1e-6, 1e-5))


def op(spelling: Spelling) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda x, weight, eps: rms_norm(x, weight, eps, spelling.offset, spelling.round_first)[0]


class Results(NamedTuple):
    y: Tensor
    dx: Tensor | None
    dweight: Tensor | None


def run(
    f: Callable[[Tensor, Tensor, float], Tensor],
    x: Tensor,
    weight: Tensor,
    eps: float,
    gradient: Callable[[Tensor], Tensor],
    needs: tuple[bool, ...] = (True, True),
) -> Results:
    x, weight = x.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
    y = f(x, weight, eps)
    wanted = [value for value in (x, weight) if value.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, gradient(y)))  # not .grad, which would give dx the strides of x
    return Results(y.detach(), *(next(found) if needed else None for needed in needs))


def check(spelling: Spelling, x: Tensor, weight: Tensor, eps: float, dy: Tensor, needs: tuple[bool, ...]) -> None:
    """y and each gradient asked for, against eager's own error."""
    actual = run(op(spelling), x, weight, eps, lambda y: dy, needs)
    eager = run(spelling.eager, x, weight, eps, lambda y: dy)
    truth = run(spelling.eager, x.double(), weight.double(), eps, lambda y: dy.double())
    assert_same_metadata(actual.y, torch.empty_like(x, dtype=eager.y.dtype))
    assert_close_to_truth(actual.y, eager.y, truth.y, FORWARD)
    assert [value is not None for value in actual[1:]] == list(needs)
    h = unit(x.double(), eps)
    rstd = (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    dunit = dy.double() * (weight.double() + spelling.offset)
    if actual.dx is not None:
        assert_same_metadata(actual.dx, torch.empty_like(x))
        projected = h * (dunit * h).abs().mean(-1, keepdim=True)
        terms = (rstd * torch.maximum(dunit.abs(), projected.abs())).max().item()
        assert_close_to_truth(actual.dx, eager.dx, truth.dx, GRADIENT, terms)
    if actual.dweight is not None:
        assert_same_metadata(actual.dweight, torch.empty_like(weight))
        terms = (dy.double() * h).abs().reshape(-1, x.shape[-1]).sum(0).max().item()
        assert_close_to_truth(actual.dweight, eager.dweight, truth.dweight, GRADIENT, terms)


@spelled
@on_devices
@given(specs(), dtypes, upstreams(), requires_grad(2), epsilons, seeds)
def test_matches_eager(
    device: str, spelling: Spelling, spec: Spec, weight_dtype: torch.dtype, kind: str, needs: tuple[bool, ...],
    eps: float, seed: int,
) -> None:  # fmt: skip
    x = spec.build(device)
    weight = Spec(spec.shape[-1:], weight_dtype, seed=seed).build(device)
    y = spelling.eager(x, weight, eps)
    check(spelling, x, weight, eps, upstream(y, kind, seed + 1), needs)


@spelled
@on_devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_upstream_gradient(device: str, spelling: Spelling, layout: str) -> None:
    shape = (2, 3, 5, 40)
    x, weight = Spec(shape, torch.float32, layout).build(device), Spec(shape[-1:], torch.float32).build(device)
    for kind in UPSTREAM:
        dy = upstream(torch.empty_like(x), kind, seed=1)
        for needs in ((True, True), (True, False)):
            check(spelling, x, weight, 1e-6, dy, needs)


@spelled
@on_devices
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rounds_where_the_model_rounds(device: str, spelling: Spelling, dtype: torch.dtype) -> None:
    x, dy = (Spec((64, 256), dtype, seed=seed).build(device) for seed in (1, 2))
    for weight_dtype in (dtype, torch.float32):
        weight = Spec((256,), weight_dtype).build(device)
        actual, expected = (run(f, x, weight, 1e-6, lambda y: dy.to(y.dtype)) for f in (op(spelling), spelling.eager))
        same = (actual.y == expected.y) if actual.y.dtype == dtype else (actual.y - expected.y).abs() < 1e-5
        assert same.double().mean() > 0.99  # rstd may differ in its last bit, and turn a rounding
    torch.testing.assert_close(actual.dweight, expected.dweight, rtol=1e-5, atol=1e-4)  # float32: of rounded values


CONFIG_LENGTHS = (64, 96, 200, 256, 600, 1024, 2048, 4095, 5120, 8192, 16384)


@spelled
@on_devices
@pytest.mark.parametrize("length", CONFIG_LENGTHS)
def test_every_launch_configuration(device: str, spelling: Spelling, length: int) -> None:
    n_rows = 70 if length <= 256 else 9  # several tiles, the last one not full
    for dtype in DTYPES:
        x, dy = (Spec((n_rows, length), dtype, seed=seed).build(device) for seed in (1, 2))
        check(spelling, x, Spec((length,), dtype).build(device), 1e-6, dy, (True, True))


@on_devices
def test_triton_runs_where_it_should(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu" and not INTERPRETING:
        monkeypatch.setattr(registry, "load", lambda launcher: pytest.fail("on a plain CPU"))
        launched = None
    else:
        from fastft.kernels import rms_norm_triton

        launched = []
        for name in ("forward", "backward", "backward_weight"):
            kernel = getattr(rms_norm_triton, name)
            monkeypatch.setattr(
                rms_norm_triton, name, lambda *a, kernel=kernel, name=name: (launched.append(name), kernel(*a))
            )
    x = torch.randn(4, 32, device=device)
    for needs in ((True, True), (True, False)):
        run(op(SPELLINGS["llama"]), x, torch.randn(32, device=device), 1e-6, torch.ones_like, needs)
    run(op(SPELLINGS["llama"]), x.double(), torch.randn(32, device=device).double(), 1e-6, torch.ones_like)
    assert launched in (None, ["forward", "backward_weight", "forward", "backward"])


@spelled
@on_devices
@given(lengths(300), st.integers(1, 40), dtypes, seeds)
def test_rows_are_independent(
    device: str, spelling: Spelling, length: int, n_rows: int, dtype: torch.dtype, seed: int
) -> None:
    x, dy = (Spec((n_rows, length), dtype, seed=seed + i).build(device) for i in range(2))
    weight = Spec((length,), dtype, seed=seed + 2).build(device)
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed)).to(device)
    straight = run(op(spelling), x, weight, 1e-6, lambda y: dy)
    permuted = run(op(spelling), x[order], weight, 1e-6, lambda y: dy[order])
    assert torch.equal(straight.y[order], permuted.y)
    assert torch.equal(straight.dx[order], permuted.dx)


@spelled
@on_devices
@given(shapes(), st.sampled_from((0.25, 0.5, 2.0, 64.0)), seeds)
def test_scale_does_not_matter_without_eps(
    device: str, spelling: Spelling, shape: tuple[int, ...], scale: float, seed: int
) -> None:
    x = Spec(shape, torch.float32, seed=seed).build(device)
    weight = Spec(shape[-1:], torch.float32, seed=seed + 1).build(device)
    y, rstd = rms_norm(x, weight, 0.0, spelling.offset, spelling.round_first)
    scaled_y, scaled_rstd = rms_norm(scale * x, weight, 0.0, spelling.offset, spelling.round_first)
    assert torch.equal(y, scaled_y)  # a power of two: no rounding changes
    assert torch.equal(rstd, scale * scaled_rstd)


@on_devices
@given(specs())
def test_rstd(device: str, spec: Spec) -> None:
    x = spec.build(device)
    _, rstd = rms_norm(x, torch.ones(spec.shape[-1], dtype=x.dtype, device=device), 1e-6, 0.0, True)
    expected = (x.double().square().mean(-1) + 1e-6).rsqrt()
    assert rstd.shape == x.shape[:-1]
    assert rstd.dtype == torch.float32
    assert not rstd.requires_grad
    torch.testing.assert_close(rstd.double(), expected, rtol=2e-6, atol=0.0)


@spelled
@on_devices
def test_rows_of_zeros_stay_finite(device: str, spelling: Spelling) -> None:
    x, weight = torch.zeros(3, 64, device=device, dtype=torch.float16), torch.ones(64, device=device)
    found = run(op(spelling), x, weight, 1e-6, torch.ones_like)
    assert torch.equal(found.y, torch.zeros_like(found.y))
    assert torch.equal(found.dweight, torch.zeros_like(weight))
    assert torch.isfinite(found.dx).all()


@spelled
@on_devices
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(device: str, spelling: Spelling, shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape, device=device), torch.ones(64, device=device)
    found = run(op(spelling), x, weight, 1e-6, torch.ones_like)
    assert found.y.shape == found.dx.shape == shape
    assert torch.equal(found.dweight, torch.zeros_like(weight))


@spelled
@on_devices
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 5)])
def test_gradcheck(device: str, spelling: Spelling, shape: tuple[int, ...]) -> None:
    x = Spec(shape, torch.float64, "transposed").build(device).requires_grad_()
    weight = Spec(shape[-1:], torch.float64, seed=1).build(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: op(spelling)(x, weight, 1e-3), (x, weight))


@spelled
@on_devices
@given(st.sampled_from(("contiguous", "transposed", "sliced", "columns")), seeds)
def test_float64_is_float64_throughout(device: str, spelling: Spelling, kind: str, seed: int) -> None:
    x = Spec((3, 4, 17), torch.float64, kind, seed).build(device)
    weight, dy = Spec((17,), torch.float64).build(device), Spec((3, 4, 17), torch.float64, seed=1).build(device)
    check(spelling, x, weight, 1e-6, dy, (True, True))


class Names(TorchDispatchMode):
    """The fastft ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastft":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needs", "backward"),
    [
        ((True, False), ["rms_norm_backward"]),
        ((False, True), ["rms_norm_backward_weight"]),
        ((True, True), ["rms_norm_backward_weight"]),
    ],
)
def test_a_frozen_weight_costs_nothing(needs: tuple[bool, ...], backward: list[str]) -> None:
    with Names() as names:
        run(op(SPELLINGS["llama"]), torch.randn(4, 8), torch.randn(8), 1e-6, torch.ones_like, needs)
    assert names.seen == ["rms_norm", *backward]


def test_nothing_is_saved_when_nothing_needs_a_gradient() -> None:
    y, rstd = rms_norm(torch.randn(4, 8), torch.randn(8), 1e-6, 0.0, True)
    assert y.grad_fn is None
    assert rstd.grad_fn is None


@on_devices
@pytest.mark.parametrize("kind", ["transposed", "sliced", "columns"])
def test_saved_tensors_may_come_back_in_another_layout(device: str, kind: str) -> None:
    x = Spec((2, 3, 4, 16), torch.float32, kind).build(device)
    weight, dy = Spec((16,), torch.float32).build(device), Spec((2, 3, 4, 16), torch.float32, seed=1).build(device)
    expected = run(op(SPELLINGS["llama"]), x, weight, 1e-6, lambda y: dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):  # as save_on_cpu, pinned
        found = run(op(SPELLINGS["llama"]), x, weight, 1e-6, lambda y: dy)
    torch.testing.assert_close(found.dx, expected.dx)
    torch.testing.assert_close(found.dweight, expected.dweight)


@pytest.mark.parametrize(
    ("x", "weight", "offset", "round_first"),
    [
        (torch.ones(2, 8), torch.ones(7), 0.0, True),
        (torch.ones(2, 8), torch.ones(1, 8), 0.0, True),
        (torch.ones(()), torch.ones(1), 0.0, True),
        (torch.ones(2, 8, dtype=torch.int64), torch.ones(8), 0.0, False),
        (torch.ones(2, 0), torch.ones(0), 0.0, False),
        (torch.ones(2, 8), torch.ones(8), 1.0, True),
    ],
)
def test_what_the_op_does_not_define_is_an_error(x: Tensor, weight: Tensor, offset: float, round_first: bool) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        rms_norm(x, weight, 1e-6, offset, round_first)


@pytest.mark.skipif(INTERPRETING, reason="compiles; says nothing of the kernels")
@on_devices
def test_one_graph_serves_every_length(device: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, 1e-6, 0.0, True)[0]  # constants, as a graph has: dynamic=True makes floats symbolic

    compiled = torch.compile(plain, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in ((2, 5), (3, 7), (4, 9)):
        x, weight = torch.randn(batch, length, 16, device=device), torch.randn(16, device=device)
        dy = torch.randn_like(x)
        found = run(compiled, x, weight, 1e-6, lambda y, dy=dy: dy)
        expected = run(plain, x, weight, 1e-6, lambda y, dy=dy: dy)
        for mine, value in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, value)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_two_to_the_31_elements() -> None:
    n_rows = 2**31 // 4096 + 5
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16).repeat(n_rows // 64 + 1, 1)[:n_rows]
    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    y, rstd = rms_norm(x, weight, 1e-6, 0.0, True)
    dx = torch.ops.fastft.rms_norm_backward(y, x, weight, rstd, 0.0, True)
    tail = slice(n_rows - 64, n_rows)
    expected_y, expected_rstd = rms_norm(x[tail], weight, 1e-6, 0.0, True)
    assert torch.equal(y[tail], expected_y)
    assert torch.equal(rstd[tail], expected_rstd)
    expected_dx = torch.ops.fastft.rms_norm_backward(y[tail], x[tail], weight, rstd[tail], 0.0, True)
    assert torch.equal(dx[tail], expected_dx)


def test_rows_longer_than_a_program_holds_use_the_reference() -> None:
    x = torch.randn(2, dispatch.MAX_ROW + 1)
    assert not dispatch.takes(x.shape[-1], dispatch.MAX_ROW, [x])
    check(SPELLINGS["llama"], x, torch.randn(x.shape[-1]), 1e-6, torch.randn_like(x), (True, True))
