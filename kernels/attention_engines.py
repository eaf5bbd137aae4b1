"""PyTorch's own attention kernels, and where they are the fastest: cuDNN, FlashAttention-2, memory-efficient.

They are used for what all of them support: no mask or a causal one over as many keys as queries, and nothing else.
Each saves the log-sum-exp of its rows, so a backward need not be that of the forward's engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastft.compat.operators import attention_engine
from fastft.kernels import key_copies
from fastft.kernels.core.launch_recorder import is_aligned, setting

_triton_alone = False  # set by only_triton
CUDNN_FROM, CUDNN_BEFORE, CUDNN_HEAD = (9, 0), (11, 0), 128
CUDNN_LATENT, CUDNN_LATENT_FROM = (192, 128), 91100  # sizes beyond CUDNN_HEAD, and the version that has them
FLASH_FROM, FLASH_BEFORE, FLASH_HEAD = (8, 0), (13, 0), 256
FLASH_SMALL_HEAD = 192  # its backward refuses longer ones where a block has little shared memory
PADDED_VALUES = False  # whether FlashAttention-2 gets values that are shorter than keys, with zeros behind them
EFFICIENT_FROM = (7, 5)
AS_GIVEN, NO_RANGES = 0, -1  # max_seqlen where all ranges and ids are read, and where start and end tell nothing
SHORTEST = 64  # for cuDNN, which crashes at 1; where queries are few, in decoding, FlashAttention-2 splits the keys
ALIGNED_BYTES = 16


@contextmanager
def only_triton() -> Iterator[None]:
    """Use the Triton kernels wherever they can run, for tests and measurements."""
    global _triton_alone
    before, _triton_alone = _triton_alone, True
    try:
        yield
    finally:
        _triton_alone = before


@functools.cache
def engine_of(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str:
    """Return the fastest engine for plain and causal attention of equal lengths; "" for Triton or the reference.

    On an H100 cuDNN's kernels are 1.5 to 2 times as fast as FlashAttention-2, see docs/performance.md.  In cuDNN's
    values may be of another size than keys; the sizes are those at which torch's own attention asks for it (ATen's
    sdp_utils.cpp).
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    capability, half = torch.cuda.get_device_capability(device), dtype in (torch.float16, torch.bfloat16)
    fits = half and head_dim % 8 == 0 and value_dim % 8 == 0
    if fits and CUDNN_FROM <= capability < CUDNN_BEFORE and _cudnn_takes(head_dim, value_dim):
        return "cudnn"
    longest = FLASH_HEAD if capability[1] == 0 and capability[0] < 12 else FLASH_SMALL_HEAD
    fits = fits and head_dim <= longest and _flash_takes(head_dim, value_dim)
    if fits and FLASH_FROM <= capability < FLASH_BEFORE:
        return "flash"
    fits = value_dim == head_dim and head_dim % (8 if half else 4) == 0 and dtype in (torch.float16, torch.float32)
    return "efficient" if fits and EFFICIENT_FROM <= capability < FLASH_FROM else ""


def _cudnn_takes(head_dim: int, value_dim: int) -> bool:
    """Return whether cuDNN is there and has a forward and a backward for heads of these sizes."""
    if not torch.backends.cudnn.is_available():
        return False
    latent = (head_dim, value_dim) == CUDNN_LATENT and (torch.backends.cudnn.version() or 0) >= CUDNN_LATENT_FROM
    return latent or max(head_dim, value_dim) <= CUDNN_HEAD


def _flash_takes(head_dim: int, value_dim: int) -> bool:
    return value_dim == head_dim or (PADDED_VALUES and value_dim < head_dim)


def restricting(
    key: Tensor, value: Tensor, vectors: Sequence[Tensor | None], causal: bool, window: int, max_seqlen: int,
    copies: Tensor | None = None,
) -> tuple[Tensor, Tensor, Sequence[Tensor | None], bool, int]:  # fmt: skip
    """Return what a call comes down to: keys and values, vectors, whether it is causal, and its window.

    vectors: start, end, query_ids and key_ids, None for those that are not to be read.
    """
    if key_copies.given(copies):
        taken = [key_copies.taken(tensor, copies) for tensor in (key, value)]
        return *taken, (*vectors[:2], None, None), False, 0  # type: ignore[return-value]
    if max_seqlen == NO_RANGES:
        vectors = (None, None, *vectors[2:])
    elif max_seqlen != AS_GIVEN and max_seqlen >= key.shape[2]:
        vectors = (None,) * 4
    elif max_seqlen != AS_GIVEN:
        vectors, window = (*vectors[:2], None, None), 0
    return key, value, vectors, causal, window


def chosen(
    query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor | None], causal: bool, scale: float,
    *numbers: float,
) -> str:  # fmt: skip
    """Choose an engine that torch.backends.cuda allows; return "" where a call has more than a causal mask.

    The Triton kernels give the same bits each time, the engines' backwards do not.
    """
    if (
        setting(_avoids_engines)
        or not scale > 0.0
        or any(tensor is not None for tensor in tensors)
        or any(numbers)
        or query.numel() == 0
    ):
        return ""
    if key.shape[2] == 0 or (causal and query.shape[2] != key.shape[2]):
        return ""  # they do not agree on where the diagonal begins
    engine = engine_of(query.device, query.dtype, query.shape[-1], value.shape[-1])
    if engine == "cudnn" and min(query.shape[2], key.shape[2]) < SHORTEST:
        engine = "flash" if _flash_takes(query.shape[-1], value.shape[-1]) else ""
    return engine if engine and setting(_ENABLED[engine]) else ""


