"""What nodes of a captured graph say of themselves: name, module, source line, layer; and whether values are alike."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastft.compat import operators, symbolic


def same_kind(left: Tensor, right: Tensor) -> bool:
    """Whether two fake tensors have one dtype, device, shape and memory layout."""
    alike = left.dtype == right.dtype and left.device == right.device
    return alike and same_sizes(left.shape, right.shape) and same_strides(left, right)


def same_strides(left: Tensor, right: Tensor) -> bool:
    """But for axes of one element, which have none."""
    pairs = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(
        symbolic.statically_known_true(size == 1) or symbolic.statically_known_true(one == other)
        for size, one, other in pairs
    )


def same_sizes(left: Any, right: Any) -> bool:
    """Whether two shapes are known to be equal."""
    return len(left) == len(right) and all(
        symbolic.statically_known_true(one == other) for one, other in zip(left, right, strict=True)
    )


def layer_of(path: str) -> str:
    """The numbered module that a module's path lies in: ``layers.7`` of ``layers.7.mlp``; "" if there is none."""
    found = re.match(r"(?:^|.*?\.)\d+(?=\.|$)", path)
    return found.group() if found else ""


def is_result_of_many(node: Node) -> bool:
    """Whether a node takes one of the results of another."""
    return node.target is operator.getitem


def represents_exactly(outer: torch.dtype, inner: torch.dtype) -> bool:
    """Whether one dtype has all numbers of the other."""
    return torch.promote_types(outer, inner) == outer


def name_of(target: Any) -> str:
    """An op's name for people: ``rsqrt``, ``fastft.rms_norm``."""
    if isinstance(target, str):
        return target
    if operators.is_operator(target):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", None) or str(target)


def module_path(node: Node) -> str:
    """The dotted path of the module that made this node, as ``named_modules`` spells it; "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    raw = list(stack.values())[-1][0] if stack else ""
    # A forward behind a decorator's ``wrapper(*args, **kwargs)`` has the model at args[0].
    root = r"^L\['args'\]\[0\]|^L\['\w+'\]"
    path = re.sub(r"\.__dict__\['_modules'\]|\._modules", "", re.sub(root, "", raw))
    path = re.sub(r"\['?([^\]']+)'?\]", r".\1", path)
    return re.sub(r"^\.?(_orig_mod\b\.?)?", "", path)


def source_line(node: Node) -> str:
    """``file:line`` of the user's or the model's line that made this node; "" where Dynamo kept none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return ":".join(frames[-1]) if frames else ""


def without_scope(source: str) -> str:
    """``L['batch']['labels']`` as Dynamo spells it when it tells why it compiles again: ``batch['labels']``."""
    return re.sub(r"^L\['(\w+)'\]", r"\1", source)
