"""Softmax attention of grouped heads under any mask, without a tensor of the size of the scores.

out = dropout(softmax(scores)) value, of scores = softcap(scale * query key^T) where a query may attend to a key.
Vaswani et al., arXiv:1706.03762; computed as in Dao, FlashAttention-2, arXiv:2307.08691, with the log-sum-exp saved.

query [B, H, S, D]; key [B, G, T, D]; value [B, G, T, DV], H a multiple of G: head h reads key head h // (H // G)
(arXiv:2305.13245).  DV is D, or another size (multi-head latent attention: DeepSeek-V2, arXiv:2405.04434).
Query i may attend to the keys j for which all of these conditions hold, as far as they are given:
- causal: j <= i.  window, if not 0: j > i - window.
- start, end [B or 1, S], integers: start[i] <= j < end[i].  Most masks are such ranges: causal and sliding windows,
  padding, documents in a row, prefixes.  A row whose start is negative gives the same weight to all keys before its
  end, whatever else holds, and its scores get the gradient of such a softmax: so does a row that is masked throughout
  by the lowest finite number, in which its scores vanish.
- query_ids [B or 1, S] and key_ids [B or 1, T], integers: query_ids[i] == key_ids[j].
- mask [B or 1, H or 1, S, T]: true if it is bool; otherwise it is added to the scores, and may have a gradient.
  Numbers below LOWEST, in which scores vanish, count as -inf.  Where it is above HIGHEST, the score is 0 in place of
  the sum, with the gradients of any other: so a row of one head is masked throughout by the lowest finite number.
A row that may attend to nothing is 0, and its log-sum-exp is -inf.
max_seqlen: what the caller vouches for.  0: nothing.  -1: start and end leave out no key; they are not read.  Above 0:
no query may attend to more than so many keys; where these are less than T, start and end tell all that window and ids
do, which are not read; else causal and window tell all, and start, end and ids are not read.  FlashAttention calls the
longest document in a packed row so.
sinks [H]: the score of one more key with value 0 (Agarwal et al., gpt-oss, arXiv:2508.10925).
softcap, if not 0: softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118).
seed [1], an integer: if given, a share dropout of the weights is 0 and the others are scaled by 1 / (1 - dropout).
contiguous: whether out is contiguous; otherwise it is a transposed view of [B, S, H, DV].
copies [N], integers, if there are any: the keys are N rows of those given, key[:, :, copies], and the values too, as
where sequences begin alike.  start and end then tell all: causal, window, max_seqlen and ids are not read.
Results: out [B, H, S, DV], of the dtype of query, and the log-sum-exp of each row of scores [B, H, S], float32.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.kernels import attention_engines, key_copies
from fastft.kernels.core import dispatch
from fastft.kernels.core.registry import define, require, wide

LOWEST, HIGHEST = -5e8, 5e8
LONGEST_HEAD = 256  # that the Triton kernels take
MULTIPLIER, INCREMENT = 0x45D9F3B, 0x9E3779B9  # of the hash that dropout draws from


def allowed(
    query: Tensor, key: Tensor, start: Tensor | None, end: Tensor | None, query_ids: Tensor | None,
    key_ids: Tensor | None, mask: Tensor | None, causal: bool, window: int,
) -> Tensor:  # fmt: skip
    """Return which scores count: bool, broadcasts to [B, H, S, T]."""
    i = torch.arange(query.shape[-2], device=query.device)[:, None]
    j = torch.arange(key.shape[-2], device=query.device)
    counts = torch.ones(1, 1, len(i), len(j), dtype=torch.bool, device=query.device)
    if causal:
        counts = counts & (j <= i)
    if window:
        counts = counts & (j > i - window)
    if start is not None:
        counts = counts & (j >= start[:, None, :, None])
    if end is not None:
        counts = counts & (j < end[:, None, :, None])
    if query_ids is not None and key_ids is not None:
        counts = counts & (query_ids[:, None, :, None] == key_ids[:, None, None, :])
    if mask is not None and mask.dtype == torch.bool:
        counts = counts & mask
    if start is not None:
        before_end = torch.ones_like(j, dtype=torch.bool) if end is None else j < end[:, None, :, None]
        counts = torch.where(start[:, None, :, None] < 0, before_end, counts)
    return counts


def kept(seed: Tensor, shape: Sequence[int], dropout: float) -> Tensor:
    """Return what dropout keeps, bool [B, H, S, T]: by a 32-bit hash of the seed and of an element's position."""
    B, H, S, T = shape
    rows = torch.arange(B * H * S, device=seed.device).view(B, H, S, 1)
    columns = torch.arange(T, device=seed.device)
    drawn = _mixed(_mixed(_mixed(rows) ^ seed) + columns * INCREMENT)
    return drawn >= int(dropout * 2**32)


