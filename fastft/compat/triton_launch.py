"""Compile a Triton kernel for arguments that are only described, and launch it with little Python before it."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

ALIGNMENT = 16  # bytes of an address, and units of an integer, that Triton specialises kernels for
_CODES = {
    "i1": "i", "i8": "b", "i16": "h", "i32": "i", "i64": "l", "u1": "I", "u8": "B", "u16": "H", "u32": "I", "u64": "K",
    "fp16": "f", "bf16": "f", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip


raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device's number; None without CUDA
Environment = dict[str, str]  # the variables that Triton reads: they are part of its cache's keys
_ahead: dict[str, Future] = {}  # by _key: what worker processes compile


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor whose address is known to be aligned, or not known to be, where a kernel is compiled."""

    dtype: torch.dtype
    aligned: bool

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


def compile_ahead(kernel: Any, arguments: Sequence[Any], meta: Mapping[str, Any]) -> None:
    """Begin to compile a kernel for the current device, in a process of Inductor's pool if it has one.

    What it compiles is found in Triton's cache later; arguments as of ``compiled``.
    """
    from triton.runtime import driver

    key = _key(kernel, arguments, meta)
    if key in _ahead or get_compile_threads() <= 1 or not torch.cuda.is_available():
        return
    target = driver.active.get_current_target()
    work = (kernel.fn.__module__, kernel.fn.__name__, arguments, dict(meta), target, _as_the_user_set_it())
    _ahead[key] = AsyncCompile.process_pool().submit(_compile_in_worker, *work)


def compiled(kernel: Any, arguments: Sequence[Any], meta: Mapping[str, Any]) -> Any:
    """Compile a kernel for the current device, or find it compiled; raises TritonError where it cannot be compiled.

    arguments: numbers, Pointer in place of tensors, and tuples of them.
    """
    ahead = _ahead.get(_key(kernel, arguments, meta))
    if ahead is not None:
        ahead.exception()  # waits; what failed there is tried again here
    _settle_key(kernel)
    with _environment(_as_the_user_set_it()):
        made = kernel.warmup(*arguments, grid=(1,), **meta)
    return made.result() if hasattr(made, "result") else made


def _key(kernel: Any, arguments: Sequence[Any], meta: Mapping[str, Any]) -> str:
    return repr((kernel.fn.__module__, kernel.fn.__name__, torch.cuda.current_device(), arguments, meta))


def _compile_in_worker(
    module: str, name: str, arguments: Sequence[Any], meta: Mapping[str, Any], target: Any, environment: Environment
) -> None:
    """Compile a kernel for a target into Triton's cache, without a device."""
    from triton.runtime import driver

    kernel, before = getattr(importlib.import_module(module), name), driver._active
    driver.set_active(_Target(target))
    _settle_key(kernel)
    try:
        with _environment(environment):
            kernel.warmup(*arguments, grid=(1,), **meta)
    finally:
        driver.set_active(before)


def _as_the_user_set_it() -> Environment:
    """Return Triton's variables, and the folder of its cache as Inductor chooses it; without Inductor's own ptxas.

    Inductor sets that one in the processes that it compiles in, at different times, and it is part of the cache's keys.
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}
    if variables.get("TRITON_PTXAS_PATH", "").startswith(os.path.dirname(torch.__file__)):
        del variables["TRITON_PTXAS_PATH"]
    return {"TRITON_CACHE_DIR": triton_cache_dir(torch.cuda.current_device()), **variables}


def _settle_key(function: Any) -> None:
    """Compute the keys of the functions that a kernel calls before its own, for Triton's cache.

    Triton 3.6 leaves their globals out of its key where their keys are computed within it, so that one kernel has
    different keys in processes that compiled other kernels before.
    """
    names, scope = function.fn.__code__.co_names, function.fn.__globals__
    for called in (scope[name] for name in names if name in scope and is_compiled(scope[name])):
        if called is not function:
            _settle_key(called)
    function.cache_key  # noqa: B018


@contextmanager
def _environment(wanted: Environment) -> Iterator[None]:
    """Let Triton see these variables and no others of its own; it remembers the version of the first ptxas it met."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("TRITON_")}
    os.environ.update(wanted)
    _forget_ptxas()
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name, None)
        os.environ.update(before)
        _forget_ptxas()


def _forget_ptxas() -> None:
    if importlib.util.find_spec("triton.backends.nvidia") is not None:
        compiler = importlib.import_module("triton.backends.nvidia.compiler")
        getattr(getattr(compiler, "get_ptxas_version", None), "cache_clear", lambda: None)()


class _Target:
    """Stands for Triton's driver where there is no device."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


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
    needed = [getattr(made.metadata, size) for size in scratch]
    programs = " * ".join(f"({size})" for size in grid)
    beside = [f"scratch({size} * {programs})" if size else "None" for size in needed]
    given = ", ".join([*(text for _, text in pairs), *beside])
    shared = f"{made.metadata.num_warps}, {made.metadata.shared}, {codes + 'O' * len(scratch)!r}"
    text = f"static_launch({name}_function, {', '.join(grid)}, {shared}, ({given},), stream)"
    # The kernel is held too: its function is gone with it.
    scope = {"static_launch": _static_launcher(), f"{name}_function": made.function, name: made}
    return text, scope | ({"scratch": _scratch} if any(needed) else {})


def _scratch(size_bytes: int) -> int:
    """Return the address of memory for a kernel that is launched next: what gets it afterwards runs behind it."""
    return torch.empty(size_bytes, dtype=torch.uint8, device="cuda").data_ptr()


def gives_scratch() -> bool:
    """Return whether kernels may need memory of their own, which descriptors of tiles lie in."""
    return _static_launcher() is not None


@contextmanager
def scratch_memory() -> Iterator[None]:
    """Let torch allocate the memory that kernels need which Triton launches, on whichever thread this is."""
    from triton.runtime import _allocation

    allocate = lambda size, alignment, stream: torch.empty(size, dtype=torch.uint8, device="cuda")  # noqa: E731
    token = _allocation._allocator.set(allocate)
    try:
        yield
    finally:
        _allocation._allocator.reset(token)


@functools.cache
def _static_launcher() -> Any:
    launcher = getattr(torch._C, "_StaticCudaLauncher", None)
    return None if torch.version.hip is not None else getattr(launcher, "_launch_kernel", None)


def _is_static(made: Any) -> bool:
    """Return whether torch's launcher in C takes a kernel: without a profile's memory, clusters or cooperation."""
    data = made.metadata
    plain = not (
        getattr(data, "profile_scratch_size", 0)
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
