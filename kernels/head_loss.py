"""Define a loss of a head's logits as an op that never holds all of them.

Each op defines what a row of logits is compared with, and how: linear_cross_entropy.py, linear_kl_div.py.  What the
logits are made of is told in head_call.py.

The first result is the losses [...], or with reduce their sum [], float32 (float64 for float64).  The others are
gradients of the sum of all losses, of those among (hidden, weight, bias, lora_s, lora_b) that grads_in_forward marks:
in hidden's dtype, and float32 for what is summed over rows.  Forward has the logits at hand, so computing them there
saves a product.  Backward then only scales: all by the gradient of the sum, or each row of hidden's and lora_s's by its
own.  What is not marked, or cannot be scaled afterwards, backward computes from new logits.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.library import CustomOpDef

from fastft.kernels.core.registry import Case, Choice, Results, Shapes, define, require, wide
from fastft.kernels.head_call import (
    ALIKE,
    BY_ROW,
    DIFFERENTIABLE,
    PLACES,
    HeadCall,
    check,
    dtypes_of_grads_in_forward,
    empty,
    flops,
    run_chunks,
    scaled,
    scratch_bytes,
)

ProcessChunk = Callable[[Tensor, Tensor | slice, Tensor, Tensor, float, bool], None]


C = TypeVar("C", bound=HeadCall)


@dataclass(frozen=True)
class HeadLoss(Generic[C]):
    """What defines one loss op; the methods take the op's arguments.

    call_of: the op's dataclass, made from all arguments but those that say what to return.
    check: raises where a call's rows cannot be compared with what is passed for it.
    losses: computes the loss of each row in plain PyTorch, differentiable: the specification.
    finalize: called last, once everything is launched.
    ignored: returns which rows count for nothing, from what rows are compared with and the numbers among a call's
        arguments; None where all rows count.
    prepare: returns which rows are ignored, or None, and a function that writes the losses of some rows, and gain times
        the gradient over their logits: (logits, which rows, gradient of the losses, losses, gain, whether a gradient is
        needed).
    """

    call_of: Callable[..., C]
    check: Callable[[C], None]
    losses: Callable[[C], Tensor]
    prepare: Callable[[C], tuple[Tensor | None, ProcessChunk]]
    finalize: Callable[[C], None] = lambda call: None
    ignored: Callable[[Tensor, Sequence[Any]], Tensor] | None = None

    def define(
        self, name: str, reference: Callable[..., Results], reference_backward: Callable[..., Results],
        compared: Shapes, choices: Sequence[Choice],
    ) -> tuple[CustomOpDef, CustomOpDef]:  # fmt: skip
        """Define the op and its backward, of these signatures; compared: the shape of what rows are compared with."""
        forward, backward = _cases(compared, choices)
        op = define(
            name, reference, self.new_outputs, self.fill,
            cases=forward, gradients=DIFFERENTIABLE, alike=ALIKE, flops=flops, scratch=self.scratch_bytes,
            planned=False,  # how many labels count is read from them
        )  # fmt: skip
        backward_op = define(
            f"{name}_backward", reference_backward, self.new_gradients, self.fill_backward,
            cases=backward, statistics=("grad_output",), alike=ALIKE, flops=flops_backward,
            scratch=lambda grad_output, *arguments: self.scratch_bytes(*arguments, ()), planned=False,
        )  # fmt: skip
        op.register_autograd(functools.partial(self._backward, backward_op), setup_context=self._setup_context)
        return op, backward_op

    def scratch_bytes(self, *arguments: Any) -> int:
        """Count the bytes of a chunk: its logits, its hidden states and their gradient."""
        *fields, _, _ = arguments
        return scratch_bytes(self.call_of(*fields))

    def reference(self, *arguments: Any) -> list[Tensor]:
        """Compute the losses, or their sum, and the marked gradients in plain PyTorch."""
        *fields, reduce, grads_in_forward = arguments
        call = self.call_of(*fields)
        losses = self.losses(call)
        gradients = zip(
            self._differentiate(call, torch.ones_like(losses), grads_in_forward),
            dtypes_of_grads_in_forward(call, grads_in_forward),
            strict=True,
        )
        return [losses.sum() if reduce else losses, *(gradient.to(dtype) for gradient, dtype in gradients)]

    def reference_backward(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """Compute the needed gradients in plain PyTorch; grad_output [...] is that of each row's loss."""
        *fields, needed = arguments
        return self._differentiate(self.call_of(*fields), grad_output, needed)

    def _differentiate(self, call: Any, grad_output: Tensor, marks: Sequence[bool]) -> list[Tensor]:
        candidates = zip(DIFFERENTIABLE, call.differentiable, marks, strict=True)
        leaves = {
            name: tensor.detach().requires_grad_() for name, tensor, mark in candidates if mark and tensor is not None
        }
        if not leaves:
            return []
        with torch.enable_grad():
            losses = self.losses(replace(call, **leaves))
        return list(torch.autograd.grad(losses, list(leaves.values()), grad_output.to(losses.dtype)))

    def new_outputs(self, *arguments: Any) -> list[Tensor]:
        """Allocate empty losses and gradients; raise where shapes or dtypes do not fit."""
        *fields, reduce, grads_in_forward = arguments
        call = self._checked(fields, grads_in_forward)
        loss = call.hidden.new_empty(() if reduce else call.rows, dtype=wide(call.hidden.dtype))
        return [loss, *empty(call, grads_in_forward, dtypes_of_grads_in_forward(call, grads_in_forward))]

    def new_gradients(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """Allocate the needed gradients, empty."""
        *fields, needed = arguments
        call = self._checked(fields, needed)
        fits = grad_output.shape == call.rows
        require(fits, lambda: f"gradient {tuple(grad_output.shape)} of losses {tuple(call.rows)}")
        return empty(call, needed, [tensor.dtype for tensor in call.chosen(needed)])

    def _checked(self, fields: Sequence[Any], marks: Sequence[bool]) -> C:
        call = self.call_of(*fields)
        check(call, marks)
        self.check(call)
        return call

    def fill(self, targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
        """Write the forward's results into targets."""
        *fields, reduce, grads_in_forward = arguments
        call = self.call_of(*fields)
        loss, *gradients = targets
        by_row = loss.new_empty(prod(call.rows)) if reduce or not loss.is_contiguous() else loss.view(-1)
        ones = loss.new_ones(()).expand(by_row.shape)
        self._run(call, by_row, ones, gradients, grads_in_forward, forward=True)
        if reduce:
            torch.sum(by_row, 0, out=loss)
        elif by_row.data_ptr() != loss.data_ptr():
            loss.copy_(by_row.view(loss.shape))

    def fill_backward(self, targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
        """Write the backward's results into targets."""
        grad_output, *fields, needed = arguments
        call = self.call_of(*fields)
        unused = call.hidden.new_empty(prod(call.rows), dtype=wide(call.hidden.dtype))
        self._run(call, unused, grad_output.reshape(-1), targets, needed)

    def _run(
        self, call: C, loss: Tensor, upstream: Tensor, targets: Sequence[Tensor], marks: Sequence[bool],
        *, forward: bool = False,
    ) -> None:  # fmt: skip
        """Write each row's loss, and the marked gradients, each row's multiplied by upstream."""
        ignored, fill_rows = self.prepare(call)
        loss.zero_()

        def fill_chunk(logits: Tensor, rows: Tensor | slice, gain: float, gradient: bool) -> None:
            chunk_loss = loss.new_empty(logits.shape[0])
            fill_rows(logits, rows, upstream[rows], chunk_loss, gain, gradient)
            loss[rows] = chunk_loss

        run_chunks(call, ignored, fill_chunk, targets, marks, forward=forward)
        self.finalize(call)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        *fields, ctx.reduce, grads_in_forward = inputs
        ctx.numbers, ctx.count = fields[6:], len(inputs)
        needs = [ctx.needs_input_grad[place] for place in PLACES]
        scalable = [mark and (ctx.reduce or row) for mark, row in zip(grads_in_forward, BY_ROW, strict=True)]
        ctx.grads_in_forward = (
            grads_in_forward if all(ready or not need for ready, need in zip(scalable, needs, strict=True)) else None
        )
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if fields[place] is None else fields[place].dtype for place in PLACES]
        compared = [] if self.ignored is None else [fields[2]]
        ctx.save_for_backward(*([*compared, *output[1:]] if ctx.grads_in_forward is not None else fields[:6]))

    def _backward(self, backward_op: CustomOpDef, ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        grad = grads[0]
        needs = [ctx.needs_input_grad[place] for place in PLACES]
        gradients: list[Tensor | None] = [None] * ctx.count
        if grad is not None and ctx.grads_in_forward is not None:
            ready = iter(ctx.saved_tensors)
            if self.ignored is not None:  # the mean of no row has an infinite factor, and a gradient of 0 all the same
                rows = self.ignored(next(ready), ctx.numbers)
                grad = grad.masked_fill(rows.all() if ctx.reduce else rows, 0.0)
            for place, mark, need, dtype in zip(PLACES, ctx.grads_in_forward, needs, ctx.dtypes, strict=True):
                if mark:
                    gradient = next(ready)
                    gradients[place] = scaled(gradient, grad.unsqueeze(-1), dtype) if need else None
        elif grad is not None:
            upstream = grad.expand(ctx.saved_tensors[0].shape[:-1]) if ctx.reduce else grad
            made = iter(backward_op(upstream, *ctx.saved_tensors, *ctx.numbers, needs))
            for place, need in zip(PLACES, needs, strict=True):
                gradients[place] = next(made) if need else None
        return tuple(gradients)


def flops_backward(grad_output: torch.Size, hidden: torch.Size, weight: torch.Size, *arguments: Any) -> int:
    """Count the FLOPs of the needed gradients and of the recomputed logits."""
    return flops(hidden, weight, *arguments)


def _cases(compared: Shapes, choices: Sequence[Choice]) -> tuple[list[Case], list[Case]]:
    """Build cases: forwards that compute all gradients, those by rows and none; and backwards."""
    shapes = {"hidden": "... H", "weight": "N H", **compared}
    adapted = {**shapes, "bias": "N", "lora_s": "... A", "lora_b": "N A"}
    forward: list[Case] = []
    backward: list[Case] = []
    for options, tensors in itertools.product(choices, (shapes, {**shapes, "bias": "N"}, adapted)):
        present = [name in tensors for name in DIFFERENTIABLE]
        by_row = [mark and row for mark, row in zip(present, BY_ROW, strict=True)]
        for reduce, grads_in_forward in ((True, present), (False, by_row), (options is choices[0], [False] * 5)):
            forward.append((tensors, {**options, "reduce": reduce, "grads_in_forward": grads_in_forward}))
        backward.append(({"grad_output": "...", **tensors}, {**options, "needed": present}))
    return forward, backward
