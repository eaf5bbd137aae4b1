"""Convert a budget to bytes, and measure what a device's memory holds besides activations."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from fastft.rewriter.memory.optimizer_state import bytes_of, optimizers, parameters_of, state_bytes
from fastft.rewriter.memory.simulate import Facts
from fastft.units import GIB

MARGIN = 0.06  # of a card, left free by default: fragments, and what the simulation does not know
HOST_SHARE = 0.5  # of the memory that the host has free, for offloaded activations
CUBLAS_BYTES = {9: 2**25, 10: 2**25}  # of its workspace, by the major compute capability
OTHER_CUBLAS_BYTES = 2**23


def budget_bytes(budget: Any, device: torch.device) -> int | None:
    """Return the bytes that tensors may take on the device: None for no limit, 0 for as little as possible.

    budget: as in Options.memory_budget, already in bytes where it had a unit.
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
    """Return the bytes that this process's tensors may take: those allocated now and those free."""
    free, _ = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return allocated + min(free + reserved - allocated, max(0, _allowed(device) - allocated))


def _allowed(device: torch.device) -> int:
    """Return the bytes torch may allocate: all of the card, or the share that set_per_process_memory_fraction gives."""
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def facts(device: torch.device, held_by_inputs: int, gradients_to_come: int) -> Facts:
    """Return the bytes allocated now, and those that the optimizer's first step will add.

    Without an optimizer yet, Adam is assumed, with 2 * gradients_to_come bytes of state.  held_by_inputs: bytes of a
    graph's inputs, used where there is no allocator to ask.
    """
    trained = [
        optimizer
        for optimizer in optimizers()
        if any(parameter.device == device for parameter in parameters_of(optimizer))
    ]
    states = sum(state_bytes(optimizer, device) for optimizer in trained) if trained else 2 * gradients_to_come
    if device.type != "cuda":
        return Facts(held_by_inputs, states, host=host_bytes())
    parameters = {
        parameter: None for optimizer in trained for parameter in parameters_of(optimizer) if parameter.device == device
    }
    gradients = sum(bytes_of(parameter.grad) for parameter in parameters if parameter.grad is not None)
    workspace = CUBLAS_BYTES.get(torch.cuda.get_device_capability(device)[0], OTHER_CUBLAS_BYTES)
    return Facts(torch.cuda.memory_allocated(device) - gradients, states, workspace, host_bytes())


def host_bytes() -> int:
    """Return the bytes that may be offloaded: HOST_SHARE of the host's free memory; 8 GiB where it is unknown.

    Processes on one host, one for each card, share it.
    """
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    share = HOST_SHARE / max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))  # as torchrun and accelerate set it
    return int(share * int(available[1]) * 1024) if available else 8 * GIB
