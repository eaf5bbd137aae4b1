"""Calls on lazy logits that treat each row by itself, by name: elementwise ones stay programs, reductions are computed.

A call that is in none of the tables, or whose arguments are not what the tables are for, is left to whoever asks.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastft.compat.fake_tensors import tree_map_only
from fastft.rewriter.fx.effects import names_a_write
from fastft.rewriter.runtime.row_call import Call, computed, dims_of, elementwise, program_of_call, reduced, summed
from fastft.rewriter.runtime.row_losses import class_loss, summed_loss
from fastft.rewriter.runtime.row_programs import Input, Program

_ELEMENTWISE = """
abs add addcdiv addcmul and bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bool clamp clamp_max clamp_min clip
clone detach div divide double eq erf exp exp2 expm1 float floor ge greater greater_equal gt half int invert isfinite
isinf isnan isneginf isposinf le lerp less less_equal log log10 log1p log2 logaddexp logical_and logical_not logical_or
logical_xor logsigmoid long lt masked_fill maximum minimum mul multiply nan_to_num ne neg negative not_equal or pos pow
radd rdiv reciprocal rmul rpow rsqrt rsub rtruediv sigmoid sign softplus sqrt square sub subtract tanh to true_divide
truediv type_as where xlogy xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
_ALONG = {"softmax": 0, "log_softmax": 0, "cumsum": 0}  # along an axis, which is this argument behind the tensor
_REDUCING = {
    "sum": 0, "mean": 0, "prod": 0, "amax": 0, "amin": 0, "max": 0, "min": 0, "argmax": 0, "argmin": 0, "logsumexp": 0,
    "any": 0, "all": 0, "std": 0, "var": 0, "count_nonzero": 0, "norm": 1, "linalg_vector_norm": 1, "topk": 1,
    "kthvalue": 1, "gather": 0, "take_along_dim": 1, "index_select": 0,
}  # fmt: skip
_LAST_BY_DEFAULT = ("topk", "kthvalue")
_OVER_ALL = ("sum", "mean", "any", "all")  # may run over rows too, behind the classes
_SUMMED = ("kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits")
_BY_CLASS = ("cross_entropy", "nll_loss")


_UNSTACKING = ("logsumexp", "sum", "mean", "amax", "amin", "prod")
_CUTS: dict[str, tuple[str, ...]] = {
    "__iter__": (),
    "unbind": ("dim",),
    "split": ("split_size", "dim"),
    "chunk": ("chunks", "dim"),
}


