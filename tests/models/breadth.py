"""What people fine-tune, small: architectures, adapters, quantised bases, pictures and sound, heads.

tests/models/test_breadth.py runs each; benchmarks/compatibility.py makes the table of docs/compatibility.md of them.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastft
from fastft.rewriter.check import Check

LAYERS = 4
PAD = 0
Batch = dict[str, Tensor]
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 160, "max_position_embeddings": 128, "num_hidden_layers": LAYERS, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A model, its batches, and what makes a loss of its result where it has none itself."""

    model: nn.Module
    batches: Sequence[Batch]
    loss: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """One thing that people fine-tune, and what becomes of it.

    ops: what is lifted in layers.  shared: how many layers share a region with others; whole: if none do, a part of the
    reason.  graphs, again: of the first batch, and more for another length.  breaks: a part of the reason of graph
    breaks, if there are any.  needs: a package, or a class of transformers.  slow: takes more than ten seconds.
    """

    name: str
    make: Callable[[], Made]
    ops: str = "rms_norm rotary attention glu"
    shared: int = LAYERS
    whole: str = ""
    graphs: int = 1
    again: int = 0
    breaks: str = ""
    needs: Sequence[str] = field(default_factory=tuple)
    slow: bool = False

    def missing(self) -> str:
        """The package or class that is needed and not there, "" if none is missing."""
        there = (hasattr(transformers, one) or importlib.util.find_spec(one) is not None for one in self.needs)
        return next((one for one, found in zip(self.needs, there, strict=True) if not found), "")


def run(case: Case, device: str = "cpu") -> Check:
    """The check of a case: two batches, of two lengths."""
    torch._dynamo.reset()
    made = case.make()
    first, *others = ({name: value.to(device) for name, value in batch.items()} for batch in made.batches)
    return fastft.check(made.model.to(device), then=others, loss=made.loss, **first)


def sizes(*without: str, **more: Any) -> dict[str, Any]:
    """The sizes of a small decoder, without some and with more."""
    return {**{name: size for name, size in SIZES.items() if name not in without}, **more}


def text(*, image: int = 0, at: slice | None = None, **more: Any) -> list[Batch]:
    """Two batches: 2 rows of 24 tokens, and of 31 with padding behind one; with an image's tokens at a place."""
    batches = []
    for length, padding in ((24, 0), (31, 3)):
        ids = torch.randint(10, 100, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        labels = ids.clone()
        if at is not None:
            ids[:, at], labels[:, at] = image, -100
        if padding:
            ids[0, -padding:], mask[0, -padding:], labels[0, -padding:] = PAD, 0, -100
        made = {name: value(ids) if callable(value) else value.clone() for name, value in more.items()}
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask, **made})
    return batches


def noise(*shape: int) -> Tensor:
    """Pixels or sound."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def built(config: Any, name: str = "AutoModelForCausalLM") -> nn.Module:
    """A model with random weights, its norms' weights neither all one nor all zero, in train mode."""
    torch.manual_seed(0)
    owner = getattr(transformers, name)
    model = owner.from_config(config) if hasattr(owner, "from_config") else owner(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            nn.init.normal_(parameter, 0.5, 0.5)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.train()


def config(name: str, **settings: Any) -> Any:
    """A configuration of transformers', by the name of its class."""
    return getattr(transformers, name)(**settings)
