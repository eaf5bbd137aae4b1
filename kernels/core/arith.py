"""Arithmetic of sizes.  Without Triton, which not every platform has, and which kernels' files alone may import."""


def cdiv(a: int, b: int) -> int:
    """Divide and round up.  Triton's own can be compiled too, which makes it 20 times as slow to call."""
    return -(-a // b)
