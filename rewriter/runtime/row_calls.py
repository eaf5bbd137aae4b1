"""Calls on lazy logits that treat each row by itself, by name: elementwise ones stay programs, reductions are computed.

A call that is in none of the tables, or whose arguments are not what the tables are for, is left to whoever asks.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastft.compat.fake_tensors import fake_tensor, leaves, tree_map_only, tried
from fastft.kernels.core.registry import wide
from fastft.rewriter.fx.effects import names_a_write
from fastft.rewriter.runtime.row_programs import Input, Node, Program, autocast_now, evaluate

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
        """Return what the call would return, as fake tensors; None if it would fail."""
        as_tensor = lambda one: one.tensor if isinstance(one, Input) else fake_tensor(one.shape, one.dtype, one.device)  # noqa: E731
        return tried(self.function, *tree_map_only((Program, Input), as_tensor, (self.args, dict(self.kwargs))))

    def of(self, function: Callable, *args: Any, **kwargs: Any) -> Call:
        """Return another call."""
        return replace(self, function=function, args=args, kwargs=kwargs)


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
        return _class_loss(call)
    if first.classes_second:
        return None
    if first.stacked:
        return _unstacked(call, first) if name in _UNSTACKING and call.args[0] is first else None
    if name == "stack":
        return _stacked(call, first)
    if name in _SUMMED:
        return _summed_loss(call)
    if name in ELEMENTWISE:
        return _elementwise(call)
    return _along_classes(call, name, first) if call.args and call.args[0] is first else None


def _is_plain(operand: Any) -> bool:
    return isinstance(operand, Program) or (
        type(operand) in (Tensor, torch.nn.Parameter) and operand.layout is torch.strided
    )


def _along_classes(call: Call, name: str, first: Program) -> Any:
    """Compute a call that works along the classes of its first argument."""
    if name in _ALONG:
        return _elementwise(call) if _is_last(_dims(call, _ALONG[name]), first.rank) else None
    if name == "getitem":
        return _picked(call, first)
    if name in ("matmul", "linear"):
        return _product(call, first)
    if name not in _REDUCING:
        return None
    dims = _dims(call, _REDUCING[name])
    if _is_last(dims, first.rank) or (dims is None and name in _LAST_BY_DEFAULT):
        return _reduced(call)
    return _over_all(call, dims, first) if name in _OVER_ALL else None


def _dims(call: Call, place: int) -> Any:
    """Return the axes that a call names, at this place behind its first argument; None if it names none."""
    rest = call.args[1:]
    dims = rest[place] if len(rest) > place else call.kwargs.get("dim")
    return dims[0] if isinstance(dims, (tuple, list)) and len(dims) == 1 else dims


def _is_last(dim: Any, rank: int) -> bool:
    return type(dim) is int and dim in (-1, rank - 1)


def _operand(one: Program | Tensor | Input, like: Program) -> Node | Input | None:
    """Return what stands for an argument: of each row, or of all; None for one that fits no row."""
    if not isinstance(one, Tensor):
        return one.root if isinstance(one, Program) else one
    shape = (1,) * (like.rank - one.dim()) + tuple(one.shape)
    if len(shape) != like.rank or any(size not in (1, row) for size, row in zip(shape, like.rows, strict=False)):
        return None
    if one.device != like.device and one.dim() > 0:
        return None
    by_row = any(size != 1 for size in shape[:-1])
    return Input(one.expand(*like.rows, shape[-1]) if by_row else one, by_row)


def _program(call: Call, like: Program, result: Tensor | Sequence[Tensor]) -> Program | None:
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


def _elementwise(call: Call) -> Program | None:
    """Return the program of a call that returns another tensor of the same shape."""
    like, result = call.programs[0], call.tried()
    if not isinstance(result, Tensor) or tuple(result.shape) != like.shape or result.device != like.device:
        return None
    return _program(call, like, result)


def _reduced(call: Call) -> Any:
    """Compute a call that leaves no more than a few numbers of each row."""
    like, result = call.programs[0], call.tried()
    results = [result] if isinstance(result, Tensor) else list(result or ())
    rows = len(like.rows)
    if not results or any(tuple(one.shape[:rows]) != like.rows or one.device != like.device for one in results):
        return None
    computed = _computed(call, like, results)
    return computed if computed is None or isinstance(result, Tensor) else type(result)(computed)


def _computed(call: Call, like: Program, results: Sequence[Tensor]) -> Any:
    """Compute the program that ends in this call, None if some argument fits no row."""
    program = _program(call, like, results)
    if program is None:
        return None
    with torch.set_grad_enabled(program.requires_grad):
        return evaluate(program, call.chunk_bytes)


def _stacked(call: Call, first: Program) -> Program | None:
    """Return the program of tensors stacked along a new first axis, as mixtures of distributions are."""
    result, parts = call.tried(), call.operands
    if not isinstance(result, Tensor) or tuple(result.shape) != (len(parts), *first.shape):
        return None
    program = _program(call, first, result)
    return program and replace(program, stacked=len(parts))


def _unstacked(call: Call, first: Program) -> Program | None:
    """Return the program of a call that reduces the first axis of a stack."""
    result = call.tried()
    if _dims(call, 0) != 0 or not isinstance(result, Tensor) or tuple(result.shape) != first.shape[1:]:
        return None
    program = _program(call, first, result)
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
    return _reduced(call) if isinstance(last, (int, list)) or (isinstance(last, Tensor) and last.dim() == 1) else None


def _sliced(call: Call, first: Program) -> Any:
    """Compute a slice of the classes, if these are few; return the program of many."""
    result = call.tried()
    if not isinstance(result, Tensor) or 2 * result.shape[-1] <= first.classes:
        return _reduced(call)
    program = _program(call, first, result)
    return None if program is None else replace(program, classes=result.shape[-1])


def _one_of_each(call: Call, first: Program, leading: tuple[Any, ...], last: Any) -> Any:
    """Compute x[rows, classes], where both are tensors or numbers."""
    integers = lambda one: type(one) is int or (isinstance(one, Tensor) and one.dtype == torch.int64)  # noqa: E731
    if not leading or not all(map(integers, (*leading, last))) or not isinstance(last, Tensor):
        return None
    rows, result = first.moved("getitem", (leading,), {}), call.tried()
    if rows is None or not isinstance(result, Tensor) or tuple(result.shape) != rows.rows:
        return None
    picked = _computed(call.of(_class_of_each, rows, last.expand(rows.rows).unsqueeze(-1)), rows, [result])
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
    return _reduced(replace(call, args=args, kwargs=kwargs))


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
        partial = _reduced(call.of(call.function, first, dim=-1, keepdim=True))
        return None if partial is None else call.function(partial, *call.args[1:], **call.kwargs)
    return _summed(call, first, named, result)


def _summed(call: Call, program: Program, dims: Sequence[int], result: Tensor, reduction: str = "") -> Tensor | None:
    """Sum a program over these axes, in float32 at least; for a mean, divide.  result: as a fake tensor."""
    dtype = torch.promote_types(wide(program.dtype), result.dtype) if program.dtype.is_floating_point else result.dtype
    partial = _reduced(call.of(torch.sum, program, dim=-1, keepdim=True, dtype=dtype))
    if partial is None:
        return None
    total = partial.sum(list(dims), keepdim=call.kwargs.get("keepdim", False))
    if "mean" in (call.name, reduction):
        total = total / (math.prod(program.shape) / max(1, math.prod(result.shape)))
    elif reduction == "batchmean":
        total = total / program.shape[0]
    return total.to(result.dtype)


def _bound(call: Call) -> dict[str, Any] | None:
    """Return the arguments of a loss by name, None for a call that is deprecated or not of torch.nn.functional."""
    try:
        bound = inspect.signature(call.function).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    options = dict(bound.arguments)
    deprecated = options.pop("size_average", None), options.pop("reduce", None)
    return options if deprecated == (None, None) and isinstance(options.get("reduction"), str) else None


def _summed_loss(call: Call) -> Any:
    """Compute a loss that is a sum over elements, or return the program of its summands."""
    options, result = _bound(call), call.tried()
    if options is None or not isinstance(result, Tensor):
        return None
    reduction = options.pop("reduction")
    summands = _elementwise(call.of(call.function, **options, reduction="none"))
    if summands is None or reduction == "none":
        return summands
    return _summed(call, summands, range(summands.rank), result, reduction)


def _class_loss(call: Call) -> Any:
    """Compute a cross entropy or nll_loss of class numbers or probabilities, with weights of classes."""
    options, result = _bound(call), call.tried()
    if options is None or not isinstance(result, Tensor) or not isinstance(options["input"], Program):
        return None
    logits, target, reduction = options.pop("input"), options.pop("target"), options.pop("reduction")
    numbers = isinstance(target, Tensor) and tuple(target.shape) == logits.rows and not target.is_floating_point()
    shares = not isinstance(target, Tensor) or (tuple(target.shape) == logits.shape and not logits.classes_second)
    if (logits.rank != 2 and not logits.classes_second) or not (numbers or shares):
        return None  # here the classes have to be the second axis
    by_token = call.of(
        functools.partial(_losses_of_rows, call.function), replace(logits, classes_second=False),
        target.unsqueeze(-1) if numbers else target, numbers, **options,
    )  # fmt: skip
    losses = _computed(by_token, by_token.args[0], [result])
    if losses is None or reduction == "none":
        return losses
    total = losses.sum(dtype=wide(result.dtype))
    return (total / _count(target, options, logits) if reduction == "mean" else total).to(result.dtype)


def _losses_of_rows(loss: Callable, x: Tensor, target: Tensor, numbers: bool, **options: Any) -> Tensor:
    """Return the loss of each row of x [..., V]; target: class numbers [..., 1], or shares [..., V]."""
    flat = target.reshape(-1) if numbers else target.reshape(-1, target.shape[-1])
    return loss(x.reshape(-1, x.shape[-1]), flat, reduction="none", **options).reshape(x.shape[:-1])


def _count(target: Any, options: Mapping[str, Any], logits: Program) -> Tensor | int:
    """Return what the mean of a loss divides by: rows, or the weights of those that are not ignored."""
    if not isinstance(target, Tensor) or target.is_floating_point():
        return math.prod(logits.rows)
    valid, weight = target != options["ignore_index"], options["weight"]
    if weight is None:
        return valid.sum()
    return torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum(dtype=wide(weight.dtype))
