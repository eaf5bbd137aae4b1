"""A call on lazy logits with programs in their places: the program that ends in it, or what it leaves of each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastft.compat.fake_tensors import fake_tensor, leaves, tree_map_only, tried
from fastft.kernels.core.registry import wide
from fastft.rewriter.fx import autocast
from fastft.rewriter.runtime.row_programs import Input, Node, NotByRow, Program, autocast_now, evaluate

_tried: dict[Any, Any] = {}  # results by function, kinds of operands and all else that is given
_MOST_TRIED = 4096


def _kind(operand: Program | Tensor | Input) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    one = operand.tensor if isinstance(operand, Input) else operand
    return tuple(one.shape), one.dtype, one.device


@dataclass(frozen=True)
class Call:
    """A call of the user's, with programs in the places of lazy logits; Inputs say how rows read a tensor."""

    function: Callable
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    chunk_bytes: int

    @property
    def name(self) -> str:
        """The function's name, without the underscores of an operator's."""
        return getattr(self.function, "__name__", "").strip("_")

    @property
    def operands(self) -> list[Any]:
        """All programs, tensors and Inputs among the arguments."""
        return [one for one in leaves((self.args, dict(self.kwargs))) if isinstance(one, (Program, Tensor, Input))]

    @property
    def programs(self) -> list[Program]:
        """All programs among the arguments."""
        return [one for one in self.operands if isinstance(one, Program)]

    def tried(self) -> Any:
        """Return what the call would return, as fake tensors, None if it would fail; calls of a kind are tried once."""
        operands, given = (Program, Tensor, Input), (self.args, dict(self.kwargs))
        key = self.function, repr(tree_map_only(operands, _kind, given)), autocast.state()
        if key not in _tried:
            if len(_tried) >= _MOST_TRIED:
                _tried.clear()
            _tried[key] = tried(self.function, *tree_map_only(operands, lambda one: fake_tensor(*_kind(one)), given))
        return _tried[key]

    def of(self, function: Callable, *args: Any, **kwargs: Any) -> Call:
        """Return another call."""
        return replace(self, function=function, args=args, kwargs=kwargs)


def dims_of(call: Call, place: int) -> Any:
    """Return the axes that a call names, at this place behind its first argument; None if it names none."""
    rest = call.args[1:]
    dims = rest[place] if len(rest) > place else call.kwargs.get("dim")
    return dims[0] if isinstance(dims, (tuple, list)) and len(dims) == 1 else dims


def _operand(one: Program | Tensor | Input, like: Program) -> Node | Input | None:
    """Return what stands for an argument: of each row, or of all; None for one that fits no row."""
    if not isinstance(one, Tensor):
        return one.root if isinstance(one, Program) else one
    shape = (1,) * (like.rank - one.dim()) + tuple(one.shape)
    if len(shape) != like.rank or any(size not in (1, row) for size, row in zip(shape, like.rows, strict=False)):
        return None
    if one.device != like.device and one.dim() > 0:
        return None
    by_row = any(size != 1 for size in shape[:-1]) or tuple(one.shape[:-1]) == like.rows != ()
    return Input(one.expand(*like.rows, shape[-1]) if by_row else one, by_row)


def program_of_call(call: Call, like: Program, result: Tensor | Sequence[Tensor]) -> Program | None:
    """Return the program that ends in this call, None if some argument fits no row.  result: as fake tensors."""
    found = {id(one): _operand(one, like) for one in call.operands}
    if any(one is None for one in found.values()):
        return None
    kinds = (Program, Tensor, Input)
    args, kwargs = tree_map_only(kinds, lambda one: found[id(one)], (call.args, dict(call.kwargs)))
    results = [result] if isinstance(result, Tensor) else result
    leads = any(map(_is_trained, call.operands))
    trained = leads and torch.is_grad_enabled() and any(one.is_floating_point() for one in results)
    row_bytes = sum(one.numel() * one.itemsize for one in results) // max(1, math.prod(like.rows))
    node = Node(call.function, args, kwargs, autocast_now(like.device.type), row_bytes)
    program = replace(like, root=node, dtype=results[0].dtype, requires_grad=trained)
    if leads and not trained and isinstance(result, Tensor):
        return replace(program, requires_grad=True).detached()  # in a larger program it is a constant
    return program


def _is_trained(one: Program | Tensor | Input) -> bool:
    return (one.tensor if isinstance(one, Input) else one).requires_grad


def elementwise(call: Call) -> Program | None:
    """Return the program of a call that returns another tensor of the same shape."""
    like, result = call.programs[0], call.tried()
    if not isinstance(result, Tensor) or tuple(result.shape) != like.shape or result.device != like.device:
        return None
    return program_of_call(_lasting(call, like), like, result)


def _lasting(call: Call, like: Program) -> Call:
    """Return the same call with operands that its program may keep: it may be moved, and they be written to, later.

    Those [1, ..., k] become [k], which fits rows of any rank; small ones without gradients are copied.
    """

    def kept(one: Tensor) -> Tensor:
        small = one.numel() <= like.classes and not one.requires_grad and not isinstance(one, torch.nn.Parameter)
        one = one.clone() if small else one
        same = one.dim() < 2 or one.numel() != one.shape[-1] or tuple(one.shape[:-1]) == like.rows
        return one if same else one.reshape(one.shape[-1])

    args, kwargs = tree_map_only(Tensor, kept, (call.args, dict(call.kwargs)))
    return replace(call, args=args, kwargs=kwargs)


def reduced(call: Call) -> Any:
    """Compute a call that leaves no more than a few numbers of each row."""
    like, result = call.programs[0], call.tried()
    results = [result] if isinstance(result, Tensor) else list(result or ())
    rows = len(like.rows)
    if not results or any(tuple(one.shape[:rows]) != like.rows or one.device != like.device for one in results):
        return None
    values = computed(call, like, results)
    return values if values is None or isinstance(result, Tensor) else type(result)(values)


def computed(call: Call, like: Program, results: Sequence[Tensor]) -> Any:
    """Compute the program that ends in this call, None if some argument fits no row, or a result no chunk of rows."""
    program = program_of_call(call, like, results)
    if program is None:
        return None
    try:
        with torch.set_grad_enabled(program.requires_grad):
            return evaluate(program, call.chunk_bytes)
    except NotByRow:
        return None


def summed(call: Call, program: Program, dims: Sequence[int], result: Tensor, reduction: str = "") -> Tensor | None:
    """Sum a program over these axes, in float32 at least; for a mean, divide.  result: as a fake tensor."""
    dtype = torch.promote_types(wide(program.dtype), result.dtype) if program.dtype.is_floating_point else result.dtype
    partial = reduced(call.of(torch.sum, program, dim=-1, keepdim=True, dtype=dtype))
    if partial is None:
        return None
    total = partial.sum(list(dims), keepdim=call.kwargs.get("keepdim", False))
    if "mean" in (call.name, reduction):
        total = total / (math.prod(program.shape) / max(1, math.prod(result.shape)))
    elif reduction == "batchmean":
        total = total / program.shape[0]
    return total.to(result.dtype)
