"""Attention -> fastft::attention, with whatever mask is added or passed; rewriter/attention/ finds out what it means.

The references differ in how they scale, where they mask, and what they do to the scores.  Source: Vaswani et al.,
Attention Is All You Need, arXiv:1706.03762.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels.attention import LOWEST, unsupported_reason
from fastft.reasons import Reason
from fastft.rewriter.fx import autocast
from fastft.rewriter.matching.rule import Rule


def attended(scores: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """Weight the values by a softmax in float32, cast to the dtype of the queries."""
    return torch.matmul(torch.softmax(scores, -1, torch.float32).to(q.dtype), v)


def widened(scores: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """Weight the values as attended does, with the scores cast to float32 before the softmax."""
    return torch.matmul(torch.softmax(scores.float(), -1).to(q.dtype), v)


def product(q: Tensor, k: Tensor) -> Tensor:
    """Multiply every query by every key."""
    return torch.matmul(q, k.transpose(2, 3))


def dot_product(q: Tensor, k: Tensor, v: Tensor, dropout: float, is_causal: bool, scale: float) -> Tensor:
    """torch's own, without a mask."""
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal, scale=scale)


def dot_product_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, is_causal: bool, scale: float
) -> Tensor:
    """torch's own, with a mask."""
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale)


def grouped_query(q: Tensor, k: Tensor, v: Tensor, dropout: float, is_causal: bool, scale: float) -> Tensor:
    """torch's own, of fewer key heads than query heads."""
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal, scale=scale, enable_gqa=True)


def grouped_query_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, is_causal: bool, scale: float
) -> Tensor:
    """torch's own, of fewer key heads, with a mask."""
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=True)


def multi_query(q: Tensor, k: Tensor, v: Tensor, dropout: float, is_causal: bool, scale: float) -> Tensor:
    """torch's own, of one key head that is broadcast: Falcon."""
    return dot_product(q, k, v, dropout, is_causal, scale)


def multi_query_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, is_causal: bool, scale: float
) -> Tensor:
    """The same with a mask."""
    return dot_product_masked(q, k, v, mask, dropout, is_causal, scale)


def eager_additive_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """transformers' eager attention."""
    return attended(product(q, k) * scale + mask, q, v)


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same without a mask."""
    return attended(product(q, k) * scale, q, v)


def eager_softcap_additive_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Gemma 2: scores between -softcap and softcap."""
    return attended(torch.tanh(product(q, k) * scale / softcap) * softcap + mask, q, v)


def eager_softcap(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
    """The same without a mask."""
    return attended(torch.tanh(product(q, k) * scale / softcap) * softcap, q, v)


def eager_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """GPT-OSS: one more score a head, whose weight goes nowhere."""
    scores = product(q, k) * scale + mask
    more = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    together = torch.cat([scores, more], -1)
    together = together - together.max(dim=-1, keepdim=True)[0]
    weights = torch.softmax(together, -1, torch.float32)[..., :-1]
    return torch.matmul(weights.to(v.dtype), v)


def eager_sinks_in_input_dtype(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scale: float
) -> Tensor:  # fmt: skip
    """GPT-OSS in 16 bits: the same with a softmax in the dtype of the scores."""
    scores = product(q, k) * scale + mask
    more = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    together = torch.cat([scores, more], -1)
    together = together - together.max(dim=-1, keepdim=True)[0]
    return torch.matmul(torch.softmax(together, -1)[..., :-1], v)


def eager_additive_mask_divided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, root: float) -> Tensor:
    """Llama's own code: divided by the root of head_dim, cast before the softmax."""
    return widened(product(q, k) / root + mask, q, v)


def eager_divided(q: Tensor, k: Tensor, v: Tensor, root: float) -> Tensor:
    """The same without a mask."""
    return widened(product(q, k) / root, q, v)


def eager_additive_mask_widened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Scaled, and cast before the softmax."""
    return widened(product(q, k) * scale + mask, q, v)


def eager_widened(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same without a mask."""
    return widened(product(q, k) * scale, q, v)


def eager_masked_fill(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, scale: float, value: float) -> Tensor:
    """nanoGPT: scores replaced where they do not count."""
    return torch.matmul(torch.softmax((product(q, k) * scale).masked_fill(masked, value), -1), v)


def eager_masked_fill_divided(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, root: float, value: float) -> Tensor:
    """The same, divided by the root of head_dim."""
    return torch.matmul(torch.softmax((product(q, k) / root).masked_fill(masked, value), -1), v)


def eager_masked_fill_dropout(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor, scale: float, value: float, dropout: float
) -> Tensor:
    """nanoGPT with dropout."""
    weights = torch.softmax((product(q, k) * scale).masked_fill(masked, value), -1)
    return torch.matmul(F.dropout(weights, dropout), v)


def eager_bias_masked_fill(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, masked: Tensor, scale: float, value: float
) -> Tensor:
    """MPT: a number for each head and key is added, then scores are replaced where they do not count."""
    return widened((product(q, k) * scale + bias).masked_fill(masked, value), q, v)


