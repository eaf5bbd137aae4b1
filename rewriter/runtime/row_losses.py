"""Losses of lazy logits that no op has: computed row by row, then summed as the call asks."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastft.kernels.core.registry import wide
from fastft.rewriter.runtime.row_call import Call, computed, elementwise, summed
from fastft.rewriter.runtime.row_programs import Program

_OVER_WEIGHT = ("mse_loss", "l1_loss")  # their mean divides by the sum of the weight, where one is given


def _bound(call: Call) -> dict[str, Any] | None:
    """Return the arguments of a loss by name, None for a call that is deprecated or not of torch.nn.functional."""
    try:
        bound = inspect.signature(call.function).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    options = dict(bound.arguments)
    deprecated = options.pop("size_average", None), options.pop("reduce", None)
    return options if deprecated == (None, None) and isinstance(options.get("reduction"), str) else None


def summed_loss(call: Call) -> Any:
    """Compute a loss that is a sum over elements, or return the program of its summands."""
    options, result = _bound(call), call.tried()
    if options is None or not isinstance(result, Tensor):
        return None
    reduction = options.pop("reduction")
    if call.name in _OVER_WEIGHT and options.get("weight") is not None and reduction == "mean":
        return None
    summands = elementwise(call.of(call.function, **options, reduction="none"))
    if summands is None or reduction == "none":
        return summands
    return summed(call, summands, range(summands.rank), result, reduction)


def class_loss(call: Call) -> Any:
    """Compute a cross entropy or nll_loss of class numbers or probabilities, with weights of classes."""
    options, result = _bound(call), call.tried()
    if options is None or not isinstance(result, Tensor) or not isinstance(options["input"], Program):
        return None
    logits, target, reduction = options.pop("input"), options.pop("target"), options.pop("reduction")
    numbers = isinstance(target, Tensor) and tuple(target.shape) == logits.rows and not target.is_floating_point()
    shares = not isinstance(target, Tensor) or (tuple(target.shape) == logits.shape and not logits.classes_second)
    if (logits.rank != 2 and not logits.classes_second) or not (numbers or shares):
        return None  # here the classes have to be the second axis
    by_token = call.of(
        functools.partial(_losses_of_rows, call.function), replace(logits, classes_second=False),
        target.unsqueeze(-1) if numbers else target, numbers, **options,
    )  # fmt: skip
    losses = computed(by_token, by_token.args[0], [result])
    if losses is None or reduction == "none":
        return losses
    total = losses.sum(dtype=wide(result.dtype))
    return (total / _count(target, options, logits) if reduction == "mean" else total).to(result.dtype)


def _losses_of_rows(loss: Callable, x: Tensor, target: Tensor, numbers: bool, **options: Any) -> Tensor:
    """Return the loss of each row of x [..., V]; target: class numbers [..., 1], or shares [..., V]."""
    flat = target.reshape(-1) if numbers else target.reshape(-1, target.shape[-1])
    return loss(x.reshape(-1, x.shape[-1]), flat, reduction="none", **options).reshape(x.shape[:-1])


def _count(target: Any, options: Mapping[str, Any], logits: Program) -> Tensor | int:
    """Return what the mean of a loss divides by: rows, or the weights of those that are not ignored."""
    if not isinstance(target, Tensor) or target.is_floating_point():
        return math.prod(logits.rows)
    valid, weight = target != options["ignore_index"], options["weight"]
    if weight is None:
        return valid.sum()
    return torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum(dtype=wide(weight.dtype))
