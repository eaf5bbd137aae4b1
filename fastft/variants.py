"""A base model as people fine-tune it: its weights in fewer bits, its adapters of one kind or another."""

from __future__ import annotations

from typing import Any

from fastft.errors import UserError

ADAPTERS = ("lora", "dora", "rslora", "lora-bias", "loha", "lokr", "adalora", "oft", "vera", "ia3", "none")
QUANTIZATIONS = ("nf4", "fp4", "int8", "none")
NUDGE = 0.02  # adapters begin as nothing, behind which none of their gradients would be seen


def variant(model: Any, quantization: str, adapter: str, rank: int) -> Any:
    """Hold a model in fewer bits and give it adapters.

    Layers come first and experts last: PEFT makes other adapters of layers in fewer bits, and passes over experts that
    are so already.  quantization, adapter, rank: as of ``quantized`` and ``adapted``.
    """
    model = adapted(quantized(model, quantization), adapter, rank)
    if quantization in ("nf4", "fp4"):
        from fastft.quantize import quantize_

        quantize_(model, quantization, parts=["experts"])
    return model


def adapted(model: Any, adapter: str, rank: int) -> Any:
    """Freeze a model and give it adapters of PEFT's on all its linear layers, none of which is nothing any more.

    adapter: one of ADAPTERS; "none" returns the model as it is, all of it trained.  rank: of the factors (IA3 has
    none; OFT's blocks are as large).
    """
    if adapter == "none":
        return model
    import torch
    from peft import get_peft_model

    model = get_peft_model(model, config(adapter, rank, "all-linear"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(NUDGE * torch.randn_like(parameter))
    return model


def config(adapter: str, rank: int, target_modules: Any) -> Any:
    """Return PEFT's configuration of an adapter; it needs no seed and gets no dropout."""
    import peft

    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": target_modules}
    of_lora: dict[str, dict[str, Any]] = {
        "lora": {},
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "lora-bias": {"lora_bias": True},
    }
    if adapter in of_lora:
        return peft.LoraConfig(**lora, **of_lora[adapter])
    if adapter == "adalora":
        return peft.AdaLoraConfig(
            init_r=rank, target_r=max(1, rank // 2), total_step=1000, target_modules=target_modules
        )
    if adapter == "oft":
        return peft.OFTConfig(r=0, oft_block_size=rank, target_modules=target_modules)
    if adapter == "ia3":
        return peft.IA3Config(target_modules=target_modules, feedforward_modules=[])
    made = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig, "vera": peft.VeraConfig}[adapter]
    return made(r=rank, target_modules=target_modules)


def quantized(model: Any, quantization: str) -> Any:
    """Hold a model's linear layers but the head in 4 or 8 bits, by bitsandbytes; everything in it is frozen.

    quantization: one of QUANTIZATIONS.  Raises UserError without bitsandbytes.
    """
    if quantization == "none":
        return model
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(f"{quantization} needs bitsandbytes: pip install bitsandbytes.") from None
    from fastft.quantize import eight_bit_, quantize_

    model.requires_grad_(False)
    if quantization == "int8":
        eight_bit_(model)
    else:
        quantize_(model, quantization, parts=["layers"])
    return model
