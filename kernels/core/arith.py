"""Integer arithmetic of sizes, without Triton: not every platform has it, so only the kernels' own files import it."""

import torch


def cdiv(a: int, b: int) -> int:
    """Divide and round up.  triton.cdiv can be compiled too, which makes it 20 times as slow to call."""
    return -(-a // b)


def at_least_one(a: int, b: int) -> int:
    """Return the smaller of two numbers, or 1 if that is more; of sizes that are symbols without comparing them."""
    if isinstance(a, int) and isinstance(b, int):
        return max(1, min(a, b))
    return torch.sym_max(1, torch.sym_min(a, b))
