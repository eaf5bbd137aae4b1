"""What is asked of a language model's prediction of a token, without holding logits, and its gradients.

Of the softmax p of a row of logits y (head_call.py), whose label is one of the classes (class_labels.py):
log_probs = y_label - lse,  entropy = -sum p log p,  lse = log sum exp,  mean_logits = mean(y),  log_sum_sq_probs =
log sum p^2, float32 [...] (float64 for float64), and is_top1, bool [...]: whether the label is the first of the largest
logits.  Rows labelled ignore_index give 0 and False.  A temperature T divides scale and softcap.

The first three have gradients: dy_j = g_log_probs (1[j = label] - p_j) - g_entropy p_j (log p_j + entropy) + g_lse p_j.
Behind the six come gradients of the sum of log_probs, of those among hidden and lora_s that grads_in_forward marks, in
hidden's dtype and float32: rows of their own, which backward scales by each row's g_log_probs.  Rows of which another
gradient is not zero, and all rows where weight, bias or lora_b need a gradient, are computed from new logits.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastft.kernels import class_labels, head_call
from fastft.kernels.class_labels import LabelledCall
from fastft.kernels.core.registry import Case, define, require, wide
from fastft.kernels.head_call import ALIKE, BY_ROW, DIFFERENTIABLE, PLACES

RESULTS = 6  # of each row
WITH_GRADIENT = 3  # of these, the first


@dataclass(frozen=True)
class Arguments(LabelledCall):
    """Arguments of a call, without those that say what to return."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    lora_s: Tensor | None
    lora_b: Tensor | None
    ignore_index: int
    scale: float
    softcap: float
    chunk_bytes: int


def statistics(call: Arguments) -> list[Tensor]:
    """Compute the six results in plain PyTorch, the first three differentiable: the specification.

    An entropy or a log-probability near 0 is not the difference of two large numbers: everything is relative to the
    largest logit.
    """
    y = call.y()
    ignored = call.labels == call.ignore_index
    labels = call.labels.masked_fill(ignored, 0).unsqueeze(-1)
    largest = y.detach().amax(-1, keepdim=True)
    log_total = torch.log(torch.exp(y - largest).sum(-1, keepdim=True))
    log_p = y - largest - log_total
    p = torch.exp(log_p)
    entropy = -(p * log_p.masked_fill(p == 0.0, 0.0)).sum(-1)  # a bias of -inf may rule a class out
    fixed = [y.mean(-1), torch.log(p.square().sum(-1))]
    top1 = y.detach().argmax(-1) == labels.squeeze(-1)
    results = [log_p.gather(-1, labels).squeeze(-1), entropy, (largest + log_total).squeeze(-1)]
    results += [one.detach() for one in fixed]
    return [*(one.masked_fill(ignored, 0.0) for one in results), top1 & ~ignored]


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, lora_s: Tensor | None, lora_b: Tensor | None,
    ignore_index: int, scale: float, softcap: float, chunk_bytes: int, grads_in_forward: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the six results and the marked gradients in plain PyTorch."""
    call = Arguments(hidden, weight, labels, bias, lora_s, lora_b, ignore_index, scale, softcap, chunk_bytes)
    ones = torch.ones(call.rows, dtype=wide(hidden.dtype), device=hidden.device)
    gradients = _differentiate(call, [ones, None, None], grads_in_forward)
    dtypes = head_call.dtypes_of_grads_in_forward(call, grads_in_forward)
    return [*statistics(call), *(one.to(dtype) for one, dtype in zip(gradients, dtypes, strict=True))]


def reference_backward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, lora_s: Tensor | None, lora_b: Tensor | None,
    ignore_index: int, scale: float, softcap: float, chunk_bytes: int,
    grad_log_probs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None, ready: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the needed gradients in plain PyTorch; ready: those that forward computed, all of the needed or none."""
    call = Arguments(hidden, weight, labels, bias, lora_s, lora_b, ignore_index, scale, softcap, chunk_bytes)
    upstream = [grad_log_probs, grad_entropy, grad_lse]
    gradients = _differentiate(call, upstream, needed)
    if not ready:
        return gradients
    again = _not_zero(call, upstream[1:]).view(call.rows).unsqueeze(-1)
    factor, pairs = _factor(call, grad_log_probs), zip(gradients, ready, strict=True)
    return [torch.where(again, new, head_call.scaled(old, factor, new.dtype)) for new, old in pairs]


