"""Bytes that the optimizers of this process will allocate in their first step."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastft.compat import fsdp


def optimizers() -> list[torch.optim.Optimizer]:
    """Find the optimizers in this process: the training loop makes its own and registers it nowhere.

    This scans the class of every live object, about a million, once for each plan.
    """
    kinds = {torch.optim.Optimizer}
    while further := {inner for kind in kinds for inner in kind.__subclasses__()} - kinds:
        kinds |= further
    return [obj for obj in gc.get_objects() if type(obj) in kinds and hasattr(obj, "param_groups")]


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Iterate over all parameters of an optimizer."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def state_bytes(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Count the bytes of state still to be allocated for the parameters on this device."""
    return sum(
        _bytes_of_state(optimizer, group, fsdp.local(parameter))
        for group in optimizer.param_groups for parameter in group["params"]
        if parameter.requires_grad and parameter.device == device and not optimizer.state.get(parameter)
    )  # fmt: skip


def _bytes_of_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> int:
    """Count the bytes of a parameter's state by the kind of optimizer; an unknown one counts as Adam: two tensors.

    bitsandbytes: paged state is in managed memory, which moves to the host when the card is full, and 8-bit state is
    for tensors of at least 4,096 elements, with a float32 scale for each 256 (bitsandbytes/optim/optimizer.py).
    """
    name = type(optimizer).__name__
    tensors = 1 if re.search("SGD|Lion|Momentum|RMSprop|Adagrad|LARS|Muon", name) else 2
    if name == "SGD" and not group.get("momentum"):
        tensors = 0
    tensors += bool(group.get("amsgrad"))
    if not type(optimizer).__module__.startswith("bitsandbytes"):
        return tensors * bytes_of(parameter)
    if "Paged" in name:
        return 0
    if "8bit" in name and parameter.numel() >= 4096:
        return tensors * (parameter.numel() + 4 * -(-parameter.numel() // 256))
    return tensors * 4 * parameter.numel()


def bytes_of(tensor: Tensor) -> int:
    """Count the bytes of a tensor's elements on this device."""
    tensor = fsdp.local(tensor)
    return tensor.numel() * tensor.element_size()