def _mixed(number: Tensor) -> Tensor:
    """Hash 32-bit numbers: a permutation whose output bits each depend on all input bits, two multiply-shift rounds."""
    number = number & 0xFFFFFFFF
    for _ in range(2):
        number = ((number ^ (number >> 16)) * MULTIPLIER) & 0xFFFFFFFF
    return number ^ (number >> 16)


def grouped(tensor: Tensor, heads: int) -> Tensor:
    """Repeat key or value heads [B, G, T, D or DV] so that there is one for each query head."""
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive mask in dtype, with -inf for numbers below LOWEST."""
    return mask.to(dtype).masked_fill(mask < LOWEST, -torch.inf)


def capped(scores: Tensor, softcap: float) -> Tensor:
    """Apply softcap * tanh(scores / softcap) to scores; leave them if softcap is 0."""
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def scored(products: Tensor, start: Tensor | None, mask: Tensor | None, softcap: float) -> Tensor:
    """Turn scaled products into scores: 0 in rows that weigh all keys alike, with the same gradient as elsewhere."""
    scores = capped(products, softcap)
    nothing = scores - scores.detach()
    if mask is not None and mask.dtype != torch.bool:
        alone = (mask - mask.detach()).to(scores.dtype)
        scores = torch.where(mask > HIGHEST, nothing + alone, scores + added(mask, scores.dtype))
    return scores if start is None else torch.where(start[:, None, :, None] < 0, nothing, scores)


def reference(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, end: Tensor | None, query_ids: Tensor | None,
    key_ids: Tensor | None, mask: Tensor | None, sinks: Tensor | None, seed: Tensor | None, causal: bool, window: int,
    max_seqlen: int, scale: float, softcap: float, dropout: float, contiguous: bool, copies: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute out and log-sum-exp with all scores at once, in float32 (float64 for float64)."""
    dtype = wide(query.dtype)
    key, value, (start, end, query_ids, key_ids), causal, window = attention_engines.restricting(
        key, value, (start, end, query_ids, key_ids), causal, window, max_seqlen, copies
    )
    counts = allowed(query, key, start, end, query_ids, key_ids, mask, causal, window)
    products = query.to(dtype) @ grouped(key, query.shape[1]).to(dtype).transpose(-1, -2) * scale
    scores = scored(products, start, mask, softcap)
    counts = counts.expand(scores.shape) & (scores > -torch.inf)
    scores = scores.masked_fill(~counts, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)  # a softmax without an element has no gradient
    weights = scores.softmax(-1).masked_fill(empty, 0.0)[..., : key.shape[-2]]
    if seed is not None:
        weights = weights * kept(seed, weights.shape, dropout).to(dtype) / (1.0 - dropout)
    out = (weights @ grouped(value, query.shape[1]).to(dtype)).to(query.dtype)
    return out, scores.detach().logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)


