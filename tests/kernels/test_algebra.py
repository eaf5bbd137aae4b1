"""What the ops' mathematics promises, beside agreeing with their references."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICES, INTERPRETING, Spec, dtypes, lengths, seeds
from torch import Tensor

from fastft.kernels import REGISTRY

fastft = torch.ops.fastft
on_devices = pytest.mark.parametrize("device", DEVICES)
ROW_WISE = {  # one tensor of rows to another
    "rms_norm": lambda x, weight: fastft.rms_norm(x, weight, 1e-6, 0.0, True)[0],
    "layer_norm": lambda x, weight: fastft.layer_norm(x, weight, weight, 1e-6, False)[0],
    "glu": lambda x, weight: fastft.glu(x, x.flip(-1), "silu"),
    "glu_packed": lambda x, weight: fastft.glu_packed(torch.cat((x, x.flip(-1)), -1), "gelu_tanh"),
    "add_rms_norm": lambda x, weight: fastft.add_rms_norm(x, x.flip(-1), weight, 1e-6, 1.0, False)[0],
}


def angles(length: int, pairs: int, device: str, interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles, the same for both elements of a pair; [length, 2 * pairs]."""
    turned = Spec((length, pairs), torch.float32, seed=3).build(device)
    both = turned.repeat_interleave(2, -1) if interleaved else torch.cat((turned, turned), -1)
    return both.cos(), both.sin()


@on_devices
@given(st.booleans(), st.booleans(), st.integers(1, 40), st.integers(0, 9), seeds)
def test_rotating_back_undoes_a_rotation(
    device: str, interleaved: bool, apart: bool, pairs: int, passed: int, seed: int
) -> None:
    x = Spec((2, 3, 5, 2 * pairs + passed), torch.float32, "transposed", seed).build(device)
    cos, sin = angles(5, pairs, device, interleaved)
    y = fastft.rotary(x, cos, sin, interleaved, False, interleaved and apart, False)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        fastft.rotary_backward(y, cos, sin, interleaved, False, interleaved and apart), x, rtol=1e-5, atol=1e-5
    )


@on_devices
@given(st.booleans(), st.booleans(), st.integers(1, 20), seeds)
def test_products_depend_on_the_distance_alone(
    device: str, interleaved: bool, apart: bool, pairs: int, seed: int
) -> None:
    """The property that rotary embedding exists for."""
    q, k = (Spec((1, 1, 1, 2 * pairs), torch.float32, seed=seed + i).build(device).expand(1, 1, 9, -1) for i in (0, 1))
    frequencies = torch.rand(pairs, generator=torch.Generator().manual_seed(seed)).to(device)
    turned = torch.arange(9.0, device=device)[:, None] * frequencies
    turned = turned.repeat_interleave(2, -1) if interleaved else torch.cat((turned, turned), -1)
    new_q, new_k = fastft.rotary_qk(q, k, turned.cos(), turned.sin(), interleaved, False, interleaved and apart, False)
    products = new_q[0, 0] @ new_k[0, 0].T
    for distance in range(9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROW_WISE)
@on_devices
@given(lengths(300), st.integers(1, 40), dtypes, seeds)
def test_rows_are_independent(device: str, name: str, length: int, n_rows: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = (Spec(shape, dtype, seed=seed).build(device) for shape in ((n_rows, length), (length,)))
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed)).to(device)
    first, second = ROW_WISE[name](x, weight)[order], ROW_WISE[name](x[order], weight)
    eager = device == "cpu" and not INTERPRETING  # whose exponentials differ at the ends of a tensor
    torch.testing.assert_close(first, second, rtol=2 * torch.finfo(dtype).eps if eager else 0, atol=0)


@on_devices
@given(lengths(300), seeds, st.sampled_from((0.25, 2.0, 64.0)))
def test_without_eps_norms_do_not_see_scale(device: str, length: int, seed: int, scale: float) -> None:
    x, weight = (Spec(shape, torch.float32, seed=seed).build(device) for shape in ((5, length), (length,)))
    for offset, round_first in ((0.0, True), (1.0, False)):
        y, rstd = fastft.rms_norm(x, weight, 0.0, offset, round_first)
        scaled, scaled_rstd = fastft.rms_norm(scale * x, weight, 0.0, offset, round_first)
        assert torch.equal(y, scaled)  # a power of two: no rounding changes
        assert torch.equal(rstd, scale * scaled_rstd)


@on_devices
@given(st.integers(2, 300), seeds)
def test_layer_norm_does_not_see_a_shift(device: str, length: int, seed: int) -> None:
    x, weight = (Spec(shape, torch.float32, seed=seed).build(device) for shape in ((5, length), (length,)))
    y, shifted = (fastft.layer_norm(one, weight, None, 1e-5, False)[0] for one in (x, x + 3.0))
    torch.testing.assert_close(y, shifted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        fastft.layer_norm(x, None, None, 1e-5, True)[0].mean(-1), torch.zeros_like(x[:, 0]), rtol=0, atol=1e-5
    )


@on_devices
@given(lengths(300), seeds)
def test_a_gate_of_zero_lets_nothing_through(device: str, length: int, seed: int) -> None:
    up = Spec((4, length), torch.float32, seed=seed).build(device)
    for _, choice in REGISTRY["fastft::glu"].cases:
        assert torch.equal(fastft.glu(torch.zeros_like(up), up, choice["activation"]), torch.zeros_like(up))
