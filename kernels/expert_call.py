"""The arguments of expert_linear, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastft.kernels.dequantize_4bit import dequantize_into

DIFFERENTIABLE = ("x", "weight", "bias", "lora_a", "lora_b", "top_k_weights")  # what may need a gradient, in order


class ExpertCall(NamedTuple):
    """The arguments of a call, as expert_linear.py describes them."""

    x: Tensor
    weight: Tensor
    absmax: Sequence[Tensor]
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    top_k_weights: Tensor | None
    order: Tensor
    place: Tensor
    ends: Tensor
    features: int
    scale: float
    top_k: int
    transposed: bool
    gathers: bool
    blocksize: int
    quant_type: str

    @property
    def combines(self) -> bool:
        """Whether the rows of each token are summed."""
        return self.top_k_weights is not None

    @property
    def rows(self) -> int:
        """The number of rows that experts compute."""
        return self.order.shape[0]

    @property
    def rank(self) -> int:
        """The rank of the adapters, 0 without one."""
        return 0 if self.lora_a is None else self.lora_a.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of y."""
        return (self.rows if self.top_k_weights is None else self.top_k_weights.shape[0], self.features)

    def copied_bytes(self) -> int:
        """Count the bytes of tensors that kernels cannot read as they lie in memory, and of factors in x's dtype."""
        rows = [one for one in (self.x, self.bias) if one is not None and not is_readable(one)]
        factors = [one for one in (self.lora_a, self.lora_b) if one is not None and not is_factor(one, self.x)]
        elements = sum(one.numel() for one in (*rows, *factors))
        weights = self.top_k_weights
        if weights is not None and not weights.is_contiguous():
            return elements * self.x.element_size() + weights.numel() * weights.element_size()
        return elements * self.x.element_size()

    def sorted_bytes(self) -> int:
        """Count the bytes of rows that are put side by side for the gradient of experts' weights."""
        columns = (self.x.shape[-1] if self.gathers else 0) + (self.features if self.combines else 0)
        return self.rows * columns * self.x.element_size()

    def matrices(self) -> Tensor:
        """Return the experts' weights [E, K, N] in x's dtype, dequantized if need be; a row of x is multiplied by one.

        Those in 16 bits are a view.
        """
        experts, columns = self.ends.shape[0], self.x.shape[-1]
        weight = self.weight
        if self.quant_type:
            shape = (columns, self.features) if self.transposed else (self.features, columns)
            low = self.x.dtype if self.x.dtype in (torch.float16, torch.bfloat16) else torch.float32
            flat = torch.empty(experts * shape[0], shape[1], dtype=low, device=self.x.device)
            dequantize_into(flat, [(weight, self.absmax)], [flat.shape[0]], self.blocksize, self.quant_type)
            weight = flat.view(experts, *shape).to(self.x.dtype)
        return weight if self.transposed else weight.transpose(1, 2)


def differentiable(call: ExpertCall) -> list[Tensor | None]:
    """List the tensors that may need a gradient."""
    return [getattr(call, name) for name in DIFFERENTIABLE]


def is_readable(rows: Tensor) -> bool:
    """Return whether kernels read rows as they lie in memory: elements side by side."""
    return rows.stride(-1) == 1


def is_factor(factor: Tensor, x: Tensor) -> bool:
    """Return whether an adapter's factor is in x's dtype, each expert's in one piece."""
    return factor.dtype == x.dtype and factor.is_contiguous()
