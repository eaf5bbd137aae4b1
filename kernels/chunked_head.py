"""Compute a head's logits one chunk of rows at a time:  logits = hidden W^T + s B^T, and the products backward.

The logits of all tokens never exist at once: a chunk is written, its losses are taken, its gradient is written over it
and multiplied back, and the next chunk takes its place.  cuBLAS multiplies; the caller decides what happens to rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.registry import wide
from fastft.kernels.lora_products import operands

ALIGNED = 8  # columns: with any other number cuBLAS takes kernels of a seventh of the speed
WHOLE = 128  # rows, of which a chunk has a multiple where it has more
GAIN = 256.0  # of a float16 gradient of the sum of losses: probabilities of 1e-5 are not normal numbers there


@dataclass
class Gradients:
    """Where gradients are written; None for those that are not needed.

    hidden [M, H] and lora_s [M, r] of any dtype; weight [V, H], bias [V] and lora_b [V, r] float32 (float64 beside
    float64), which begin as zeros.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_s: Tensor | None = None
    lora_b: Tensor | None = None

    @property
    def any(self) -> bool:
        """Whether any gradient is needed."""
        return any(value is not None for value in vars(self).values())


@dataclass
class Head:
    """hidden [M, H], weight [V, H], lora_s [M, r] and lora_b [V, r] if there is an adapter.

    chunk_bytes: the most bytes of a chunk of logits; it has at least one row.
    ignored: bool [M], rows whose logits nobody needs.
    gain: factor of the gradient of the logits while it is held.
    few: whether it may well be that all rows are ignored.
    """

    hidden: Tensor
    weight: Tensor
    lora_s: Tensor | None
    lora_b: Tensor | None
    chunk_bytes: int
    ignored: Tensor | None = None
    gain: float = 1.0
    few: bool = False

    def run(self, process_chunk: Callable[[Tensor, Tensor | slice], None], gradients: Gradients) -> None:
        """Call process_chunk(logits, rows) for each chunk, and write the gradients that follow from it.

        process_chunk: writes gain times the gradient of the logits over them where any gradient is needed; rows: which
            of the M rows they are of.  Ignored rows may be among them: the gradient that they have, it writes too.
        """
        for rows in self._chunks():
            hidden = self.hidden[rows]
            logits = self._logits(hidden, rows)
            process_chunk(logits, rows)
            if gradients.any:
                self._multiply_back(logits, hidden, rows, gradients)

    def _chunks(self) -> Iterator[Tensor | slice]:
        """Yield the rows of each chunk; ignored ones only at the end of the last, if leaving them out costs no time.

        On a GPU the number of rows is copied asynchronously, the first chunk is launched, and only then is the number
        waited for: the device has work meanwhile.  Where they may be few it is waited for at once.  During CUDA graph
        capture nothing can be waited for, and all rows are taken.
        """
        total, size = self.hidden.shape[0], self._rows_of_chunk()
        on_cpu = self.hidden.device.type == "cpu"
        at_once = not self.few and total <= size
        if self.ignored is None or (not on_cpu and (at_once or torch.cuda.is_current_stream_capturing())):
            yield from (slice(start, min(start + size, total)) for start in range(0, total, size))
            return
        order = torch.argsort(self.ignored.to(torch.uint8), stable=True)
        used = (~self.ignored).sum()
        count, first = used, 0
        if not on_cpu and not self.few:
            count = torch.empty_like(used, device="cpu", pin_memory=True).copy_(used, non_blocking=True)
            ready = torch.cuda.current_stream(used.device).record_event()
            yield order[:size]
            ready.synchronize()
            first = size
        total = int(count)
        yield from (order[start : min(start + size, total)] for start in range(first, total, size))

    def _rows_of_chunk(self) -> int:
        """Return the rows of a chunk: as many as chunk_bytes allow, in chunks of about one size."""
        M, V = self.hidden.shape[0], self.weight.shape[0]
        most = max(1, self.chunk_bytes // (self._stride * self.hidden.element_size()))
        size = cdiv(M, max(1, cdiv(M, most)))
        rounded = cdiv(size, WHOLE) * WHOLE
        return max(1, rounded if rounded <= most else most // WHOLE * WHOLE or most) if M * V else max(1, M)

    @property
    def _stride(self) -> int:
        """Stride of a row of logits: on a GPU padded, so that each row begins at a multiple of 16 bytes, for cuBLAS.

        Not on a CPU, whose bfloat16 products multiply what lies behind a row by zero (oneDNN on AMX,
        uxlfoundation/oneDNN#5717): unwritten columns may hold NaN.
        """
        V = self.weight.shape[0]
        return V if self.hidden.device.type == "cpu" else cdiv(V, 8 * ALIGNED) * 8 * ALIGNED

    @functools.cached_property
    def _buffer(self) -> Tensor:
        rows = min(self._rows_of_chunk(), self.hidden.shape[0])
        return self.hidden.new_empty(rows, self._stride)[:, : self.weight.shape[0]]

    def _logits(self, hidden: Tensor, rows: Tensor | slice) -> Tensor:
        logits = self._buffer[: hidden.shape[0]]
        for part in self._columns:
            torch.mm(hidden, self.weight[part].T, out=logits[:, part])
        if self.lora_s is not None and self.lora_b is not None:
            s, b = self.lora_s[rows], self.lora_b
            logits.addmm_(*operands(s, [(b, 0, 0, 1.0)], b.shape[0], logits.dtype, transposed=True))
        return logits

    @property
    def _columns(self) -> list[slice]:
        """All columns, or those that cuBLAS is fast for and the rest."""
        V = self.weight.shape[0]
        even = V // ALIGNED * ALIGNED
        return [slice(0, V)] if even in (0, V) or self.hidden.device.type == "cpu" else [slice(0, even), slice(even, V)]

    def _multiply_back(self, grad: Tensor, hidden: Tensor, rows: Tensor | slice, gradients: Gradients) -> None:
        scale = 1.0 / self.gain
        if gradients.hidden is not None:
            gradients.hidden[rows] = self._hidden_gradient(grad, scale)
        if gradients.weight is not None:
            _accumulate(gradients.weight, grad.T, hidden, scale)
        if gradients.bias is not None:
            gradients.bias.add_(grad.sum(0, dtype=gradients.bias.dtype), alpha=scale)
        if gradients.lora_s is not None and self.lora_b is not None:
            gradients.lora_s[rows] = (_product(grad, self.lora_b.to(grad.dtype)) * scale).to(gradients.lora_s.dtype)
        if gradients.lora_b is not None and self.lora_s is not None:
            _accumulate(gradients.lora_b, grad.T, self.lora_s[rows].to(grad.dtype), scale)

    def _hidden_gradient(self, grad: Tensor, scale: float) -> Tensor:
        out = grad.new_empty(grad.shape[0], self.weight.shape[1])
        for number, part in enumerate(self._columns):
            beta = 0.0 if number == 0 else 1.0
            torch.addmm(out, grad[:, part], self.weight[part], beta=beta, alpha=scale, out=out)
        return out


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply with a result in float32 at least."""
    dtype = wide(left.dtype)
    if left.device.type == "cuda" and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale * left right to total."""
    if left.device.type == "cuda" and left.dtype != total.dtype:
        torch.addmm(total, left, right, alpha=scale, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=scale)
