"""Autocast as it is where a node computes: as around the compiled call, or as the graph itself switches it.

accelerate and Trainer wrap a model's forward in autocast before it is compiled, so that the graph enters and leaves it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import operators
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.fx import bodies

_KINDS = ("cuda", "cpu")
State = tuple[torch.dtype | None, ...]


@contextmanager
def at(node: Node) -> Iterator[None]:
    """What the graph has entered and not left at this node."""
    with ExitStack() as stack:
        for entered in _entered(node):
            stack.enter_context(_context(*entered.args))
        yield


def _entered(node: Node) -> list[Node]:
    entries = node.graph.find_nodes(op="call_function", target=operators.ENTER_AUTOCAST)
    return [one for one in entries if one < node and not any(left < node for left in one.users)]


def _context(kind: Any, dtype: Any = None, enabled: Any = True, cache: Any = None) -> AbstractContextManager:
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache)


@contextmanager
def around(gm: GraphModule, body: GraphModule) -> Iterator[None]:
    """What the graphs around a nested body have entered where it is run."""
    with ExitStack() as stack:
        for call in bodies.calls_of(gm, body):
            stack.enter_context(at(call))
        yield


def state() -> State:
    """What autocast makes of matrices now, for each kind of device; None where it is off."""
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in _KINDS)


def entered() -> dict[str, torch.dtype]:
    """The kinds of devices for which autocast is on now, and what it makes of matrices there."""
    return {kind: dtype for kind, dtype in zip(_KINDS, state(), strict=True) if dtype is not None}


@contextmanager
def reproduced_on_cpu(wanted: State) -> Iterator[None]:
    """Autocast for tensors on a CPU as it is in that state for whichever device."""
    dtype = next((one for one in wanted if one is not None), None)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def dtype_at(node: Node) -> torch.dtype | None:
    """What autocast makes of matrices where this node computes, on its device; None where it is off."""
    value = value_of(node)
    assert isinstance(value, Tensor)
    kind = value.device.type
    if kind == "meta":  # autocast leaves tensors without values alone
        return None
    with at(node):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_softmax": lambda tensor: torch.log_softmax(tensor, -1),
    "cross_entropy": lambda tensor: F.cross_entropy(tensor, torch.zeros(1, dtype=torch.long, device=tensor.device)),
    "nll_loss": lambda tensor: F.nll_loss(tensor, torch.zeros(1, dtype=torch.long, device=tensor.device)),
}


@functools.cache
def dtype_of_loss(name: str, device: str, dtype: torch.dtype, automatic: torch.dtype) -> torch.dtype:
    """Try which dtype a loss of logits gets: which functions are widened differs from device to device."""
    with torch.autocast(device, dtype=automatic), torch.no_grad():
        return LOSSES[name](torch.zeros(1, 1, dtype=dtype, device=device)).dtype