def _differentiate(call: Arguments, upstream: Sequence[Tensor | None], marks: Sequence[bool]) -> list[Tensor]:
    candidates = zip(DIFFERENTIABLE, call.differentiable, marks, strict=True)
    leaves = {
        name: tensor.detach().requires_grad_() for name, tensor, mark in candidates if mark and tensor is not None
    }
    with torch.enable_grad():
        results = statistics(replace(call, **leaves))[:WITH_GRADIENT]  # type: ignore[arg-type]
    given = {one: grad.to(one.dtype) for one, grad in zip(results, upstream, strict=True) if grad is not None}
    if not leaves or not given:
        return [torch.zeros_like(one) for one in leaves.values()]
    return list(torch.autograd.grad(list(given), list(leaves.values()), list(given.values())))


def _not_zero(call: Arguments, upstream: Sequence[Tensor | None]) -> Tensor:
    """Tell of which rows [M] any of these gradients is not zero; a NaN is not."""
    given = [grad != 0.0 for grad in upstream if grad is not None]
    none = torch.zeros(call.rows, dtype=torch.bool, device=call.hidden.device)
    return functools.reduce(torch.logical_or, given, none).reshape(-1)


def _factor(call: Arguments, grad: Tensor | None) -> Tensor:
    """Return what scales forward's gradients, [..., 1]: of ignored rows 0, whatever their gradient is."""
    if grad is None:
        return call.hidden.new_zeros((*call.rows, 1), dtype=wide(call.hidden.dtype))
    return grad.masked_fill(call.labels == call.ignore_index, 0.0).unsqueeze(-1)


def new_outputs(*arguments: Any) -> list[Tensor]:
    """Allocate empty results and gradients; raise where shapes or dtypes do not fit."""
    *fields, marks = arguments
    call = _checked(fields, marks)
    by_row = not any(mark and not row for mark, row in zip(marks, BY_ROW, strict=True))
    require(by_row, lambda: "gradients that are summed over rows cannot be scaled by row afterwards")
    dtypes = [wide(call.hidden.dtype)] * (RESULTS - 1) + [torch.bool]
    results = [torch.empty(call.rows, dtype=dtype, device=call.hidden.device) for dtype in dtypes]
    return [*results, *head_call.empty(call, marks, head_call.dtypes_of_grads_in_forward(call, marks))]


def new_gradients(*arguments: Any) -> list[Tensor]:
    """Allocate the needed gradients, empty."""
    *fields, grad_log_probs, grad_entropy, grad_lse, ready, needed = arguments
    call = _checked(fields, needed)
    shapes = [grad.shape for grad in (grad_log_probs, grad_entropy, grad_lse) if grad is not None]
    require(all(shape == call.rows for shape in shapes), lambda: f"gradients {shapes} of {tuple(call.rows)}")
    if ready:
        fits = [one.shape for one in ready] == [one.shape for one in call.chosen(needed)]
        summed = any(mark and not row for mark, row in zip(needed, BY_ROW, strict=True))
        require(fits and not summed, lambda: "what is ready is not what is needed, row by row")
    return head_call.empty(call, needed, [tensor.dtype for tensor in call.chosen(needed)])


def _checked(fields: Sequence[Any], marks: Sequence[bool]) -> Arguments:
    call = Arguments(*fields)
    head_call.check(call, marks)
    class_labels.check(call)
    return call


