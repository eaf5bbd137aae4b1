"""A hub id's architecture with random weights and few layers, and batches for it: enough to see what becomes of it."""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Iterator
from typing import Any

from fastft.errors import UserError
from fastft.models import Source, explained, find, load_any_config, without_dropout
from fastft.units import format_bytes
from fastft.variants import variant

# Attributes of transformers' configurations.
COUNTS = (
    "num_hidden_layers", "depth", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers",
    "decoder_layers", "num_global_layers", "num_conformer_blocks",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
FEWEST_EXPERTS = 8
AUTO_CLASSES = (  # the first that knows a configuration
    "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM", "AutoModelForSequenceClassification", "AutoModel",
)  # fmt: skip
Batch = dict[str, Any]


def small(
    name: str,
    *,
    layers: int,
    rank: int = 8,
    device: str = "cpu",
    adapter: str = "lora",
    quantization: str = "none",
    image: bool = False,
    lengths: tuple[int, ...] = (32,),
) -> tuple[Any, list[Batch]]:
    """Build a model with random weights and few layers, and a batch of 2 rows of tokens for it of each length.

    adapter, quantization: as of fastft/variants.py.  image: each row has a picture, as the model's processor makes it.
    Raises UserError for what cannot be built.
    """
    import torch

    if adapter == "none" and quantization != "none":
        raise UserError(f"A base model in {quantization} is not trained itself; choose an --adapter other than none.")
    source = find(name)
    model_config = with_layers(without_dropout(load_any_config(source)), layers)
    processor = _processor(source) if image else None
    torch.manual_seed(0)
    with explained(source):
        build = _class_of(model_config)
        _require_memory(name, build, model_config)
        model = build(model_config)
    if getattr(model.config, "use_cache", None) is not None:
        model.config.use_cache = False
    model = variant(model, quantization, adapter, rank).to(device).train()
    batches = [_pictures(processor, model, length) if processor else _text(model, length) for length in lengths]
    return model, [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def _require_memory(name: str, build: Any, model_config: Any) -> None:
    """Raise UserError for weights that are more than what is free in this machine, where that is known."""
    import torch

    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return
    with torch.device("meta"):
        needed_bytes = sum(parameter.nbytes for parameter in build(copy.deepcopy(model_config)).parameters())
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed_bytes > free_bytes:
        raise UserError(
            f"{name} takes {format_bytes(needed_bytes)} with so many layers, and {format_bytes(free_bytes)} are free; "
            "pass fewer --layers."
        )


def with_layers(model_config: Any, layers: int) -> Any:
    """Leave a configuration, and those of its towers and decoder, so many layers, and few experts."""
    for part in _parts(model_config):
        depths = {name: part.__dict__[name] for name in COUNTS if isinstance(part.__dict__.get(name), int)}
        before = max(depths.values(), default=0)
        if before > layers:
            _cut_lists(part, before, layers)
            for name, depth in depths.items():
                setattr(part, name, min(depth, layers))
            _share_less(part, before, layers)
        _fewer_experts(part)
    return model_config


def _parts(model_config: Any) -> Iterator[Any]:
    """Iterate over a configuration and all that are inside it."""
    yield model_config
    for name in getattr(model_config, "sub_configs", None) or ():
        part = getattr(model_config, name, None)
        if hasattr(part, "to_dict"):
            yield from _parts(part)


def _cut_lists(part: Any, before: int, layers: int) -> None:
    """Cut lists with an entry for each layer, and thin lists of layers' numbers out."""
    for name, value in list(part.__dict__.items()):
        if not isinstance(value, list) or not value:
            continue
        if len(value) == before:
            setattr(part, name, value[:layers])
        elif re.search(r"layer|block|index|indices", name) and all(isinstance(one, int) for one in value):
            setattr(part, name, sorted({one * layers // before for one in value if one >= 0}))


def _share_less(part: Any, before: int, layers: int) -> None:
    """Let as large a part of the layers share keys and values as did, if each kind of layer still has its own."""
    shared = getattr(part, "num_kv_shared_layers", None)
    if shared:
        kinds = list(getattr(part, "layer_types", None) or [""])
        last = max(kinds.index(kind) for kind in set(kinds))
        part.num_kv_shared_layers = min(shared * layers // before, layers - 1 - last)


def _fewer_experts(part: Any) -> None:
    """Leave no more experts than show how they are chosen: hundreds would fill the memory."""
    each = getattr(part, "num_experts_per_tok", None) or 1
    groups = getattr(part, "n_group", None) or 1
    for name in EXPERTS:
        if isinstance(many := part.__dict__.get(name), int) and many > FEWEST_EXPERTS:
            fewest = max(FEWEST_EXPERTS, each, 2 * groups)
            setattr(part, name, min(many, -(-fewest // groups) * groups))


def _class_of(model_config: Any) -> Any:
    """Return what builds the model: the class that the configuration names, or the first that knows it."""
    import transformers

    for name in model_config.architectures or ():
        named: Any = getattr(transformers, name, None)
        if hasattr(named, "_from_config"):
            return named._from_config
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        if type(model_config) in auto._model_mapping:
            return auto.from_config
    raise UserError(f"transformers has no model for a {model_config.model_type}.")


def _text(model: Any, length: int) -> Batch:
    """Make a batch of random tokens, none of which stands for an image or a sound, with what the model asks for."""
    import torch

    base = _base(model)
    takes = inspect.signature(base.forward).parameters
    if not takes.keys() & {"input_ids", "input_features"}:
        raise UserError(f"A {type(base).__name__} takes no tokens; make a model and a batch for it in a SCRIPT.py.")
    text = base.config.get_text_config()
    ids = torch.randint(text.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
    for special in _special_ids(base.config):
        ids[ids == special] = next(one for one in range(text.vocab_size) if one not in _special_ids(base.config))
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "input_features" in takes and "input_ids" not in takes:
        frames = 2 * base.config.max_source_positions
        batch = {"input_features": torch.randn(2, base.config.num_mel_bins, frames)}
    if getattr(base.config, "vision_config", None) is not None:
        batch |= {name: torch.zeros_like(ids) for name in ("token_type_ids", "mm_token_type_ids") if name in takes}
    if "labels" in takes:
        batch["labels"] = _labels(type(base).__name__, base.config, ids)
    return batch


def _labels(class_name: str, model_config: Any, ids: Any) -> Any:
    """Make labels as a model of this class takes them."""
    import torch

    if "SequenceClassification" in class_name:
        classes = model_config.num_labels
        return torch.arange(len(ids)) % classes if classes > 1 else torch.linspace(0.0, 1.0, len(ids))
    return ids % model_config.num_labels if "TokenClassification" in class_name else ids.clone()


def _special_ids(model_config: Any) -> set[int]:
    """Return the tokens that a configuration has a name for."""
    named = [
        value
        for part in _parts(model_config)
        for name, value in part.to_dict().items()
        if re.search(r"token_(id|index)$", name)
    ]
    return {one for value in named for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _processor(source: Source) -> Any:
    """Load what makes a model's inputs of text and pictures; raise UserError where there is none."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source.location)
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise UserError(
            f"--image needs the processor of {source.location}, which cannot be loaded ({reason}); pass a model whose "
            "processor is there, or make model and batch in a SCRIPT.py."
        ) from error
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{source.location} has no processor for images; leave --image off.")
    return processor


def _pictures(processor: Any, model: Any, length: int) -> Batch:
    """Make a batch of 2 rows, each with a picture and about so many words behind it."""
    import torch
    from PIL import Image

    noise = torch.randint(256, (224, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture, words = Image.fromarray(noise.numpy()), " ".join(["word"] * length)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": words}]
        text = processor.apply_chat_template([{"role": "user", "content": content}])
    else:
        text = f"{processor.image_token} {words}"
    made = processor(text=[text, text], images=[[picture], [picture]], return_tensors="pt")
    batch = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
    labels = batch["input_ids"].clone()
    for special in _special_ids(_base(model).config):
        labels[labels == special] = -100
    return {**batch, "labels": labels}