def score_gradients(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, start: Tensor | None,
    end: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    causal: bool, window: int, scale: float, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute scaled products, weights behind dropout, and the gradients of scores behind the softcap [B, H, S, T]."""
    dtype, heads = wide(query.dtype), query.shape[1]
    q, k, v, dout = (tensor.to(dtype) for tensor in (query, grouped(key, heads), grouped(value, heads), grad_output))
    counts = allowed(query, key, start, end, query_ids, key_ids, mask, causal, window)
    products = q @ k.transpose(-1, -2) * scale
    scores = scored(products, start, mask, softcap)
    lse = lse.masked_fill(lse == -torch.inf, 0.0).to(dtype)
    weights = torch.exp(scores.masked_fill(~counts, -torch.inf) - lse[..., None])
    kept_scale: Tensor | float = 1.0 if seed is None else kept(seed, weights.shape, dropout).to(dtype) / (1.0 - dropout)
    dweights = (dout @ v.transpose(-1, -2)) * kept_scale
    dscores = weights * (dweights - (dout * out.to(dtype)).sum(-1, keepdim=True))
    return products, weights * kept_scale, dscores


def reference_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, start: Tensor | None,
    end: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    causal: bool, window: int, max_seqlen: int, scale: float, softcap: float, dropout: float,
    copies: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of query, key and value with all scores at once."""
    rows = key.shape[2]
    key, value, (start, end, query_ids, key_ids), causal, window = attention_engines.restricting(
        key, value, (start, end, query_ids, key_ids), causal, window, max_seqlen, copies
    )
    products, weights, dscores = score_gradients(
        grad_output, query, key, value, out, lse, start, end, query_ids, key_ids, mask, seed, causal, window, scale,
        softcap, dropout,
    )  # fmt: skip
    if softcap:
        dscores = dscores * (1.0 - torch.tanh(products / softcap) ** 2)
    dtype, by_group = dscores.dtype, (key.shape[1], query.shape[1] // key.shape[1])
    dquery = dscores @ grouped(key, query.shape[1]).to(dtype) * scale
    dkey = (dscores.transpose(-1, -2) @ query.to(dtype) * scale).unflatten(1, by_group).sum(2)
    dvalue = (weights.transpose(-1, -2) @ grad_output.to(dtype)).unflatten(1, by_group).sum(2)
    if key_copies.given(copies):
        dkey, dvalue = (key_copies.summed_reference(one, copies, rows) for one in (dkey, dvalue))
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)


def reference_mask_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, start: Tensor | None,
    end: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, mask: Tensor, seed: Tensor | None,
    causal: bool, window: int, max_seqlen: int, scale: float, softcap: float, dropout: float,
) -> Tensor:  # fmt: skip
    """Compute the gradient of a mask that is added: that of the scores, summed where the mask is broadcast.

    It is 0 in rows that weigh all keys alike by their start, and is added behind the softcap.
    """
    _, _, (start, end, query_ids, key_ids), causal, window = attention_engines.restricting(
        key, value, (start, end, query_ids, key_ids), causal, window, max_seqlen
    )
    _, _, dscores = score_gradients(
        grad_output, query, key, value, out, lse, start, end, query_ids, key_ids, mask, seed, causal, window, scale,
        softcap, dropout,
    )  # fmt: skip
    if start is not None:
        dscores = dscores.masked_fill(start[:, None, :, None] < 0, 0.0)
    return dscores.sum_to_size(mask.shape).to(mask.dtype)


def check(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, end: Tensor | None, query_ids: Tensor | None,
    key_ids: Tensor | None, mask: Tensor | None,
) -> None:  # fmt: skip
    """Raise for shapes and dtypes that the op does not define."""
    shapes = lambda: f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"  # noqa: E731
    require(query.dim() == key.dim() == value.dim() == 4, shapes)
    require(key.shape[:3] == value.shape[:3], shapes)
    require(query.shape[0] == key.shape[0], shapes)
    require(query.shape[-1] == key.shape[-1], shapes)
    require(query.shape[1] % key.shape[1] == 0, shapes)
    dtypes = lambda: f"query {query.dtype}, key {key.dtype}, value {value.dtype}"  # noqa: E731
    require(query.dtype == key.dtype == value.dtype and query.is_floating_point(), dtypes)
    require((query_ids is None) == (key_ids is None), lambda: "query_ids and key_ids belong together")
    rows, columns = query.shape[-2], key.shape[-2]
    named = {"start": (start, rows), "end": (end, rows), "query_ids": (query_ids, rows), "key_ids": (key_ids, columns)}
    for name, (tensor, length) in named.items():
        if tensor is not None:
            described = f"{name} {tuple(tensor.shape)}"
            require(tensor.dim() == 2, lambda described=described: f"{described} has not 2 axes")  # type: ignore[misc]
            require(tensor.shape[1] == length, lambda described=described: f"{described}: {shapes()}")  # type: ignore[misc]
            tensor.expand(query.shape[0], -1)  # raises where it does not broadcast
    if mask is not None:
        require(mask.shape[-2:] == (rows, columns), lambda: f"mask {tuple(mask.shape)}: {shapes()}")
        mask.expand(*query.shape[:-1], columns)  # raises where it does not broadcast


