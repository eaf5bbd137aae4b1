"""What kernels.py compares: each op beside a reference, by eager PyTorch and by Inductor, and Liger's.

The reference is the rule's own; that of experts is torch's grouped product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.patterns import glu, layer_norm, rms_norm, rotary

EPS, HEAD, LENGTH = 1e-6, 128, 2048
LARGEST_EXPERTS = 4096  # hidden size
SPELLING = (EPS, 0.0, True)  # Llama's
ANGLES = (False, False, False)  # halves, one number an element, laid out as the input; the op of q and k has one more
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One op at one shape.  trained: the inputs that get a gradient.  liger: None where it has no such kernel."""

    name: str
    shape: str
    tensors: Mapping[str, Tensor]
    trained: tuple[str, ...]
    ours: Function
    reference: Function
    liger: Function | None = None


def _liger(name: str, *settings: Any) -> Function:
    """A function of Liger's, found when it is first called: it may not be installed."""

    def call(*tensors: Tensor) -> Any:
        import liger_kernel.ops as ops

        return getattr(ops, name).apply(*tensors, *settings)

    return call


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm.llama(x, weight, EPS)


def norms(rows: int, hidden: int, new: Callable[..., Tensor]) -> Iterator[Case]:
    """Of the residual stream."""
    ops, shape = torch.ops.fastft, f"{rows}x{hidden}"
    x, residual, weight, other = new(rows, hidden), new(rows, hidden), new(hidden), new(hidden)
    llama = ("llama", False)
    for trained in (("x",), ("x", "weight")):
        dw = " + dW" if len(trained) > 1 else ""
        yield Case(
            f"rms_norm{dw}", shape, {"x": x, "weight": weight}, trained,
            lambda x, w: ops.rms_norm(x, w, *SPELLING)[0], norm, _liger("LigerRMSNormFunction", EPS, 0.0, *llama),
        )  # fmt: skip
        yield Case(
            f"layer_norm{dw}", shape, {"x": x, "weight": weight, "bias": other},
            (*trained, "bias") if dw else trained,
            lambda x, w, b: ops.layer_norm(x, w, b, EPS, True)[0],
            lambda x, w, b: layer_norm.torch_layer_norm(x, w, b, EPS),
            _liger("LigerLayerNormFunction", EPS),
        )  # fmt: skip
    stream = {"x": x, "residual": residual, "weight": weight}
    yield Case(
        "add_rms_norm", shape, stream, ("x", "residual"),
        lambda x, r, w: ops.add_rms_norm(x, r, w, *SPELLING)[:2], lambda x, r, w: (norm(x + r, w), x + r),
        _liger("LigerFusedAddRMSNormFunction", EPS, 0.0, *llama),
    )  # fmt: skip
    yield Case(
        "rms_norm_add", shape, stream, ("x", "residual"),
        lambda x, r, w: ops.rms_norm_add(x, r, w, *SPELLING)[0], lambda x, r, w: norm(x, w) + r,
    )  # fmt: skip

    def sandwich(x: Tensor, residual: Tensor, weight: Tensor, inner_weight: Tensor) -> tuple[Tensor, Tensor]:
        total = norm(x, inner_weight) + residual
        return norm(total, weight), total

    yield Case(
        "rms_norm_add_rms_norm", shape, {**stream, "inner_weight": other}, ("x", "residual"),
        lambda x, r, w, v: ops.rms_norm_add_rms_norm(x, r, v, w, EPS, *SPELLING)[:2], sandwich,
    )  # fmt: skip


