"""Liger and Unsloth as contenders: what each library asks of a model that was built elsewhere.

Both get the model of models.py with its random weights, in the loop of measure.py, and are told what their users tell
them.  Written for Liger 0.8.5 and Unsloth 2026.10.9, with transformers 5.17 and peft 0.21.

Unsloth leaves the attention_mask out in training, which changes no loss where padding is on the right.  It tells packed
documents apart in a batch of one row; in a larger one, every token sees the documents before its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Model = Any
Build = Callable[[], Model]
LENGTH = 2048  # what Unsloth cuts batches to by default; raised for longer ones


def import_first(contender: str) -> None:
    """Import what must come before transformers and PEFT, which it patches, and before memory on the card is in use."""
    if not contender.startswith("unsloth"):
        return
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"{contender} needs CUDA")  # elsewhere it trains with other code
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    caches = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.mkdtemp(prefix="fastft-bench-")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(caches) / "unsloth"))  # not the working directory
    import unsloth  # noqa: F401

    # expandable segments, which it asks for by a variable that is read when CUDA starts, as it has here
    if settings := os.environ.get("PYTORCH_ALLOC_CONF"):
        torch.cuda.memory._set_allocator_settings(settings)


def liger(build: Build, lower: str) -> Model:
    """All of Liger's kernels for the presets' models, the fused head and cross entropy among them.

    It replaces the classes that modules are made of, so it comes before the model, and the forward of each class of
    models, which PEFT calls.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen3
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM

    kinds = {LlamaForCausalLM: apply_liger_kernel_to_llama, Qwen3ForCausalLM: apply_liger_kernel_to_qwen3}
    for kind, apply in kinds.items():
        before = kind.forward
        apply(rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=True)
        if kind.forward is before:
            raise RuntimeError(f"Liger left {kind.__name__}.forward, and so the head, as it was")
    return build()


def unsloth(build: Build, lower: str, checkpointing: bool | str) -> Model:
    """As Unsloth's loader treats a base model and an adapter, once it has read them.

    checkpointing: its use_gradient_checkpointing; "unsloth" keeps what layers start from in the host's memory.
    """
    from unsloth.models._utils import apply_unsloth_gradient_checkpointing

    model = _for_causal_lm(build())
    base = model.get_base_model()
    loader = _loader_of(base)
    dtype = base.get_input_embeddings().weight.dtype
    loader.pre_patch()  # the classes' forwards
    base.config.dtype = dtype
    _replace_rotary(base, dtype)
    loader.post_patch(base, None, correct_dtype=dtype)
    _set_length(model, LENGTH)
    model.register_forward_pre_hook(_lengthen, with_kwargs=True)
    _name_trainer_loop()
    mode = apply_unsloth_gradient_checkpointing(checkpointing, LENGTH, dtype)
    model = loader.patch_peft_model(model, use_gradient_checkpointing=mode)
    if mode:
        base.gradient_checkpointing_enable()  # as the Trainer does; what it enables is Unsloth's by now
    model = loader.for_training(model)
    _check(base, mode)
    return model


def unsloth_loaded(base: Model, lora: dict[str, Any], checkpointing: bool | str, length: int, nf4: bool) -> Model:
    """Any model by Unsloth's own loader, which reads base from a folder that is then deleted.

    lora: the arguments of LoraConfig.  length: of the longest batch.  nf4: whether it loads base in 4 bits.
    The folder has a tokenizer of three words and no image processor: batches come as tensors.
    """
    import gc

    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from unsloth import FastLanguageModel, FastModel

    loader = FastModel if hasattr(base.config, "vision_config") else FastLanguageModel
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as folder:
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del base
        gc.collect()
        torch.cuda.empty_cache()
        model, _ = loader.from_pretrained(
            folder, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=nf4, load_in_16bit=not nf4,
            use_gradient_checkpointing=checkpointing, use_exact_model_name=True,
        )  # fmt: skip
        model = loader.get_peft_model(model, **lora, use_gradient_checkpointing=checkpointing)
    return loader.for_training(model, use_gradient_checkpointing=checkpointing)


def _loader_of(base: Model) -> Any:
    """The class that Unsloth's loader leaves a model of this type to."""
    from unsloth.models import FastLanguageModel, FastQwen3Model

    return FastQwen3Model if base.config.model_type == "qwen3" else FastLanguageModel


def _for_causal_lm(model: Model) -> Model:
    """What PEFT makes of a model whose adapter has the task type CAUSAL_LM; Unsloth takes no other."""
    from peft import PeftModelForCausalLM

    model.__class__ = PeftModelForCausalLM
    model.base_model_prepare_inputs_for_generation = model.get_base_model().prepare_inputs_for_generation
    return model


def _replace_rotary(base: Model, dtype: Any) -> None:
    """Unsloth's in place of transformers', whose class it replaces before a model is made."""
    import torch
    from unsloth.models.llama import LlamaRotaryEmbedding

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # the tables', as while a model is loaded
    try:
        rotary = LlamaRotaryEmbedding(config=base.config)
    finally:
        torch.set_default_dtype(default)
    for owner in (base.model, *(layer.self_attn for layer in base.model.layers)):
        owner.rotary_emb = rotary


def _set_length(model: Model, length: int) -> None:
    for module in model.modules():
        module.max_seq_length = length


def _lengthen(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A batch longer than max_seq_length would be cut."""
    length = kwargs["input_ids"].shape[1]
    if length > model.max_seq_length:
        _set_length(model, length)


def _name_trainer_loop() -> None:
    """patch_peft_model refuses to work unless the loader has rewritten the Trainer, which nobody uses here."""
    from transformers import Trainer

    Trainer._inner_training_loop.__name__ = "_fast_inner_training_loop"


def _check(base: Model, mode: bool | str) -> None:
    """That nothing was silently left as it was."""
    from unsloth.kernels import apply_lora_o, apply_lora_qkv

    for i, layer in enumerate(base.model.layers):
        found = {
            "q, k and v": getattr(layer.self_attn, "apply_qkv", None) is apply_lora_qkv,
            "o": getattr(layer.self_attn, "apply_o", None) is apply_lora_o,
            "the MLP": "forward" in vars(layer.mlp),
            "checkpointing": bool(getattr(layer, "gradient_checkpointing", False)) == bool(mode),
        }
        if mode == "unsloth":
            function = getattr(layer, "_gradient_checkpointing_func", None)
            found["offloading"] = getattr(getattr(function, "func", None), "__name__", "") == "unsloth_checkpoint"
        if wrong := [name for name, right in found.items() if not right]:
            raise RuntimeError(f"Unsloth did not set layer {i} up as asked: {', '.join(wrong)}")