def longest_head(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Return the larger of the sizes of a query and of a value."""
    return max(query.shape[-1], value.shape[-1])


def unsupported_reason(query: Tensor, value: Tensor, masked: bool) -> str | None:
    """Return why a call would need all scores in a tensor here, or None.  masked: by more than a causal mask."""
    on_gpu, longest = query.device.type == "cuda", longest_head(query, query, value)
    if on_gpu and not (dispatch.has_tensor_cores(query.device) and longest <= LONGEST_HEAD):
        sizes = (query.shape[-1], value.shape[-1])
        plain = not masked and attention_engines.engine_of(query.device, query.dtype, *sizes)
        return None if plain else f"there is no kernel for it on this GPU, with {longest} elements a head"
    return None


def new_outputs(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, end: Tensor | None, query_ids: Tensor | None,
    key_ids: Tensor | None, mask: Tensor | None, sinks: Tensor | None, seed: Tensor | None, causal: bool, window: int,
    max_seqlen: int, scale: float, softcap: float, dropout: float, contiguous: bool, copies: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Allocate empty out and log-sum-exp."""
    check(query, key, value, start, end, query_ids, key_ids, mask)
    key_copies.check(copies, mask, (start, end))
    require(0.0 <= dropout < 1.0, lambda: f"a share of {dropout} cannot be dropped")
    (B, H, S, _), DV = query.shape, value.shape[-1]
    out = query.new_empty(B, H, S, DV) if contiguous else query.new_empty(B, S, H, DV).transpose(1, 2)
    return out, query.new_empty(B, H, S, dtype=wide(query.dtype))


def new_gradients(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """Allocate empty gradients in the memory order of query, key and value."""
    return tuple(torch.empty_like(tensor) for tensor in (query, key, value))


def new_mask_gradient(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, start: Tensor | None,
    end: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, mask: Tensor, *_: Any,
) -> Tensor:  # fmt: skip
    """Allocate an empty gradient of the mask, contiguous."""
    return mask.new_empty(mask.shape)


def flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *arguments: Any, products: tuple[int, int] = (1, 1)
) -> int:
    """Count the FLOPs of products of the scores' size; half if causal, as other masks are not known.

    products: how many there are with keys or queries, and how many with values or gradients of out.  A row meets at
    most max_seqlen keys, if that is a number already.
    """
    B, H, S, D = query
    causal, _, max_seqlen = itertools.islice(itertools.dropwhile(lambda one: not isinstance(one, bool), arguments), 3)
    known = type(max_seqlen) is int and type(key[2]) is int and max_seqlen > 0
    T = min(key[2], max_seqlen) if known else key[2]
    elements = products[0] * D + products[1] * value[3]
    return 2 * B * H * S * T * elements // (2 if causal else 1)


def flops_backward(grad_output: Sequence[int], query: Sequence[int], *arguments: Any) -> int:
    """Count the FLOPs of the scores again, and of the gradients of the scores, of query, key and value."""
    return flops(query, *arguments, products=(3, 2))


def scratch_bytes(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> int:
    """Count the bytes of copies of keys and values."""
    return key_copies.bytes_of((key, value), others[-1])


def scratch_bytes_backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> int:
    """Count the bytes of query's gradient in float32, as torch's engines have it, and of copies and their gradients."""
    return query.numel() * 4 + 2 * key_copies.bytes_of((key, value), others[-1])


_QKV = {"query": "B G*E S D", "key": "B G T D", "value": "B G T D"}
_BACKWARD = {"grad_output": "B G*E S D", **_QKV, "out": "B G*E S D", "lse": "B G*E S"}
_OTHER_VALUES = {"value": "B G T V"}
_IDS = {"query_ids": "index B S 2", "key_ids": "index B T 2"}
# The scale is small, as products of long heads are large.
_PLAIN = {"causal": False, "window": 0, "max_seqlen": 0, "scale": 0.01, "softcap": 0.0, "dropout": 0.0}
_AS_MANY = {"key": "B G S D", "value": "B G S D"}  # behind fewer keys a window is empty
_WAYS: list[tuple[dict, dict]] = [
    ({}, {}), ({}, {"causal": True}), (_AS_MANY, {"causal": True, "window": 3}), ({}, {"causal": True, "softcap": 0.1}),
    ({"start": "index B S T"}, {}), ({"mask": "B 1 S T"}, {}), ({"mask": "1 G*E S T"}, {"causal": True}),
    ({"seed": "index 1 N"}, {"dropout": 0.25}), (_OTHER_VALUES, {"causal": True}),
]  # fmt: skip
_SPARSE_WAYS: list[tuple[dict, dict]] = [  # a row may be left without a key
    ({"start": "index B S T", "end": "index 1 S T"}, {}), (_IDS, {"causal": True}),
    ({"start": "index 1 S T", **_IDS}, {"softcap": 0.1}), ({"start": "index B S T", **_IDS}, {"max_seqlen": 4}),
    ({"start": "index B S T", "end": "index 1 S T", **_IDS}, {"causal": True, "max_seqlen": -1}),
    ({"start": "index B S N", "end": "index 1 S N", "copies": "rows N T"}, {"causal": True, "window": 2}),
]  # fmt: skip
_SINKS = {"sinks": "G*E"}


def _like_values(tensors: dict[str, str]) -> dict[str, str]:
    """Add out and its gradient, for values of another size than keys."""
    return tensors | dict.fromkeys(("grad_output", "out"), "B G*E S V") if tensors is _OTHER_VALUES else tensors


attention = define(
    "attention", reference, new_outputs, "attention_triton.forward",
    cases=[
        *(({**_QKV, **tensors}, {**_PLAIN, **choice, "contiguous": False}) for tensors, choice in _WAYS),
        *(
            ({**_QKV, **tensors, **_SINKS}, {**_PLAIN, **choice, "contiguous": True})
            for tensors, choice in (_WAYS[1], *_SPARSE_WAYS)
        ),
    ],
    gradients=("query", "key", "value", "mask", "sinks"), alike=("query", "key", "value"), statistics=("mask",),
    flops=flops, engine=attention_engines.forward, longest_row=LONGEST_HEAD, row_length=longest_head,
    multiplies=True, scratch=scratch_bytes,
)  # fmt: skip
attention_backward = define(
    "attention_backward", reference_backward, new_gradients, "attention_backward_triton.backward",
    cases=[
        ({**_BACKWARD, **_like_values(tensors)}, {**_PLAIN, **choice}) for tensors, choice in (*_WAYS, *_SPARSE_WAYS)
    ],
    statistics=("lse", "mask"), alike=("grad_output", "query", "key", "value", "out"),
    flops=flops_backward, engine=attention_engines.backward, longest_row=LONGEST_HEAD,
    row_length=lambda grad_output, *arguments: longest_head(*arguments), multiplies=True,
    scratch=scratch_bytes_backward,
)  # fmt: skip
_MASK_WAYS: list[tuple[dict, dict]] = [
    ({"mask": "B 1 S T"}, {"causal": True, "softcap": 0.1}), ({"mask": "1 G*E S T"}, {}),
    ({"mask": "B G*E S S", **_AS_MANY, "start": "index B S S"}, {"window": 3, "causal": True}),
    ({"mask": "1 1 S T", "seed": "index 1 N"}, {"dropout": 0.25}), ({"mask": "S T", **_IDS}, {}),
]  # fmt: skip
attention_mask_backward = define(
    "attention_mask_backward", reference_mask_backward, new_mask_gradient, "attention_mask_backward_triton.backward",
    cases=[({**_BACKWARD, **tensors}, {**_PLAIN, **choice}) for tensors, choice in _MASK_WAYS],
    statistics=("lse", "mask"), alike=("grad_output", "query", "key", "value", "out"),
    flops=lambda _, *others: flops(*others),
    longest_row=LONGEST_HEAD, row_length=lambda _, *others: longest_head(*others), multiplies=True,
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (query, key, value, *masks), (sinks, seed), ctx.choice, copies = inputs[:8], inputs[8:10], inputs[10:-2], inputs[-1]
    ctx.save_for_backward(query, key, value, *output, *masks, sinks, seed, copies)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 18
    query, key, value, out, lse, *masks, sinks, seed, copies = ctx.saved_tensors
    gradients: Sequence[Tensor | None] = (None,) * 3
    if any(ctx.needs_input_grad[:3]):
        gradients = attention_backward(
            grad_output, query, key, value, out, lse, *masks, seed, *ctx.choice, copies
        )  # fmt: skip
    needed = [gradient if needs else None for gradient, needs in zip(gradients, ctx.needs_input_grad[:3], strict=True)]
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[8]:
        # With value 0 a sink only takes weight from the others: its score's gradient is -weight * (dout . out).
        weight = torch.exp(sinks[:, None].to(lse.dtype) - lse)
        delta = (grad_output.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        dsinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
    dmask = None
    if ctx.needs_input_grad[7]:
        dmask = attention_mask_backward(grad_output, query, key, value, out, lse, *masks, seed, *ctx.choice)
    return *needed, *(None,) * 4, dmask, dsinks, *(None,) * 9


attention.register_autograd(_backward, setup_context=_setup_context)
