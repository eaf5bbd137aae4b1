"""KL divergence of a head's predictions from a teacher's, and its gradients, without holding the logits.

loss_i = sum_v exp(t_iv) (t_iv - log_softmax(y_i)_v),  y = hidden W^T + s B^T + bias: distillation (Hinton et al., 2015,
arXiv:1503.02531) from log-probabilities t that were stored.  The sum of exp(t) need not be 1.  A class whose
exp(t) is 0 adds nothing, whatever y is there.

target = t [..., V], of any floating-point dtype: it has no gradient.  The other arguments, scale, which is 1 /
temperature, softcap and the results are those of head_call.py and head_loss.py.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fastft.kernels import head_call
from fastft.kernels.core.layout import has_unit_rows, merge
from fastft.kernels.core.registry import require
from fastft.kernels.head_call import HeadCall
from fastft.kernels.head_loss import HeadLoss, ProcessChunk


@dataclass(frozen=True)
class Arguments(HeadCall):
    """Arguments of a call, without those that say what to return."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    lora_s: Tensor | None
    lora_b: Tensor | None
    scale: float
    softcap: float
    chunk_bytes: int


def losses(call: Arguments) -> Tensor:
    """Compute the loss of each row in plain PyTorch: the specification.

    log_softmax is written step by step, relative to the largest logit.
    """
    y = call.y()
    t = call.target.detach().to(y.dtype)
    y = y - y.detach().amax(-1, keepdim=True)
    share, log_p = torch.exp(t), y - torch.log(torch.exp(y).sum(-1, keepdim=True))
    return torch.where(share != 0.0, share * (t - log_p), 0.0).sum(-1)


def reference(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, lora_s: Tensor | None, lora_b: Tensor | None,
    scale: float, softcap: float, chunk_bytes: int, reduce: bool, grads_in_forward: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the losses, or their sum, and the marked gradients in plain PyTorch."""
    return LOSS.reference(
        hidden, weight, target, bias, lora_s, lora_b, scale, softcap, chunk_bytes, reduce, grads_in_forward
    )  # fmt: skip


def reference_backward(
    grad_output: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, lora_s: Tensor | None,
    lora_b: Tensor | None, scale: float, softcap: float, chunk_bytes: int, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the needed gradients in plain PyTorch; grad_output [...] is that of each row's loss."""
    return LOSS.reference_backward(
        grad_output, hidden, weight, target, bias, lora_s, lora_b, scale, softcap, chunk_bytes, needed
    )


def _check(call: Arguments) -> None:
    target, shape = call.target, (*call.rows, call.weight.shape[0])
    fits = target.shape == shape and target.is_floating_point()
    require(fits, lambda: f"target {target.dtype} {tuple(target.shape)} for logits {shape}")


def _prepare(call: Arguments) -> tuple[None, ProcessChunk]:
    def process_chunk(
        logits: Tensor, rows: Tensor | slice, upstream: Tensor, loss: Tensor, gain: float, gradient: bool
    ) -> None:
        fill_rows(logits, rows_of(call.target, rows), upstream, loss, call, gain, gradient)

    return None, process_chunk


def rows_of(target: Tensor, rows: Tensor | slice) -> Tensor:
    """Return rows [rows, V] of [..., V], copied only where one stride does not reach them or their stride is not 1."""
    lead = target.shape[:-1]
    if len(merge(lead, [target.stride()])[0]) <= 1:
        part = target.reshape(prod(lead), target.shape[-1])[rows]
        return part if has_unit_rows(part) else part.contiguous()
    number, index = torch.arange(prod(lead), device=target.device)[rows], []
    for size in reversed(lead):
        index.append(number % size)
        number = number // size
    return target[tuple(reversed(index))].contiguous()


def _plain_rows(
    logits: Tensor, target: Tensor, upstream: Tensor, loss: Tensor, call: Arguments, gain: float, gradient: bool
) -> None:
    y, slope = call.logits_of_product(logits, loss.dtype)
    y -= y.amax(-1, keepdim=True)
    t = target.to(y.dtype)
    share, p = torch.exp(t), torch.exp(y)
    shares, total = share.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    away = (share * (t - y)).masked_fill_(share == 0.0, 0.0).sum(-1, keepdim=True)
    loss.copy_((away + torch.log(total) * shares).squeeze(-1))  # near 0 not the difference of two large numbers
    if not gradient:
        return
    dy = p * (shares / total) - share
    factor = (upstream.to(dy.dtype) * gain * call.scale).unsqueeze(1)
    logits.copy_((dy if slope is None else dy * slope) * factor)


fill_rows = functools.partial(head_call.fill_rows, "linear_kl_div_triton.rows", _plain_rows)
LOSS = HeadLoss(Arguments, _check, losses, _prepare)
_PLAIN = {"scale": 1.0, "softcap": 0.0, "chunk_bytes": 2**9}
linear_kl_div, linear_kl_div_backward = LOSS.define(
    "linear_kl_div",
    reference,
    reference_backward,
    {"target": "... N"},
    [
        _PLAIN,
        _PLAIN | {"scale": 0.5, "chunk_bytes": 2**28},
        _PLAIN | {"softcap": 2.0},
        _PLAIN | {"scale": 0.5, "softcap": 3.0},
    ],
)
