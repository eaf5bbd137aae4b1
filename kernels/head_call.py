"""Arguments of an op on a head's logits, and what such ops do in common:  y = hidden W^T + s B^T + bias.

y is multiplied by scale and, if softcap is not 0, becomes softcap tanh(y / softcap) (Gemma 2, arXiv:2408.00118).

hidden [..., H], weight [V, H] and bias [V] of one dtype; s = lora_s [..., r] and B = lora_b [V, r] of any
floating-point dtype, the two factors of an adapter on the head: s_j x A_j^T beside each other, and B_j.
chunk_bytes: the bytes of logits that are held at once.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels.chunked_head import GAIN, Gradients, Head
from fastft.kernels.core import dispatch
from fastft.kernels.core.registry import load, require, wide

DIFFERENTIABLE = ("hidden", "weight", "bias", "lora_s", "lora_b")  # the order of grads_in_forward and needed
PLACES = (0, 1, 3, 4, 5)  # of these among an op's arguments; the third is what rows are compared with
BY_ROW = (True, False, False, True, False)  # which gradients are rows of their own; the others are sums over rows
ALIKE = ("hidden", "weight", "bias")


FillChunk = Callable[[Tensor, Tensor | slice, float, bool], None]  # logits, which rows, gain, whether for a gradient


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


def run_chunks(
    call: HeadCall, ignored: Tensor | None, fill_chunk: FillChunk, gradients: Sequence[Tensor], marks: Sequence[bool],
    *, forward: bool = False, begun: bool = False,
) -> None:  # fmt: skip
    """Call fill_chunk for each chunk of rows, and write the marked gradients.

    ignored: bool [M], rows of which nothing is wanted; their gradients are zero, or as they were if begun.
    forward: whether they are of a loss that is not scaled yet: float16 gradients then have a gain while they are held.
    """
    lora_s = None if call.lora_s is None else matrix(call.lora_s)
    gain = GAIN / max(1.0, abs(call.scale)) if forward and call.hidden.dtype == torch.float16 else 1.0
    head = Head(matrix(call.hidden), call.weight, lora_s, call.lora_b, call.chunk_bytes, ignored, gain, begun)
    held, written = _targets(gradients, marks, begun)
    head.run(lambda logits, rows: fill_chunk(logits, rows, gain, held.any), held)
    for target, value in written:
        target.copy_(value.view(target.shape))


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


def matrix(tensor: Tensor) -> Tensor:
    """Reshape [..., D] to a matrix [M, D]."""
    return tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


def dtypes_of_grads_in_forward(call: HeadCall, grads_in_forward: Sequence[bool]) -> list[torch.dtype]:
    """Return the gradients' dtypes: hidden's own, wide for the others, which are scaled before they are rounded."""
    return [
        tensor.dtype if number == 0 else wide(tensor.dtype)
        for number, (tensor, need) in enumerate(zip(call.differentiable, grads_in_forward, strict=True))
        if need and tensor is not None
    ]


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale a gradient, rounded once to dtype, with no float32 tensor in between.

    factor has an axis, or a GPU would round it to the gradient's dtype.
    """
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def empty(call: HeadCall, marks: Sequence[bool], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Allocate the marked gradients, empty."""
    pairs = zip(call.chosen(marks), dtypes, strict=True)
    return [torch.empty(tensor.shape, dtype=dtype, device=tensor.device) for tensor, dtype in pairs]


def check(call: HeadCall, marks: Sequence[bool]) -> None:
    """Raise where the shapes or dtypes of a call do not fit, or a gradient is marked of what is not given."""
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


def _targets(
    targets: Sequence[Tensor], marks: Sequence[bool], begun: bool
) -> tuple[Gradients, list[tuple[Tensor, Tensor]]]:
    """Return where a chunk's gradients go, the targets themselves or buffers, and the pairs to be copied in the end."""
    remaining, gradients, copied = iter(targets), Gradients(), []
    for name, by_row, mark in zip(DIFFERENTIABLE, BY_ROW, marks, strict=True):
        if not mark:
            continue
        target = next(remaining)
        summed = not by_row and target.dtype != wide(target.dtype)
        own = torch.empty_like(target, dtype=wide(target.dtype)) if summed else target
        if not begun:
            own.zero_()
        if summed:
            copied.append((target, own))
        setattr(gradients, name, own.view(-1, own.shape[-1]) if by_row else own)
    return gradients, copied


def flops(hidden: torch.Size, weight: torch.Size, *arguments: Any) -> int:
    """Count 2 FLOPs for each logit and feature, and as many for each of hidden's and weight's gradients if marked."""
    return 2 * prod(hidden) * weight[0] * (1 + sum(map(bool, arguments[-1][:2])))


def scratch_bytes(call: HeadCall) -> int:
    """Count the bytes of a chunk: its logits, its hidden states and their gradient."""
    rows, (V, H), size = prod(call.rows), call.weight.shape, call.hidden.element_size()
    chunk = torch.sym_min(rows, max(1, call.chunk_bytes // (V * size)))
    return chunk * (V + 2 * H) * size
