"""Both products with a gradient in one pass over it, and what a GEMM in 16 bits is given of float32.

The former is for 16 bits, and float16 stands for bfloat16 in the interpreter; a CPU without that takes two passes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICES, INTERPRETING, LOW, Spec
from torch import Tensor

from fastft.kernels import REGISTRY
from fastft.kernels.core import dispatch
from fastft.kernels.lora_products import (
    MAX_RANK,
    ONE_PASS_RANK,
    ONE_PASS_TERMS,
    Matrix,
    Sum,
    collect,
    one_pass_factors,
    operands,
    place,
    project_and_outer,
)

on_devices = pytest.mark.parametrize("device", DEVICES[0 if INTERPRETING else 1 :])
SCALE = 0.5


class Case(NamedTuple):
    """x [M, K], s [M, r], and of each of x's parts its columns, its ranks and B."""

    x: Tensor
    s: Tensor
    columns: list[slice]
    ranks: list[slice]
    factors: list[Tensor]


def slices(sizes: Sequence[int]) -> list[slice]:
    return [slice(sum(sizes[:at]), sum(sizes[: at + 1])) for at in range(len(sizes))]


def case(
    length: int, widths: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, layout: str, device: str
) -> Case:
    build = lambda *shape, of=dtype, layout="contiguous": Spec(shape, of, layout, len(shape)).build(device)  # noqa: E731
    x, s = build(length, sum(widths), layout=layout), build(length, sum(ranks), of=torch.float32)
    factors = [build(width, rank) for width, rank in zip(widths, ranks, strict=True)]
    return Case(x, s, slices(widths), slices(ranks), factors)


def run(one: Case, width: int) -> tuple[list[Tensor], Any]:
    """The product, x^T s of each part, [x | product] with columns to spare; and whether one pass did it."""
    product, targets = torch.full_like(one.s, torch.nan), [torch.full_like(b, torch.nan) for b in one.factors]
    wider = one.x.new_full((one.x.shape[0], one.x.shape[1] + width), torch.nan)
    copy, spare = (wider.split([one.x.shape[1], width], 1)) if width else (None, None)
    used = [at for at, own in enumerate(one.ranks) if own.stop > own.start]
    pieces = [(one.factors[at], one.columns[at].start, 0, SCALE) for at in used]
    into = [(targets[at], one.columns[at].start, 0, SCALE) for at in used]
    matrices: list[Matrix] = []
    sums: list[Sum] = []
    p = one_pass_factors(one.x, one.s, pieces, one.ranks, matrices)
    if p is None:
        return [], False
    place(matrices)
    done = project_and_outer(one.x, one.s, p, product, into, one.columns, one.ranks, copy, spare, sums)
    collect(sums)
    return [product, *(targets[at] for at in used), wider], done


def expected(one: Case, width: int) -> list[Tensor]:
    x, s = one.x.double(), one.s.to(one.x.dtype).double()
    parts = list(zip(one.columns, one.ranks, one.factors, strict=True))
    product = torch.cat([SCALE * x[:, part] @ b.double() for part, _, b in parts], 1)
    outer = [SCALE * x[:, part].T @ s[:, own] for part, own, _ in parts if own.stop > own.start]
    zeros = x.new_zeros(x.shape[0], max(0, width - product.shape[1]))
    return [product, *outer, torch.cat([x, product, zeros], 1) if width else x]


@on_devices
@given(
    length=st.sampled_from((1, 63, 300, 700)),
    widths=st.lists(st.sampled_from((1, 64, 255, 256, 300, 2100)), min_size=1, max_size=3),
    ranks=st.lists(st.sampled_from((0, 1, 8, ONE_PASS_RANK)), min_size=3, max_size=3),
    dtype=st.sampled_from(LOW),
    layout=st.sampled_from(("contiguous", "sliced", "columns", "expanded")),
    spare=st.booleans(),
)
def test_one_pass_is_both_products(
    device: str, length: int, widths: list[int], ranks: list[int], dtype: torch.dtype, layout: str, spare: bool
) -> None:
    ranks = [max(1, ranks[0]), *ranks[1 : len(widths)]]
    one, width = case(length, widths, ranks, dtype, layout, device), 64 if spare else 0
    found, done = run(one, width)
    assert done
    for mine, other in zip(found[: None if spare else -1], expected(one, width)[: None if spare else -1], strict=True):
        allowed = torch.finfo(mine.dtype).eps * other.abs().max().item() + 1e-6 * (length + max(widths))
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=allowed)
    again, _ = run(one, width)
    assert all(torch.equal(mine, other) for mine, other in zip(found[:-1], again[:-1], strict=True))


