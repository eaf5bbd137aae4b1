"""What a budget is in bytes, and what a device's memory holds beside activations."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastft.rewriter.planner import GIB, Facts

MARGIN = 0.06  # of a card, left free by default: fragments, and what the simulation does not know
HOST_SHARE = 0.5  # of the memory that the host has free, for offloaded activations
CUBLAS_BYTES = {9: 2**25, 10: 2**25}  # its workspace by the card's generation
OTHER_CUBLAS_BYTES = 2**23


def budget_bytes(budget: Any, device: torch.device) -> int | None:
    """Bytes that tensors may take on the device: None for no limit, 0 for as little as possible.

    budget: as in Options.memory_budget, bytes already where they have a unit.
    """
    if budget in ("max-speed", "min"):
        return None if budget == "max-speed" else 0
    if isinstance(budget, int):
        return budget
    if device.type != "cuda":
        return None
    if isinstance(budget, float):
        return int(budget * torch.cuda.get_device_properties(device).total_memory)
    return available_bytes(device) - int(MARGIN * _allowed(device))


def available_bytes(device: torch.device) -> int:
    """What this process's tensors may take in all: what they take now and what is free."""
    free, _ = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return allocated + min(free + reserved - allocated, max(0, _allowed(device) - allocated))


def _allowed(device: torch.device) -> int:
    """What torch lets this process take: the card, or the share that set_per_process_memory_fraction names."""
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def facts(device: torch.device, held_by_inputs: int, gradients_to_come: int) -> Facts:
    """What is allocated now and what the optimizer's first step will add: Adam's, if there is no optimizer yet.

    held_by_inputs: bytes of a graph's inputs, which is all that is known where no allocator can be asked.
    """
    trained = [optimizer for optimizer in optimizers() if any(one.device == device for one in _parameters(optimizer))]
    states = sum(_state_bytes(optimizer, device) for optimizer in trained) if trained else 2 * gradients_to_come
    if device.type != "cuda":
        return Facts(held_by_inputs, states, host=host_bytes())
    parameters = {one: None for optimizer in trained for one in _parameters(optimizer) if one.device == device}
    gradients = sum(_bytes(one.grad) for one in parameters if one.grad is not None)
    workspace = CUBLAS_BYTES.get(torch.cuda.get_device_capability(device)[0], OTHER_CUBLAS_BYTES)
    return Facts(torch.cuda.memory_allocated(device) - gradients, states, workspace, host_bytes())


def host_bytes() -> int:
    """What may be offloaded: a share of the memory that the host has free, so far as it says."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(HOST_SHARE * int(found[1]) * 1024) if found else 8 * GIB


def optimizers() -> list[torch.optim.Optimizer]:
    """Find those that exist in this process.  A training loop makes its own, and tells nobody.

    It takes a look at every object, of which there are a million: at its class alone, and once for each plan.
    """
    kinds = {torch.optim.Optimizer}
    while further := {inner for kind in kinds for inner in kind.__subclasses__()} - kinds:
        kinds |= further
    return [one for one in gc.get_objects() if type(one) in kinds and hasattr(one, "param_groups")]


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (one for group in optimizer.param_groups for one in group["params"])


def _state_bytes(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
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
        return tensors * _bytes(one)
    if "Paged" in name:
        return 0
    if "8bit" in name and one.numel() >= 4096:
        return tensors * (one.numel() + 4 * -(-one.numel() // 256))
    return tensors * 4 * one.numel()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
