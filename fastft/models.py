"""Turn what the user wrote after ``--model`` into a causal language model with LoRA adapters."""

from __future__ import annotations

import copy
import functools
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastft.errors import UserError
from fastft.presets import PRESETS, byte_tokenizer, config, write
from fastft.rewriter.options import nearest

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PATH_LIKE = re.compile(r"[./~].*|.*\.gguf|.*/.*/.*")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: ``location`` is a preset's name, a folder or a hub id."""

    location: str
    preset: bool = False
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, str]:
        """What ``from_pretrained`` takes besides the location."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def find(name: str) -> Source:
    """Tell presets, folders, .gguf files and hub ids apart; raise UserError for anything else."""
    if name in PRESETS:
        return Source(name, preset=True)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"The folder {name} holds no config.json, so it is not a model; pass a model's folder.")
        return Source(str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is not a .gguf file; --model takes a hub id, a folder or a .gguf file.")
        return Source(str(path.parent.resolve()), gguf_file=path.name)
    if PATH_LIKE.fullmatch(name) or not HUB_ID.fullmatch(name):
        raise UserError(f"There is no model at {name}; check the path.")
    if "/" not in name and name.startswith("tiny"):
        raise UserError(f"There is no preset {name!r}; did you mean {nearest(name, list(PRESETS))!r}?")
    go_offline_if_unreachable()
    return Source(name)


def go_offline_if_unreachable() -> None:
    """Go to the hub's cache at once if there is no network: its client retries for half a minute otherwise."""
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return  # a proxy resolves names for us
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        from huggingface_hub import constants

        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is not imported yet
        constants.HF_HUB_OFFLINE = True


@contextmanager
def explained(source: Source) -> Iterator[None]:
    """Turn transformers' error for a model that cannot be loaded into one sentence (UserError)."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        if "connect" in reason or "offline" in reason.lower():
            reason = "the hub cannot be reached and the local cache does not hold it; pass a folder or a .gguf file"
        reason = re.split(r"(?<=\w)\.\s", reason)[0].rstrip(".")
        raise UserError(f"Cannot load the model {source.gguf_file or source.location}: {reason}.") from error


def load_config(source: Source) -> Any:
    """Load the model's configuration; raise UserError unless it is that of a causal language model."""
    model_config = load_any_config(source)
    if source.preset:
        return model_config
    _check_causal(source, model_config)
    return without_dropout(model_config)


def load_any_config(source: Source) -> Any:
    """Load the configuration of a model of any kind, as it is."""
    if source.preset:
        return config(source.location)
    with explained(source):
        return copy.deepcopy(_read_config_once(source)) if source.gguf_file else _read_config(source)


def _read_config(source: Source) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source.location, **source.arguments)


_read_config_once = functools.cache(_read_config)  # a .gguf file's vocabulary is read with it, which takes seconds


def without_dropout(model_config: Any) -> Any:
    """Set each dropout of a configuration to zero: runs with one seed are to be comparable step by step."""
    for name, value in model_config.to_dict().items():
        if re.search("drop(out)?$", name) and isinstance(value, float):
            setattr(model_config, name, 0.0)
    return model_config


def _check_causal(source: Source, model_config: Any) -> None:
    from transformers.models.auto import modeling_auto as auto

    kind = model_config.model_type
    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    classes = set(model_config.architectures or ())
    encoder = kind in masked and not getattr(model_config, "is_decoder", False) and not classes & causal
    if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or (classes and not classes & causal):
        what = ", ".join(sorted(classes)) or kind
        raise UserError(f"{source.location} is a {what}, not a causal language model; pass one such as Llama or Qwen.")


def load_tokenizer(source: Source) -> Any:
    """Load the model's tokenizer; it gets a padding token if it has none."""
    if source.preset:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    with explained(source):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # never learnt from: padding has the label -100
    return tokenizer


def materialise(source: Source, folder: Path, *, seed: int, nf4: bool) -> Source:
    """Write the base model to ``folder`` if there is none to load yet: a preset, or a .gguf file to be quantised.

    transformers cannot quantise while it reads a .gguf file, so that model is saved as a folder first.
    """
    if source.preset:
        write(source.location, folder, seed)
    elif source.gguf_file and nf4:
        _convert(source, folder)
    else:
        return source
    return Source(str(folder))


