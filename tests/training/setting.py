"""What the scenarios share: tiny models, batches, and the one word by which they are compiled or not.

A scenario is a function of a Setting that trains for a few steps, in the way its docstring names, and returns what can
be seen of it (losses, gradient norms).  It is run without fastft, with fastft, and without it but with weights that are
a rounding away: the last says how far apart two right runs may be.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastft

LAYERS, VOCABULARY, LENGTH = 3, 128, 24
FEW = ["q_proj", "down_proj"]  # layers that have adapters: torch traces each of them in every scenario
PADDING, END = 0, 1


@dataclass
class Setting:
    """How a scenario is to be run.

    compiled: by fastft.  nudge: another number is another rounding of every weight; 0 is none.  folder: an empty one.
    options: what fastft is told.
    """

    folder: Path
    compiled: bool = False
    nudge: int = 0
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=lambda: {"lower": "eager", "strict": True})

    def compile(self, what: Any) -> Any:
        """``torch.compile`` of a module or function."""
        return torch.compile(what, backend="fastft", options=self.options) if self.compiled else what

    def compile_in_place(self, model: nn.Module) -> nn.Module:
        """``model.compile``: for what asks a model of which class it is."""
        if self.compiled:
            model.compile(backend="fastft", options=self.options)
        return model

    def seed(self) -> None:
        random.seed(0)
        torch.manual_seed(0)

    def model(
        self, *, dtype: torch.dtype = torch.float32, lora: Any = FEW, nf4: bool = False, rounded: Any = None,
        layers: int = LAYERS, storage: torch.dtype = torch.uint8,
    ) -> Any:  # fmt: skip
        """A small Llama in train mode, with adapters whose second factors are not zero.

        lora: the layers that have them, if any.  rounded: the dtype that is computed in, if another than the weights'.
        storage: of 4-bit weights.
        """
        model = base(dtype, layers)
        if nf4:
            fastft.quantize_(model.requires_grad_(False), storage=storage)
        if lora:
            torch.manual_seed(1)
            model = get_peft_model(model, adapter(target_modules=lora))
        return self.nudged(model, rounded).to(self.device).train()

    def nudged(self, model: nn.Module, dtype: torch.dtype | None = None) -> Any:
        """Every weight moved by less than a rounding of dtype, or its own."""
        if self.nudge:
            generator = torch.Generator().manual_seed(self.nudge)
            for value in model.parameters():
                if value.is_floating_point() and not hasattr(value, "quant_state"):
                    noise = torch.rand(value.shape, generator=generator) * 2 - 1
                    value.data.copy_(value.data * (1 + torch.finfo(dtype or value.dtype).eps * noise.to(value.device)))
        return model

    def batches(self, count: int, rows: int = 2, length: int = LENGTH) -> Iterator[dict[str, Tensor]]:
        """Padded rows, the same in every run."""
        for number in range(count):
            yield batch(number, rows, length, self.device)


def base(dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> LlamaForCausalLM:
    """The model without adapters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=256, initializer_range=0.1,
        pad_token_id=PADDING, eos_token_id=END, bos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def adapter(**more: Any) -> LoraConfig:
    """Adapters of rank 4, on all projections if more does not say otherwise."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**{**settings, **more}, task_type="CAUSAL_LM")


def batch(number: int, rows: int = 2, length: int = LENGTH, device: str = "cpu") -> dict[str, Tensor]:
    """Rows of which the first is padded."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    values = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: value.to(device) for name, value in values.items()}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def norm_of_gradients(model: nn.Module) -> float:
    """The geometric mean of the norms of all gradients, so that each of them shows; None's are left out."""
    norms = [one.grad.float().norm() for one in trained(model) if one.grad is not None]
    return torch.stack(norms).clamp(min=1e-12).log().mean().exp().item()


Scenario = Callable[[Setting], Sequence[float]]
