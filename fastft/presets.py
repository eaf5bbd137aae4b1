"""Models small enough to make on the spot, with random weights and a tokenizer of bytes: nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIALS = ("<pad>", "<s>", "</s>")
WIDTH, LAYERS, HEADS, KV_HEADS = 192, 3, 6, 2
VOCABULARY = 320  # 256 bytes and the specials, rounded up so that the head's rows stay aligned on a GPU

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": WIDTH // HEADS,
    "max_position_embeddings": 4096,
    # Frozen random layers must pass their input on at its own size, or an adapter has nothing to build upon.
    "initializer_range": WIDTH**-0.5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

PRESETS = {  # name -> transformers' model type
    "tiny-llama": "llama",
    "tiny-qwen3": "qwen3",
    "tiny-mistral": "mistral",
}


def config(name: str) -> Any:
    """Build the transformers configuration of a preset."""
    from transformers import AutoConfig

    return AutoConfig.for_model(PRESETS[name], **SIZES)


def byte_tokenizer() -> Any:
    """Build a tokenizer of 256 bytes and three specials, which transformers can save and load like any other."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))  # BPE without merges: one token a byte
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


def write(name: str, folder: Path, seed: int) -> None:
    """Save a preset's random weights and tokenizer as a model folder; the seed fixes every weight."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config(name)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
