"""Metadata of captured nodes (name, module path, source line, layer), and comparisons of example values."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastft import compat
from fastft.compat import operators, symbolic

_SUBSTITUTES = os.path.dirname(str(compat.__file__))
FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def same_kind(left: Tensor, right: Tensor) -> bool:
    """Tell whether two fake tensors have the same dtype, device, shape and strides."""
    alike = left.dtype == right.dtype and left.device == right.device
    return alike and same_sizes(left.shape, right.shape) and same_strides(left, right)


def same_strides(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors have the same strides, except in axes of size 1."""
    pairs = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(
        symbolic.statically_known_true(size == 1) or symbolic.statically_known_true(stride == other_stride)
        for size, stride, other_stride in pairs
    )


def same_sizes(left: Any, right: Any) -> bool:
    """Tell whether two shapes are statically known to be equal."""
    return len(left) == len(right) and all(
        symbolic.statically_known_true(size == other_size) for size, other_size in zip(left, right, strict=True)
    )


def layer_of(path: str) -> str:
    """Return the numbered module that contains a module's path: ``layers.7`` for ``layers.7.mlp``; "" without one."""
    prefix = re.match(r"(?:^|.*?\.)\d+(?=\.|$)", path)
    return prefix.group() if prefix else ""


def is_result_of_many(node: Node) -> bool:
    """Tell whether a node selects one of the results of another."""
    return node.target is operator.getitem


def represents_exactly(outer: torch.dtype, inner: torch.dtype) -> bool:
    """Tell whether dtype ``outer`` represents every number of dtype ``inner`` exactly."""
    return torch.promote_types(outer, inner) == outer


def name_of(target: Any) -> str:
    """Return an op's name as reports show it: ``rsqrt``, ``fastft.rms_norm``."""
    if isinstance(target, str):
        return target
    if operators.is_operator(target):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", None) or str(target)


def place_of(node: Node) -> tuple[str, str]:
    """Return the module and the source line that made a node, as reports name them."""
    return module_path(node), source_line(node)


def module_path(node: Node) -> str:
    """Return the dotted path of the module that made this node, as in ``named_modules``; "" for the root module."""
    return path_in(node.meta.get("nn_module_stack") or {})


def path_in(stack: Mapping[str, tuple[str, Any]]) -> str:
    """Return the same of a stack of modules, of which Dynamo has the innermost last."""
    raw = list(stack.values())[-1][0] if stack else ""
    # A forward behind a decorator's ``wrapper(*args, **kwargs)`` has the model at args[0].
    root = r"^L\['args'\]\[0\]|^L\['\w+'\]"
    path = re.sub(r"\.__dict__\['_modules'\]|\._modules", "", re.sub(root, "", raw))
    path = re.sub(r"\['?([^\]']+)'?\]", r".\1", path)
    return re.sub(r"^\.?(_orig_mod\b\.?)?", "", path)


def traced_in(nodes: Iterable[Node], modules: Iterable[str]) -> str | None:
    """Return which of several modules the nodes of the body that serves all of them were traced in, or None."""
    traced = next(filter(None, map(module_path, nodes)), "")
    return next((module for module in modules if f"{traced}.".startswith(f"{module}.")), None)


def source_line(node: Node) -> str:
    """Return ``file:line`` of the user's or the model's line that made this node; "" where Dynamo kept none.

    Of a substitute that was traced in place of a library's function it is the line that calls it.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not frame[0].startswith(_SUBSTITUTES)] or frames
    return ":".join(frames[-1]) if frames else ""


def without_scope(source: str) -> str:
    """Strip Dynamo's local scope from a source name: ``L['batch']['labels']`` becomes ``batch['labels']``."""
    return re.sub(r"^L\['(\w+)'\]", r"\1", source)