def _convert(source: Source, folder: Path) -> None:
    """Save a .gguf file's model as a folder, by way of a plain copy: transformers cannot save what it read so."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(load_config(source))
    plain.load_state_dict(load(source, device="cpu", dtype="float32", nf4=False).state_dict())
    plain.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


def nf4_arguments(dtype: str) -> dict[str, Any]:
    """Return the options of BitsAndBytesConfig for QLoRA's 4-bit weights."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


def load(source: Source, *, device: str, dtype: str, nf4: bool) -> Any:
    """Load the base model on its device, with its linear layers, but not its experts, in 4 bits if ``nf4``."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype), "config": load_config(source), **source.arguments}
    if nf4:
        arguments |= {"quantization_config": BitsAndBytesConfig(**nf4_arguments(dtype)), "device_map": {"": device}}
    with explained(source):
        model: Any = AutoModelForCausalLM.from_pretrained(source.location, **arguments)
    model.config.use_cache = False  # training has no use for keys and values among a graph's results
    return model if nf4 else model.to(device)


def add_lora(model: Any, *, rank: int, random_base: bool) -> Any:
    """Add adapters to every linear layer; a random base also trains its embedding and head, which know no language."""
    from peft import LoraConfig, get_peft_model

    saved = ["embed_tokens", "lm_head"] if random_base else None
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=saved, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def four_bit_experts(model: Any, *, dtype: str) -> None:
    """Make 4-bit what ``load`` left: experts, after the adapters, which PEFT puts around no other way."""
    import torch

    from fastft.quantize import quantize_

    quantize_(model, "nf4", compute_dtype=getattr(torch, dtype), parts=["experts"])


def on_meta(name: str, *, rank: int, batch_size: int, seq_len: int, nf4: bool = False) -> tuple[Any, dict[str, Any]]:
    """Build a model without weights and a batch for it, both on the meta device: any size fits.

    nf4: its layers as QLoRA holds them, and everything else in bfloat16.
    """
    import torch

    from fastft.quantize import four_bit_experts_on_meta, four_bit_on_meta

    source = find(name)
    model_config = load_config(source)
    with torch.device("meta"):
        model = _random(source, model_config, rank, prepare=four_bit_on_meta if nf4 else None)
        if nf4:
            four_bit_experts_on_meta(model)
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
    return model, _batch(ids)


def _random(source: Source, model_config: Any, rank: int, prepare: Any = None) -> Any:
    """Build a model of this configuration without its weights, with adapters unless ``rank`` is 0, to be trained.

    prepare: is called with the model before it gets its adapters.
    """
    from transformers import AutoModelForCausalLM

    with explained(source):
        model = AutoModelForCausalLM.from_config(model_config)
        model.config.use_cache = False
        if prepare is not None:
            prepare(model)
        if rank:
            model = add_lora(model, rank=rank, random_base=source.preset)
    return model.train()


def _batch(ids: Any) -> dict[str, Any]:
    """Make a batch without padding, of which every token counts."""
    import torch

    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def made_by(script: str) -> tuple[Any, Any]:
    """Run a script and return what its ``make()`` returns: a model, and its batch as a dict or a tuple."""
    import runpy

    if not Path(script).is_file():
        raise UserError(f"There is no script {script!r}.")
    make = runpy.run_path(script).get("make")
    if not callable(make):
        raise UserError(f"{script!r} has no function make(), which returns a model and a batch for it.")
    made = make()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], (dict, tuple))):
        raise UserError(f"make() in {script!r} has to return a model and a batch, a dict or a tuple of its arguments.")
    return made


def moved(source: Source, staging: Path, output: Path) -> Source:
    """Return the same source as it is once the staging folder has been renamed to the output folder."""
    if Path(source.location).is_relative_to(staging):
        return replace(source, location=str(output / Path(source.location).relative_to(staging)))
    return source
