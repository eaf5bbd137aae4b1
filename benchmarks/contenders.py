"""What is compared.  To add one, write a function here and name it in CONTENDERS.

A contender gets ``build``, which makes the model, so that it may act before the model exists (a library that patches
classes) as well as after, and returns what the training loop calls.  Heavy imports belong inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peers

Model = Any  # a module, or what torch.compile makes of one
Build = Callable[[], Model]


def eager(build: Build, lower: str) -> Model:
    return build()


def eager_checkpoint(build: Build, lower: str) -> Model:
    """Every layer recomputed in the backward pass, as transformers does it."""
    model = build()
    base = model.get_base_model()
    # transformers 5.23 has a new name for it; 5.17 knows the old one only
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def inductor(build: Build, lower: str) -> Model:
    import torch

    return torch.compile(build())


def inductor_checkpoint(build: Build, lower: str) -> Model:
    return inductor(lambda: eager_checkpoint(build, lower), lower)


def fastft(build: Build, lower: str, **options: Any) -> Model:
    import torch

    return torch.compile(build(), backend="fastft", options={"lower": lower, **options})


def liger_checkpoint(build: Build, lower: str) -> Model:
    return eager_checkpoint(lambda: peers.liger(build, lower), lower)


MAIN: dict[str, Callable[..., Model]] = {
    "eager": eager,
    "eager-checkpoint": eager_checkpoint,
    "inductor": inductor,
    "fastft": fastft,
}
CONTENDERS = MAIN | {  # to be asked for by name: other libraries, and fastft with one option changed
    "inductor-checkpoint": inductor_checkpoint,
    "liger": peers.liger,
    "liger-checkpoint": liger_checkpoint,
    "unsloth": partial(peers.unsloth, checkpointing=False),
    "unsloth-checkpoint": partial(peers.unsloth, checkpointing="unsloth"),  # its own, to the host's memory
    "fastft-whole": partial(fastft, outline=False),
    "fastft-min": partial(fastft, memory_budget="min"),
    "fastft-max": partial(fastft, memory_budget="max-speed"),
    "fastft-graphs": partial(fastft, cuda_graphs=True),
    "fastft-all-rows": partial(fastft, skip_padding=False),
    "fastft-plain": partial(fastft, cuda_graphs=False),
}
