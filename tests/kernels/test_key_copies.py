"""Attention whose keys are copies of rows against attention of the copies themselves, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICES, INTERPRETING, LOW, Spec
from torch import Tensor

from fastft.kernels.attention import attention

DTYPES = [torch.float32, *(() if INTERPRETING else LOW)]


@pytest.mark.parametrize("device", DEVICES)
@given(
    B=st.integers(1, 2), G=st.integers(1, 2), E=st.integers(1, 2), S=st.integers(1, 40), N=st.integers(0, 70),
    D=st.sampled_from([8, 16, 40]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_gradients_of_copies_are_summed(
    device: str, B: int, G: int, E: int, S: int, N: int, D: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, G * E, S, D), (B, G, S, D), (B, G, S, D))
    tensors = [Spec(shape, dtype, "transposed", seed + at).build(device) for at, shape in enumerate(shapes)]
    copies = torch.randint(S, (N,), generator=generator, dtype=torch.int32)
    start = torch.randint(max(N, 1), (B, S), generator=generator)
    end = start + torch.randint(1, 9, (B, S), generator=generator)
    start, end, copies = (one.to(device) for one in (start, end, copies))
    upstream = torch.randn(B, G * E, S, D, generator=generator, dtype=torch.float64).to(device)

    def results(*given: Tensor, copied: bool) -> list[Tensor]:
        q, k, v = leaves = [one.detach().requires_grad_() for one in given]
        vectors = (start, end, None, None) if N else (None,) * 4
        if copied:
            more = copies if N else copies[:0]
            vectors = (start, end, None, None)
            out = attention(q, k, v, *vectors, None, None, None, True, 0, S, 0.3, 0.0, 0.0, True, more)[0]
        elif N:
            k, v = k[:, :, copies.long()], v[:, :, copies.long()]
            out = attention(q, k, v, *vectors, None, None, None, False, 0, 0, 0.3, 0.0, 0.0, True)[0]
        else:
            out = attention(q, k, v, *vectors, None, None, None, True, 0, S, 0.3, 0.0, 0.0, True)[0]
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    exact = results(*(one.double() for one in tensors), copied=False)
    mine = results(*tensors, copied=True)
    bound = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for found, expected in zip(mine, exact, strict=True):
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= bound * max(expected.abs().max().item(), 1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_give_the_same_bits(device: str) -> None:
    q, k, v = (Spec((1, 2, 64, 16), torch.float32, seed=at).build(device).requires_grad_() for at in range(3))
    copies = torch.arange(300, device=device, dtype=torch.int32) % 7
    start, end = torch.zeros(1, 64, device=device).int(), torch.full((1, 64), 300, device=device).int()
    found = []
    for _ in range(2):
        out = attention(q, k, v, start, end, None, None, None, None, None, True, 0, 0, 0.3, 0.0, 0.0, True, copies)[0]
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert not found[0][1][:, :, 7:].any()  # which no key is a copy of


@pytest.mark.parametrize(
    ("copies", "mask", "start"),
    [
        (torch.zeros(3), None, torch.zeros(1, 4).int()), (torch.zeros(3, 3).int(), None, torch.zeros(1, 4).int()),
        (torch.zeros(4).int(), torch.zeros(4, 4), torch.zeros(1, 4).int()), (torch.zeros(3).int(), None, None),
    ],
    ids=["no integers", "no vector", "a mask", "no ranges"],
)  # fmt: skip
def test_calls_that_say_nothing(copies: Tensor, mask: Tensor | None, start: Tensor | None) -> None:
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="copies"):
        attention(q, q, q, start, start, None, None, mask, None, None, False, 0, 0, 1.0, 0.0, 0.0, True, copies)
