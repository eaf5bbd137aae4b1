"""Tiny models of each family, as a user would fine-tune them, and the truth in float64."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

LAYERS = 2
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """A configuration class of transformers, the rule its norms match, and how many norms L layers have."""

    name: str
    config: str
    rule: str
    norms: Callable[[int], int]


FAMILIES = (
    Family("llama", "LlamaConfig", "rms_norm.llama", lambda layers: 2 * layers + 1),
    Family("mistral", "MistralConfig", "rms_norm.llama", lambda layers: 2 * layers + 1),
    Family("qwen2", "Qwen2Config", "rms_norm.llama", lambda layers: 2 * layers + 1),
    Family("qwen3", "Qwen3Config", "rms_norm.llama", lambda layers: 4 * layers + 1),  # q_norm and k_norm
    Family("gemma2", "Gemma2Config", "rms_norm.gemma", lambda layers: 4 * layers + 1),  # before and after each block
    Family("gemma3", "Gemma3TextConfig", "rms_norm.gemma", lambda layers: 6 * layers + 1),  # both
    Family("phi3", "Phi3Config", "rms_norm.llama", lambda layers: 2 * layers + 1),
)


def build(
    family: Family,
    *,
    nf4: bool,
    checkpoint: bool,
    train_norms: bool,
    layers: int = LAYERS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> nn.Module:
    """A PEFT model with random adapters, in train mode; norm weights are random, so that a dropped one shows."""
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**{**_SIZES, "num_hidden_layers": layers})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    if nf4:
        model = _quantized(model, dtype, device)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if train_norms and parameter.dim() == 1 and "norm" in name:
            parameter.requires_grad_()
    if checkpoint:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    return model.to(device).train()


def _quantized(model: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map=device)


def batch(*, padded: bool, length: int = 16, device: str = "cpu") -> dict[str, Tensor]:
    """Two sequences; padded gives a mask with zeros at the end of one of them."""
    ids = torch.randint(1, 128, (2, length), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        mask = torch.ones_like(ids)
        mask[1, length - 5 :] = 0
        inputs |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: value.to(device) for name, value in inputs.items()}


@dataclass(frozen=True)
class Step:
    """What one batch gives."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def step(model: Callable, inputs: dict[str, Tensor], of: nn.Module) -> Step:
    """One batch, forward and backward; the gradients are those it leaves in ``of``."""
    of.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in of.named_parameters() if parameter.grad is not None}
    return Step(outputs.loss.detach(), outputs.logits.detach(), gradients)


def truth(model: nn.Module, inputs: dict[str, Tensor]) -> Step:
    """What the batch gives with the same weights in float64, norms and softmax included."""
    exact = copy.deepcopy(model)
    exact.gradient_checkpointing_disable()
    for name, module in list(exact.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            parent, _, child = name.rpartition(".")
            setattr(exact.get_submodule(parent), child, _dequantized(module))
    exact.double()
    with _Double():
        return step(exact, inputs, exact)


def _dequantized(module: nn.Module) -> nn.Linear:
    weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = module.bias
    return linear


class _Double(TorchFunctionMode):
    """Wherever a model asks for a lower precision, float64 is taken."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = dict(kwargs or {})
        if func in (Tensor.float, Tensor.bfloat16, Tensor.half):
            return args[0].double()
        lower = (torch.float32, torch.bfloat16, torch.float16)
        args = tuple(torch.float64 if argument in lower else argument for argument in args) if _floating(args) else args
        if kwargs.get("dtype") in lower:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _floating(args: tuple) -> bool:
    return any(isinstance(argument, torch.dtype) for argument in args)
