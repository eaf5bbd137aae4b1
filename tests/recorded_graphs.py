"""What stands for CUDA graphs without a GPU: operations that are recorded, and run again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft.rewriter.runtime import cuda_graphs
from fastft.rewriter.runtime.cuda_graphs import Capture
from fastft.rewriter.runtime.part import Part


class Recorded(TorchDispatchMode):
    """A context that records what runs in it; ``replay`` runs it again and writes to the tensors that it wrote to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict[str, Any], Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                if func.is_view:
                    continue
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)


def capture(
    parts: Sequence[Part], outputs: Sequence[Any], moving: Sequence[int], inputs: Sequence[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Capture:  # fmt: skip
    """Capture a stack as a GPU would."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(cuda_graphs.eager, "clone_all", lambda values: [value.clone() for value in values])
    made = Capture.prepared(parts, moving, inputs)
    made.run(parts, outputs, made.static(inputs), lambda graph: graph)
    return made
