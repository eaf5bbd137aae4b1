"""The arguments of lora_linear: projections of one input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastft.kernels.dequantize_4bit import dequantize_into


class Arguments(NamedTuple):
    """The arguments of a call, as lora_linear.py describes them."""

    x: Tensor
    weights: Sequence[Tensor]
    absmax: Sequence[Tensor]
    absmax_8bit: Sequence[Tensor]
    absmax_code: Sequence[Tensor]
    absmax_offset: Sequence[Tensor]
    biases: Sequence[Tensor]
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    inputs: Sequence[Tensor]
    features: Sequence[int]
    biased: Sequence[int]
    adapted: Sequence[int]
    scales: Sequence[float]
    blocksize: int
    quant_type: str
    widened: bool
    rounded: bool


class Group(Arguments):
    """The arguments of a call, with what follows from them computed once."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of y."""
        return (*self.x.shape[:-1], sum(self.features))

    @cached_property
    def columns(self) -> list[slice]:
        """The columns of y that each sibling has."""
        ends = [sum(self.features[: sibling + 1]) for sibling in range(len(self.features))]
        return [slice(end - size, end) for end, size in zip(ends, self.features, strict=True)]

    @cached_property
    def ranks(self) -> list[slice]:
        """The columns of the second result that each adapter has."""
        sizes = [a.shape[0] for a in self.lora_a]
        return [slice(sum(sizes[:adapter]), sum(sizes[: adapter + 1])) for adapter in range(len(sizes))]

    @cached_property
    def ranks_of_siblings(self) -> list[slice]:
        """The columns of the second result that each sibling's adapter has, where none has two; none without one."""
        own = dict(zip(self.adapted, self.ranks, strict=True))
        return [own.get(sibling, slice(0, 0)) for sibling in range(len(self.features))]

    @cached_property
    def read(self) -> Sequence[Tensor]:
        """The input that each adapter reads."""
        return self.inputs if len(self.inputs) == len(self.lora_a) else [*(self.inputs or [self.x])] * len(self.lora_a)

    @cached_property
    def adapters(self) -> list[tuple[Tensor, Tensor, float, slice, slice]]:
        """Each adapter's A, B, scale, columns of y and columns of the second result."""
        columns = [self.columns[sibling] for sibling in self.adapted]
        return list(zip(self.lora_a, self.lora_b, self.scales, columns, self.ranks, strict=True))

    def adapter_dtype(self, a: Tensor, b: Tensor) -> torch.dtype:
        """Return the dtype that an adapter computes in."""
        return self.x.dtype if self.rounded else torch.promote_types(a.dtype, b.dtype)

    def rounded_beside(self, source: Tensor) -> bool:
        """Return whether adapters count as rounded to the dtype of what they are multiplied by: x's, if rounded."""
        return self.rounded and source.dtype == self.x.dtype

    def statistics_of(self, sibling: int) -> Sequence[Tensor]:
        """Return the absmax of a 4-bit weight and, if nested, its other three statistics."""
        lists = (self.absmax, self.absmax_8bit, self.absmax_code, self.absmax_offset)
        return [statistics[sibling] for statistics in lists if statistics]

    def weights_into(self, out: Tensor) -> None:
        """Dequantize all 4-bit weights into out [sum of features, K], one below the other."""
        weights = [(weight, self.statistics_of(sibling)) for sibling, weight in enumerate(self.weights)]
        dequantize_into(out, weights, self.features, self.blocksize, self.quant_type)

    def weight(self, sibling: int) -> Tensor:
        """Return a sibling's weight in x's dtype, dequantized if need be."""
        if not self.quant_type:
            return self.weights[sibling]
        low = self.x.dtype if self.x.dtype in (torch.float16, torch.bfloat16) else torch.float32
        out = torch.empty(self.features[sibling], self.x.shape[-1], dtype=low, device=self.x.device)
        dequantize_into(
            out, [(self.weights[sibling], self.statistics_of(sibling))], [out.shape[0]], self.blocksize, self.quant_type
        )
        return out.to(self.x.dtype)

    def bias(self, sibling: int) -> Tensor | None:
        """Return a sibling's bias, or None."""
        return self.biases[self.biased.index(sibling)] if sibling in self.biased else None
