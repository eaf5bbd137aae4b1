"""Run expert_linear: which products, in which order, and what lies in scratch between them.

A 4-bit weight is dequantized to 16 bits into scratch for one product of all experts and freed with the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.kernels.expert_call import ExpertCall, is_factor, is_readable
from fastft.kernels.expert_linear_triton import outer, product
from fastft.kernels.expert_rows_triton import combine, spread, weigh


def forward(targets: Sequence[Tensor], *arguments: Any) -> None:
    """Write y and the products with A into targets."""
    call = _with_unit_rows(ExpertCall(*arguments))
    y, s = targets
    where = (call.order, call.ends, call.top_k, call.gathers)
    rows = call.x.new_empty(call.rows, call.features) if call.combines else y
    adapter = None
    if call.lora_a is not None and call.lora_b is not None:
        product(s, call.x, _factor(call.lora_a, call.x).transpose(1, 2), *where)
        adapter = s, _factor(call.lora_b, call.x).transpose(1, 2)
    scale = 1.0 if adapter is None else call.scale
    product(rows, call.x, call.matrices(), *where, scale=scale, adapter=adapter, bias=call.bias)
    if call.top_k_weights is not None:
        combine(y, rows, call.top_k_weights, call.place, call.top_k)


def backward(targets: Sequence[Tensor], grad_output: Tensor, s: Tensor, *arguments: Any) -> None:
    """Write the needed gradients into targets, in the order of differentiable()."""
    *fields, needed = arguments
    call = _with_unit_rows(ExpertCall(*fields))
    grad_output, left = _unit_rows(grad_output), iter(targets)
    dx, dweight, dbias, da, db, dweights = (next(left) if need else None for need in needed)
    x, row_weights, where = call.x, call.top_k_weights, (call.order, call.ends, call.top_k)
    ds = adapter = None
    if call.lora_a is not None and call.lora_b is not None and (dx is not None or da is not None or call.combines):
        ds = x.new_empty(call.rows, call.rank)
        product(ds, grad_output, _factor(call.lora_b, x), *where, call.combines, scale=call.scale)
        adapter = ds, _factor(call.lora_a, x)
    if dx is not None or dweights is not None:
        _backward_of_rows(call, grad_output, adapter, dx, dweights)
    sums: dict[str, Any] = {"row_weights": row_weights}
    if da is not None and ds is not None:
        outer(da, ds, x, *where, gathers=call.gathers, **sums)
    if db is not None:
        outer(db.transpose(1, 2), s, grad_output, *where, scale=call.scale, gathers=call.combines, **sums)
    if dweight is not None:
        _backward_of_weights(call, grad_output, dweight if call.transposed else dweight.transpose(1, 2))
    if dbias is not None:
        ones = x.new_ones(1, 1).expand(call.rows, 1)
        outer(dbias.unsqueeze(1), ones, grad_output, *where, gathers=call.combines, **sums)


def _backward_of_rows(
    call: ExpertCall, grad_output: Tensor, adapter: tuple[Tensor, Tensor] | None, dx: Tensor | None,
    dweights: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients of x and of the weights that rows are summed by."""
    x, where = call.x, (call.order, call.ends, call.top_k)
    rows = dx if dx is not None and not call.gathers else x.new_empty(call.rows, x.shape[1])
    product(rows, grad_output, call.matrices().transpose(1, 2), *where, call.combines, adapter=adapter)
    if call.top_k_weights is not None:
        bias_dots = None
        if call.bias is not None:  # each row's dot with its expert's bias
            bias_dots = x.new_empty(call.rows, 1, dtype=torch.float32)
            product(bias_dots, grad_output, call.bias.unsqueeze(2), *where, call.combines)
        dots = dweights if dweights is not None else x.new_empty(call.rows, dtype=torch.float32)
        weigh(rows, dots, x, call.top_k_weights, call.order, call.top_k, call.gathers, bias_dots)
    if dx is not None and call.gathers:
        combine(dx, rows, None, call.place, call.top_k)


def _backward_of_weights(call: ExpertCall, grad_output: Tensor, dweight: Tensor) -> None:
    """Write the gradient of experts' weights, of rows that are copied where they do not lie side by side in order.

    Several tiles read each row, and each would look its number up.
    """
    x, grads = call.x, grad_output
    if call.gathers:
        x = x.new_empty(call.rows, x.shape[1])
        spread(x, call.x, None, call.order, call.top_k)
    if call.combines:
        grads = x.new_empty(call.rows, call.features)
        spread(grads, grad_output, call.top_k_weights, call.order, call.top_k)
    outer(dweight, x, grads, call.order, call.ends, call.top_k)


def _factor(factor: Tensor, x: Tensor) -> Tensor:
    """Return an adapter's factor in x's dtype, each expert's in one piece."""
    if is_factor(factor, x):
        return factor
    return torch.empty(factor.shape, dtype=x.dtype, device=x.device).copy_(factor)


def _unit_rows(tensor: Tensor) -> Tensor:
    return tensor if is_readable(tensor) else tensor.contiguous()


def _with_unit_rows(call: ExpertCall) -> ExpertCall:
    """Return the call with tensors whose rows kernels can read: elements side by side."""
    weights, bias = call.top_k_weights, call.bias
    return call._replace(
        x=_unit_rows(call.x), bias=None if bias is None else _unit_rows(bias),
        top_k_weights=None if weights is None else weights.contiguous(),
    )  # fmt: skip
