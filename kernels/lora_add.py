"""result + scale * (x A^T) B^T, by itself: what a LoRA layer adds, before it is known what it is added to.

A name for what the rules find (patterns/lora.py), and not a kernel: where it does not become part of lora_linear, torch
takes it apart again into the user's own expression.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_add(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """result [..., N], x [..., K], A [r, K], B [N, r]."""
    return result + F.linear(F.linear(x, a), b) * scale


library = torch.library.Library("fastft", "FRAGMENT")
library.define("lora_add(Tensor result, Tensor x, Tensor a, Tensor b, float scale) -> Tensor")
library.impl("lora_add", lora_add, "CompositeImplicitAutograd")
