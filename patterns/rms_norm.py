"""RMSNorm -> fastft::rms_norm:  y = x / rms(x) * scale,  rms over the last axis in float32.

The references differ in what the scale is, where they round and how they take the root: different functions, so one
rule each.  A reference is the pattern and the oracle; where a rule declines, the user's own code runs.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.reasons import Reason
from fastft.rewriter.matching.rule import Rule


def unit(x: Tensor, eps: float) -> Tensor:
    """Divide x by its root mean square, in float32."""
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama, Mistral, Qwen, Phi-3: rounded before it is scaled."""
    return weight * unit(x, eps).to(x.dtype)


def gpt_oss(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """GPT-OSS and others: rounded after it is scaled."""
    return (weight * unit(x, eps)).to(x.dtype)


def gpt_oss_widened(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same with the weight's own cast to float32 written out."""
    return (weight.float() * unit(x, eps)).to(x.dtype)


def gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma 1 to 3: scaled by 1 + weight."""
    return (unit(x, eps) * (1.0 + weight.float())).to(x.dtype)


def gemma4(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma 4: the root as a power of -1/2."""
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + eps, -0.5) * weight.float()).to(x.dtype)


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch.nn.RMSNorm and torch.nn.functional.rms_norm."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def unscaled(x: Tensor, eps: float) -> Tensor:
    """Without a weight: Llama 4's queries and keys, nanochat."""
    return unit(x, eps).to(x.dtype)


def gemma4_unscaled(x: Tensor, eps: float) -> Tensor:
    """Without a weight, the root as a power of -1/2: Gemma 4's values."""
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + eps, -0.5)).to(x.dtype)


def torch_unscaled(x: Tensor, eps: float) -> Tensor:
    """torch.nn.RMSNorm(elementwise_affine=False)."""
    return F.rms_norm(x, (x.shape[-1],), None, eps)


def l2(x: Tensor, eps: float) -> Tensor:
    """Divided by the root of the sum of squares: Qwen 3.5's linear attention."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float, offset: float, round_first: bool) -> Tensor:
    """fastft::rms_norm"""
    return torch.ops.fastft.rms_norm(x, weight, eps, offset, round_first)[0]


def decline_float64(x: Tensor, **_: object) -> str | None:
    """Decline float64: the op computes it in float64, as torch.nn.RMSNorm does, but the written-out norms do not."""
    return Reason("x is float64 and is rounded to float32 first", "dtype.float64") if x.dtype == torch.float64 else None


_L2 = "it is an L2 norm; Inductor computes it with the casts and copies behind it"
without_weight = partial(
    Rule,
    replacement=partial(rms_norm, offset=1.0, round_first=False),
    shapes={"x": "... D"},
    dtype_from=("x",),
    between_casts=False,
    decline_if=decline_float64,
)
rule = partial(
    Rule,
    anchor=torch.rsqrt,
    shapes={"x": "... D", "weight": "D"},
    dtype_from=("x", "weight"),
    decline_if=decline_float64,
)
RULES = (
    rule(llama, partial(rms_norm, offset=0.0, round_first=True)),
    rule(gemma, partial(rms_norm, offset=1.0, round_first=False)),
    rule(gpt_oss, partial(rms_norm, offset=0.0, round_first=False)),
    rule(gpt_oss_widened, partial(rms_norm, offset=0.0, round_first=False)),
    rule(gemma4, partial(rms_norm, offset=0.0, round_first=False), anchor=torch.pow, report_misses=False),
    Rule(
        torch_rms_norm,
        partial(rms_norm, offset=0.0, round_first=False),
        anchor=torch.rms_norm,
        shapes={"x": "... D", "weight": "D"},
    ),
    without_weight(unscaled, anchor=torch.rsqrt),
    without_weight(gemma4_unscaled, anchor=torch.pow, report_misses=False),
    without_weight(torch_unscaled, anchor=torch.rms_norm, dtype_from=(), decline_if=lambda **_: None),
    Rule(l2, None, torch.rsqrt, {"x": "... D"}, report_misses=False, decline_reason=_L2),
)
