"""Make a model's frozen linear layers and experts 4-bit, in place, one at a time: for what no loader quantises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastft import quantize_experts
from fastft.quantize_experts import DTYPES, FourBit, on_default_stream, reason_of_parent
from fastft.rewriter.report import compile_progress

QUANT_TYPES = ("nf4", "fp4")
PARTS = ("layers", "experts")


@dataclass(frozen=True)
class Quantized:
    """What quantize_ did: the names of what is 4-bit now, layers and experts' parameters, and why others are not."""

    layers: tuple[str, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} weights are 4-bit now, {len(self.skipped)} are left as they were:"]
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.skipped.items())])


def quantize_(
    model: nn.Module,
    quant_type: str = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    storage: torch.dtype = torch.uint8,
    parts: Collection[str] = PARTS,
) -> Quantized:
    """Replace frozen nn.Linear layers of ``model`` by bitsandbytes' Linear4bit, and experts by its parametrization.

    Layers and experts that adapters of PEFT's are around are among them.  Experts are parameters [experts, rows,
    columns] of modules of the model's own: a module that reads one is given the de-quantised weight, of its dtype.
    Each weight is quantised where it lies and freed before the next, so that memory never holds two copies of the
    model.  Left as they are: trainable weights (freeze them first: ``model.requires_grad_(False)``), heads,
    embeddings, weights that are shared with another module or that an adapter is merged into, rows that are no whole
    number of blocks, and layers with hooks or classes of their own.  ``state_dict`` keeps the 4-bit weights, and so
    does ``save_pretrained`` those of layers; to load a state dict, quantize the new model in the same way first.

    quant_type: "nf4" or "fp4".  double_quant: the absmax are quantised too.  compute_dtype: of the layers' products;
    each layer's own dtype if None.  storage: the dtype that the packed bytes pretend to have, as transformers'
    bnb_4bit_quant_storage: torch 2.11 shards floating-point parameters alone.  parts: "layers", "experts" or both.
    Raises ValueError for another quant_type or part, ImportError without bitsandbytes.
    """
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type {quant_type!r} is none of {', '.join(QUANT_TYPES)}; use 'nf4'.")
    if not set(parts) <= set(PARTS):
        raise ValueError(f"parts {parts!r} are not of {PARTS!r}.")
    how = FourBit(quant_type, blocksize, double_quant, storage)
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    heads, linears = _heads(model), _linears(model) if "layers" in parts else []
    turns = [(name, partial(_quantize_linear, model, name, heads, uses, how, compute_dtype)) for name in linears]
    experts = quantize_experts.candidates(model) if "experts" in parts else []
    turns += [(name, partial(quantize_experts.quantize, model, name, uses, how)) for name in experts]
    layers, skipped = [], {}
    with compile_progress.line() as say:
        for index, (name, quantize_one) in enumerate(turns):
            say(f"quantising {name} ({index + 1} of {len(turns)})")
            reason = quantize_one()
            if reason:
                skipped[name] = reason
            else:
                layers.append(name)
    if layers:
        whole: Any = model
        base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        base.is_loaded_in_4bit = True  # what PEFT reads to wrap and merge layers as 4-bit ones
        if not skipped.keys() >= set(linears) or getattr(base, "hf_quantizer", None) is None:
            _tell_transformers(base, how, compute_dtype, [name for name in linears if name in skipped])
        if not skipped.keys() >= set(experts):
            quantize_experts.refuse_to_save(base)
    return Quantized(tuple(layers), skipped)


def _quantize_linear(
    model: nn.Module, name: str, heads: set[int], uses: Counter[int], how: FourBit, compute_dtype: torch.dtype | None
) -> str:
    """Make a linear layer 4-bit; return why it is left as it was, or ""."""
    layer: Any = model.get_submodule(name)
    reason = "it is the head" if id(layer) in heads else _reason(layer, uses, how.blocksize)
    reason = reason or reason_of_parent(model.get_submodule(name.rpartition(".")[0]))
    if not reason:
        _put(model, name, _four_bit(layer, how, compute_dtype or layer.weight.dtype))
    return reason


