"""Both products with a gradient in one pass over it.

It is for 16 bits, and float16 stands for bfloat16 in the interpreter; a CPU without that takes two passes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICES, INTERPRETING, LOW, Spec
from torch import Tensor

from fastft.kernels import dispatch
from fastft.kernels.lora_products import ONE_PASS_RANK, ONE_PASS_TERMS, project_and_outer

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
    done = project_and_outer(one.x, one.s, product, pieces, into, one.columns, one.ranks, copy, spare)
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
    lora_linear_backward_triton.both(
        one.x, one.s, torch.stack(terms, 1), product, pieces, one.columns, one.ranks, None, None
    )
    x, s = one.x.double(), one.s.double()
    truth = torch.cat([x[:, part] @ b.double() for part, b in zip(one.columns, factors, strict=True)], 1)
    torch.testing.assert_close(product.double(), truth, rtol=0, atol=3e-6 * truth.abs().max().item())
    for target, part, own in zip(targets, one.columns, one.ranks, strict=True):
        truth = x[:, part].T @ s[:, own]
        torch.testing.assert_close(target.double(), truth, rtol=0, atol=3e-6 * truth.abs().max().item())


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
