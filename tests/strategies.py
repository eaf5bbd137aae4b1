"""What the property tests draw: row lengths, shapes, memory layouts, upstream gradients, what requires a gradient.

A drawn value is a small frozen dataclass that prints as the code that builds it, so a failure can be pasted.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastft.kernels import expert_order

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
DEVICES = ["cpu", CUDA]
LOW = (torch.float16,) if INTERPRETING else (torch.float16, torch.bfloat16)  # the interpreter gets bfloat16 wrong
DTYPES = (torch.float32, *LOW)

PRIMES = (2, 3, 5, 7, 13, 31, 61, 127, 251, 509, 1021)
POWERS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LAYOUTS = ("contiguous", "transposed", "sliced", "chunked", "expanded", "columns")
UPSTREAM = ("random", "expanded", "strided", "transposed", "sum")

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)


def lengths(largest: int = 1024) -> st.SearchStrategy[int]:
    """One, primes, and powers of two with their neighbours."""
    values = {1, *PRIMES, *(power + step for power in POWERS for step in (-1, 0, 1))}
    return st.sampled_from(sorted(value for value in values if value <= largest))


@st.composite
def shapes(draw: st.DrawFn, largest_row: int = 300, most_rows: int = 48, most_axes: int = 4) -> tuple[int, ...]:
    """Leading axes whose product is at most most_rows, then the row length."""
    leading: list[int] = []
    room = most_rows
    axes = draw(st.integers(0, most_axes - 1))
    for axis in range(axes):
        size = draw(st.integers(1, min(room, 17 if axis == axes - 1 else 4)))  # leave room for the others
        leading.append(size)
        room //= size
    return (*leading, draw(lengths(largest_row)))


@dataclass(frozen=True)
class Spec:
    """A tensor of normal values, of any bytes, or of class numbers below a limit, to be built.

    Any layout but contiguous is a view of a larger or permuted buffer.  A fifth of the class numbers is -100.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    seed: int = 0
    scale: float = 1.0
    below: int = 0
    routing: str = ""

    def build(self, device: str | torch.device = "cpu") -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.routing:
            return self._routed(generator)[self.routing].to(device)

        def normal(*shape: int) -> Tensor:
            if self.dtype == torch.int64:
                kept = torch.rand(shape, generator=generator) < 0.8
                numbers = torch.randint(self.below, shape, generator=generator)
                return numbers.where(kept, torch.tensor(-100)).to(device)
            if not self.dtype.is_floating_point:
                return torch.randint(256, shape, generator=generator, dtype=self.dtype).to(device)
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * self.scale
            return values.to(self.dtype).to(device)

        axes = len(self.shape)
        if self.layout == "transposed" and axes > 2:  # heads before positions
            shape = list(self.shape)
            shape[-2], shape[-3] = shape[-3], shape[-2]
            return normal(*shape).transpose(-2, -3)
        if self.layout == "sliced" and axes > 0:  # a part of each row of a fused projection
            return normal(*self.shape[:-1], 3 * self.shape[-1] + 8)[..., 8 : 8 + self.shape[-1]]
        if self.layout == "chunked" and axes > 2:  # some heads of a fused projection
            return normal(*self.shape[:-2], 2 * self.shape[-2] + 1, self.shape[-1])[..., 1 : 1 + self.shape[-2], :]
        if self.layout == "expanded" and axes > 1:
            return normal(1, *self.shape[1:]).expand(self.shape)
        if self.layout == "columns" and axes > 1:  # the rows are not side by side
            return normal(*self.shape[:-2], self.shape[-1], self.shape[-2]).transpose(-1, -2)
        return normal(*self.shape)

    def _routed(self, generator: torch.Generator) -> dict[str, Tensor]:
        """What expert_order makes of some routing."""
        slots, experts = self.shape[0], self.below
        kind = self.seed % 4
        ids = torch.randint(-1 if kind == 3 else 0, experts, (slots,), generator=generator)
        if kind == 1:  # skewed: most experts get little or nothing
            ids = (torch.rand(slots, generator=generator) ** 6 * experts).long()
        elif kind == 2:
            ids.fill_(experts - 1)
        order, place, ends = expert_order.reference(ids, experts)
        return {"order": order, "place": place, "ends": ends, "rows": ids.clamp(min=0).int()}


def layouts() -> st.SearchStrategy[str]:
    return st.sampled_from(LAYOUTS)


@st.composite
def specs(draw: st.DrawFn, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Spec:
    return Spec(
        draw(shapes()) if shape is None else shape,
        draw(dtypes) if dtype is None else dtype,
        draw(layouts()),
        draw(seeds),
        draw(st.sampled_from((1.0, 0.03, 20.0))),
    )


def upstream(y: Tensor, kind: str, seed: int = 0) -> Tensor:
    """A gradient of y of one of the kinds in UPSTREAM."""
    spec = Spec(tuple(y.shape), y.dtype, seed=seed)
    if y.dim() == 0:
        return spec.build(y.device)
    if kind == "expanded":  # as from .mean() or .sum() over the leading axes
        return Spec(tuple(y.shape[-1:]), y.dtype, seed=seed).build(y.device).expand(y.shape)
    if kind == "strided":  # every second element of each row
        return Spec((*y.shape[:-1], 2 * y.shape[-1]), y.dtype, seed=seed).build(y.device)[..., ::2]
    if kind == "transposed":
        return Spec(tuple(y.shape), y.dtype, "transposed" if y.dim() > 2 else "columns", seed).build(y.device)
    if kind == "sum":  # as from .sum(): every stride 0
        return torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape)
    return spec.build(y.device)


def upstreams() -> st.SearchStrategy[str]:
    return st.sampled_from(UPSTREAM)


def requires_grad(count: int) -> st.SearchStrategy[tuple[bool, ...]]:
    """Which of count inputs require a gradient; at least one does."""
    return st.tuples(*[st.booleans()] * count).filter(any)
