"""The cross entropy of a head's logits, and its gradients, without holding them:  y = hidden W^T + s B^T + bias.

loss_i = lse_i - (1 - e) y_label - e mean(y_i) + z lse_i^2,  lse = log sum exp.  e is label smoothing (Szegedy et al.,
2015, arXiv:1512.00567), z the weight of the z-loss (PaLM, 2022, arXiv:2204.02311); rows labelled ignore_index give 0.
y is multiplied by scale and, if softcap is not 0, becomes softcap tanh(y / softcap) (Gemma 2, arXiv:2408.00118).

hidden [..., H], weight [V, H] and bias [V] of one dtype; labels int64 [...]; s = lora_s [..., r] and B = lora_b [V, r]
of any floating-point dtype, the two factors of an adapter on the head: s_j x A_j^T beside each other, and B_j.
chunk_bytes: of logits that are held at once.

The first result is the losses [...], or with reduce their sum [], float32 (float64 for float64).  The others are
gradients of the sum of all losses, of those among (hidden, weight, bias, lora_s, lora_b) that ahead marks: in hidden's
dtype, and float32 for what is summed over rows.  Forward has the logits at hand, so computing them there saves a
product.  Backward then only scales: all by the gradient of the sum, or each row of hidden's and lora_s's by its own.
Anything that is not marked, or cannot be scaled afterwards, backward computes from new logits.

Labels outside of [0, V) raise as torch.nn.functional.cross_entropy does: IndexError, on a GPU a device-side assertion.
"""

import itertools
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels import dispatch
from fastft.kernels.chunked_head import GAIN, Gradients, Head
from fastft.kernels.registry import Case, define, load, require, wide

DIFFERENTIABLE = ("hidden", "weight", "bias", "lora_s", "lora_b")  # the order of ahead and needed
BY_ROW = (True, False, False, True, False)  # which gradients are rows of their own; the others are sums over rows


class Arguments(NamedTuple):
    """Of a call, but for what it is to return."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    lora_s: Tensor | None
    lora_b: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    scale: float
    softcap: float
    chunk_bytes: int

    @property
    def differentiable(self) -> list[Tensor | None]:
        """What there is a gradient of, in the order of DIFFERENTIABLE."""
        return [self.hidden, self.weight, self.bias, self.lora_s, self.lora_b]


def losses(call: Arguments) -> Tensor:
    """Of each row, in plain PyTorch: the specification.  What torch computes at once, step by step.

    A loss near 0 is not taken as the difference of two large numbers: all is relative to the largest logit.
    """
    logits = F.linear(call.hidden, call.weight, call.bias)
    if call.lora_s is not None and call.lora_b is not None:
        dtype = torch.promote_types(call.lora_s.dtype, call.lora_b.dtype)
        logits = (logits + F.linear(call.lora_s.to(dtype), call.lora_b.to(dtype))).to(logits.dtype)
    y = logits.to(wide(logits.dtype)) * call.scale
    if call.softcap:
        y = call.softcap * torch.tanh(y / call.softcap)
    ignored = call.labels == call.ignore_index
    labels = call.labels.masked_fill(ignored, 0).unsqueeze(-1)
    largest = y.detach().amax(-1, keepdim=True)
    log_total = torch.log(torch.exp(y - largest).sum(-1, keepdim=True))
    target, lse = y.gather(-1, labels), largest + log_total
    loss = log_total + (largest - target)
    if call.label_smoothing:  # else a class that a bias of -inf rules out is no matter
        loss = loss + call.label_smoothing * (target - y.mean(-1, keepdim=True))
    return (loss + call.z_loss * lse.square()).squeeze(-1).masked_fill(ignored, 0.0)


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, lora_s: Tensor | None, lora_b: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, scale: float, softcap: float, chunk_bytes: int,
    reduce: bool, ahead: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The forward in plain PyTorch."""
    call = Arguments(
        hidden, weight, labels, bias, lora_s, lora_b, ignore_index, label_smoothing, z_loss, scale, softcap, chunk_bytes
    )
    found = losses(call)
    given = found.new_ones(labels.shape)
    gradients = zip(_gradients(call, given, ahead), _ahead_dtypes(call, ahead), strict=True)
    return [found.sum() if reduce else found, *(one.to(dtype) for one, dtype in gradients)]


