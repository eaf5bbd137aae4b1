"""Bytes that the optimizers of this process will allocate in their first step."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def optimizers() -> list[torch.optim.Optimizer]:
    """Find those that exist in this process.  A training loop makes its own, and tells nobody.

    It takes a look at every object, of which there are a million: at its class alone, and once for each plan.
    """
    kinds = {torch.optim.Optimizer}
    while further := {inner for kind in kinds for inner in kind.__subclasses__()} - kinds:
        kinds |= further
    return [one for one in gc.get_objects() if type(one) in kinds and hasattr(one, "param_groups")]


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (one for group in optimizer.param_groups for one in group["params"])


def state_bytes(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """What the state of parameters that have none yet will take."""
    return sum(
        _bytes_of_state(optimizer, group, one)
        for group in optimizer.param_groups for one in group["params"]
        if one.requires_grad and one.device == device and not optimizer.state.get(one)
    )  # fmt: skip


def _bytes_of_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], one: Tensor) -> int:
    """By the kind of optimizer; an unknown one is taken for Adam, which has two numbers for each of the parameter's.

    bitsandbytes: paged state is in managed memory, which moves to the host when the card is full, and 8-bit state is
    for tensors of 4,096 elements at least, with a float32 scale for each 256 (bitsandbytes/optim/optimizer.py).
    """
    name = type(optimizer).__name__
    tensors = 1 if re.search("SGD|Lion|Momentum|RMSprop|Adagrad|LARS|Muon", name) else 2
    if name == "SGD" and not group.get("momentum"):
        tensors = 0
    tensors += bool(group.get("amsgrad"))
    if not type(optimizer).__module__.startswith("bitsandbytes"):
        return tensors * bytes_of(one)
    if "Paged" in name:
        return 0
    if "8bit" in name and one.numel() >= 4096:
        return tensors * (one.numel() + 4 * -(-one.numel() // 256))
    return tensors * 4 * one.numel()


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
