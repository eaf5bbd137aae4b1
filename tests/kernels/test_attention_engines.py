"""Which of torch's kernels are asked for which heads, and that they are given and give what they take and return.

No GPU is needed: stand-ins that compute by the op's definition take the place of the kernels, and raise for what these
would refuse.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import INTERPRETING
from torch import Tensor

from fastft.kernels import attention, attention_engines

pytestmark = pytest.mark.skipif(INTERPRETING, reason="no kernel of ours is asked for")
DEVICE = torch.device("cuda", 0)
NONE = (None,) * 5  # ranges, ids and mask
TAKES = {  # capability, version of cuDNN, heads of keys and values: who computes them
    (9, 0, 91100, 128, 128): "cudnn", (9, 0, 91100, 96, 64): "cudnn", (9, 0, 91100, 64, 128): "cudnn",
    (9, 0, 91100, 192, 128): "cudnn", (9, 0, 91002, 192, 128): "", (9, 0, 91100, 192, 192): "flash",
    (9, 0, 91100, 192, 120): "", (9, 0, 91100, 256, 256): "flash", (9, 0, 91100, 100, 64): "",
    (9, 0, 91100, 64, 60): "", (10, 0, 91100, 192, 128): "cudnn", (9, 0, 0, 128, 128): "flash", (9, 0, 0, 96, 64): "",
    (8, 0, 91100, 192, 128): "", (8, 9, 91100, 96, 96): "flash", (12, 0, 91100, 192, 128): "",
    (7, 5, 91100, 96, 96): "efficient", (7, 5, 91100, 96, 64): "",
}  # fmt: skip


def as_on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn > 0)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize("given", TAKES, ids=str)
def test_who_computes_which_heads(given: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor, cudnn, head_dim, value_dim = given
    as_on(monkeypatch, (major, minor), cudnn)
    assert attention_engines.engine_of.__wrapped__(DEVICE, torch.float16, head_dim, value_dim) == TAKES[given]


@pytest.mark.parametrize(("sizes", "expected"), [((192, 128), "flash"), ((128, 192), ""), ((256, 128), "")])
def test_shorter_values_may_be_padded(sizes: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on(monkeypatch, (8, 9), 91100)
    monkeypatch.setattr(attention_engines, "PADDED_VALUES", True)
    assert attention_engines.engine_of.__wrapped__(DEVICE, torch.float16, *sizes) == expected


def engine(name: str, backward: bool = False) -> Callable[..., Any]:
    """What stands for an engine: any head sizes for cuDNN, equal ones for FlashAttention-2."""

    def sizes(q: Tensor, v: Tensor) -> None:
        assert name == "cudnn" or q.shape[-1] == v.shape[-1]

    def forward(q: Tensor, k: Tensor, v: Tensor, *more: Any, scale: float) -> tuple[Tensor, Tensor]:
        sizes(q, v)
        assert more == ((0.0, True) if name == "flash" else (None, True, 0.0, True))
        return attention.reference(q, k, v, *NONE, None, None, True, 0, 0, scale, 0.0, 0.0, False)

    def gradients(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *_: Any, scale: float
    ) -> Any:
        sizes(q, v)
        assert dout.shape == out.shape == (*q.shape[:3], v.shape[-1])
        lse = lse.reshape(q.shape[:3])
        return attention.reference_backward(dout, q, k, v, out, lse, *NONE, None, True, 0, 0, scale, 0.0, 0.0)

    return gradients if backward else forward


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize(("name", "DV"), [("cudnn", 8), ("cudnn", 24), ("cudnn", 16), ("flash", 8), ("flash", 16)])
def test_values_of_another_size(name: str, DV: int, contiguous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    shapes = ((2, 70, 4, 16), (2, 70, 2, 16), (2, 70, 2, DV))
    query, key, value = (draw(shape).transpose(1, 2).requires_grad_() for shape in shapes)
    choice = (*NONE, None, None, True, 0, 0, 0.3, 0.0, 0.0, contiguous)
    expected = attention.attention(query, key, value, *choice)
    monkeypatch.setattr(attention_engines, "PADDED_VALUES", True)
    monkeypatch.setattr(attention_engines, "engine_of", lambda *_: name)
    monkeypatch.setattr(attention_engines, "attention_engine", engine)
    monkeypatch.setitem(attention_engines._ENABLED, name, lambda: True)
    found = attention.attention(query, key, value, *choice)
    assert [one.stride() for one in found] == [one.stride() for one in expected]
    grad = draw(expected[0].shape)
    results = [(*one, *torch.autograd.grad(one[0], (query, key, value), grad)) for one in (found, expected)]
    for mine, right in zip(*results, strict=True):
        assert mine.stride() == right.stride()
        torch.testing.assert_close(mine, right)