def cuts(name: str, shape: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """Return the calls that make the parts into which a call cuts [*rows, V] along its rows, each with its arguments.

    None is for any other call.
    """
    if name not in _CUTS:
        return None
    options = {**dict(zip(_CUTS[name], args, strict=False)), **kwargs}
    dim, axes = options.pop("dim", 0), len(shape)
    if type(dim) is not int or not -axes <= dim < axes or dim % axes == axes - 1:
        return None
    places = torch.arange(shape[dim])
    if name in ("__iter__", "unbind"):
        return [(torch.select, dim, place) for place in range(shape[dim])]
    parts = getattr(places, name)(*options.values())
    starts = itertools.accumulate((len(part) for part in parts), initial=0)
    return [(torch.narrow, dim, start, len(part)) for start, part in zip(starts, parts, strict=False)]


def apply(call: Call) -> Any:
    """Return the program of a call, or what was computed of it row by row; None for a call that is neither."""
    name, programs = call.name, call.programs
    first = programs[0]
    alike = all((one.shape, one.device) == (first.shape, first.device) for one in programs)
    if not alike or names_a_write(getattr(call.function, "__name__", "")):
        return None
    if call.kwargs.get("out") is not None or call.kwargs.get("inplace") or not all(map(_is_plain, call.operands)):
        return None
    if name in _BY_CLASS:
        return class_loss(call)
    if first.classes_second:
        return None
    if first.stacked:
        return _unstacked(call, first) if name in _UNSTACKING and call.args[0] is first else None
    if name == "stack":
        return _stacked(call, first)
    if name in _SUMMED:
        return summed_loss(call)
    if name in ELEMENTWISE:
        return elementwise(call)
    return _along_classes(call, name, first) if call.args and call.args[0] is first else None


def _is_plain(operand: Any) -> bool:
    return isinstance(operand, Program) or (
        type(operand) in (Tensor, torch.nn.Parameter) and operand.layout is torch.strided
    )


def _along_classes(call: Call, name: str, first: Program) -> Any:
    """Compute a call that works along the classes of its first argument."""
    if name in _ALONG:
        last = _is_last(dims_of(call, _ALONG[name]), first.rank)
        return elementwise(_along_last(call, _ALONG[name])) if last and isinstance(call.tried(), Tensor) else None
    if name == "getitem":
        return _picked(call, first)
    if name in ("matmul", "linear"):
        return _product(call, first)
    if name not in _REDUCING:
        return None
    dims = dims_of(call, _REDUCING[name])
    if _is_last(dims, first.rank) or (dims is None and name in _LAST_BY_DEFAULT):
        return reduced(call)
    return _over_all(call, dims, first) if name in _OVER_ALL else None


def _is_last(dim: Any, rank: int) -> bool:
    return type(dim) is int and dim in (-1, rank - 1)


def _along_last(call: Call, place: int) -> Call:
    """Return the same call with its axis counted from the end: its program may be moved to rows of another rank."""
    if len(call.args) > place + 1:
        return replace(call, args=(*call.args[: place + 1], -1, *call.args[place + 2 :]))
    return replace(call, kwargs={**call.kwargs, "dim": -1})


def _stacked(call: Call, first: Program) -> Program | None:
    """Return the program of tensors stacked along a new first axis, as mixtures of distributions are."""
    result, parts, dim = call.tried(), call.operands, dims_of(call, 0)
    if not isinstance(result, Tensor) or not (dim is None or (type(dim) is int and dim in (0, -first.rank - 1))):
        return None
    program = program_of_call(call.of(torch.stack, parts), first, result)
    return program and replace(program, stacked=len(parts))


def _unstacked(call: Call, first: Program) -> Program | None:
    """Return the program of a call that reduces the first axis of a stack."""
    result = call.tried()
    if dims_of(call, 0) != 0 or not isinstance(result, Tensor) or tuple(result.shape) != first.shape[1:]:
        return None
    program = program_of_call(call, first, result)
    return program and replace(program, stacked=0)


def _picked(call: Call, first: Program) -> Any:
    """Compute some classes of each row, x[..., classes], or one of each of some rows, x[rows, classes]."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if any(one is None or isinstance(one, bool) for one in index):
        return None
    if index[0] is Ellipsis and len(index) == 2:
        index = (slice(None),) * len(first.rows) + index[1:]
    if len(index) != first.rank or any(one is Ellipsis for one in index):
        return None
    *leading, last = index
    if not all(isinstance(one, slice) and one == slice(None) for one in leading):
        return _one_of_each(call, first, tuple(leading), last)
    call = call.of(operator.getitem, first, (Ellipsis, last))
    if isinstance(last, slice):
        return _sliced(call, first)
    return reduced(call) if isinstance(last, (int, list)) or (isinstance(last, Tensor) and last.dim() == 1) else None


def _sliced(call: Call, first: Program) -> Any:
    """Compute a slice of the classes, if these are few; return the program of many."""
    result = call.tried()
    if not isinstance(result, Tensor) or 2 * result.shape[-1] <= first.classes:
        return reduced(call)
    program = program_of_call(call, first, result)
    return None if program is None else replace(program, classes=result.shape[-1])


def _one_of_each(call: Call, first: Program, leading: tuple[Any, ...], last: Any) -> Any:
    """Compute x[rows, classes], where both are tensors or numbers."""
    integers = lambda one: type(one) is int or (isinstance(one, Tensor) and one.dtype == torch.int64)  # noqa: E731
    if not leading or not all(map(integers, (*leading, last))) or not isinstance(last, Tensor):
        return None
    rows, result = first.moved("getitem", (leading,), {}), call.tried()
    if rows is None or not isinstance(result, Tensor) or tuple(result.shape) != rows.rows:
        return None
    picked = computed(call.of(_class_of_each, rows, last.expand(rows.rows).unsqueeze(-1)), rows, [result])
    return None if picked is None else picked.squeeze(-1)


def _class_of_each(x: Tensor, classes: Tensor) -> Tensor:
    """Return x[..., classes] of x [..., V] and classes [..., 1], which count from the end where they are negative."""
    return torch.gather(x, -1, torch.where(classes < 0, classes + x.shape[-1], classes))


def _product(call: Call, first: Program) -> Any:
    """Compute a product of each row with a vector or a matrix, which no row has a part of its own of."""
    others = call.operands[1:]
    if not others or any(isinstance(one, Program) or one.dim() not in (1, 2) for one in others):
        return None
    if any(one.device != first.device for one in others):
        return None
    whole = lambda one: Input(one, False)  # noqa: E731
    args, kwargs = tree_map_only(Tensor, whole, (call.args, dict(call.kwargs)))
    return reduced(replace(call, args=args, kwargs=kwargs))


def _over_all(call: Call, dims: Any, first: Program) -> Any:
    """Compute a sum, mean, any or all over the classes and other axes, or over everything."""
    many = range(first.rank) if dims is None else dims
    named = [dim % first.rank for dim in many if type(dim) is int] if isinstance(many, (tuple, list, range)) else []
    if first.rank - 1 not in named or len(call.args) > 2 or not set(call.kwargs) <= {"dim", "keepdim", "dtype"}:
        return None
    result = call.tried()
    if not isinstance(result, Tensor):
        return None
    if call.name in ("any", "all"):
        partial = reduced(call.of(call.function, first, dim=-1, keepdim=True))
        return None if partial is None else call.function(partial, *call.args[1:], **call.kwargs)
    return summed(call, first, named, result)
