"""The only file that touches private torch symbols.  Supported: torch 2.11 to 2.15."""

from __future__ import annotations

import contextlib
import re
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InvalidCxxCompiler
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = [
    "BackendCompilerFailed",
    "InvalidCxxCompiler",
    "breaks",
    "compile_fx",
    "fake_mode_of",
    "is_higher_order",
    "is_mutable",
    "is_operator",
    "module_path",
    "set_value",
    "source_line",
    "statically_known_true",
    "storage_key",
    "value_of",
]

_LIBRARY_FRAME = re.compile(r"[/\\](torch|accelerate|peft)[/\\]")


def value_of(argument: Any) -> Any:
    """What a node computes, as the fake tensor or number that Dynamo saw; anything but a node is its own value."""
    return argument.meta.get("example_value") if isinstance(argument, Node) else argument


def set_value(node: Node, value: Any) -> None:
    """Record what ``node`` computes."""
    node.meta["example_value"] = value


def fake_mode_of(values: Any) -> AbstractContextManager:
    """The mode under which these fake tensors were made; a null context for meta or real tensors."""
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), contextlib.nullcontext())


def storage_key(tensor: torch.Tensor) -> int:
    """The same number for a tensor and all its views."""
    return tensor.untyped_storage()._cdata


def is_higher_order(target: Any) -> bool:
    """Whether the node's target takes graph bodies as arguments (checkpoint, autograd.Function, ...)."""
    return isinstance(target, HigherOrderOperator)


def is_operator(target: Any) -> bool:
    """Whether the node's target is a registered operator (``torch.ops.library.name``)."""
    return isinstance(target, (OpOverload, OpOverloadPacket))


def is_mutable(target: Any) -> bool:
    """Whether a registered operator may write to an argument."""
    if isinstance(target, OpOverloadPacket):
        return any(is_mutable(getattr(target, overload)) for overload in target.overloads())
    return isinstance(target, OpOverload) and target._schema.is_mutable


def module_path(node: Node) -> str:
    """The dotted path of the module that made this node, as ``named_modules`` spells it; "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    raw = list(stack.values())[-1][0] if stack else ""
    path = re.sub(r"\.__dict__\['_modules'\]|\._modules", "", re.sub(r"^L\['\w+'\]", "", raw))
    path = re.sub(r"\['?([^\]']+)'?\]", r".\1", path)
    return re.sub(r"^\.?(_orig_mod\b\.?)?", "", path)


def source_line(node: Node) -> str:
    """``file:line`` of the user's or the model's line that made this node; "" where Dynamo kept none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return ":".join(frames[-1]) if frames else ""


def breaks(gm: GraphModule) -> tuple[str, str] | None:
    """Why Dynamo ended this graph early, and where (``file:line``); None when it did not."""
    cause = getattr(gm, "compile_subgraph_reason", None)
    if cause is None or not getattr(cause, "graph_break", False):
        return None
    frames = [frame for frame in cause.user_stack or () if not _LIBRARY_FRAME.search(frame.filename)] or cause.user_stack
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return str(cause.reason).strip().splitlines()[0], where
