"""Cross-entropy of a head's logits, and its gradients, without holding them:  y = hidden W^T + s B^T + bias.

loss_i = lse_i - (1 - e) y_label - e mean(y_i) + z lse_i^2,  lse = log sum exp.  e is label smoothing (Szegedy et al.,
2015, arXiv:1512.00567), z the weight of the z-loss (PaLM, 2022, arXiv:2204.02311); rows labelled ignore_index give 0.
labels: those of class_labels.py.  The other arguments and the results are those of head_call.py and head_loss.py.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft.kernels import class_labels, head_call
from fastft.kernels.class_labels import LabelledCall
from fastft.kernels.head_loss import HeadLoss, ProcessChunk


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
    label_smoothing: float
    z_loss: float
    scale: float
    softcap: float
    chunk_bytes: int


def losses(call: Arguments) -> Tensor:
    """Compute the loss of each row in plain PyTorch: the specification.

    A loss near 0 is not the difference of two large numbers: everything is relative to the largest logit.
    """
    y = call.y()
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
    reduce: bool, grads_in_forward: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the losses, or their sum, and the marked gradients in plain PyTorch."""
    return LOSS.reference(
        hidden, weight, labels, bias, lora_s, lora_b, ignore_index, label_smoothing, z_loss, scale, softcap,
        chunk_bytes, reduce, grads_in_forward,
    )  # fmt: skip


def reference_backward(
    grad_output: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, lora_s: Tensor | None,
    lora_b: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, scale: float, softcap: float,
    chunk_bytes: int, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the needed gradients in plain PyTorch; grad_output [...] is that of each row's loss."""
    return LOSS.reference_backward(
        grad_output, hidden, weight, labels, bias, lora_s, lora_b, ignore_index, label_smoothing, z_loss, scale,
        softcap, chunk_bytes, needed,
    )  # fmt: skip


def _prepare(call: Arguments) -> tuple[Tensor, ProcessChunk]:
    labels, ignored = class_labels.flattened(call)

    def process_chunk(
        logits: Tensor, rows: Tensor | slice, upstream: Tensor, loss: Tensor, gain: float, gradient: bool
    ) -> None:
        fill_rows(logits, labels[rows], upstream, loss, call, gain, gradient)

    return ignored, process_chunk


def _plain_rows(
    logits: Tensor, labels: Tensor, upstream: Tensor, loss: Tensor, call: Arguments, gain: float, gradient: bool
) -> None:
    ignored, V = labels == call.ignore_index, logits.shape[1]
    y, slope = call.logits_of_product(logits, loss.dtype)
    index = labels.masked_fill(ignored, 0).unsqueeze(1)
    target, mean = y.gather(1, index).squeeze(1), y.mean(-1)
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
    dy.scatter_add_(1, index, dy.new_full(index.shape, call.label_smoothing - 1.0))
    factor = (upstream.to(dy.dtype) * gain * call.scale).unsqueeze(1)
    logits.copy_((dy if slope is None else dy * slope) * factor).masked_fill_(ignored.unsqueeze(1), 0.0)


fill_rows = functools.partial(head_call.fill_rows, "linear_cross_entropy_triton.rows", _plain_rows)
LOSS = HeadLoss(
    Arguments, class_labels.check, losses, _prepare, class_labels.finish, lambda labels, numbers: labels == numbers[0]
)
_PLAIN = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "scale": 1.0, "softcap": 0.0}
_PLAIN |= {"chunk_bytes": 2**9}
linear_cross_entropy, linear_cross_entropy_backward = LOSS.define(
    "linear_cross_entropy",
    reference,
    reference_backward,
    {"labels": "index ... N"},
    [
        _PLAIN,
        _PLAIN | {"label_smoothing": 0.2, "chunk_bytes": 2**28},
        _PLAIN | {"softcap": 2.0},
        _PLAIN | {"label_smoothing": 0.1, "z_loss": 1e-2, "scale": 0.5, "softcap": 3.0},
    ],
)
