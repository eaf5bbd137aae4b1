"""Compile a Triton kernel for arguments that are only described, and launch it with little Python before it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

ALIGNMENT = 16  # bytes of an address, and units of an integer, that Triton specialises kernels for
WIDE = 2**31  # an integer from here on is passed in 64 bits
_CODES = {
    "i1": "i", "i8": "b", "i16": "h", "i32": "i", "i64": "l", "u1": "I", "u8": "B", "u16": "H", "u32": "I", "u64": "K",
    "fp16": "f", "bf16": "f", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip


class Pointer:
    """Stands for a tensor whose address is known to be aligned, or not known to be, where a kernel is compiled."""

    def __init__(self, dtype: torch.dtype, aligned: bool) -> None:
        self.dtype, self.aligned = dtype, aligned

    def data_ptr(self) -> int:
        """Return an address of this kind."""
        return 0 if self.aligned else 1

    @staticmethod
    def ptr_range() -> int:
        """Return how many bytes a tensor has at the most: AMD's compiler uses that these are few."""
        return 2**62


def integer(divisible: bool) -> int:
    """Return an integer that a kernel is compiled for in place of one that is known to be divisible, or is not."""
    return ALIGNMENT if divisible else ALIGNMENT + 1


def is_compiled(kernel: Any) -> bool:
    """Return whether a kernel is compiled; Triton's interpreter, in its place, takes tensors and not addresses."""
    from triton.runtime.jit import JITFunction

    return isinstance(kernel, JITFunction)


def compiled(kernel: Any, arguments: Sequence[Any], meta: Mapping[str, Any]) -> Any:
    """Compile a kernel for the current device, or find it compiled; raises TritonError where it cannot be compiled.

    arguments: numbers, Pointer in place of tensors, and tuples of them.
    """
    made = kernel.warmup(*arguments, grid=(1,), **meta)
    return made.result() if hasattr(made, "result") else made


def launch(
    made: Any, name: str, grid: Sequence[str], texts: Sequence[Any], meta: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Write a launch of a compiled kernel as Python, and the globals that it needs, whose names begin with name.

    texts: the arguments as Python, tensors as their addresses; tuples stay tuples.  ``stream`` is a name there.
    """
    made.run  # loads it; raises where it needs more than the device has  # noqa: B018
    signature = list(made.src.signature.values())
    names = made.src.fn.arg_names[len(texts) :]
    every = [*texts, *(repr(meta[constant]) for constant in names)]
    grid = [*grid, "1", "1"][:3]
    if not _is_static(made):
        given = f"{', '.join(grid)}, stream, {name}.function, {name}.packed_metadata, None, None, None"
        return f"{name}.run({given}, {', '.join(map(_tuple, every))})", {name: made}
    pairs = [pair for kind, text in zip(signature, every, strict=True) for pair in _flat(kind, text)]
    codes = "".join("O" if kind[0] == "*" else _CODES[kind] for kind, _ in pairs)
    scratch = [size for size in ("global_scratch_size", "profile_scratch_size") if hasattr(made.metadata, size)]
    given = ", ".join([*(text for _, text in pairs), *["None"] * len(scratch)])
    shared = f"{made.metadata.num_warps}, {made.metadata.shared}, {codes + 'O' * len(scratch)!r}"
    text = f"static_launch({name}_function, {', '.join(grid)}, {shared}, ({given},), stream)"
    # The kernel is held too: its function is gone with it.
    return text, {"static_launch": _static_launcher(), f"{name}_function": made.function, name: made}


@functools.cache
def _static_launcher() -> Any:
    launcher = getattr(torch._C, "_StaticCudaLauncher", None)
    return None if torch.version.hip is not None else getattr(launcher, "_launch_kernel", None)


def _is_static(made: Any) -> bool:
    """Return whether torch's launcher in C takes a kernel: without scratch memory, clusters or cooperation."""
    data = made.metadata
    plain = not (
        getattr(data, "global_scratch_size", 0)
        or getattr(data, "profile_scratch_size", 0)
        or getattr(data, "launch_cooperative_grid", False)
        or getattr(data, "launch_pdl", False)
    )
    return plain and getattr(data, "num_ctas", 1) == 1 and _static_launcher() is not None


def _flat(kind: Any, text: Any) -> Iterable[tuple[str, str]]:
    """Pair an argument's type with its text, element by element if it is a tuple; leave constants out."""
    if isinstance(kind, tuple):
        return itertools.chain.from_iterable(_flat(one, other) for one, other in zip(kind, text, strict=True))
    return [] if kind == "constexpr" else [(kind, text)]


def _tuple(text: Any) -> str:
    return text if isinstance(text, str) else f"({', '.join(map(_tuple, text))},)"
