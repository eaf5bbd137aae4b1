"""Integer arithmetic of sizes, without Triton: not every platform has it, so only the kernels' own files import it."""


def cdiv(a: int, b: int) -> int:
    """Divide and round up.  triton.cdiv can be compiled too, which makes it 20 times as slow to call."""
    return -(-a // b)
