"""A preset as a model, with random weights made in place on the device: nothing is downloaded.

A model is laid out on the meta device and filled one module at a time, so that an 8B model takes seconds, and with
``nf4`` no more than one weight is ever held in 16 bits beside its quantised form.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from presets import PRESETS, PROJECTIONS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


def build(
    preset: str, *, layers: int | None, nf4: bool, dtype: torch.dtype, device: str, seed: int,
    storage: torch.dtype = torch.uint8,
) -> nn.Module:  # fmt: skip
    """A preset with random weights and LoRA (r=16) on all seven projections, in train mode.

    LoRA's B starts random, not zero, so that every factor has a gradient from the first step on.  PEFT keeps A and B in
    float32 beside the base's dtype, as it does by default.  storage: the dtype that 4-bit weights pretend to have.
    """
    torch.manual_seed(seed)
    shape = PRESETS[preset] | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(**shape, use_cache=False)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config).to(dtype)
    if nf4:
        _swap_for_nf4(model, dtype, storage)
    for module in model.modules():
        _fill(module, device)
    model.tie_weights()
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not filled
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS), init_lora_weights=False)
    return get_peft_model(model, lora).train()


def _fill(module: nn.Module, device: str) -> None:
    """Real weights for the module's own parameters: ones for norms, normal(0, 0.02) for the rest."""
    for name, parameter in module.named_parameters(recurse=False):
        data = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
        if data.dim() > 1:
            data.normal_(0.0, 0.02)
        module._parameters[name] = _quantised(module, data) if _is_nf4(module) else nn.Parameter(data)


def _swap_for_nf4(model: Any, dtype: torch.dtype, storage: torch.dtype) -> None:
    """Each projection becomes bitsandbytes' Linear4bit, still on the meta device; the head stays as it is."""
    from bitsandbytes.nn import Linear4bit

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in PROJECTIONS and isinstance(child, nn.Linear):
                new = Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=dtype,
                    compress_statistics=True,
                    quant_type="nf4",
                    quant_storage=storage,
                    device="meta",
                )
                setattr(parent, name, new.to(dtype))
    model.is_loaded_in_4bit = True  # what PEFT asks before it wraps a Linear4bit


def _is_nf4(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit"


def _quantised(module: Any, data: torch.Tensor) -> nn.Parameter:
    from bitsandbytes.nn import Params4bit

    settings = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": module.quant_storage}
    weight: Any = Params4bit(data, requires_grad=False, module=module, **settings)
    return weight.to(data.device)  # this quantises
