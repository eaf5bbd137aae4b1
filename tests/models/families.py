"""Tiny models of each family, as a user would fine-tune them, and the truth in float64."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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


Counts = dict[str, tuple[int, int]]  # a for every layer, and b: a * L + b in L layers


@dataclass(frozen=True)
class Family:
    """A configuration class of transformers, and what rules apply how often.

    missed: reasons for what is left; head: what its loss becomes; substituted: what fastft traces as ops, but no other
    backend.
    """

    name: str
    config: str
    lifted: Counts
    fused: Counts
    missed: Counts = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    head: Counts = field(default_factory=lambda: {"linear_cross_entropy.cross_entropy": (0, 1)})
    substituted: Counts = field(default_factory=dict)

    @property
    def norms(self) -> int:
        """How many RMSNorms and LayerNorms a model of LAYERS layers has."""
        return sum(times for rule, times in expected(self.lifted, LAYERS).items() if "norm" in rule)


def expected(counts: Counts, layers: int) -> dict[str, int]:
    """How often each rule applies to so many layers."""
    return {rule: each * layers + once for rule, (each, once) in counts.items()}


ROPE = {"rotary.half": (2, 0)}  # queries and keys
INTERLEAVED = {"rotary.interleaved": (2, 0)}
PART = {"rotary.half_of_a_part": (2, 0)}
PAIR = {"rotary.queries_and_keys": (1, 0)}
SWIGLU, GEGLU = {"glu.silu": (1, 0)}, {"glu.gelu_tanh": (1, 0)}
LLAMA_FUSED = {**PAIR, "add_rms_norm.before_a_block": (1, 0)}  # the other norm of a layer is the next one's first
LAYER_NORMS = {"layer_norm.torch_layer_norm": (2, 1)}
NOTHING_GATED = "it multiplies nothing; Inductor fuses it with its neighbours"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def with_lora(family: Family, nf4: bool) -> Family:
    """The family with an adapter on every projection: seven of them, or four where q, k, v and gate, up are packed."""
    packed = family.name == "phi3"
    each, merged = (4, 4) if packed else (7, 4)
    quantized = {"lora_linear.four_bit": (each, 0)} if nf4 else {}
    halves = {} if packed else {"glu.halves": (1, 0)}
    lifted = {**family.lifted, **quantized, "lora.scaled": (each, 0)}
    return replace(family, lifted=lifted, fused={**family.fused, **halves, "lora_linear.group": (merged, 0)})


def llama(norms: int = 2, rotary: Counts = ROPE) -> Counts:
    """RMSNorms a layer and one at the end, rotary embedding, SwiGLU."""
    return {"rms_norm.llama": (norms, 1), **rotary, **SWIGLU}


FAMILIES = (
    Family("llama", "LlamaConfig", llama(), LLAMA_FUSED),
    Family("mistral", "MistralConfig", llama(), LLAMA_FUSED),
    Family("qwen2", "Qwen2Config", llama(), LLAMA_FUSED),
    Family(  # q_norm and k_norm
        "qwen3", "Qwen3Config", llama(4),
        {"norm_rotary.normed_then_transposed": (1, 0), "add_rms_norm.before_a_block": (1, 0)},
    ),
    Family(  # norms before and after each block
        "gemma2", "Gemma2Config", {"rms_norm.gemma": (4, 1), **ROPE, **GEGLU},
        {**PAIR, "add_rms_norm.around_an_addition": (1, 0), "add_rms_norm.after_a_block": (1, 0)},
    ),
    Family(  # both
        "gemma3", "Gemma3TextConfig", {"rms_norm.gemma": (6, 1), **ROPE, **GEGLU},
        {"norm_rotary.normed": (1, 0), "add_rms_norm.around_an_addition": (1, 0), "add_rms_norm.after_a_block": (1, 0)},
    ),
    Family(
        "phi3", "Phi3Config", {"rms_norm.llama": (2, 1), **PART, "glu.silu_packed": (1, 0)}, LLAMA_FUSED
    ),
)  # fmt: skip
OTHERS = (
    Family("gemma", "GemmaConfig", {"rms_norm.gemma": (2, 1), **ROPE, **GEGLU}, LLAMA_FUSED),
    Family("granite", "GraniteConfig", llama(), LLAMA_FUSED, sizes={"residual_multiplier": 0.22}),
    Family("smollm3", "SmolLM3Config", llama(), LLAMA_FUSED),
    Family("olmo2", "Olmo2Config", llama(4), {**PAIR, "add_rms_norm.after_a_block": (2, 0)}),
    Family(
        "exaone4", "Exaone4Config", llama(4), {"norm_rotary.normed": (1, 0), "add_rms_norm.after_a_block": (2, 0)},
        sizes={"sliding_window": 4096},
    ),
    Family("ernie4_5", "Ernie4_5Config", llama(2, INTERLEAVED), LLAMA_FUSED),
    Family("helium", "HeliumConfig", llama(2, INTERLEAVED), LLAMA_FUSED),
    Family(
        "glm4", "Glm4Config",
        {"rms_norm.llama": (4, 1), "rotary.interleaved_part": (2, 0), "glu.silu_packed": (1, 0)},
        {**PAIR, "add_rms_norm.around_an_addition": (1, 0), "add_rms_norm.after_a_block": (1, 0)},
    ),
    Family(
        "gpt_oss", "GptOssConfig", {"rms_norm.llama": (2, 1), "rotary.half_by_parts": (2, 0)}, LLAMA_FUSED,
        sizes={"num_local_experts": 4, "experts_implementation": "eager"}, substituted={"experts": (2, 0)},
    ),
    Family("olmo", "OlmoConfig", {"layer_norm.without_weight": (2, 1), **ROPE, **SWIGLU}, PAIR),
    Family("stablelm", "StableLmConfig", {**LAYER_NORMS, **PART, **SWIGLU}, PAIR),
    Family(
        "starcoder2", "Starcoder2Config", {**LAYER_NORMS, **ROPE}, PAIR,
        {f"glu.plain_gelu_tanh: {NOTHING_GATED}": (1, 0)}
    ),
    Family("nemotron", "NemotronConfig", {**LAYER_NORMS, **PART}, PAIR, {f"glu.plain_relu: {NOTHING_GATED}": (1, 0)}),
    Family(  # attention and MLP beside each other, of one norm
        "cohere", "CohereConfig",
        {"layer_norm.cohere": (1, 1), "rotary.interleaved": (2, 0), **SWIGLU}, PAIR,
    ),
    Family("phi", "PhiConfig", {"layer_norm.torch_layer_norm": (1, 1), **PART}, PAIR),
    Family("gpt_neox", "GPTNeoXConfig", {**LAYER_NORMS, **PART}, PAIR, {f"glu.plain_gelu: {NOTHING_GATED}": (1, 0)}),
    Family(
        "falcon", "FalconConfig", {"layer_norm.torch_layer_norm": (1, 1), **ROPE}, PAIR,
        {f"glu.plain_gelu: {NOTHING_GATED}": (1, 0)}, {"new_decoder_architecture": False, "head_dim": None},
    ),
    Family(  # queries and keys each with angles of their own, though equal ones
        "gptj", "GPTJConfig", {"layer_norm.torch_layer_norm": (1, 1), "rotary.interleaved_part": (2, 0)}, {},
        sizes={**NO_DROPOUT, "rotary_dim": 8},
    ),
    Family(  # norms of the embeddings, before each block, and of rotated queries and keys
        "nanochat", "NanoChatConfig", {"rms_norm.unscaled": (4, 2), "rotary.half_backwards": (2, 0)}, PAIR,
        {f"glu.plain_relu: {NOTHING_GATED}": (1, 0)},
    ),
    # a warning breaks its graph before its loss
    Family("gpt2", "GPT2Config", LAYER_NORMS, {}, sizes=NO_DROPOUT, head={}),
)  # fmt: skip
CHUNKED = (
    Family(  # without experts, and without a layer that does not rotate
        "llama4", "Llama4TextConfig",
        {**llama(2, {"rotary.complex_product_positions_first": (2, 0)}), "rms_norm.unscaled": (2, 0)}, LLAMA_FUSED,
        sizes={"intermediate_size_mlp": 128, "moe_layers": [], "num_local_experts": 2, "attention_chunk_size": 16},
    ),
)  # fmt: skip


def build(
    family: Family,
    *,
    nf4: bool,
    checkpoint: bool,
    train_norms: bool,
    layers: int = LAYERS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    lora: bool = True,
    hooked: bool = False,
) -> nn.Module:
    """A PEFT model with random adapters, in train mode; norm weights are random, so that a dropped one shows.

    lora: False leaves out PEFT and trains every parameter.  hooked: a checkpointed model as transformers leaves it,
    with a hook at its embeddings and a warning.  Both break the graph before the first layer, for which Dynamo traces
    all of it up to six times.
    """
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_hidden_layers": layers, **family.sizes}
    config = getattr(transformers, family.config)(**{name: value for name, value in sizes.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and ("norm" in name or ".ln_" in name):
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    if nf4:
        model = _quantized(model, dtype, device)
    if not lora:
        return model.to(device).train()
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if train_norms and parameter.dim() == 1 and "norm" in name:
            parameter.requires_grad_()
    if checkpoint:
        model.gradient_checkpointing_enable()
        if hooked:
            model.enable_input_require_grads()
        else:
            model.get_base_model().disable_input_require_grads()
            model.config.use_cache = False
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


def stacked(steps: Sequence[Step]) -> Step:
    """What several batches of one size give, as one."""
    names = steps[0].gradients
    return Step(
        torch.stack([one.loss for one in steps]),
        torch.stack([one.logits for one in steps]),
        {name: torch.stack([one.gradients[name] for one in steps]) for name in names},
    )


def truth(model: nn.Module, inputs: dict[str, Tensor]) -> Step:
    """What the batch gives with the same weights in float64, norms and softmax included."""
    exact = in_double(model)
    exact.gradient_checkpointing_disable()
    with Double():
        return step(exact, inputs, exact)


def in_double(model: nn.Module) -> nn.Module:
    """A copy with the same weights in float64, 4-bit ones too."""
    exact = copy.deepcopy(model)
    for name, module in list(exact.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            parent, _, child = name.rpartition(".")
            setattr(exact.get_submodule(parent), child, _dequantized(module))
    return exact.double()


def _dequantized(module: nn.Module) -> nn.Linear:
    weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = module.bias
    return linear


class Double(TorchFunctionMode):
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
