"""Every op with its plain PyTorch reference and some inputs, so that a test finds each of them without being told."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastft.rewriter.compat import OpOverload

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Entry:
    """reference has the op's signature; examples(dtype, device) yields argument tuples of that dtype, seeded, small."""

    op: OpOverload
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    examples: Callable[[torch.dtype, torch.device], Iterator[Arguments]]


REGISTRY: dict[str, Entry] = {}


def register(
    op: OpOverload,
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    examples: Callable[[torch.dtype, torch.device], Iterator[Arguments]],
) -> None:
    """Enter an op under its qualified name, as in ``fastft::rms_norm``."""
    name = op._schema.name
    if name in REGISTRY:
        raise ValueError(f"{name} is already registered")
    REGISTRY[name] = Entry(op, reference, examples)
