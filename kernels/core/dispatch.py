"""Choose the implementation: Triton where device, dtypes and row length allow it, the op's reference elsewhere."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.capability import BFLOAT16_FROM, TENSOR_CORES_FROM, TILES_FROM, TRITON_FROM
from fastft.compat import triton_launch
from fastft.kernels.core.layout import has_unit_rows

log = logging.getLogger("fastft")
MAX_ROW = 16384  # one row is held by one program
SHARED_OPERANDS = (9, 10)  # generations, by the first number of their capability
MAX_ROW_WITH_SUMS = 8192  # and a row of float32 sums beside it: longer ones do not fit into registers

Reference = Callable[..., Tensor | tuple[Tensor, ...] | list[Tensor]]
_verdicts: dict[Hashable, bool] = {}  # by op, row length, devices and dtypes: whether Triton runs


def interpreting() -> bool:
    """Return whether Triton's interpreter replaces the compiler, so that kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_dtypes(device: torch.device) -> frozenset[torch.dtype]:
    """Return the floating-point dtypes that the Triton kernels support on this device; none where they cannot run."""
    everywhere = frozenset({torch.float32, torch.float16})
    if importlib.util.find_spec("triton") is None:
        return frozenset()
    if device.type == "cpu":
        return everywhere if interpreting() else frozenset()  # the interpreter computes bfloat16 wrongly
    if device.type != "cuda":
        return frozenset()
    if torch.version.hip is not None:
        return everywhere | {torch.bfloat16}
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_FROM:
        return frozenset()
    return everywhere if capability < BFLOAT16_FROM else everywhere | {torch.bfloat16}


@functools.cache
def has_tensor_cores(device: torch.device) -> bool:
    """Return whether tl.dot uses tensor cores here; True in the interpreter, where nothing else would be faster."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type == "cuda" or interpreting()
    return torch.cuda.get_device_capability(device) >= TENSOR_CORES_FROM


@functools.cache
def has_shared_operands(device: torch.device) -> bool:
    """Return whether tensor cores read both operands from shared memory: large tiles then need few registers."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in SHARED_OPERANDS


@functools.cache
def has_tensor_memory_accelerator(device: torch.device) -> bool:
    """Return whether a kernel may load tiles by descriptors that it makes itself."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type == "cpu" and interpreting()
    return torch.cuda.get_device_capability(device) >= TILES_FROM and triton_launch.gives_scratch()


def takes(row_length: int, longest_row: int | None, tensors: Sequence[Tensor]) -> bool:
    """Return whether the Triton kernels support a call: one device, their dtypes, rows of at most longest_row."""
    device = tensors[0].device
    dtypes = triton_dtypes(device)
    fits = longest_row is None or row_length <= longest_row
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return (
        fits and all(tensor.device == device for tensor in tensors) and all(tensor.dtype in dtypes for tensor in floats)
    )


def fill(
    outputs: Sequence[Tensor],
    arguments: Sequence[Any],
    launcher: Callable[[], Callable],
    op: Reference,
    longest_row: int | None = MAX_ROW,
    row_length: int | None = None,
) -> None:
    """Write the results of the reference op(*arguments) into outputs, by launcher()(outputs, *arguments) if possible.

    row_length: by default that of the first output.  launcher is called only where Triton runs, as it may not be
    installed.
    """
    tensors = [value for value in (*outputs, *arguments) if isinstance(value, Tensor)]
    row_length = outputs[0].shape[-1] if row_length is None else row_length
    flags = [argument if isinstance(argument, bool) else argument is None for argument in arguments]
    key = (op, row_length, *flags, *[(tensor.device, tensor.dtype) for tensor in tensors])
    if all(tensor.numel() > 0 for tensor in tensors if tensor.is_floating_point()):  # integers may tell nothing
        if key not in _verdicts:
            _verdicts[key] = takes(row_length, longest_row, tensors)
        if _verdicts[key] and _filled(key, outputs, arguments, launcher()):
            return
    results = op(*arguments)
    for output, result in zip(outputs, (results,) if isinstance(results, Tensor) else results, strict=True):
        output.copy_(result)


def _filled(
    key: tuple[Any, ...], outputs: Sequence[Tensor], arguments: Sequence[Any], launch: Callable[..., None]
) -> bool:
    by_rows = all(has_unit_rows(output) for output in outputs if output.dim() == outputs[0].dim())
    targets = outputs if by_rows else [torch.empty_like(o, memory_format=torch.contiguous_format) for o in outputs]
    if not _launched(key, outputs[0], launch, targets, *arguments):
        return False
    if not by_rows:
        for output, target in zip(outputs, targets, strict=True):
            output.copy_(target)
    return True


def launched(launch: Callable[..., None], tensors: Sequence[Tensor], *arguments: Any) -> bool:
    """Call launch(*arguments) for a part of an op; return False if its kernel cannot be compiled for these tensors."""
    key = (launch, *dict.fromkeys((tensor.device, tensor.dtype) for tensor in tensors))
    return _verdicts.setdefault(key, True) and _launched(key, tensors[0], launch, *arguments)


def _launched(key: tuple[Any, ...], beside: Tensor, launch: Callable[..., None], *arguments: Any) -> bool:
    """Launch; return False, with a warning the first time, if the kernel cannot be compiled for this device."""
    try:
        with torch.cuda.device_of(beside):  # Triton launches on the current device
            launch(*arguments)
    except Exception as error:
        from triton.errors import TritonError

        if interpreting() or not isinstance(error, TritonError):
            raise
        _verdicts[key] = False
        log.warning("%s: no Triton kernel for %s, plain PyTorch instead: %s", launch.__qualname__, key[1:], error)
        return False
    return True
