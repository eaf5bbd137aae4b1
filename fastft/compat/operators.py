"""What is registered with torch: operators, higher-order operators, what they mutate and alias."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx.node import _get_qualified_name

__all__ = ["OpOverload"]  # what is only passed on


def is_view(target: Any) -> bool:
    """Return whether an operator's result aliases its first argument."""
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint  # as torch.utils.checkpoint is captured
LAYER_CALL = torch.ops.higher_order.wrap  # runs a body as it is: a layer whose like was traced (layer_reuse.py)
ENTER_AUTOCAST = torch.amp._enter_autocast  # as autocast inside a graph is captured


def is_higher_order(target: Any) -> bool:
    """Return whether a node's target takes graph bodies as arguments (checkpoint, autograd.Function, ...)."""
    return isinstance(target, HigherOrderOperator)


def is_operator(target: Any) -> bool:
    """Return whether a node's target is a registered operator (``torch.ops.library.name``)."""
    return isinstance(target, (OpOverload, OpOverloadPacket))


def is_grouped_product(target: Any) -> bool:
    """Return whether a node's target is torch's product of experts' rows, or what transformers has in its place."""
    grouped = [getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None)]
    return target in grouped or (is_operator(target) and str(target).startswith("transformers.grouped_mm"))


def schema_name(target: Any) -> str:
    """Return the name of an operator with its library: ``aten::add``."""
    return str(target._schema.name)


def is_mutable(target: Any) -> bool:
    """Return whether a registered operator may mutate an argument."""
    if isinstance(target, OpOverloadPacket):
        return any(is_mutable(getattr(target, overload)) for overload in target.overloads())
    return isinstance(target, OpOverload) and target._schema.is_mutable


def qualified_name(target: Any) -> str:
    """Return the dotted name of a function, a class or an operator: ``torch.ops.higher_order.wrap``."""
    if is_higher_order(target):
        return f"torch.ops.higher_order.{target.name()}"
    if is_operator(target):
        return f"torch.ops.{target}"
    return re.sub(r"^_operator\.", "operator.", _get_qualified_name(target))


@functools.cache
def attention_engine(engine: str, *, backward: bool = False) -> Any:
    """Return the ATen operator of one of scaled_dot_product_attention's engines: cudnn, flash or efficient."""
    return getattr(torch.ops.aten, f"_scaled_dot_product_{engine}_attention" + ("_backward" if backward else ""))