@on_devices
def test_terms_are_float32(device: str) -> None:
    from fastft.kernels import lora_linear_backward_triton

    one = case(200, (300, 64), (16, 3), LOW[-1], "contiguous", device)
    factors = [Spec(tuple(b.shape), torch.float32).build(device) for b in one.factors]
    left, terms = torch.zeros(364, 16, device=device), []
    for part, b in zip(one.columns, factors, strict=True):
        left[part, : b.shape[1]] = b
    for _ in range(ONE_PASS_TERMS):
        terms.append(left.to(one.x.dtype))
        left = left - terms[-1]
    product, targets = torch.empty_like(one.s), [torch.empty_like(b) for b in factors]
    pieces = [(target, part.start, 0, 1.0) for target, part in zip(targets, one.columns, strict=True)]
    sums: list[Sum] = []
    lora_linear_backward_triton.both(
        one.x, one.s, torch.stack(terms, 1), product, pieces, one.columns, one.ranks, None, None, sums
    )
    collect(sums)
    x, s = one.x.double(), one.s.double()
    truth = torch.cat([x[:, part] @ b.double() for part, b in zip(one.columns, factors, strict=True)], 1)
    torch.testing.assert_close(product.double(), truth, rtol=0, atol=3e-6 * truth.abs().max().item())
    for target, part, own in zip(targets, one.columns, one.ranks, strict=True):
        truth = x[:, part].T @ s[:, own]
        torch.testing.assert_close(target.double(), truth, rtol=0, atol=3e-6 * truth.abs().max().item())


@on_devices
def test_matrices_of_one_launch_have_their_own_terms(device: str) -> None:
    """Beside what has three terms there may be what has one, and nothing is written behind it."""
    build = lambda *shape: Spec(shape, torch.float32, "contiguous", len(shape)).build(device)  # noqa: E731
    pieces = [[(build(3, 20), 1, 0, SCALE)], [(build(5, 4), 0, 2, 1.0), (build(2, 7), 6, 0, SCALE)]]
    outs = [torch.full((4, 9, 20), torch.nan, dtype=LOW[-1], device=device) for _ in pieces]
    place([(out[:terms], some) for out, terms, some in zip(outs, (3, 1), pieces, strict=True)])
    for out, terms, some in zip(outs, (3, 1), pieces, strict=True):
        left = torch.zeros(9, 20, device=device)
        for piece, row, column, scale in some:
            left[row : row + piece.shape[0], column : column + piece.shape[1]] = scale * piece
        for term in out[:terms]:
            torch.testing.assert_close(term, left.to(out.dtype), rtol=0, atol=0)
            left = left - term.float()
        assert out[terms:].isnan().all()


