"""The value that a node computes, as the fake tensor that Dynamo saw: reading, recording, comparing."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    statically_known_true,
)
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["tree_map_only"]  # what is only passed on


def value_of(argument: Any) -> Any:
    """Return the fake tensor or number that Dynamo saw a node compute; anything but a node is its own value."""
    return argument.meta.get("example_value") if isinstance(argument, Node) else argument


def set_value(node: Node, value: Any) -> None:
    """Record what ``node`` computes."""
    node.meta["example_value"] = value


def infer_example_value(node: Node) -> None:
    """Record what a new call computes, from the values of its arguments."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_of)
    with fake_mode_of(tensors_in((args, kwargs))), torch.no_grad():
        function = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        result = cast(Callable, function)(*args, **kwargs)
    # A real op writes its results in place; .data is the same tensor without that history, which a fake one has not.
    real = lambda tensor: tensor if isinstance(tensor, FakeTensor) else tensor.data  # noqa: E731
    set_value(node, tree_map_only(Tensor, real, result))


@contextlib.contextmanager
def fake_mode_of(values: Any) -> Iterator[None]:
    """Enter the mode of these fake tensors, if any; sizes stay symbols in torch 2.11's linear too."""
    with mode_of(values) or contextlib.nullcontext(), enable_python_dispatcher():
        yield


def mode_of(values: Iterable[Any]) -> FakeTensorMode | None:
    """Return the FakeTensorMode of the first fake tensor among these values, or None."""
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


_template_mode = FakeTensorMode()


def fake_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Make a fake tensor that belongs to no graph, on the CPU by default."""
    with _template_mode:
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def new_mode() -> FakeTensorMode:
    """Make a mode such as Dynamo makes for a graph, with symbols of its own."""
    return FakeTensorMode(shape_env=ShapeEnv())


def as_captured(mode: FakeTensorMode, tensor: Tensor, name: str, symbolic: Collection[int] = ()) -> Tensor:
    """Make a graph's input a fake tensor as Dynamo does; symbolic: the axes whose sizes become symbols.

    As with Dynamo, axes that are equally long in the example share a symbol.
    """
    kinds = [DimDynamic.DUCK if axis in symbolic else DimDynamic.STATIC for axis in range(tensor.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
    return mode.from_tensor(tensor, source=ConstantSource(name), symbolic_context=context)


@contextlib.contextmanager
def expecting_failures() -> Iterator[None]:
    """Keep fake tensors from logging, as errors with a traceback, calls that are tried and may fail."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


@contextlib.contextmanager
def computing_in(mode: FakeTensorMode) -> Iterator[None]:
    """Compute fake tensors of this mode."""
    with mode, enable_python_dispatcher():
        yield


def written_to(tensor: torch.Tensor) -> bool:
    """Return whether this tensor or a view of it was mutated while the graph was captured.

    An input that counts writes shares them with the inputs in the same storage, each of which counts its own.
    """
    if tensor.is_inference() or tensor._version == 0:
        return False
    if not _counts_alone(tensor):
        return True
    alike: Sequence[Tensor] = _inputs_alike(tensor) or [tensor]
    return any(one._version > _made_by_writing(one, first=one is alike[0]) for one in alike)


def _counts_alone(tensor: torch.Tensor) -> bool:
    return tensor.is_leaf and not tensor._is_view()


def _made_by_writing(tensor: torch.Tensor, *, first: bool) -> int:
    """Count the writes that faking an input takes: some if it is not all of its storage, or not the first in it."""
    return 0 if first and statically_known_true(tensor.storage_offset() == 0) else _writes_at_offset()


def _inputs_alike(tensor: torch.Tensor) -> list[FakeTensor]:
    """List the graph inputs in the same storage that are no views, in the order of faking; [] if this is none."""
    if not isinstance(tensor, FakeTensor):
        return []
    faked = list(tensor.fake_mode.fake_tensor_converter.meta_converter.tensor_memo.values())
    key = storage_key(tensor)
    fakes = [one for one in faked if isinstance(one, FakeTensor) and _counts_alone(one)]
    alike = [one for one in fakes if storage_key(one) == key]
    return alike if any(one is tensor for one in alike) else []


@functools.cache
def _writes_at_offset() -> int:
    return FakeTensorMode().from_tensor(torch.nn.Parameter(torch.zeros(2)[1:]))._version


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that a tensor and all its aliases share: the identity of their storage."""
    while functorch.is_functorch_wrapped_tensor(tensor):  # inside a vmap, say
        tensor = functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()._cdata


def empty_like_fake(value: Any, mode: FakeTensorMode) -> Any:
    """Make a fake tensor of ``mode`` with the metadata of ``value``, in storage of its own; return a size as it is."""
    if not isinstance(value, Tensor):
        return value
    with mode, torch.no_grad():
        offset = value.storage_offset()
        size, stride = tuple(value.shape), tuple(value.stride())
        if statically_known_true(offset == 0):
            result = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
        else:
            extent = offset + 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
            flat = torch.empty(extent, dtype=value.dtype, device=value.device)
            result = flat.as_strided(size, stride, offset)
    return result.requires_grad_(value.requires_grad)


def tried(function: Callable, args: Any, kwargs: Any) -> Any:
    """Return what a call on such fake tensors returns, under the autocast that is on now; None where it fails."""
    with expecting_failures(), torch.no_grad(), _template_mode:
        try:
            return function(*args, **kwargs)
        except Exception:
            return None


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in a node's value, which may be a tuple."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def leaves(value: Any) -> list[Any]:
    """List all that is in a call's arguments, however nested."""
    return tree_leaves(value)


def is_fake(value: Any) -> bool:
    """Return whether this is a tensor without data."""
    return isinstance(value, FakeTensor)


def is_plain(value: Any) -> bool:
    """Return whether this is a strided tensor of no subclass, or a size."""
    return isinstance(value, torch.SymInt) or (type(value) is FakeTensor and value.layout is torch.strided)


def kind_of_input(node: Node) -> tuple:
    """Return what compiled code assumes about an input: inputs of equal kind may be passed to the same code."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return type(value), repr(value)
    geometry = repr((tuple(value.shape), tuple(value.stride()), value.storage_offset()))
    properties = (value.dtype, value.device, value.layout, value.requires_grad, value.is_conj(), value.is_neg())
    subclass = () if is_plain(value) or isinstance(value, torch.nn.Parameter) else (id(value),)
    return type(value), geometry, *properties, stays_in_place(node), *subclass


def stays_in_place(node: Node) -> str | None:
    """Return Dynamo's type of static input (parameters and buffers keep their address), or None."""
    return (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
