"""Where what becomes of a case is not what its entry expects: today's exceptions, by the case's name, and why.

An exception that goes away fails its test, which prints the line as it is now: delete it here, or write that one.

ops: lifted in layers.  shared: how many layers share a region; whole: why none does.  again: graphs more for another
length.  breaks: why torch breaks the graph; into how many differs from version to version.
"""

from typing import Any

TRANSFORM = "the graph holds a torch.func transform"
LOW_RANK = "rms_norm glu"  # values of another size than keys, written to a new tensor with them; interleaved keys
BRANCH = "data-dependent branching"
BIASED = "layer_norm"  # attention adds another number for each head

TODAY: dict[str, dict[str, Any]] = {
    "Gemma 3 of 4B and more, text alone": {"ops": "", "shared": 0, "whole": TRANSFORM},
    "EmbeddingGemma": {"shared": 0, "whole": TRANSFORM},
    "Gemma 4": {"shared": 0, "whole": "nothing in it repeats"},
    "Gemma 3n": {"shared": 0, "whole": "clamp_ writes in place"},
    "DeepSeek V2 Lite": {"ops": LOW_RANK},
    "DeepSeek V3": {"ops": LOW_RANK},
    "GLM 4.7 Flash": {"ops": LOW_RANK},
    "Youtu": {"ops": LOW_RANK},
    "MiniCPM 3": {"ops": "rms_norm rotary glu"},
    "Phi 4 mini": {"shared": 0, "whole": "copy_ writes in place"},
    "Llama 4": {"ops": "rms_norm attention glu"},
    "nanochat": {"ops": "attention"},
    "GPT-OSS": {"ops": "rms_norm rotary"},
    "Bamba": {"again": 1, "shared": 2},
    "Zamba 2": {"again": 1},
    "Jamba": {"again": 1, "shared": 2},
    "T5 1.1": {"ops": "rms_norm"},
    "BLOOM": {"ops": BIASED, "shared": 3},
    "MPT": {"ops": BIASED, "shared": 3},
    "Falcon with ALiBi": {"ops": BIASED},
    "LoRA with `lora_bias`": {"ops": "rms_norm rotary attention glu"},
    "DoRA": {"breaks": "method `startswith`"},
    "DoRA, base in NF4": {"breaks": "overridden tensor subclass attributes"},
    "LoHa": {"breaks": BRANCH},
    "LoKr": {"breaks": BRANCH},
    "aLoRA": {"breaks": "aten.nonzero"},
    "AdaLoRA": {"ops": "rms_norm attention"},
    "LoRA, base in int8 (bitsandbytes)": {
        "ops": "rms_norm rotary attention lora",
        "shared": 0,
        "whole": "set_ writes in place",
    },
    "Gemma 3 of 4B and more, text alone, NF4 and LoRA": {"ops": "lora_linear", "shared": 0, "whole": TRANSFORM},
    "EmbeddingGemma, NF4 and LoRA": {"shared": 0, "whole": TRANSFORM},
    "Gemma 4, NF4 and LoRA": {"shared": 0, "whole": "nothing in it repeats"},
    "Gemma 3n, NF4 and LoRA": {"shared": 0, "whole": "clamp_ writes in place"},
    "DeepSeek V2 Lite, NF4 and LoRA": {"ops": f"{LOW_RANK} lora lora_linear"},
    "DeepSeek V3, NF4 and LoRA": {"ops": f"{LOW_RANK} lora lora_linear"},
    "GLM 4.7 Flash, NF4 and LoRA": {"ops": f"{LOW_RANK} lora lora_linear"},
    "Youtu, NF4 and LoRA": {"ops": f"{LOW_RANK} lora lora_linear"},
    "MiniCPM 3, NF4 and LoRA": {"ops": "rms_norm rotary glu lora lora_linear"},
    "Phi 4 mini, NF4 and LoRA": {"shared": 0, "whole": "copy_ writes in place"},
    "Llama 4, NF4 and LoRA": {"ops": "rms_norm attention glu lora lora_linear"},
    "nanochat, NF4 and LoRA": {"ops": "attention lora lora_linear"},
    "Qwen2.5-VL": {"breaks": "aten._local_scalar_dense"},
    "ModernBERT, classes of tokens": {"shared": 2},
    "Mistral 3": {"breaks": "Tensor.item()"},
    "Qwen3-VL": {"breaks": "aten.repeat_interleave"},
    "Gemma 3 with a picture": {"breaks": "Tensor.item()"},
    "LLaVA": {"breaks": "Tensor.item()"},
    "LLaVA-OneVision": {"breaks": "aten._local_scalar_dense"},
    "SmolVLM": {"breaks": "aten.nonzero"},
    "PaliGemma 2": {"breaks": "Tensor.item()"},
    "GPT-OSS, NF4 and LoRA": {"ops": "rms_norm rotary lora lora_linear"},
    "Bamba, NF4 and LoRA": {"again": 1, "shared": 2},
    "Zamba 2, NF4 and LoRA": {"again": 1},
    "Jamba, NF4 and LoRA": {"again": 1, "shared": 2},
    "T5 1.1, NF4 and LoRA": {"ops": "rms_norm lora lora_linear"},
    "BLOOM, NF4 and LoRA": {"ops": f"{BIASED} lora lora_linear"},
    "MPT, NF4 and LoRA": {"ops": f"{BIASED} lora lora_linear"},
    "Falcon with ALiBi, NF4 and LoRA": {"ops": f"{BIASED} lora"},
}
