"""What a budget is in bytes, and what a device's memory holds beside activations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from fastft.rewriter.memory.optimizer_state import bytes_of, optimizers, parameters_of, state_bytes
from fastft.rewriter.memory.simulate import Facts
from fastft.units import GIB

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
    trained = [optimizer for optimizer in optimizers() if any(one.device == device for one in parameters_of(optimizer))]
    states = sum(state_bytes(optimizer, device) for optimizer in trained) if trained else 2 * gradients_to_come
    if device.type != "cuda":
        return Facts(held_by_inputs, states, host=host_bytes())
    parameters = {one: None for optimizer in trained for one in parameters_of(optimizer) if one.device == device}
    gradients = sum(bytes_of(one.grad) for one in parameters if one.grad is not None)
    workspace = CUBLAS_BYTES.get(torch.cuda.get_device_capability(device)[0], OTHER_CUBLAS_BYTES)
    return Facts(torch.cuda.memory_allocated(device) - gradients, states, workspace, host_bytes())


def host_bytes() -> int:
    """What may be offloaded: a share of the memory that the host has free, so far as it says."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(HOST_SHARE * int(found[1]) * 1024) if found else 8 * GIB
