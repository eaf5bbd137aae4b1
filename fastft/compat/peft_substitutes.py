"""What is traced in place of PEFT's functions that Dynamo cannot trace (substitutions.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastft.compat.substitutions import Substitution


def dequantize_module_weight(original: Callable, module: Any) -> Any:
    """Return a layer's weight as floating-point numbers: itself, or what bitsandbytes makes of 4 bits."""
    if hasattr(module, "W_q"):
        return original(module)
    weight = module.weight
    if type(weight) in (torch.nn.Parameter, torch.Tensor):
        return weight
    if type(weight).__name__ != "Params4bit":
        return original(module)
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)


def apply_always(original: Callable, layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute what a LoHa or LoKr layer does if none of its adapters is left out at random."""
    if layer.disable_adapters or layer.merged:
        return original(layer, x, *args, **kwargs)
    names = [name for name in layer.active_adapters if name in layer._available_adapters]
    if layer.training and any(layer.module_dropout[name] for name in names):
        return original(layer, x, *args, **kwargs)
    result = layer.base_layer(x, *args, **kwargs)
    for name in names:
        result = result + layer._get_delta_activations(name, x, *args, **kwargs)
    return result.to(x.dtype)


def invocation_offsets(
    original: Callable, peft_config: Any, active_adapter: str, input_ids: torch.Tensor | None, adapter_names: Any = None
) -> Any:
    """Return how far from each row's end the last invocation of an aLoRA adapter begins, [B]; 0 if there is none.

    The original returns a list of numbers, with None for 0; activate() takes this tensor in its place.
    """
    tokens = getattr(peft_config.get(active_adapter), "alora_invocation_tokens", None)
    if input_ids is None or adapter_names or not tokens or input_ids.shape[1] < len(tokens):
        return original(peft_config, active_adapter, input_ids, adapter_names=adapter_names)
    starts = input_ids.shape[1] - len(tokens) + 1
    found = torch.ones_like(input_ids[:, :starts], dtype=torch.bool)
    for place, token in enumerate(tokens):
        found = found & (input_ids[:, place : place + starts] == token)
    from_end = torch.arange(input_ids.shape[1], len(tokens) - 1, -1, device=input_ids.device)
    return torch.where(found, from_end, input_ids.shape[1] + 1).amin(1) % (input_ids.shape[1] + 1)


def activate(
    original: Callable, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """Add what an aLoRA adapter computes from the invocation on, as LoRA of x with the positions before at zero."""
    offsets = kwargs.get("alora_offsets")
    factors = module.lora_A[active_adapter], module.lora_B[active_adapter]
    if not isinstance(offsets, torch.Tensor) or result.dim() != 3 or factors[1].bias is not None:
        return original(module, active_adapter, x, result, **kwargs)
    length = x.shape[1]
    active = torch.arange(length, device=x.device) >= length - offsets[:, None]
    read = module.lora_dropout[active_adapter](torch.where(active[..., None], x.to(factors[0].weight.dtype), 0.0))
    return result + (factors[1](factors[0](read)) * module.scaling[active_adapter]).to(result.dtype)


_DRAWS = "it draws a random number to decide in Python whether an adapter is left out, with a module_dropout of 0 too"

SUBSTITUTIONS = (
    Substitution(
        "peft.utils.integrations:dequantize_module_weight", "peft", "0.17", "0.22",
        "it asks for the name of the module that the weight's class is defined in",
        dequantize_module_weight,
    ),
    Substitution("peft.tuners.loha.layer:LoHaLayer.forward", "peft", "0.17", "0.22", _DRAWS, apply_always),
    Substitution("peft.tuners.lokr.layer:LoKrLayer.forward", "peft", "0.17", "0.22", _DRAWS, apply_always),
    Substitution(
        "peft.tuners.lora.variants:calculate_alora_offsets", "peft", "0.18", "0.22",
        "it searches the tokens in Python", invocation_offsets,
    ),
    Substitution(
        "peft.tuners.lora.variants:ALoraLinearVariant.forward", "peft", "0.18", "0.22",
        "how many positions it computes depends on the tokens", activate,
    ),
)  # fmt: skip