def eager_bias_additive_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Bloom: a number for each head and key is added by the product, with all heads of a batch in one axis."""
    heads = q.shape[0] * q.shape[1]
    queries, keys = q.reshape(heads, -1, q.shape[3]), k.reshape(heads, -1, q.shape[3])
    scores = torch.baddbmm(bias, queries, keys.transpose(-1, -2), beta=1.0, alpha=scale)
    scores = scores.view(q.shape[0], q.shape[1], q.shape[2], -1) + mask
    weights = torch.softmax(scores, -1, torch.float32).to(q.dtype).view(heads, q.shape[2], -1)
    return torch.bmm(weights, v.reshape(heads, -1, v.shape[3])).view(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


def softmax_in_input_dtype(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """No mask, and a softmax in the dtype of the scores."""
    return torch.matmul(torch.softmax(product(q, k) * scale, -1), v)


def softmax_in_input_dtype_additive_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """A mask that is added, and a softmax in the dtype of the scores."""
    return torch.matmul(torch.softmax(product(q, k) * scale + mask, -1), v)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None,
    masked: Tensor | None = None, bias: Tensor | None = None, *, contiguous: bool, scale: float = 1.0,
    root: float = 1.0, value: float = 0.0, softcap: float = 0.0, dropout: float = 0.0, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """fastft::attention"""
    dtype = next((autocast_dtype for autocast_dtype in autocast.state() if autocast_dtype is not None), None)
    if dtype is not None:
        q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    if bias is not None and mask is not None:
        mask = bias.view(q.shape[0], q.shape[1], 1, -1) + mask
    if masked is not None:
        mask = torch.zeros_like(masked, dtype=q.dtype) if bias is None else bias
        mask = mask.masked_fill(masked, value)
        if value != -math.inf:  # rows filled throughout weigh all keys alike, whatever the query: it has no gradient
            q = q.masked_fill(masked.all(-1, keepdim=True), 0.0)
    seed = q.new_empty(1, dtype=torch.int64).random_(2**31) if dropout else None
    return torch.ops.fastft.attention(
        q, k, v, None, None, None, None, mask, sinks, seed, is_causal, 0, 0, scale / root, softcap, dropout, contiguous,
        None,
    )[0]  # fmt: skip


def decline_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **more: Any) -> str | None:
    """Return why the op cannot compute this attention, or cannot here; None if it can."""
    if not 0.0 <= more.get("dropout", 0.0) < 1.0:
        return Reason(f"dropout is {more['dropout']}", "attention.dropout")
    if not more.get("value", -math.inf) < LOWEST:  # by which scores that are not filled may not vanish
        return f"scores are filled with {more['value']} and not with -inf"
    if not (q.shape[1] and k.shape[1]) or q.shape[1] % k.shape[1] != 0:
        return "the number of query heads is no multiple of that of key heads"
    extra = mask is not None or "softcap" in more or "sinks" in more or "masked" in more or more.get("dropout", 0.0)
    return unsupported_reason(q, v, bool(extra))


HEADS = {"q": "B H S D", "k": "B H T D", "v": "B H T E"}
SHARED = {"q": "B H S D", "k": "B 1 T D", "v": "B 1 T E"}
GROUPS = {"q": "B H S D", "k": "B G T D", "v": "B G T E"}


def rules(
    reference: Callable, anchor: Callable, shapes: dict[str, str], orders: tuple[bool, ...] = (False, True), **more: Any
) -> tuple[Rule, ...]:
    """Build a rule for each memory order that the result may have."""
    return tuple(
        Rule(reference, partial(attention, contiguous=contiguous), anchor, shapes, decline_if=decline_attention, **more)
        for contiguous in orders
    )


def eager_rules(reference: Callable, **tensors: str) -> tuple[Rule, ...]:
    """Build the rules of a written-out attention; misses are not reported, as routers have softmaxes too."""
    shapes = {**HEADS, **tensors}
    first = "v" if "sinks" in shapes else "q"  # whose dtype the weights are cast to
    same_dtype_as = {name: first for name in ("q", "k", "v", "sinks") if name in shapes and name != first}
    dtype_from = (first, *(name for name in ("bias", "mask") if name in shapes))
    booleans = ("masked",) if "masked" in shapes else ()
    more: dict[str, Any] = {"dtype_from": dtype_from, "same_dtype_as": same_dtype_as, "booleans": booleans}
    return rules(
        reference, torch.softmax, shapes, (True,), report_misses=False, **more
    )  # a product of matrices is contiguous


RULES = (
    *rules(dot_product, F.scaled_dot_product_attention, HEADS),
    *rules(dot_product_masked, F.scaled_dot_product_attention, {**HEADS, "mask": "* S T"}),
    *rules(grouped_query, F.scaled_dot_product_attention, GROUPS),
    *rules(grouped_query_masked, F.scaled_dot_product_attention, {**GROUPS, "mask": "* S T"}),
    *rules(multi_query, F.scaled_dot_product_attention, SHARED),
    *rules(multi_query_masked, F.scaled_dot_product_attention, {**SHARED, "mask": "* S T"}),
    *eager_rules(eager_additive_mask, mask="* S T"),
    *eager_rules(eager),
    *eager_rules(eager_softcap_additive_mask, mask="* S T"),
    *eager_rules(eager_softcap),
    *eager_rules(eager_sinks, mask="* S T", sinks="H"),
    *eager_rules(eager_sinks_in_input_dtype, mask="* S T", sinks="H"),
    *eager_rules(eager_additive_mask_divided, mask="* S T"),
    *eager_rules(eager_divided),
    *eager_rules(eager_additive_mask_widened, mask="* S T"),
    *eager_rules(eager_widened),
    *eager_rules(eager_masked_fill, masked="* S T"),
    *eager_rules(eager_masked_fill_divided, masked="* S T"),
    *eager_rules(eager_masked_fill_dropout, masked="* S T"),
    *eager_rules(eager_bias_masked_fill, bias="*", masked="* S T"),
    *eager_rules(eager_bias_additive_mask, bias="N 1 T", mask="* S T"),
    *eager_rules(softmax_in_input_dtype),
    *eager_rules(softmax_in_input_dtype_additive_mask, mask="* S T"),
)