def _avoids_engines() -> bool:
    return _triton_alone or torch.are_deterministic_algorithms_enabled()


_ENABLED: dict[str, Callable[[], bool]] = {
    "cudnn": lambda: torch.backends.cudnn.enabled and torch.backends.cuda.cudnn_sdp_enabled(),
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
}


def _readable(tensor: Tensor) -> Tensor:
    """Return the tensor as the engines address it, copied if needed: no expanded axis, unit stride, 16-byte aligned."""
    step = ALIGNED_BYTES // tensor.element_size()
    *others, last = tensor.stride()
    fits = last == 1 and all(stride % step == 0 for stride in others) and is_aligned(tensor)
    return tensor if fits and 0 not in others else tensor.clone(memory_format=torch.contiguous_format)


def _padded(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with zeros behind each row, as long as those of another: they add nothing to a product."""
    missing = like.shape[-1] - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _unpadded(tensor: Tensor, like: Tensor) -> Tensor:
    """Return as much of each row as those of another are long."""
    return tensor if tensor.shape[-1] == like.shape[-1] else tensor[..., : like.shape[-1]]


def _beside(tensor: Tensor) -> Tensor:
    """Lay out [B, H, S, D] in exactly the strides of a dense [B, S, H, D].

    torch caches the graphs of cuDNN's backward by the strides of query, key and value alone (native/cudnn/MHA.cpp in
    ATen), so the strides of the other tensors must always be the same, even along axes of one element.
    """
    _, H, S, D = tensor.shape
    strides = (S * H * D, D, H * D, 1)
    if tensor.stride() == strides and is_aligned(tensor):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def forward(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, end: Tensor | None, query_ids: Tensor | None,
    key_ids: Tensor | None, mask: Tensor | None, sinks: Tensor | None, seed: Tensor | None, causal: bool, window: int,
    max_seqlen: int, scale: float, softcap: float, dropout: float, contiguous: bool, copies: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Compute out and log-sum-exp by one of torch's engines; return None where none is chosen."""
    if key_copies.given(copies):
        return None
    *_, vectors, causal, window = restricting(key, value, (start, end, query_ids, key_ids), causal, window, max_seqlen)
    engine = chosen(query, key, value, (*vectors, mask, sinks, seed), causal, scale, window, softcap)
    if not engine:
        return None
    q, k, v = map(_readable, (query, key, value))
    B, H, S, _ = q.shape
    if engine == "flash":
        v = _padded(v, q)
    if engine == "efficient":
        k, v = (tensor.repeat_interleave(H // k.shape[1], 1) for tensor in (k, v))
    extra = () if engine == "flash" else (None, True)  # no bias, and the log-sum-exp
    results = attention_engine(engine)(q, k, v, *extra, 0.0, causal, scale=scale)
    out = _unpadded(results[0], value)
    out = out.contiguous() if contiguous else _beside(out)
    return out, results[1].reshape(B, H, -1)[..., :S].contiguous()


def backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, start: Tensor | None,
    end: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    causal: bool, window: int, max_seqlen: int, scale: float, softcap: float, dropout: float,
    copies: Tensor | None = None,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """Compute the gradients by one of torch's engines; return None where none is chosen."""
    if key_copies.given(copies):
        return None
    *_, vectors, causal, window = restricting(key, value, (start, end, query_ids, key_ids), causal, window, max_seqlen)
    engine = chosen(query, key, value, (*vectors, mask, seed), causal, scale, window, softcap)
    if not engine:
        return None
    q, k, v = map(_readable, (query, key, value))
    dout, out, lse = _beside(grad_output), _beside(out), lse.contiguous()
    S, T = q.shape[2], k.shape[2]
    none: Any = torch.empty(0, dtype=torch.int64, device=q.device)  # of dropout's generator
    if engine == "cudnn":
        extra = (lse[..., None], none, none, None, None, None, S, T, 0.0, causal)  # neither bias nor cumulative lengths
        gradients = attention_engine(engine, backward=True)(dout, q, k, v, out, *extra, scale=scale)
    elif engine == "flash":
        v, out, dout = (_padded(tensor, q) for tensor in (v, out, dout))
        gradients = attention_engine(engine, backward=True)(
            dout, q, k, v, out, lse, None, None, S, T, 0.0, causal, none, none, scale=scale
        )
    else:
        gradients = _efficient_backward(dout, q, k, v, out, lse, causal, scale, none)
    pairs = zip(gradients, (query, key, value), strict=True)
    return tuple(_ordered(_unpadded(gradient, like), like) for gradient, like in pairs)


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, none: Tensor
) -> tuple[Tensor, ...]:
    group = q.shape[1] // k.shape[1]
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    wide = (tensor.repeat_interleave(group, 1) for tensor in (k, v))
    dq, dk, dv, _ = attention_engine("efficient", backward=True)(
        dout, q, *wide, None, out, lse, none, none, 0.0, [True, True, True, False], causal, scale=scale
    )
    return dq, *(gradient.unflatten(1, (-1, group)).sum(2) for gradient in (dk, dv))


def _ordered(gradient: Tensor, like: Tensor) -> Tensor:
    """Return the gradient in the memory order that torch.empty_like(like) has."""
    target = torch.empty_like(like)
    return gradient if gradient.stride() == target.stride() else target.copy_(gradient)
