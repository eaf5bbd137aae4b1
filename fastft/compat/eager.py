"""Private parts of torch that a step runs through: tensors, autograd, torch functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cuda as empty_strided_cuda  # type: ignore[attr-defined]
from torch._C._dynamo.guards import _reinterpret_tensor as reinterpret_tensor  # type: ignore[attr-defined]
from torch._C._dynamo.guards import assert_size_stride
from torch.autograd import profiler
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TorchDispatchMode",
    "assert_size_stride",
    "empty_strided_cuda",
    "reinterpret_tensor",
]  # what is only passed on


as_plain_tensors = torch._C.DisableTorchFunctionSubclass  # within it no __torch_function__ is asked


def without_storage(kind: type, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """Make a tensor of this subclass that holds no memory."""
    return Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)


def version(tensor: Tensor) -> int:
    """Count the in-place writes to this tensor and its views so far."""
    return tensor._version


def base(tensor: Tensor) -> Tensor:
    """Return the tensor that this is a view of, itself if of none."""
    return tensor if tensor._base is None else tensor._base


def in_forward_mode() -> bool:
    """Return whether forward-mode differentiation is on, for which the ops have no formula."""
    return torch.autograd.forward_ad._current_level >= 0


def same_addresses(values: Sequence[Any], pointers: list[int | None], places: list[int]) -> bool:
    """Return whether the tensors at these places lie at these addresses; one call for thousands of tensors."""
    return torch._C._tensors_data_ptrs_at_indices_equal(list(values), pointers, places)


def clone_all(tensors: list[Tensor]) -> list[Tensor]:
    """Copy each tensor, in few launches."""
    grouped = [tensor for tensor in tensors if tensor.is_floating_point()]
    copied = iter(torch._foreach_mul(grouped, 1.0) if grouped else [])
    return [next(copied) if tensor.is_floating_point() else tensor.clone() for tensor in tensors]


def all_given(func: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a call that asks a subclass, with those that the caller gave and torch left out.

    torch's l1_loss does not pass its weight on: it is read from that function's frame.
    """
    frame: Any = sys._getframe(1) if func is F.l1_loss else None
    while frame is not None and frame.f_code is not func.__code__:
        frame = frame.f_back
    weight = None if frame is None else frame.f_locals.get("weight")
    return dict(kwargs) if weight is None else {**kwargs, "weight": weight}


def has_saved_tensors_hooks() -> bool:
    """Return whether torch.autograd.graph.saved_tensors_hooks are active; autograd calls only the innermost."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def after_backward(call: Callable[[], None]) -> None:
    """Call this once the running backward has computed all gradients."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def backward_id() -> int:
    """Return which run of autograd's engine this is in; -1 outside of any."""
    return torch._C._current_graph_task_id()


def is_profiling() -> bool:
    """Return whether a profiler of torch runs, in this thread or another."""
    return profiler._is_profiler_enabled


def is_emitting_nvtx() -> bool:
    """Return whether that profiler is torch.autograd.profiler.emit_nvtx, in this thread."""
    return torch._C._autograd._profiler_type() == torch._C._profiler.ActiveProfilerType.NVTX
