"""Define ops: one call of define registers an op, its fake, FLOP formula and dispatch, and enters it in REGISTRY.

The tests and the benchmarks find every op in REGISTRY and draw inputs for it from the cases of its entry.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

from fastft.kernels.core import dispatch

Results = Tensor | tuple[Tensor, ...] | list[Tensor]
Fill = Callable[[Sequence[Tensor], Sequence[Any]], None]
Shapes = Mapping[str, str]
Choice = Mapping[str, Any]
Case = tuple[Shapes, Choice]


@dataclass(frozen=True)
class Entry:
    """What is known about an op.

    reference: plain PyTorch with the op's signature, differentiable if the op is: the specification.
    cases: what it may be called with: the shapes of its tensors by parameter, and the other arguments.  Sizes are
        names or sums and products of them, "..." is any number of leading ones, as in {"x": "... D", "weight": "D"} or
        {"q": "B S H 2*R+P"}.  A tensor left out is None.
        "weights.0" and "weights.1" are the elements of a list, which is empty where none is named, and "bytes N" is
        uint8.  A list of names among the other arguments is one of their sizes.
    statistics: tensors that are float32 whatever the others are (float64 beside float64).
    alike: tensors, or lists of them, that share one dtype.
    gradients: the tensors, or lists of them, that the op has a gradient for; () for an op without autograd.
    fill: writes the results of a call into tensors that outputs made, as the op does: (targets, arguments).
    run: the op's implementation, an engine of torch's included.
    scratch: returns from a call's arguments the most bytes that it allocates beside its results; None if it is nothing.
    planned: whether a call's launches depend on its arguments' metadata alone (launch_plan.py).
    launches: where its Triton kernels are launched, as ``file.function``.
    """

    op: CustomOpDef
    reference: Callable[..., Results]
    outputs: Callable[..., Results]
    fill: Fill
    run: Callable[..., Results]
    cases: tuple[Case, ...]
    statistics: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    parameters: tuple[str, ...] = field(default=())
    lists: frozenset[str] = frozenset()
    scratch: Callable[..., int] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    planned: bool = True
    launches: str = ""

    def compute(self, *arguments: Any) -> Results:
        """Compute the op's results with our own kernels."""
        results = self.outputs(*arguments)
        self.fill((results,) if isinstance(results, Tensor) else results, arguments)
        return results

    def complete(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return all arguments of a call in order, defaults included."""
        return (*args, *(kwargs.get(name, self.defaults.get(name)) for name in self.parameters[len(args) :]))

    def arguments(self, tensors: Mapping[str, Tensor], choice: Choice) -> tuple[Any, ...]:
        """Arrange a call's arguments in order; tensors come by name, those of a list as "weights.0"."""
        lists: dict[str, list[Tensor]] = {}
        for name, tensor in tensors.items():
            lists.setdefault(parameter_of(name), []).append(tensor)
        values = {**choice, **lists, **tensors}
        return tuple(values.get(name, () if name in self.lists else None) for name in self.parameters)


def parameter_of(name: str) -> str:
    """Return the parameter that a tensor belongs to: weights, for "weights.0"."""
    return name.partition(".")[0]


REGISTRY: dict[str, Entry] = {}
_library = torch.library.Library("fastft", "FRAGMENT")


def define(
    name: str,
    reference: Callable[..., Results],
    outputs: Callable[..., Results],
    launcher: str | Fill,
    *,
    cases: Iterable[Case],
    flops: int | Callable[..., int],
    longest_row: int | None = dispatch.MAX_ROW,
    row_length: Callable[..., int] | None = None,
    statistics: Sequence[str] = (),
    alike: Sequence[str] = (),
    gradients: Sequence[str] = (),
    engine: Callable[..., Results | None] | None = None,
    multiplies: bool = False,
    scratch: Callable[..., int] | None = None,
    planned: bool = True,
) -> CustomOpDef:
    """Define the op ``fastft::name`` and enter it in REGISTRY; the caller adds autograd.

    outputs: allocates empty results for the same arguments, or raises: the fake, and what the real op writes into.
    launcher: ``file.function`` in this folder that launches Triton: (outputs, *arguments), imported when first needed.
        Or a function that fills the outputs by itself, as Entry.fill.
    flops: floating-point operations for each element of the first tensor, casts not counted; or a function of the
        arguments, in which a tensor is its shape.
    longest_row: the longest last axis that the Triton kernels take.
    row_length: returns from the arguments what longest_row limits; by default it is the last axis of the first result.
    engine: called first; returns the results of one of torch's own kernels where that is the fastest, laid out as those
        of outputs, or None.
    multiplies: the Triton kernels multiply tiles (tl.dot), and only run on tensor cores.
    scratch: returns from the arguments the most bytes that a call allocates beside its results.
    planned: whether the calls depend on the arguments' metadata alone (launch_plan.py).
    """

    def fill(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
        if callable(launcher):
            launcher(targets, arguments)
        else:
            longest = 0 if multiplies and not dispatch.has_tensor_cores(arguments[0].device) else longest_row
            length = row_length(*arguments) if row_length is not None else targets[0].shape[-1]
            dispatch.fill(targets, arguments, lambda: load(launcher), reference, longest, length)

    def run(*arguments: Any) -> Results:
        if engine is not None and (computed := engine(*arguments)) is not None:
            return computed
        compute, device = REGISTRY[f"fastft::{name}"].compute, arguments[0].device.type
        if torch.is_autocast_enabled(device):  # an op says itself what it computes in: its products are not cast
            with torch.autocast(device, enabled=False):
                return compute(*arguments)
        return compute(*arguments)

    op = torch.library.custom_op(
        f"fastft::{name}", run, mutates_args=(), schema=torch.library.infer_schema(reference, mutates_args=())
    )
    # On a GPU without custom_op's own wrapper, whose search for aliases costs more than the launches (seen in a
    # profile with torch 2.11); tests/kernels/test_ops.py searches instead.
    _library.impl(name, run, "CUDA")
    op.register_fake(outputs)

    def count(*shapes: Any, **_: Any) -> int:
        if callable(flops):
            return flops(*shapes)
        return flops * prod(next(shape for shape in shapes if isinstance(shape, torch.Size)))

    register_flop_formula(getattr(torch.ops.fastft, name))(count)
    parameters = inspect.signature(reference).parameters
    REGISTRY[f"fastft::{name}"] = Entry(
        op, reference, outputs, fill, run, tuple(cases), tuple(statistics), tuple(alike), tuple(gradients),
        tuple(parameters),
        frozenset(name for name, parameter in parameters.items() if "Sequence" in str(parameter.annotation)), scratch,
        {name: value.default for name, value in parameters.items() if value.default is not value.empty}, planned,
        launcher if isinstance(launcher, str) else f"{launcher.__module__.rpartition('.')[2]}.{launcher.__name__}",
    )  # fmt: skip
    return op


def cases(shapes: Sequence[Shapes], choices: Sequence[Choice] = ({},)) -> tuple[Case, ...]:
    """Combine each of these shapes with each of these choices."""
    return tuple(itertools.product(shapes, choices))


def require(condition: Any, message: Callable[[], str]) -> None:
    """Call torch._check, but skip its cost where the condition is known to be true: an op has up to thirty of them."""
    if condition is not True:
        torch._check(condition, message)


def empty_gradients(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    """Allocate a gradient for each tensor that needs one, empty and in one piece; needed: a mark for each."""
    require(len(needed) == len(tensors), lambda: f"{len(needed)} marks for {len(tensors)} tensors")
    chosen = [tensor for tensor, need in zip(tensors, needed, strict=True) if need and tensor is not None]
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in chosen]


def load(launcher: str) -> Callable[..., None]:
    """Import and return the function that ``file.function`` names; Triton is imported here and not before."""
    file, _, function = launcher.rpartition(".")
    return getattr(_module(file), function)


@functools.cache
def _module(file: str) -> ModuleType:
    return importlib.import_module(f"fastft.kernels.{file}")


def bytes_moved(values: Iterable[Any]) -> int:
    """Count the bytes that a call has to read and write: each element of tensors once.  Expanded axes cost nothing."""
    total_bytes = 0
    for value in values:
        if isinstance(value, Tensor):
            sizes = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride != 0]
            total_bytes += prod(sizes) * value.element_size()
    return total_bytes


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float32, or float64 where one of these is float64."""
    result = torch.float32
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result
