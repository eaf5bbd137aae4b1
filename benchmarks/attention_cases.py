"""The masks that models attend under, and who computes attention under them: what attention.py measures.

Eager and dense are transformers' own functions, with the masks that it gives them: bool for torch's kernels, and none
where causal says it all; for eager, added.  All give [B, S, H, D], contiguous, as an output projection takes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

import fastft.kernels.attention  # noqa: F401  (the op)
from fastft.kernels import attention_engines

CHUNK = 1024  # rows of a mask at once, where it is counted


@dataclass(frozen=True)
class Case:
    """window, document: of so many tokens, at most a half and a quarter of a row.  padded: a share of each row, at its
    end.  spread: of the scores, 1 where queries and keys are normed.  head_dim: at most, 0 for any."""

    causal: bool = True
    window: int = 0
    document: int = 0
    padded: float = 0.0
    softcap: float = 0.0
    spread: float = 1.0
    sinks: bool = False
    head_dim: int = 0

    def at(self, length: int) -> Case:
        return replace(self, window=min(self.window, length // 2), document=min(self.document, length // 4))


CASES = {
    "causal": Case(),
    "bidirectional": Case(causal=False),
    "padded": Case(padded=0.25),
    "packed": Case(document=512),
    "window": Case(window=1024),  # Mistral's and Gemma's are of this size or a few times it
    "softcap": Case(softcap=50.0, spread=4.0),  # Gemma 2
    "sinks": Case(window=128, sinks=True, head_dim=64),  # GPT-OSS
}


@dataclass(frozen=True)
class Problem:
    """query [B, H, S, D] and key, value [B, G, S, D], views of [B, S, H, D] as a projection leaves them; sinks [H]."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None

    @property
    def wanted(self) -> list[Tensor]:
        return [one for one in (self.query, self.key, self.value, self.sinks) if one is not None]

    @cached_property
    def positions(self) -> Tensor:
        return torch.arange(self.query.shape[2], device=self.query.device, dtype=torch.int32)

    @cached_property
    def documents(self) -> Tensor:
        """[S], which one each token is of."""
        return self.positions // self.case.document

    @cached_property
    def real(self) -> Tensor:
        """[B, S], bool: what is not padding."""
        length = len(self.positions)
        real = self.positions < length - round(self.case.padded * length)
        return real.expand(len(self.query), -1).contiguous()

    def allowed(self, rows: Tensor) -> Tensor:
        """bool [B or 1, 1, R, S]."""
        i, j = rows[:, None], self.positions
        found = j <= i if self.case.causal else torch.ones_like(j <= i)
        if self.case.window:
            found = found & (j > i - self.case.window)
        if self.case.document:
            found = found & (self.documents[rows][:, None] == self.documents)
        return found & self.real[:, None, None, :] if self.case.padded else found[None, None]

    @cached_property
    def share(self) -> float:
        """Of the scores, those that count."""
        counts = [self.allowed(rows)[:1].sum(dtype=torch.int64).item() for rows in self.positions.split(CHUNK)]
        return sum(counts) / len(self.positions) ** 2

    @cached_property
    def mask(self) -> Tensor | None:
        """As transformers gives it to torch's kernels."""
        case = self.case
        if not (case.window or case.document or case.padded):
            return None
        return torch.cat([self.allowed(rows) for rows in self.positions.split(CHUNK)], 2)

    def added(self, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
        """As transformers gives it to eager attention."""
        if self.mask is None and not self.case.causal:
            return None
        allowed = self.allowed(rows)
        return torch.zeros(allowed.shape, dtype=dtype, device=rows.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )

    @cached_property
    def bias(self) -> Tensor | None:
        return self.added(self.positions, self.query.dtype)

    @cached_property
    def ranges(self) -> tuple[Tensor | None, ...]:
        """The op's start, end, query_ids and key_ids."""
        start = (self.documents * self.case.document)[None] if self.case.document else None
        if not self.case.padded:
            return start, None, None, None
        key_ids = torch.where(self.real, 0, -1).int()
        return start, None, torch.zeros_like(key_ids), key_ids

    @cached_property
    def block_mask(self) -> Any:
        """For flex_attention; documents and padding are read from tensors, as where lengths differ."""
        case, causal = self.case, self.case.causal
        documents = self.documents if case.document else None
        real = self.real if case.padded else None

        def counts(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            found = j <= i if causal else j >= 0
            if case.window:
                found = found & (j > i - case.window)
            if documents is not None:
                found = found & (documents[i] == documents[j])
            return found if real is None else found & real[b, j]

        if not causal and self.mask is None:
            return None
        B, S = len(self.query) if case.padded else None, len(self.positions)
        return create_block_mask(counts, B, None, S, S, device=self.query.device)


def build(case: Case, batch: int, length: int, heads: tuple[int, int], head_dim: int, new: Callable) -> Problem:
    """Random; new: makes a normal tensor of a shape."""
    H, G = heads
    D = min(head_dim, case.head_dim or head_dim)
    query, key, value = (new(batch, length, count, D) for count in (H, G, G))
    query.mul_(case.spread)
    query, key, value = (one.transpose(1, 2).requires_grad_() for one in (query, key, value))
    return Problem(case.at(length), query, key, value, new(H).requires_grad_() if case.sinks else None)


def layer_of(problem: Problem, sinks: Tensor | None) -> nn.Module:
    """What transformers' functions ask of a layer."""
    layer: Any = nn.Module()
    layer.num_key_value_groups = problem.query.shape[1] // problem.key.shape[1]
    layer.is_causal = problem.case.causal
    layer.sinks = sinks
    return layer


def softmaxed(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, softcap: float
) -> Tensor:
    """Eager attention: GPT-OSS's if there are sinks, or else Gemma 2's, which is Llama's where nothing is capped."""
    scale = query.shape[-1] ** -0.5
    if layer.sinks is not None:
        return gpt_oss.eager_attention_forward(layer, query, key, value, bias, scaling=scale)[0]
    return gemma2.eager_attention_forward(layer, query, key, value, bias, scaling=scale, softcap=softcap or None)[0]


def truth(problem: Problem, rows: Tensor, grad_output: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Some rows of the output and the gradients that come from them, of these rows of query and of all else: eager's.

    grad_output [B, R, H, D]: of these rows.
    """
    query, *others = (one.detach().to(dtype) for one in problem.wanted)
    leaves = [one.requires_grad_() for one in (query[:, :, rows], *others)]
    layer = layer_of(problem, leaves[3] if problem.sinks is not None else None)
    out = softmaxed(layer, leaves[0], leaves[1], leaves[2], problem.added(rows, dtype), problem.case.softcap)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_output.to(dtype))]


def ours(problem: Problem) -> Tensor:
    case, scale = problem.case, problem.query.shape[-1] ** -0.5
    given = (problem.query, problem.key, problem.value, *problem.ranges, None, problem.sinks, None)
    out, _ = torch.ops.fastft.attention(*given, case.causal, case.window, 0, scale, case.softcap, 0.0, False)
    return out.transpose(1, 2).contiguous()


def dense(problem: Problem) -> Tensor:
    if problem.case.softcap or problem.sinks is not None:
        raise NotImplementedError("scaled_dot_product_attention has neither a softcap nor sinks")
    layer = layer_of(problem, None)
    return sdpa_attention_forward(layer, problem.query, problem.key, problem.value, problem.mask)[0]


def cudnn(problem: Problem) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return dense(problem)


def flash(problem: Problem) -> Tensor:
    if problem.mask is not None:
        raise NotImplementedError("torch's FlashAttention takes no mask")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return dense(problem)


def flexed(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, block_mask: Any, softcap: float) -> Tensor:
    """flex_attention; sinks take their part of the weight afterwards."""

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    found: Any = flex_attention(
        query, key, value, score_mod=capped if softcap else None, block_mask=block_mask, enable_gqa=True,
        return_aux=AuxRequest(lse=sinks is not None),
    )  # fmt: skip
    out, aux = found
    if sinks is not None:
        out = (out * torch.sigmoid(aux.lse - sinks[:, None])[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous()


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


def flex(problem: Problem) -> Tensor:
    """Compiled on CUDA; on a CPU torch compiles no backward of it."""
    run = compiled(flexed) if problem.query.is_cuda else flexed
    return run(problem.query, problem.key, problem.value, problem.sinks, problem.block_mask, problem.case.softcap)


def eager(problem: Problem, run: Callable[..., Tensor] = softmaxed) -> Tensor:
    B, H, S, _ = problem.query.shape
    scores_bytes = B * H * S * S * problem.query.element_size()
    if problem.query.is_cuda and 2 * scores_bytes > torch.cuda.mem_get_info()[1]:  # saves minutes of compiling
        raise torch.OutOfMemoryError(f"out of memory: scores take {scores_bytes / 2**30:.0f} GiB, and so do weights")
    layer = layer_of(problem, problem.sinks)
    return run(layer, problem.query, problem.key, problem.value, problem.bias, problem.case.softcap)


def eager_compiled(problem: Problem) -> Tensor:
    return eager(problem, compiled(softmaxed) if problem.query.is_cuda else softmaxed)


CONTENDERS: dict[str, Callable[[Problem], Tensor]] = {
    "fastft": ours,
    "triton": ours,
    "cudnn": cudnn,
    "flash": flash,
    "dense": dense,
    "flex": flex,
    "eager": eager,
    "eager-compiled": eager_compiled,
}
ONLY_ON_CUDA = ("triton", "cudnn")


def as_contender(name: str, device: str, action: Callable[..., Any], *given: Any) -> None:
    """Do what concerns a contender, backward included, under what makes the op it."""
    if device != "cuda" and name in ONLY_ON_CUDA:
        raise NotImplementedError("needs CUDA")
    with attention_engines.only_triton() if name == "triton" else contextlib.nullcontext():
        action(*given)
