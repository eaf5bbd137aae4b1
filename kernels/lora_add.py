"""Marker op for what a LoRA layer adds, result + scale * (x A^T) B^T, until it is known what it is added to.

It names what the rules match (patterns/lora.py) and has no kernel: where it does not become part of lora_linear, torch
decomposes it into the user's own expression again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_add(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute result + scale * (x A^T) B^T:  result [..., N], x [..., K], A [r, K], B [N, r]."""
    return result + F.linear(F.linear(x, a), b) * scale


library = torch.library.Library("fastft", "FRAGMENT")
library.define("lora_add(Tensor result, Tensor x, Tensor a, Tensor b, float scale) -> Tensor")
library.impl("lora_add", lora_add, "CompositeImplicitAutograd")