@on_devices
def test_sums_of_one_launch_have_their_own_splits(device: str) -> None:
    build = lambda *shape: Spec(shape, torch.float32, "contiguous", shape[0]).build(device)  # noqa: E731
    partials = [build(splits, 30, 16) for splits in (2, 5, 3)]
    targets = [[torch.full(size, torch.nan, device=device) for size in ((8, 4), (20, 16))] for _ in partials]
    sums = [(of, [(one, 3, 2, SCALE), (other, 10, 0, 1.0)]) for of, (one, other) in zip(partials, targets, strict=True)]
    collect(sums)
    for of, (one, other) in zip(partials, targets, strict=True):
        whole = of.sum(0)
        torch.testing.assert_close(one, SCALE * whole[3:11, 2:6])
        torch.testing.assert_close(other, whole[10:30])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@given(
    rank=st.integers(1, MAX_RANK),
    dtypes=st.sampled_from(((torch.float32, torch.float32), (torch.float32, torch.bfloat16))),
)
def test_operands_in_bfloat16_keep_what_float32_has(
    device: str, transposed: bool, rank: int, dtypes: Sequence[torch.dtype]
) -> None:
    """The product of what a GEMM is given, without what that GEMM rounds; two matrices with a gap between them."""
    left, one, other = (
        Spec(shape, dtype, "sliced", seed).build(device)
        for seed, (shape, dtype) in enumerate((((30, rank), torch.float32), *(((rank, 20), one) for one in dtypes)))
    )
    whole = torch.zeros(rank, 50, dtype=torch.float64, device=device)
    whole[:, :20], whole[:, 30:] = SCALE * one.double(), SCALE * other.double()
    pieces = (
        [(one.T, 0, 0, SCALE), (other.T, 30, 0, SCALE)] if transposed else [(one, 0, 0, SCALE), (other, 0, 30, SCALE)]
    )
    a, b = operands(left, pieces, 50, torch.bfloat16, transposed=transposed)
    assert a.dtype == b.dtype == torch.bfloat16
    assert a.shape[1] == 3 * rank
    error = (a.double() @ b.double() - left.double() @ whole).abs()
    assert (error <= 3 * 2**-16 * (left.double().abs() @ whole.abs())).all()


def test_operands_are_one_term_where_more_gain_nothing_or_cost_time() -> None:
    for rank, b, dtype in (
        (4, torch.bfloat16, torch.bfloat16),
        (4, torch.float32, torch.float32),
        (4, torch.float32, torch.float16),
        (MAX_RANK + 1, torch.float32, torch.bfloat16),
    ):
        left, right = torch.randn(8, rank), torch.randn(rank, 5, dtype=b)
        left_in, right_in = operands(left, [(right, 0, 0, SCALE)], 5, dtype)
        assert torch.equal(left_in, left.to(dtype))
        assert torch.equal(right_in, (SCALE * right.float()).to(dtype))


@on_devices
@pytest.mark.parametrize("many", [1, 2])
def test_adapters_are_rounded_to_no_lower_dtype_than_that_of_x(device: str, many: int) -> None:
    """Where what they read has it: the op says that they count as rounded to x's dtype."""
    build = lambda *shape, of=torch.float32: Spec(shape, of, "contiguous", len(shape)).build(device)  # noqa: E731
    x, sources = build(40, 64), [build(40, 64, of=torch.float16)] * many
    weight, a, b, grad = build(24, 64), [build(4, 64)] * many, [build(24, 4)] * many, build(40, 24) / 7
    group = (x, [weight], [], [], [], [], [], a, b, sources, [24], [], [0] * many, [SCALE] * many, 0, "", False, True)
    forward, backward = (REGISTRY[f"fastft::lora_linear{which}"] for which in ("", "_backward"))
    y, s = forward.compute(*group)
    found = backward.compute(grad, s, *group, [False, False, *[True] * 2 * many, *[False] * many])
    read, first, second, down = sources[0].double(), a[0].double(), b[0].double(), grad.double()
    expected = [
        x.double() @ weight.double().T + many * SCALE * read @ first.T @ second.T,
        *[SCALE * second.T @ down.T @ read] * many,
        *[SCALE * down.T @ (read @ first.T)] * many,
    ]
    for mine, truth in zip((y, *found), expected, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=2e-6 * truth.abs().max().item())


@pytest.mark.skipif(INTERPRETING, reason="there a CPU has it")
def test_two_passes_are_left_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """For ranks that make many partial sums, for dtypes that tensor cores do not multiply as they are."""
    monkeypatch.setattr(dispatch, "triton_dtypes", lambda device: frozenset(LOW) | {torch.float32})
    monkeypatch.setattr(dispatch, "has_tensor_cores", lambda device: True)
    for rank, x, b in (
        (ONE_PASS_RANK + 1, LOW[0], LOW[0]),
        (4, torch.float32, torch.float32),
        (4, LOW[0], torch.float32),
    ):
        one = case(8, (24,), (rank,), x, "contiguous", "cpu")
        _, done = run(one._replace(factors=[factor.to(b) for factor in one.factors]), 0)
        assert not done
