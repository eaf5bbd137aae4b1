"""Let the backward of RMSNorm add the gradient that the residual stream brings past the norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fastft.rewriter.fx.metadata import same_kind

BACKWARD = "fastft.rms_norm_backward.default"
ADDEND = 6  # the place of its addend


def fold(joint: Graph) -> None:
    """Replace rms_norm_backward(...) + g in a joint graph by one call, which rounds once and saves a pass over memory.

    Only where that is the one use of the call, and where g has its dtype, device, shape and strides.
    """
    for node in joint.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        for call, other in (node.args, node.args[::-1]):
            if not node.kwargs and _is_alone(call) and _alike(call, other):
                with joint.inserting_before(node):
                    new = joint.call_function(call.target, (*call.args[:ADDEND], other))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                joint.erase_node(node)
                joint.erase_node(call)
                break


def _is_alone(call: Any) -> bool:
    """Return whether this is a call without an addend whose result is used once."""
    known = isinstance(call, Node) and call.op == "call_function" and str(call.target) == BACKWARD
    return known and len(call.users) == 1 and not call.kwargs and all(arg is None for arg in call.args[ADDEND:])


def _alike(call: Node, other: Any) -> bool:
    """Return whether two nodes are tensors of one kind, and different nodes."""
    if not isinstance(other, Node) or other is call:
        return False
    one, two = call.meta.get("val"), other.meta.get("val")
    return isinstance(one, Tensor) and isinstance(two, Tensor) and same_kind(one, two)
