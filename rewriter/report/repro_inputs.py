"""What a reproducer's graph is given: tensors drawn at random, of the recorded shapes, strides and storages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastft.compat import fake_tensors

_NORMAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BYTES = {torch.uint8: (0, 256), torch.int8: (-128, 128), torch.bool: (0, 2)}


@dataclass
class Input:
    """One tensor.

    stride: None for a dense one.  leaf: whether autograd begins at it.  static: Dynamo's word for what stays where it
    is.  symbols: by axis, the sizes that may change.  storage: number and bytes of one that other inputs lie in too;
    storages: those made so far, by number.
    """

    name: str
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0
    device: str = "cpu"
    requires_grad: bool = False
    leaf: bool = True
    parameter: bool = False
    static: str | None = None
    symbols: Mapping[int, str] = field(default_factory=dict)
    storage: tuple[int, int] | None = None
    storages: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stride = self.stride if self.stride is not None else torch.empty(self.size, device="meta").stride()
        reach = sum((length - 1) * step for length, step in zip(self.size, stride, strict=True))
        number, extent = self.storage or (None, (self.offset + max(reach, 0) + 1) * self.dtype.itemsize)
        memory = self.storages.get(number) if number is not None else None
        if memory is None:
            memory = torch.zeros(extent, dtype=torch.uint8, device=self.device).untyped_storage()
        if number is not None:
            self.storages[number] = memory
        new = torch.empty(0, dtype=self.dtype, device=self.device)
        count = memory.nbytes() // self.dtype.itemsize
        self.flat = new.clone().set_(memory, 0, (count,), (1,))
        tensor = new.set_(memory, self.offset, self.size, stride)  # no view
        self.tensor = nn.Parameter(tensor, self.requires_grad) if self.parameter else tensor
        self.tensor.requires_grad_(self.requires_grad)

    def fake(self, mode: Any) -> Tensor:
        """Return the fake tensor that Dynamo would trace with."""
        return fake_tensors.as_captured(mode, self.passed(), self.name, self.symbols)

    def fill(self, seed: int = 0, below: int = 2) -> None:
        """Draw its values: numbers around 0, smaller in matrices, integers ``below``, bytes as they come."""
        flat = self.flat
        generator = torch.Generator(flat.device).manual_seed(seed)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            scale = self.size[-1] ** -0.5 if len(self.size) > 1 and self.size[-1] else 1.0
            kind = self.dtype if self.dtype in _NORMAL else torch.float32
            values = torch.empty(flat.shape, dtype=kind, device=flat.device).normal_(0, scale, generator=generator)
        else:
            least, end = _BYTES.get(self.dtype, (0, below))
            values = torch.randint(least, end, flat.shape, generator=generator, device=flat.device)
        flat.copy_(values)

    def passed(self) -> Tensor:
        """Return what to call the graph with."""
        return self.tensor if self.leaf else self.tensor.clone()


def drawn(sequence: Sequence[Input | int | None], below: int) -> list[Any]:
    """Draw values for all inputs, the same in every call."""
    for seed, value in enumerate(sequence):
        if isinstance(value, Input):
            value.fill(seed, below)
            value.tensor.grad = None
    return [value.passed() if isinstance(value, Input) else value for value in sequence]