def fill(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    """Write the forward's results into targets."""
    *fields, marks = arguments
    call = Arguments(*fields)
    upstream = targets[0].new_zeros(WITH_GRADIENT, prod(call.rows))
    upstream[0] = 1.0
    labels, ignored = class_labels.flattened(call)
    found = _run(call, labels, ignored, upstream, targets[RESULTS:], marks, forward=True)
    for target, values in zip(targets, found, strict=False):
        target.copy_(values.view(target.shape))
    class_labels.finish(call)


def fill_backward(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    """Write the backward's results into targets."""
    *fields, grad_log_probs, grad_entropy, grad_lse, ready, needed = arguments
    call = Arguments(*fields)
    given = [grad_log_probs, grad_entropy, grad_lse]
    upstream = call.hidden.new_zeros(WITH_GRADIENT, prod(call.rows), dtype=wide(call.hidden.dtype))
    for row, grad in zip(upstream, given, strict=True):
        if grad is not None:
            row.copy_(grad.reshape(-1))
    for target, one in zip(targets, ready, strict=False):
        torch.mul(one, _factor(call, grad_log_probs), out=target)
    labels, ignored = class_labels.flattened(call)
    unchanged = ignored | ~_not_zero(call, given[1:] if ready else given)
    _run(call, labels, unchanged, upstream, targets, needed, begun=bool(ready))


def _run(
    call: Arguments, labels: Tensor, ignored: Tensor, upstream: Tensor, gradients: Sequence[Tensor],
    marks: Sequence[bool], **how: bool,
) -> Tensor:  # fmt: skip
    """Write the marked gradients; return the six results [6, M], zero where ignored."""
    found = torch.zeros(RESULTS, labels.numel(), dtype=upstream.dtype, device=labels.device)

    def fill_chunk(logits: Tensor, rows: Tensor | slice, gain: float, gradient: bool) -> None:
        chunk = found.new_empty(RESULTS, logits.shape[0])
        fill_rows(logits, labels[rows], upstream[:, rows], chunk, call, gain, gradient)
        found[:, rows] = chunk

    head_call.run_chunks(call, ignored, fill_chunk, gradients, marks, **how)
    return found


def _plain_rows(
    logits: Tensor, labels: Tensor, upstream: Tensor, found: Tensor, call: Arguments, gain: float, gradient: bool
) -> None:
    ignored = labels == call.ignore_index
    y, slope = call.logits_of_product(logits, found.dtype)
    index = labels.masked_fill(ignored, 0).unsqueeze(1)
    largest, first = y.amax(-1, keepdim=True), y.argmax(-1)
    mean = y.mean(-1)
    y -= largest
    p = torch.exp(y)
    log_total = torch.log(p.sum(-1, keepdim=True))
    p /= p.sum(-1, keepdim=True)
    log_p = (y - log_total).masked_fill_(p == 0.0, 0.0)  # a bias of -inf may rule a class out
    entropy = -(p * log_p).sum(-1, keepdim=True)
    log_prob = y.gather(1, index) - log_total
    columns = [log_prob, entropy, largest + log_total, mean, torch.log(p.square().sum(-1)), first == index.squeeze(1)]
    found.copy_(torch.stack([one.reshape(-1).to(found.dtype) for one in columns]).masked_fill_(ignored, 0.0))
    if not gradient:
        return
    of_label, of_entropy, of_lse = (row.unsqueeze(1) for row in upstream.to(p.dtype))
    dy = p * (of_lse - of_label - of_entropy * (log_p + entropy))
    dy.scatter_add_(1, index, of_label)
    dy = (dy if slope is None else dy * slope) * (gain * call.scale)
    logits.copy_(dy).masked_fill_(ignored.unsqueeze(1), 0.0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *fields, marks = inputs
    ctx.numbers, ctx.count = fields[6:], len(inputs)
    needs = [ctx.needs_input_grad[place] for place in PLACES]
    made = iter(output[RESULTS:])
    ready = [next(made) if mark else None for mark in marks]
    needed = [one for one, need in zip(ready, needs, strict=True) if need]
    ctx.mark_non_differentiable(*output[WITH_GRADIENT:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*fields[:6], *([] if any(one is None for one in needed) else needed))


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    fields, ready = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
    needs = [ctx.needs_input_grad[place] for place in PLACES]
    upstream = grads[:WITH_GRADIENT]
    gradients: list[Tensor | None] = [None] * ctx.count
    if all(grad is None for grad in upstream):
        return tuple(gradients)
    places = [place for place, need in zip(PLACES, needs, strict=True) if need]
    if ready and upstream[1] is upstream[2] is None:
        factor = _factor(Arguments(*fields, *ctx.numbers), upstream[0])
        made = [head_call.scaled(one, factor, fields[place].dtype) for place, one in zip(places, ready, strict=True)]
    else:
        made = linear_token_statistics_backward(*fields, *ctx.numbers, *upstream, ready, needs)
    for place, gradient in zip(places, made, strict=True):
        gradients[place] = gradient
    return tuple(gradients)


def _flops_backward(hidden: torch.Size, weight: torch.Size, *arguments: Any) -> int:
    """Count the FLOPs of the needed gradients and of new logits; where forward's are ready, of scaling them."""
    ready = arguments[-2]
    return sum(map(prod, ready)) if ready else head_call.flops(hidden, weight, *arguments)


def _cases() -> tuple[list[Case], list[Case]]:
    """Build cases: forwards that compute gradients by rows or none, and backwards from ready gradients or none."""
    plain = {"ignore_index": -100, "scale": 1.0, "softcap": 0.0, "chunk_bytes": 2**9}
    shapes = {"hidden": "... H", "weight": "N H", "labels": "index ... N"}
    adapted = {**shapes, "bias": "N", "lora_s": "... A", "lora_b": "N A"}
    upstream = {"grad_log_probs": "...", "grad_entropy": "..."}
    forward: list[Case] = []
    backward: list[Case] = []
    for options, tensors in itertools.product(
        (plain | {"chunk_bytes": 2**28}, plain | {"scale": 0.5}, plain | {"scale": 0.5, "softcap": 2.0}),
        (shapes, {**shapes, "bias": "N"}, adapted),
    ):
        present = [name in tensors for name in DIFFERENTIABLE]
        by_row = [mark and row for mark, row in zip(present, BY_ROW, strict=True)]
        forward += [(tensors, {**options, "grads_in_forward": marks}) for marks in (by_row, [False] * 5)]
        ready = {f"ready.{at}": tensors[name] for at, name in enumerate(("hidden", "lora_s")) if name in tensors}
        backward.append(({**tensors, **upstream, "grad_lse": "..."}, {**options, "needed": present}))
        backward.append(({**tensors, **upstream, **ready}, {**options, "needed": by_row}))
    return forward, backward


fill_rows = functools.partial(head_call.fill_rows, "linear_token_statistics_triton.rows", _plain_rows)
_FORWARD, _BACKWARD = _cases()
linear_token_statistics = define(
    "linear_token_statistics", reference, new_outputs, fill,
    cases=_FORWARD, gradients=DIFFERENTIABLE, alike=ALIKE, flops=head_call.flops, planned=False,
    scratch=lambda *arguments: head_call.scratch_bytes(Arguments(*arguments[:-1])),
)  # fmt: skip
linear_token_statistics_backward = define(
    "linear_token_statistics_backward", reference_backward, new_gradients, fill_backward,
    cases=_BACKWARD, statistics=("grad_log_probs", "grad_entropy", "grad_lse"), alike=(*ALIKE, "ready"),
    flops=_flops_backward, planned=False,
    scratch=lambda *arguments: head_call.scratch_bytes(Arguments(*arguments[:10])),
)  # fmt: skip
linear_token_statistics.register_autograd(_backward, setup_context=_setup_context)
