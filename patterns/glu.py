"""Gated activations, act(gate) * up -> fastft::glu, or fastft::glu_packed where gate and up are halves of one tensor.

Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.rewriter.matching.rule import Rule


def silu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU: Llama, Mistral, Qwen."""
    return F.silu(gate) * up


def silu_written_out(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU by its formula."""
    return gate * torch.sigmoid(gate) * up


def gelu(gate: Tensor, up: Tensor) -> Tensor:
    """GEGLU, by the error function."""
    return F.gelu(gate) * up


def gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """GEGLU by its approximation: Gemma."""
    return F.gelu(gate, approximate="tanh") * up


def gelu_tanh_written_out(gate: Tensor, up: Tensor) -> Tensor:
    """GEGLU by the formula of its approximation: T5."""
    return 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0)))) * up


def relu2(gate: Tensor, up: Tensor) -> Tensor:
    """ReGLU with a squared ReLU."""
    return F.relu(gate).square() * up


def silu_packed(gate_up: Tensor) -> Tensor:
    """SwiGLU of one projection's halves: Phi 3, GLM 4."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gelu_packed(gate_up: Tensor) -> Tensor:
    """GEGLU of one projection's halves."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate) * up


def gelu_tanh_packed(gate_up: Tensor) -> Tensor:
    """GEGLU by its approximation, of one projection's halves."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def relu2_packed(gate_up: Tensor) -> Tensor:
    """ReGLU with a squared ReLU, of one projection's halves."""
    gate, up = gate_up.chunk(2, -1)
    return F.relu(gate).square() * up


def plain_silu(x: Tensor) -> Tensor:
    """SiLU by itself."""
    return F.silu(x)


def plain_gelu(x: Tensor) -> Tensor:
    """GELU by itself."""
    return F.gelu(x)


def plain_gelu_tanh(x: Tensor) -> Tensor:
    """GELU's approximation by itself."""
    return F.gelu(x, approximate="tanh")


def plain_relu(x: Tensor) -> Tensor:
    """ReLU by itself."""
    return F.relu(x)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """fastft::glu"""
    return torch.ops.fastft.glu(gate, up, activation)


def glu_packed(gate_up: Tensor, activation: str) -> Tensor:
    """fastft::glu_packed"""
    return torch.ops.fastft.glu_packed(gate_up, activation)


def separate(reference: Callable, activation: str, anchor: Callable, **more: Any) -> Rule:
    """Build the rule of an activation whose gate and up are two tensors."""
    shapes = {"gate": "... I", "up": "... I"}
    return Rule(reference, partial(glu, activation=activation), anchor, shapes, **more)


def packed(reference: Callable, activation: str, anchor: Callable) -> Rule:
    """Build the rule of an activation whose gate and up are halves of one tensor."""
    return Rule(reference, partial(glu_packed, activation=activation), anchor, {"gate_up": "... I"})


plain = partial(
    Rule,
    replacement=None,
    shapes={"x": "..."},
    decline_reason="it multiplies nothing; Inductor fuses it with its neighbours",
)
RULES = (
    separate(silu, "silu", F.silu),
    separate(silu_written_out, "silu", torch.sigmoid, report_misses=False),
    separate(gelu, "gelu", F.gelu),
    separate(gelu_tanh, "gelu_tanh", F.gelu),
    separate(gelu_tanh_written_out, "gelu_tanh", torch.tanh, report_misses=False),
    separate(relu2, "relu2", torch.relu),
    packed(silu_packed, "silu", F.silu),
    packed(gelu_packed, "gelu", F.gelu),
    packed(gelu_tanh_packed, "gelu_tanh", F.gelu),
    packed(relu2_packed, "relu2", torch.relu),
    plain(plain_silu, anchor=F.silu),
    plain(plain_gelu, anchor=F.gelu),
    plain(plain_gelu_tanh, anchor=F.gelu),
    plain(plain_relu, anchor=torch.relu),
)


def halves(gate_up: Tensor, activation: str) -> Tensor:
    """A gated activation of the halves of one tensor."""
    gate, up = gate_up.chunk(2, -1)
    return torch.ops.fastft.glu(gate, up, activation)


FUSE = (Rule(halves, glu_packed, torch.ops.fastft.glu, {"gate_up": "... I"}),)
