"""The ops ``torch.ops.fastft.*``: one file an op, with its reference, autograd, FLOP formula and Triton kernels."""

from fastft.kernels import (
    add_rms_norm,
    attention,
    dequantize_4bit,
    dora_weight_norm,
    expert_linear,
    expert_order,
    glu,
    layer_norm,
    linear_cross_entropy,
    linear_kl_div,
    linear_token_statistics,
    lora_add,
    lora_linear,
    norm_rotary,
    rms_norm,
    rotary,
)
from fastft.kernels.core.registry import REGISTRY

__all__ = [
    "REGISTRY",
    "add_rms_norm",
    "attention",
    "dequantize_4bit",
    "dora_weight_norm",
    "expert_linear",
    "expert_order",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_token_statistics",
    "lora_add",
    "lora_linear",
    "norm_rotary",
    "rms_norm",
    "rotary",
]
