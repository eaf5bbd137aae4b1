"""Where what becomes of a case is not what its entry expects: today's exceptions, by the case's name, and why.

An exception that goes away fails its test, which prints the line as it is now: delete it here, or write that one.

ops: lifted in layers.  shared: how many layers share a region; whole: why none does.  again: graphs more for another
length.  breaks: why torch breaks the graph; into how many differs from version to version.
"""

from typing import Any

CLAMPED = "rms_norm rotary attention experts"  # their gate, which is clamped, is left to Inductor

TODAY: dict[str, dict[str, Any]] = {
    "GPT-OSS": {"ops": CLAMPED},
    "GPT-OSS, NF4 and LoRA": {"ops": f"{CLAMPED} lora lora_linear"},
    # Where a length is a multiple of a state-space layer's chunk, nothing is padded, which is another graph; without
    # kernels of its own, Jamba goes through its tokens one by one.
    "Bamba": {"again": 1, "shared": 2},
    "Bamba, NF4 and LoRA": {"again": 1, "shared": 2},
    "Zamba 2": {"again": 1},
    "Zamba 2, NF4 and LoRA": {"again": 1},
    "Jamba": {"again": 1, "shared": 2},
    "Jamba, NF4 and LoRA": {"again": 1, "shared": 2},
    "Falcon with ALiBi, NF4 and LoRA": {"ops": "layer_norm attention lora"},  # its linear layers are a class of its own
    "aLoRA": {"graphs": 2, "again": 1},  # PEFT hooks layers for each call, around which graphs break
    # Which pictures are there at all, and how large each is, are values that the model reads.
    "Mistral 3": {"breaks": "Tensor.item()"},
    "LLaVA-OneVision": {"breaks": "aten._local_scalar_dense"},
    "SmolVLM": {"breaks": "aten.nonzero"},
}
