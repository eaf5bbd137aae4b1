"""Reproduce the autocast state at a node: that around the compiled call, or that which the graph itself sets.

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
    """Enter the autocast contexts that the graph has entered and not yet left at this node."""
    with ExitStack() as stack:
        for entered in _entered(node):
            stack.enter_context(context(*entered.args))
        yield


def _entered(node: Node) -> list[Node]:
    """List the calls that enter autocast before ``node`` and are not left before it."""
    entries = node.graph.find_nodes(op="call_function", target=operators.ENTER_AUTOCAST)
    return [entry for entry in entries if entry < node and not any(exit_ < node for exit_ in entry.users)]


def context(kind: Any, dtype: Any = None, enabled: Any = True, cache: Any = None) -> AbstractContextManager:
    """Return the autocast that a call with these arguments enters."""
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache)


@contextmanager
def around(gm: GraphModule, body: GraphModule) -> Iterator[None]:
    """Enter the autocast contexts in which the graphs around a nested body run it."""
    with ExitStack() as stack:
        for call in bodies.calls_of(gm, body):
            stack.enter_context(at(call))
        yield


def state() -> State:
    """Return autocast's dtype now for each device type in _KINDS, None where autocast is off."""
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in _KINDS)


def entered() -> dict[str, torch.dtype]:
    """Return the kinds of devices for which autocast is on now, with the dtype of matrix products there."""
    return {kind: dtype for kind, dtype in zip(_KINDS, state(), strict=True) if dtype is not None}


@contextmanager
def reproduced_on_cpu(wanted: State) -> Iterator[None]:
    """Give tensors on the CPU the autocast dtype that ``wanted`` has for whichever device."""
    dtype = next((automatic for automatic in wanted if automatic is not None), None)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def dtype_at(node: Node) -> torch.dtype | None:
    """Return autocast's dtype at this node, on the device of its value, or None where autocast is off."""
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
    """Return the dtype that a loss of logits has under autocast, by trying: it differs between devices."""
    with torch.autocast(device, dtype=automatic), torch.no_grad():
        return LOSSES[name](torch.zeros(1, 1, dtype=dtype, device=device)).dtype
