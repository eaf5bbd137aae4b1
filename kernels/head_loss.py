"""Define a loss of a head's logits as an op that never holds all of them:  y = hidden W^T + s B^T + bias.

y is multiplied by scale and, if softcap is not 0, becomes softcap tanh(y / softcap) (Gemma 2, arXiv:2408.00118).
Each op defines what a row of y is compared with, and how: linear_cross_entropy.py, linear_kl_div.py.

hidden [..., H], weight [V, H] and bias [V] of one dtype; s = lora_s [..., r] and B = lora_b [V, r] of any
floating-point dtype, the two factors of an adapter on the head: s_j x A_j^T beside each other, and B_j.
chunk_bytes: the bytes of logits that are held at once.

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
import torch.nn.functional as F
from torch import Tensor
from torch.library import CustomOpDef

from fastft.kernels.chunked_head import GAIN, Gradients, Head
from fastft.kernels.core import dispatch
from fastft.kernels.core.registry import Case, Choice, Results, Shapes, define, load, require, wide

DIFFERENTIABLE = ("hidden", "weight", "bias", "lora_s", "lora_b")  # the order of grads_in_forward and needed
PLACES = (0, 1, 3, 4, 5)  # of these among an op's arguments; the third is what rows are compared with
BY_ROW = (True, False, False, True, False)  # which gradients are rows of their own; the others are sums over rows
ALIKE = ("hidden", "weight", "bias")

ProcessChunk = Callable[[Tensor, Tensor | slice, Tensor, Tensor, float, bool], None]


class HeadCall:
    """What every call has.  An op's dataclass has all its arguments in order, but for those that say what to return."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_s: Tensor | None
    lora_b: Tensor | None
    scale: float
    softcap: float
    chunk_bytes: int

    @property
    def rows(self) -> torch.Size:
        """The shape of all losses."""
        return self.hidden.shape[:-1]

    @property
    def differentiable(self) -> list[Tensor | None]:
        """The tensors that may need a gradient, in the order of DIFFERENTIABLE."""
        return [self.hidden, self.weight, self.bias, self.lora_s, self.lora_b]

    def chosen(self, marks: Sequence[bool]) -> list[Tensor]:
        """Return those of the differentiable tensors that are marked and not None."""
        return [tensor for tensor, mark in zip(self.differentiable, marks, strict=True) if mark and tensor is not None]

    def y(self) -> Tensor:
        """Compute y in plain PyTorch: step by step what torch would compute at once."""
        logits = F.linear(self.hidden, self.weight, self.bias)
        if self.lora_s is not None and self.lora_b is not None:
            dtype = torch.promote_types(self.lora_s.dtype, self.lora_b.dtype)
            logits = (logits + F.linear(self.lora_s.to(dtype), self.lora_b.to(dtype))).to(logits.dtype)
        y = logits.to(wide(logits.dtype)) * self.scale
        return self.softcap * torch.tanh(y / self.softcap) if self.softcap else y

    def logits_of_product(self, product: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Compute y from a chunk's hidden W^T + s B^T, and the softcap's slope there (None without a softcap)."""
        y = product.to(dtype)
        y = (y if self.bias is None else y + self.bias) * self.scale
        if not self.softcap:
            return y, None
        y = torch.tanh(y / self.softcap)
        return self.softcap * y, 1.0 - y * y


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
        call = self.call_of(*fields)
        rows, (V, H), size = prod(call.rows), call.weight.shape, call.hidden.element_size()
        chunk = torch.sym_min(rows, max(1, call.chunk_bytes // (V * size)))
        return chunk * (V + 2 * H) * size

    def reference(self, *arguments: Any) -> list[Tensor]:
        """Compute the losses, or their sum, and the marked gradients in plain PyTorch."""
        *fields, reduce, grads_in_forward = arguments
        call = self.call_of(*fields)
        losses = self.losses(call)
        gradients = zip(
            self._differentiate(call, torch.ones_like(losses), grads_in_forward),
            _dtypes_of_grads_in_forward(call, grads_in_forward),
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
        return [loss, *_empty(call, grads_in_forward, _dtypes_of_grads_in_forward(call, grads_in_forward))]

    def new_gradients(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """Allocate the needed gradients, empty."""
        *fields, needed = arguments
        call = self._checked(fields, needed)
        fits = grad_output.shape == call.rows
        require(fits, lambda: f"gradient {tuple(grad_output.shape)} of losses {tuple(call.rows)}")
        return _empty(call, needed, [tensor.dtype for tensor in call.chosen(needed)])

    def _checked(self, fields: Sequence[Any], marks: Sequence[bool]) -> C:
        call = self.call_of(*fields)
        _check(call, marks)
        self.check(call)
        return call

    def fill(self, targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
        """Write the forward's results into targets."""
        *fields, reduce, grads_in_forward = arguments
        call = self.call_of(*fields)
        loss, *gradients = targets
        by_row = loss.new_empty(prod(call.rows)) if reduce or not loss.is_contiguous() else loss.view(-1)
        gain = GAIN / max(1.0, abs(call.scale)) if call.hidden.dtype == torch.float16 else 1.0
        self._run(call, by_row, loss.new_ones(()).expand(by_row.shape), gradients, grads_in_forward, gain)
        if reduce:
            torch.sum(by_row, 0, out=loss)
        elif by_row.data_ptr() != loss.data_ptr():
            loss.copy_(by_row.view(loss.shape))

    def fill_backward(self, targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
        """Write the backward's results into targets."""
        grad_output, *fields, needed = arguments
        call = self.call_of(*fields)
        unused = call.hidden.new_empty(prod(call.rows), dtype=wide(call.hidden.dtype))
        self._run(call, unused, grad_output.reshape(-1), targets, needed, 1.0)  # a loss in float16 has a scale already

    def _run(
        self, call: C, loss: Tensor, upstream: Tensor, targets: Sequence[Tensor], marks: Sequence[bool], gain: float
    ) -> None:
        """Write each row's loss, and the marked gradients, each row's multiplied by upstream."""
        ignored, fill_rows = self.prepare(call)
        lora_s = None if call.lora_s is None else _rows(call.lora_s)
        head = Head(_rows(call.hidden), call.weight, lora_s, call.lora_b, call.chunk_bytes, ignored, gain)
        gradients, written = _targets(targets, marks)
        loss.zero_()

        def process_chunk(logits: Tensor, rows: Tensor | slice) -> None:
            chunk_loss = loss.new_empty(logits.shape[0])
            fill_rows(logits, rows, upstream[rows], chunk_loss, head.gain, gradients.any)
            loss[rows] = chunk_loss

        head.run(process_chunk, gradients)
        for target, value in written:
            target.copy_(value.view(target.shape))
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
                    gradients[place] = _scaled(gradient, grad.unsqueeze(-1), dtype) if need else None
        elif grad is not None:
            upstream = grad.expand(ctx.saved_tensors[0].shape[:-1]) if ctx.reduce else grad
            made = iter(backward_op(upstream, *ctx.saved_tensors, *ctx.numbers, needs))
            for place, need in zip(PLACES, needs, strict=True):
                gradients[place] = next(made) if need else None
        return tuple(gradients)


def fill_rows(launcher: str, plain: Callable[..., None], logits: Tensor, *arguments: Any) -> None:
    """Write each row's loss, and gain times its gradient over the logits: by Triton where it runs, else by plain.

    arguments: what the rows are compared with, the gradient of the losses, the losses, the call, gain, and whether a
    gradient is needed.
    """
    call = next(argument for argument in arguments if isinstance(argument, HeadCall))
    tensors = [
        argument
        for argument in (logits, *arguments, call.bias)
        if isinstance(argument, Tensor) and argument.is_floating_point()
    ]
    on_triton = logits.numel() > 0 and dispatch.takes(0, None, tensors)
    if not (on_triton and dispatch.launched(load(launcher), tensors, logits, *arguments)):
        plain(logits, *arguments)


def _rows(tensor: Tensor) -> Tensor:
    """Reshape [..., D] to a matrix [M, D]."""
    return tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


def _dtypes_of_grads_in_forward(call: HeadCall, grads_in_forward: Sequence[bool]) -> list[torch.dtype]:
    """Return the gradients' dtypes: hidden's own, wide for the others, which are scaled before they are rounded."""
    return [
        tensor.dtype if number == 0 else wide(tensor.dtype)
        for number, (tensor, need) in enumerate(zip(call.differentiable, grads_in_forward, strict=True))
        if need and tensor is not None
    ]


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale a gradient, rounded once to dtype, with no float32 tensor in between.

    factor has an axis, or a GPU would round it to the gradient's dtype.
    """
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _empty(call: HeadCall, marks: Sequence[bool], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    pairs = zip(call.chosen(marks), dtypes, strict=True)
    return [torch.empty(tensor.shape, dtype=dtype, device=tensor.device) for tensor, dtype in pairs]


def _check(call: HeadCall, marks: Sequence[bool]) -> None:
    hidden, weight, bias, s, b = call.hidden, call.weight, call.bias, call.lora_s, call.lora_b
    require(hidden.is_floating_point() and hidden.dim() > 0, lambda: f"hidden {hidden.dtype} {tuple(hidden.shape)}")
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[-1] and weight.dtype == hidden.dtype
    require(fits, lambda: f"weight {weight.dtype} {tuple(weight.shape)} beside {hidden.dtype} {tuple(hidden.shape)}")
    fits = bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)
    require(fits, lambda: "bias has not the shape and dtype of weight's rows")
    require((s is None) == (b is None), lambda: "lora_s and lora_b go together")
    if s is not None and b is not None:
        fits = s.shape[:-1] == hidden.shape[:-1] and b.shape == (weight.shape[0], s.shape[-1])
        require(fits, lambda: f"lora_s {tuple(s.shape)} and lora_b {tuple(b.shape)}")
    marked = [tensor is not None for tensor, mark in zip(call.differentiable, marks, strict=True) if mark]
    require(all(marked), lambda: "a gradient is asked of what is not given")


def _targets(targets: Sequence[Tensor], marks: Sequence[bool]) -> tuple[Gradients, list[tuple[Tensor, Tensor]]]:
    """Return where a chunk's gradients go, the targets themselves or buffers, and the pairs to be copied in the end."""
    remaining, gradients, copied = iter(targets), Gradients(), []
    for name, by_row, mark in zip(DIFFERENTIABLE, BY_ROW, marks, strict=True):
        if not mark:
            continue
        target = next(remaining)
        summed = not by_row and target.dtype != wide(target.dtype)
        own = torch.empty_like(target, dtype=wide(target.dtype)) if summed else target
        own.zero_()
        if summed:
            copied.append((target, own))
        setattr(gradients, name, own.view(-1, own.shape[-1]) if by_row else own)
    return gradients, copied


def flops(hidden: torch.Size, weight: torch.Size, *arguments: Any) -> int:
    """Count 2 FLOPs for each logit and feature, and as many for each of hidden's and weight's gradients if marked."""
    return 2 * prod(hidden) * weight[0] * (1 + sum(map(bool, arguments[-1][:2])))


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