def reference_backward(
    grad_output: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, lora_s: Tensor | None,
    lora_b: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, scale: float, softcap: float,
    chunk_bytes: int, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed; grad_output [...] is that of each row's loss."""
    call = Arguments(
        hidden, weight, labels, bias, lora_s, lora_b, ignore_index, label_smoothing, z_loss, scale, softcap, chunk_bytes
    )
    return _gradients(call, grad_output, needed)


def _gradients(call: Arguments, grad_output: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    chosen = [one for one, need in zip(call.differentiable, needed, strict=True) if need and one is not None]
    if not chosen:
        return []
    with torch.enable_grad():
        leaves = {id(one): one.detach().requires_grad_() for one in chosen}
        own = [leaves.get(id(one), one) if isinstance(one, Tensor) else one for one in call]
        found = losses(Arguments(*own))
    return list(torch.autograd.grad(found, list(leaves.values()), grad_output.to(found.dtype)))


def _ahead_dtypes(call: Arguments, ahead: Sequence[bool]) -> list[torch.dtype]:
    """hidden's own; wide for sums over rows, which are scaled before they are rounded."""
    return [
        one.dtype if number == 0 else wide(one.dtype)
        for number, (one, need) in enumerate(zip(call.differentiable, ahead, strict=True))
        if need and one is not None
    ]


def _check(call: Arguments, marks: Sequence[bool]) -> None:
    hidden, weight, labels = call.hidden, call.weight, call.labels
    require(hidden.is_floating_point() and hidden.dim() > 0, lambda: f"hidden {hidden.dtype} {tuple(hidden.shape)}")
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[-1] and weight.dtype == hidden.dtype
    require(fits, lambda: f"weight {weight.dtype} {tuple(weight.shape)} beside {hidden.dtype} {tuple(hidden.shape)}")
    fits = labels.shape == hidden.shape[:-1] and labels.dtype == torch.int64
    require(fits, lambda: f"labels {labels.dtype} {tuple(labels.shape)} for hidden {tuple(hidden.shape)}")
    bias, s, b = call.bias, call.lora_s, call.lora_b
    fits = bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)
    require(fits, lambda: "bias has not the shape and dtype of weight's rows")
    require((s is None) == (b is None), lambda: "lora_s and lora_b go together")
    if s is not None and b is not None:
        fits = s.shape[:-1] == hidden.shape[:-1] and b.shape == (weight.shape[0], s.shape[-1])
        require(fits, lambda: f"lora_s {tuple(s.shape)} and lora_b {tuple(b.shape)}")
    marked = [one is not None for one, mark in zip(call.differentiable, marks, strict=True) if mark]
    require(all(marked), lambda: "a gradient is asked of what is not given")


def new_outputs(*arguments: Any) -> list[Tensor]:
    """Empty losses and gradients; raises where shapes or dtypes do not fit."""
    *given, reduce, ahead = arguments
    call = Arguments(*given)
    _check(call, ahead)
    shape = () if reduce else call.labels.shape
    loss = call.hidden.new_empty(shape, dtype=wide(call.hidden.dtype))
    return [loss, *_empty(call, ahead, _ahead_dtypes(call, ahead))]


def new_gradients(grad_output: Tensor, *arguments: Any) -> list[Tensor]:
    """Empty gradients, of those that are needed."""
    *given, needed = arguments
    call = Arguments(*given)
    _check(call, needed)
    fits = grad_output.shape == call.labels.shape
    require(fits, lambda: f"gradient {tuple(grad_output.shape)} of losses {tuple(call.labels.shape)}")
    return _empty(call, needed, [one.dtype for one in _chosen(call, needed)])


def _chosen(call: Arguments, marks: Sequence[bool]) -> list[Tensor]:
    return [one for one, mark in zip(call.differentiable, marks, strict=True) if mark and one is not None]


def _empty(call: Arguments, marks: Sequence[bool], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    pairs = zip(_chosen(call, marks), dtypes, strict=True)
    return [torch.empty(one.shape, dtype=dtype, device=one.device) for one, dtype in pairs]


def _fill(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    *given, reduce, ahead = arguments
    call = Arguments(*given)
    loss, *gradients = targets
    by_row = loss.new_empty(call.labels.numel()) if reduce or not loss.is_contiguous() else loss.view(-1)
    gain = GAIN if call.hidden.dtype == torch.float16 else 1.0
    _run(call, by_row, loss.new_ones(()).expand(by_row.shape), gradients, ahead, gain)
    if reduce:
        torch.sum(by_row, 0, out=loss)
    elif by_row.data_ptr() != loss.data_ptr():
        loss.copy_(by_row.view(loss.shape))


def _fill_backward(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    grad_output, *given, needed = arguments
    call = Arguments(*given)
    unused = torch.empty(call.labels.numel(), dtype=wide(call.hidden.dtype), device=call.hidden.device)
    _run(call, unused, grad_output.reshape(-1), targets, needed, 1.0)  # a loss in float16 has a scale already


def _run(
    call: Arguments, loss: Tensor, upstream: Tensor, targets: Sequence[Tensor], marks: Sequence[bool], gain: float
) -> None:
    """Write each row's loss, and the gradients that are marked, each row's multiplied with upstream."""
    flat = lambda one: None if one is None else one.reshape(prod(one.shape[:-1]), one.shape[-1])  # noqa: E731
    labels = call.labels.reshape(-1)
    ignored = labels == call.ignore_index
    _check_labels(labels, ignored, call.weight.shape[0])
    head = Head(flat(call.hidden), call.weight, flat(call.lora_s), call.lora_b, call.chunk_bytes, ignored, gain)
    gradients, written = _targets(targets, marks)
    loss.zero_()

    def of_rows(logits: Tensor, rows: Tensor | slice) -> None:
        one = loss.new_empty(logits.shape[0])
        fill_rows(logits, labels[rows], upstream[rows], one, call, head.gain, gradients.any)
        loss[rows] = one

    head.run(of_rows, gradients)
    for target, value in written:
        target.copy_(value.view(target.shape))


def _targets(targets: Sequence[Tensor], marks: Sequence[bool]) -> tuple[Gradients, list[tuple[Tensor, Tensor]]]:
    """Where a chunk's gradients go: the targets themselves, or what is copied to them in the end."""
    found, gradients, copied = iter(targets), Gradients(), []
    for name, by_row, mark in zip(DIFFERENTIABLE, BY_ROW, marks, strict=True):
        if not mark:
            continue
        target = next(found)
        summed = not by_row and target.dtype != wide(target.dtype)
        own = torch.empty_like(target, dtype=wide(target.dtype)) if summed else target
        own.zero_()
        if summed:
            copied.append((target, own))
        setattr(gradients, name, own.view(-1, own.shape[-1]) if by_row else own)
    return gradients, copied


def _check_labels(labels: Tensor, ignored: Tensor, classes: int) -> None:
    """Raise as torch does, on a GPU without waiting for it."""
    right = ((labels >= 0) & (labels < classes)) | ignored
    if labels.device.type == "cpu":
        if not right.all():
            raise IndexError(f"Target {labels[~right][0].item()} is out of bounds.")
    else:
        torch._assert_async(right.all(), "a label is neither a class nor ignore_index")


def fill_rows(
    logits: Tensor, labels: Tensor, upstream: Tensor, loss: Tensor, call: Arguments, gain: float, gradient: bool
) -> None:
    """Each row's loss, and gain times its gradient over the logits: by Triton where it runs."""
    given = (logits, labels, upstream, loss, call, gain, gradient)
    tensors = [one for one in (logits, loss, upstream, call.bias) if one is not None]
    on_triton = logits.numel() > 0 and dispatch.takes(0, None, tensors)
    if on_triton and dispatch.launched(load("linear_cross_entropy_triton.rows"), tensors, *given):
        return
    _plain_rows(*given)


def _plain_rows(
    logits: Tensor, labels: Tensor, upstream: Tensor, loss: Tensor, call: Arguments, gain: float, gradient: bool
) -> None:
    ignored, V = labels == call.ignore_index, logits.shape[1]
    y = logits.to(loss.dtype)
    y = (y if call.bias is None else y + call.bias) * call.scale
    slope = None
    if call.softcap:
        y = torch.tanh(y / call.softcap)
        slope = 1.0 - y * y
        y = call.softcap * y
    at = labels.masked_fill(ignored, 0).unsqueeze(1)
    target, mean = y.gather(1, at).squeeze(1), y.mean(-1)
    largest = y.amax(-1)
    y = torch.exp(y - largest.unsqueeze(1))
    total = y.sum(-1)
    log_total = torch.log(total)
    lse = largest + log_total
    # By differences from the largest: a loss near 0 is not the difference of two large numbers.
    value = log_total + (largest - target) + call.z_loss * lse * lse
    if call.label_smoothing:
        value += call.label_smoothing * (target - mean)
    loss.copy_(value.masked_fill(ignored, 0.0))
    if not gradient:
        return
    dy = y * ((1.0 + 2.0 * call.z_loss * lse) / total).unsqueeze(1) - call.label_smoothing / V
    dy.scatter_add_(1, at, dy.new_full(at.shape, call.label_smoothing - 1.0))
    factor = (upstream.to(dy.dtype) * gain * call.scale).unsqueeze(1)
    logits.copy_((dy if slope is None else dy * slope) * factor).masked_fill_(ignored.unsqueeze(1), 0.0)


def flops(hidden: torch.Size, weight: torch.Size, *arguments: Any) -> int:
    """2 for each logit and feature, and as many for each gradient that is computed ahead."""
    return 2 * prod(hidden) * weight[0] * (1 + sum(map(bool, arguments[-1][:2])))


def flops_backward(grad_output: torch.Size, hidden: torch.Size, weight: torch.Size, *arguments: Any) -> int:
    """The same, with new logits."""
    return flops(hidden, weight, *arguments)


def _cases() -> tuple[list[Case], list[Case]]:
    """Of forward, with gradients computed ahead of all inputs, of those by rows and of none; and of backward."""
    shapes = {"hidden": "... H", "weight": "N H", "labels": "index ... N"}
    adapted = {**shapes, "bias": "N", "lora_s": "... A", "lora_b": "N A"}
    plain = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "scale": 1.0, "softcap": 0.0}
    plain |= {"chunk_bytes": 2**9}
    rich = plain | {"label_smoothing": 0.1, "z_loss": 1e-2, "scale": 0.5, "softcap": 3.0}
    choices = [plain, plain | {"label_smoothing": 0.2, "chunk_bytes": 2**28}, plain | {"softcap": 2.0}, rich]
    forward: list[Case] = []
    backward: list[Case] = []
    for options, tensors in itertools.product(choices, (shapes, {**shapes, "bias": "N"}, adapted)):
        given = [name in tensors for name in DIFFERENTIABLE]
        by_row = [mark and row for mark, row in zip(given, BY_ROW, strict=True)]
        for reduce, ahead in ((True, given), (False, by_row), (options is plain, [False] * 5)):
            forward.append((tensors, {**options, "reduce": reduce, "ahead": ahead}))
        backward.append(({"grad_output": "...", **tensors}, {**options, "needed": given}))
    return forward, backward


_FORWARD, _BACKWARD = _cases()
_ALIKE = ("hidden", "weight", "bias")
linear_cross_entropy = define(
    "linear_cross_entropy", reference, new_outputs, _fill,
    cases=_FORWARD, gradients=DIFFERENTIABLE, alike=_ALIKE, flops=flops,
)  # fmt: skip
linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward", reference_backward, new_gradients, _fill_backward,
    cases=_BACKWARD, statistics=("grad_output",), alike=_ALIKE, flops=flops_backward,
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *given, ctx.reduce, ahead = inputs
    call = Arguments(*given)
    ctx.numbers = given[6:]
    needs = [ctx.needs_input_grad[at] for at in (0, 1, 3, 4, 5)]
    scalable = [mark and (ctx.reduce or row) for mark, row in zip(ahead, BY_ROW, strict=True)]
    ctx.ahead = ahead if all(ready or not need for ready, need in zip(scalable, needs, strict=True)) else None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [one.dtype if one is not None else None for one in call.differentiable]
    ctx.save_for_backward(*(output[1:] if ctx.ahead is not None else given[:6]))


def _scaled(one: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once, with no float32 tensor between; factor has an axis, or a GPU would round it to one's dtype."""
    return torch.mul(one, factor, out=torch.empty_like(one, dtype=dtype))


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    grad = grads[0]
    needs = [ctx.needs_input_grad[at] for at in (0, 1, 3, 4, 5)]
    found: list[Tensor | None] = [None] * 5
    if grad is not None and ctx.ahead is not None:
        ready, factor = iter(ctx.saved_tensors), grad.unsqueeze(-1)
        for number, (mark, dtype) in enumerate(zip(ctx.ahead, ctx.dtypes, strict=True)):
            if mark:
                one = next(ready)
                found[number] = _scaled(one, factor, dtype) if needs[number] else None
    elif grad is not None:
        labels = ctx.saved_tensors[2]
        made = iter(
            linear_cross_entropy_backward(
                grad.expand(labels.shape) if ctx.reduce else grad, *ctx.saved_tensors, *ctx.numbers, needs
            )
        )
        found = [next(made) if need else None for need in needs]
    hidden, weight, bias, lora_s, lora_b = found
    return hidden, weight, None, bias, lora_s, lora_b, *[None] * 8


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
