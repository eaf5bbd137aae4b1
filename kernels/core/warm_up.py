"""Compile the Triton kernels of ops that will be called, in threads, while something else is compiled.

A kernel is compiled when it is first launched, one after another, which takes most of a first step that finds no
cache.  Here each op is run on tensors without data, and what it would launch is compiled.  Triton's compiler leaves
Python's lock, so threads are enough.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastft.compat import fake_tensors
from fastft.kernels.core import replay
from fastft.kernels.core.registry import REGISTRY

log = logging.getLogger("fastft")

MOST_THREADS = 8  # half of a kernel's compilation holds Python's lock, which what is compiled meanwhile needs too
Call = tuple[str, tuple[Any, ...]]  # an op's name, and arguments in which a tensor is its Like


class Like(tuple):
    """A tensor's shape, strides, dtype and device."""


def like(tensor: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Like:
    """Describe a tensor of these sizes."""
    return Like((tuple(shape), tuple(stride), tensor.dtype, tensor.device))


def start(calls: Sequence[Call], device: torch.device) -> threading.Thread | None:
    """Begin to compile what these calls will launch; return a thread to join, None where nothing can be compiled.

    Whatever fails here is compiled when it is launched.
    """
    if device.type != "cuda" or torch.version.hip is not None or not calls:
        return None
    try:
        from triton import AsyncCompileMode
    except ImportError:
        return None
    arguments = (AsyncCompileMode, calls, device)
    thread = threading.Thread(target=_compile, args=arguments, name="fastft kernels", daemon=True)
    thread.start()
    return thread


def _compile(mode: Any, calls: Sequence[Call], device: torch.device) -> None:
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool, torch.cuda.device(device):
        try:
            with mode(pool, ignore_errors=True):
                for name, arguments in dict.fromkeys(calls):
                    _dry_run(name, arguments)
        except Exception as error:
            log.debug("kernels are compiled when they are launched: %s", error)


def _dry_run(name: str, arguments: tuple[Any, ...]) -> None:
    """Run an op on tensors without data, with a recorder that compiles instead of launching."""
    with fake_tensors.computing_in(fake_tensors.new_mode()), torch.no_grad(), replay.launching_by(_compile_only):
        try:
            REGISTRY[name].compute(*map(_made, arguments))
        except Exception as error:
            log.debug("not compiled ahead: %s: %s", name, error)


def _made(argument: Any) -> Any:
    if isinstance(argument, Like):
        shape, stride, dtype, device = argument
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return [_made(inner) for inner in argument] if isinstance(argument, tuple) else argument


def _compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    from triton.runtime.jit import MockTensor

    stand_in = lambda value: MockTensor(value.dtype) if isinstance(value, Tensor) else value  # noqa: E731
    kernel.warmup(*map(stand_in, args), grid=grid, **{name: stand_in(value) for name, value in meta.items()})