def heads(rows: int, hidden: int, new: Callable[..., Tensor]) -> Iterator[Case]:
    """Queries and a quarter as many keys, laid out as projections give them and seen with heads first."""
    ops, shape = torch.ops.fastft, f"{rows}x{hidden}"
    length = min(rows, LENGTH)
    q, k = (new(rows // length, length, count, HEAD).transpose(1, 2) for count in (hidden // HEAD, hidden // HEAD // 4))
    turned_by = new(1, 1, length, HEAD // 2)
    angles = torch.cat((turned_by, turned_by), -1)  # alike in both halves, which Liger takes for granted
    cos, sin, q_weight, k_weight = angles.cos(), angles.sin(), new(HEAD), new(HEAD)

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotary.half(q, cos, sin), rotary.half(k, cos, sin)

    liger = _liger("LigerRopeFunction")  # in place, as in its models: a replay turns what is turned already
    yield Case(
        "rotary_qk", shape, {"q": q, "k": k, "cos": cos, "sin": sin}, ("q", "k"),
        lambda *given: tuple(ops.rotary_qk(*given, *ANGLES, False)), turned,
        lambda q, k, c, s: liger(q, k, c[:, 0], s[:, 0])[:2],  # newer versions return cos and sin too
    )  # fmt: skip
    normed = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}
    for trained in (("q", "k"), ("q", "k", "q_weight", "k_weight")):
        yield Case(
            "norm_rotary" + (" + dW" if len(trained) > 2 else ""), shape, normed, trained,
            lambda *given: ops.norm_rotary(*given, *SPELLING, *ANGLES)[:2],
            lambda q, k, v, w, c, s: turned(norm(q, v), norm(k, w), c, s),
        )  # fmt: skip


def gates(rows: int, intermediate: int, new: Callable[..., Tensor]) -> Iterator[Case]:
    """Gate and up apart, and as halves of one tensor."""
    ops, shape = torch.ops.fastft, f"{rows}x{intermediate}"
    both = {"gate": new(rows, intermediate), "up": new(rows, intermediate)}
    yield Case(
        "glu silu", shape, both, ("gate", "up"), lambda g, u: ops.glu(g, u, "silu"), glu.silu,
        _liger("LigerSiLUMulFunction"),
    )  # fmt: skip
    yield Case(
        "glu gelu_tanh", shape, both, ("gate", "up"), lambda g, u: ops.glu(g, u, "gelu_tanh"), glu.gelu_tanh,
        _liger("LigerGELUMulFunction"),
    )  # fmt: skip
    yield Case(
        "glu_packed silu", shape, {"gate_up": new(rows, 2 * intermediate)}, ("gate_up",),
        lambda x: ops.glu_packed(x, "silu"), glu.silu_packed,
    )  # fmt: skip


def experts(rows: int, hidden: int, new: Callable[..., Tensor]) -> Iterator[Case]:
    """Qwen3-30B-A3B's at hidden size 2048: 128 experts of 768, 8 for each token, uniform, with adapters of rank 16.

    Others in proportion; fewer experts for fewer rows than 1024, and none where their weights would fill a card.
    """
    if hidden > LARGEST_EXPERTS:
        return
    ops, width, count = torch.ops.fastft, hidden * 3 // 8, max(1, min(128, rows // 8))
    top_k, rank = min(8, count), 16
    x, weights, shape = new(rows, hidden), new(rows, top_k).softmax(-1), f"{rows}x{hidden}, {count} experts"
    index = torch.rand(rows, count, device=x.device).topk(top_k, -1).indices
    order, place, ends = ops.expert_order(index, count)

    def product(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        multiplied = lambda rows, by: F.grouped_mm(rows, by.transpose(1, 2), offs=ends)  # noqa: E731
        return multiplied(x, weight) + multiplied(multiplied(x, a), b)

    def ours(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, top_k_weights: Tensor | None = None) -> Tensor:
        routing = (top_k_weights, order, place, ends, weight.shape[1], 1.0, top_k)
        return ops.expert_linear(x, weight, [], None, a, b, *routing, False, top_k_weights is None, 0, "")[0]

    def combined(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, top_k_weights: Tensor) -> Tensor:
        own = product(x, weight, a, b)[place].view(rows, top_k, hidden)
        return (own * top_k_weights.unsqueeze(-1)).sum(1)

    def layer(inputs: int, outputs: int) -> dict[str, Tensor]:
        given = {"weight": (outputs, inputs), "lora_a": (rank, inputs), "lora_b": (outputs, rank)}
        return {name: new(count, *sizes) * sizes[1] ** -0.5 for name, sizes in given.items()}

    trained = ("x", "lora_a", "lora_b")
    yield Case(
        "expert_linear gathers", shape, {"x": x, **layer(hidden, 2 * width)}, trained, ours,
        lambda x, *others: product(x[order // top_k], *others),
    )  # fmt: skip
    down = {"x": new(rows * top_k, width), **layer(width, hidden), "top_k_weights": weights}
    yield Case("expert_linear combines", shape, down, (*trained, "top_k_weights"), ours, combined)
