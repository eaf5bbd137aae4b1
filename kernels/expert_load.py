"""Count how many tokens each expert got, over all layers with so many experts and all steps of the process.

A few experts that get most of the tokens, or some that get none, are what goes wrong first in a mixture of experts.
The counts stay on the device, where expert_order adds to them, and are read when a report is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.compat import symbolic_sizes
from fastft.kernels.core.launch_recorder import constant

_counts: dict[tuple[torch.device, int], Tensor] = {}


def counts(device: torch.device, num_experts: int) -> Tensor:
    """Return the counts to add to, int64 [num_experts]; no recording or graph frees them."""
    key = (device, num_experts)
    if key not in _counts:
        with symbolic_sizes.without_modes():
            _counts[key] = constant(torch.zeros(num_experts, dtype=torch.int64, device=device))
    return _counts[key]


def totals() -> dict[int, list[int]]:
    """Return how many tokens each expert got, by the number of experts of a layer; waits for the devices."""
    found: dict[int, list[int]] = {}
    for (_, experts), tensor in _counts.items():
        before = found.get(experts, [0] * experts)
        found[experts] = [one + more for one, more in zip(before, tensor.tolist(), strict=True)]
    return found
