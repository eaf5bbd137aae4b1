"""The backend: rewrite the graph, lower it, and fall back to the graph as it was if anything of ours fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from fastft.rewriter import compat
from fastft.rewriter.options import Options


def fastft(gm: GraphModule, example_inputs: list[torch.Tensor], *, options: dict[str, Any] | None = None) -> Callable:
    """The function that torch.compile calls once a graph; found by the name "fastft"."""
    parsed = Options.parse(options)
    if parsed.lower == "eager":
        return gm.forward
    return compat.compile_fx(gm, example_inputs)
