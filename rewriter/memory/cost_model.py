"""The cost of a node: seconds, from its FLOPs, its bytes and the device's rates, and bytes of memory."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fastft.compat import fake_tensors, symbolic
from fastft.kernels.core.registry import REGISTRY
from fastft.rewriter.memory import op_traits
from fastft.rewriter.memory.device_rates import Rates


def tensor_bytes(value: Tensor) -> Any:
    """Count the bytes of a tensor, expanded axes once: an int, or an expression of symbolic sizes."""
    sizes = [size for size, stride in zip(value.shape, value.stride(), strict=True) if not symbolic.is_zero(stride)]
    return prod(sizes) * value.element_size()


def scratch_bytes(node: Node) -> Any:
    """Return the bytes that one of fastft's ops allocates besides its results."""
    entry = REGISTRY.get(_name(node))
    if entry is None or entry.scratch is None:
        return 0
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: argument.meta.get("val"))
    return entry.scratch(*entry.complete(args, kwargs))


def seconds(node: Node, rate: Rates) -> float:
    """Estimate a node's time in seconds at the example's sizes: its FLOPs, and the bytes it reads and writes."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: argument.meta.get("val"))
    result = node.meta.get("val")
    moved = sum(symbolic.hint(tensor_bytes(tensor)) for tensor in fake_tensors.tensors_in((args, kwargs, result)))
    moved += 2 * symbolic.hint(scratch_bytes(node))
    return op_traits.flops(node.target, args, kwargs, result) / rate.flops + moved / rate.bytes


def _name(node: Node) -> str:
    return str(node.target).rsplit(".", 1)[0].replace(".", "::")