def _linears(model: nn.Module) -> list[str]:
    """List the names of all linear layers but the adapters' own factors and what is 4-bit already."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [
        name
        for name, module in linears
        if type(module).__name__ != "Linear4bit" and not any(part.startswith("lora_") for part in name.split("."))
    ]


def _heads(model: nn.Module) -> set[int]:
    """Return the ids of the modules that the model declares as its head."""
    heads = []
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        head = get() if callable(get) else None
        heads += [head] if isinstance(head, nn.Module) else []
    wrapped = [getattr(head, "base_layer", head) for head in heads]
    return {id(head) for head in (*heads, *wrapped)}


def _reason(layer: nn.Linear, uses: Counter[int], blocksize: int) -> str:
    """Return why this layer is not quantised; "" if it can be."""
    if type(layer) is not nn.Linear:
        return f"it is a {type(layer).__name__}, which may do more than multiply"
    if layer.weight.requires_grad:
        return "its weight is trainable"
    if uses[id(layer.weight)] > 1:
        return "its weight is shared with another module"
    if layer.weight.dtype not in DTYPES:
        return f"its weight is {layer.weight.dtype}"
    if layer.weight.is_meta:
        return "its weight has no values yet"
    if layer.in_features % blocksize:
        return f"a row of {layer.in_features} is no whole number of blocks of {blocksize}"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks"
    return ""


def _four_bit(layer: nn.Linear, how: FourBit, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    new = Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype,
        compress_statistics=how.double_quant, quant_type=how.quant_type, quant_storage=how.storage, device="meta",
    )  # fmt: skip
    weight: Any = Params4bit(
        layer.weight.data, requires_grad=False, blocksize=how.blocksize, compress_statistics=how.double_quant,
        quant_type=how.quant_type, quant_storage=how.storage, module=new,
    )  # fmt: skip
    with on_default_stream(layer.weight.device):
        new.weight = weight.to(layer.weight.device)  # this quantises
    new.bias = layer.bias
    new.register_load_state_dict_pre_hook(_take_statistics)
    return new.train(layer.training)


def eight_bit_(model: Any) -> None:
    """Replace the linear layers but the head by bitsandbytes' Linear8bitLt, as ``load_in_8bit`` does."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    heads = _heads(model)
    for name in _linears(model):
        layer = model.get_submodule(name)
        if id(layer) in heads:
            continue
        new = Linear8bitLt(
            layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False, threshold=6.0,
            device="meta",
        )  # fmt: skip
        weight: Any = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        new.weight, new.bias = weight.to(layer.weight.device), layer.bias  # this quantises
        _put(model, name, new.train(layer.training))
    model.is_loaded_in_8bit = True


def four_bit_on_meta(model: Any) -> None:
    """Replace the linear layers but the head of a model on the meta device, as QLoRA holds them; the rest: bfloat16."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    empty = partial(torch.empty, device="meta")
    model.to(torch.bfloat16)
    heads = _heads(model)
    for name in _linears(model):
        layer = model.get_submodule(name)
        if id(layer) in heads:
            continue
        rows, columns = layer.weight.shape
        blocks = rows * columns // 64
        second = QuantState(absmax=empty(-(-blocks // 256)), code=empty(256), blocksize=256, dtype=torch.float32)
        statistics = QuantState(
            absmax=empty(blocks, dtype=torch.uint8), shape=layer.weight.shape, code=empty(16), blocksize=64,
            quant_type="nf4", dtype=torch.bfloat16, offset=empty(()), state2=second,
        )  # fmt: skip
        new = Linear4bit(
            columns, rows, bias=layer.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        new.weight = Params4bit(
            empty(rows * columns // 2, 1, dtype=torch.uint8), requires_grad=False, quant_state=statistics,
            quant_type="nf4", bnb_quantized=True, module=new,
        )  # fmt: skip
        new.bias, new.quant_state = layer.bias, statistics
        _put(model, name, new.train(layer.training))
    model.is_loaded_in_4bit = True


def four_bit_experts_on_meta(model: Any) -> None:
    """Hold the frozen experts of a model on the meta device as QLoRA holds them."""
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for name in quantize_experts.candidates(model):
        quantize_experts.quantize(model, name, uses, FourBit("nf4", 64, True, torch.uint8), meta=True)


def _take_statistics(module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Load a saved 4-bit weight together with its statistics, which torch would not know what to do with."""
    from bitsandbytes.nn import Params4bit

    name = f"{prefix}weight"
    statistics = {
        key.removeprefix(f"{name}."): value for key, value in state_dict.items() if key.startswith(f"{name}.")
    }
    for key in [key for key in state_dict if key.startswith(f"{name}.")]:
        del state_dict[key]
    if statistics and name in state_dict:  # torch leaves the statistics in a state of adapters alone
        module.weight = Params4bit.from_prequantized(
            data=state_dict[name], quantized_stats=statistics, requires_grad=False, device=module.weight.device,
            module=module,
        )  # fmt: skip


def _put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Set a submodule; a LoRA layer around it becomes PEFT's layer for 4-bit weights, which knows how to merge."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, new)
    if child == "base_layer" and (type(parent).__module__, type(parent).__name__) == (
        "peft.tuners.lora.layer",
        "Linear",
    ):
        from peft.tuners.lora.bnb import Linear4bit

        parent.__class__ = Linear4bit


def _tell_transformers(base: Any, how: FourBit, dtype: torch.dtype | None, skipped: list[str]) -> None:
    """Set what transformers reads to save and load the model, and Trainer to train it."""
    if not hasattr(base, "config") or not hasattr(base, "save_pretrained"):
        return
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    base.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=how.quant_type, bnb_4bit_use_double_quant=how.double_quant,
        bnb_4bit_compute_dtype=dtype or base.dtype, llm_int8_skip_modules=skipped or None,
        bnb_4bit_quant_storage=how.storage,
    )  # fmt: skip
    base.is_quantized = True
    base.hf_quantizer = AutoHfQuantizer.from_config(base.config.quantization_config)  # what Trainer asks
