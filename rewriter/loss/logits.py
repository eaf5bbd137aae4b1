"""Follow logits to their loss: an operation on their rows is the same operation on the rows of the hidden states.

They are followed through casts, scales, a softcap, slices along tokens and reshapes that keep the vocabulary whole; a
loss then needs no logits.  The same functions follow a graph (losses.py) and tensors (runtime/lazy_logits.py).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch

from fastft.compat.fake_tensors import value_of
from fastft.compat.symbolic import statically_known_true
from fastft.kernels.head_call import BY_ROW
from fastft.rewriter.fx.metadata import same_sizes
from fastft.rewriter.loss.head import Call, Logits, cast

NEVER = -(2**62)  # an ignore_index that no label has
_NAMED_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
_CASTS_BY_ARGUMENT = ("to", "type", "type_as")  # the dtype is among their arguments
CASTS = frozenset((*_NAMED_CASTS, *_CASTS_BY_ARGUMENT))
_NUMBERS = {"mul": "mul", "__mul__": "mul", "__rmul__": "mul", "multiply": "mul", "div": "div", "truediv": "div"}
_NUMBERS |= {"__truediv__": "div", "divide": "div", "true_divide": "div"}
_LEADING: dict[str, tuple[str, ...]] = {  # functions of leading axes, which are their arguments named dim*
    "flatten": ("dim_start", "dim_end"),
    "select": ("dim", "index"),
    "narrow": ("dim", "start", "length"),
    "unsqueeze": ("dim",),
    "squeeze": ("dim",),
}
_RENAMED = {"start_dim": "dim_start", "end_dim": "dim_end"}


def follow(
    name: str, logits: Logits, args: Sequence[Any], kwargs: Mapping[str, Any], call: Call,
    dtype: torch.dtype | None = None,
) -> Logits | None:  # fmt: skip
    """Return the logits that a call of this name makes of ``logits``, its first argument; None if its result is none.

    args: after the first.  dtype: of the result, where it is known.
    """
    if logits.is_kl_terms:
        return None
    if name == "kl_div":
        return _each_divergence(logits, args, kwargs)
    if name == "log_softmax":
        return None if logits.is_log_probs else _log_softmax(logits, args, kwargs, dtype)
    if name in _NUMBERS or name == "tanh" or name in CASTS:
        return None if logits.is_log_probs else _elementwise(name, logits, args, kwargs, dtype)
    if name in ("contiguous", "clone"):
        return logits if not args and set(kwargs) <= {"memory_format"} else None
    if logits.classes_second:
        return None
    if _exchanges_last(name, args, kwargs, logits.rank):
        return replace(logits, classes_second=True)
    moved = on_rows(name, logits.rows, logits.head.classes, logits.head.features, args, kwargs)
    if moved is None:
        return None
    function, moved_args = moved
    return replace(logits, hidden=call(function, logits.hidden, *moved_args))


def _log_softmax(
    logits: Logits, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype | None
) -> Logits | None:
    """Follow torch.log_softmax, the function of torch.nn.functional or the method."""
    if len(args) > 3 or not set(kwargs) <= {"dim", "dtype", "_stacklevel"} or logits.classes_second:
        return None
    if (args[0] if args else kwargs.get("dim")) not in (-1, logits.rank - 1):
        return None
    dtypes = [argument for argument in (*args[1:], kwargs.get("dtype")) if isinstance(argument, torch.dtype)]
    wide = dtype or (dtypes or [logits.dtype])[0]  # autocast widens too
    wider = logits if wide == logits.dtype else logits.with_step("to", wide, wide)
    return wider.with_step("log_softmax") if wider.softmax_form() is not None else None


def _elementwise(
    name: str, logits: Logits, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype | None
) -> Logits | None:
    """Follow tanh, a cast, or a multiplication or division by a number."""
    if name == "tanh":
        return logits.with_step("tanh") if not args and not kwargs else None
    if name in _NUMBERS:
        is_number = len(args) == 1 and not kwargs and type(args[0]) in (int, float)
        kind = _NUMBERS[name]
        if not is_number or (kind == "div" and args[0] == 0):
            return None
        return logits.with_step(kind, float(args[0]))
    if name in _CASTS_BY_ARGUMENT and not args and not kwargs:
        return None
    wanted = dtype or _cast_of(name, logits, args, kwargs)
    return logits.with_step("to", wanted, wanted) if wanted is not None and wanted.is_floating_point else None


def _cast_of(name: str, logits: Logits, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype that a cast asks for; None if it asks for another device, or for anything else."""
    dtype, device = _NAMED_CASTS.get(name, logits.dtype), value_of(logits.hidden).device
    if not set(kwargs) <= {"dtype", "device", "other", "non_blocking", "copy"}:
        return None
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, torch.Tensor) and argument.device == device:
            dtype = argument.dtype
        elif isinstance(argument, (str, torch.device)):
            asked = torch.device(argument)
            if asked.type != device.type or asked.index not in (None, device.index):
                return None
        elif argument is not None and not isinstance(argument, bool):  # non_blocking and copy change no number
            return None
    return dtype


def _exchanges_last(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int) -> bool:
    """Tell whether a call transposes the last two of three axes."""
    if rank != 3 or kwargs:
        return False
    if name in ("transpose", "swapaxes", "swapdims"):
        return all(type(dim) is int for dim in args) and sorted(dim % rank for dim in args) == [1, 2]
    dims = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    return name == "permute" and [dim % rank for dim in dims if type(dim) is int] == [0, 2, 1]


_DEFAULTS: dict[str, Any] = {
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
}
_LOSSES: dict[str, dict[str, Any]] = {
    "nll_loss": _DEFAULTS,
    "cross_entropy": {**_DEFAULTS, "label_smoothing": 0.0},
}  # after the target
Moved = tuple["Callable | str", Sequence[Any]]


def on_rows(
    name: str, rows: Sequence[Any], classes: int, features: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Moved | None:
    """Return the call that does to a tensor [*rows, features] what this call does to one [*rows, classes], or None.

    None is for calls that do more than move rows.
    """
    rank = len(rows) + 1
    if name in ("getitem", "__getitem__"):
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        return (operator.getitem, (index,)) if _keeps_last(index, rank) else None
    if name in ("view", "reshape"):
        return _reshape(rows, classes, features, args, kwargs)
    names = _LEADING.get(name)
    if names is None or len(args) > len(names):
        return None
    options = {"dim_start": 0, "dim_end": -1} if name == "flatten" else {}
    options |= dict(zip(names, args, strict=False)) | {_RENAMED.get(key, key): value for key, value in kwargs.items()}
    if set(options) != set(names):
        return None
    axes = rank + (name == "unsqueeze")
    for key in [parameter for parameter in names if parameter.startswith("dim")]:
        dim = options[key]
        if type(dim) is not int or not -axes <= dim < axes or dim % axes == axes - 1:
            return None
        options[key] = dim % axes
    return getattr(torch, name), [options[parameter] for parameter in names]


def _keeps_last(index: tuple[Any, ...], rank: int) -> bool:
    """Tell whether an index takes all of the last axis, unchanged."""
    taken = 0
    for item in index:
        if isinstance(item, bool):
            return False
        value = value_of(item)
        mask = isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)
        taken += 0 if item is None or item is Ellipsis else value.dim() if mask else 1
    if taken >= rank or any(item is Ellipsis for item in index[:-1]):
        return type(index[-1]) is slice and index[-1] == slice(None)
    return index[-1] is not None or taken + 1 < rank


def _reshape(
    rows: Sequence[Any], classes: int, features: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Moved | None:
    """Follow view and reshape, both as a reshape: the strides of the hidden states may require a copy."""
    sizes = list(args[0]) if args and isinstance(args[0], (tuple, list)) else list(args)
    if kwargs or not sizes or not all(isinstance(value_of(size), (int, torch.SymInt)) for size in sizes):
        return None
    *leading, last = sizes
    if type(last) is int and last == -1:  # the whole of the last axis, if the others have as many elements as before
        counts = [math.prod(value_of(size) for size in shape) for shape in (leading, rows)]
        if not statically_known_true(counts[0] == counts[1]):
            return None
    elif not statically_known_true(value_of(last) == classes):
        return None
    return torch.reshape, ((*leading, features),)


@dataclass(frozen=True)
class Loss:
    """The arguments of a cross entropy; labels have the shape of the logits without the vocabulary."""

    labels: Any
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"


def consume(
    name: str, logits: Logits, args: Sequence[Any], kwargs: Mapping[str, Any], call: Call, chunk_bytes: int,
    dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """Compute the result of a call that needs no logits without them; None if this is no such call.

    dtype: of the result, where it is known.
    """
    if logits.is_kl_terms:
        return _divergences(name, logits, args, kwargs, call, chunk_bytes)
    if name == "gather" and logits.is_log_probs and not logits.classes_second:
        return _gather(logits, args, kwargs, call, chunk_bytes)
    if name == "kl_div":
        return _divergence(logits, args, kwargs, call, chunk_bytes)
    if (
        name not in _LOSSES
        or logits.is_log_probs != (name == "nll_loss")
        or (logits.rank > 2 and not logits.classes_second)
    ):
        return None  # here the classes have to be the second axis
    loss = _asked(name, args, kwargs)
    if loss is None or not _fits(logits, value_of(loss.labels), logits.rows):
        return None
    return cast(_loss(logits, loss, call, chunk_bytes), dtype or logits.dtype, call)


def _fits(logits: Logits, labels: Any, shape: Sequence[Any]) -> bool:
    """Tell whether these are int64 class numbers, one for each row."""
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        return False
    return same_sizes(labels.shape, shape) and labels.device == value_of(logits.hidden).device


def _asked(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Loss | None:
    """Return a call's arguments after the logits, or None where linear_cross_entropy has no such option."""
    names = ("target", *_LOSSES[name])
    options = {**_LOSSES[name], **dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or set(options) != set(names):
        return None
    if any(options[option] is not None for option in ("weight", "size_average", "reduce")):
        return None
    smoothing = options.get("label_smoothing", 0.0)
    numbers = type(options["ignore_index"]) is int and type(smoothing) in (int, float) and 0.0 <= smoothing <= 1.0
    if not numbers or options["reduction"] not in ("none", "sum", "mean"):
        return None
    return Loss(options["target"], options["ignore_index"], float(smoothing), options["reduction"])


def _gather(logits: Logits, args: Sequence[Any], kwargs: Mapping[str, Any], call: Call, chunk_bytes: int) -> Any:
    """Compute the log-probability of one class per row."""
    try:
        options = signature(lambda dim, index: ...).bind(*args, **kwargs).arguments
    except TypeError:
        return None
    if options["dim"] not in (-1, logits.rank - 1) or not _fits(logits, value_of(options["index"]), (*logits.rows, 1)):
        return None
    labels = call(torch.squeeze, options["index"], -1)
    value = _loss(logits, Loss(labels, NEVER, 0.0, "none"), call, chunk_bytes)
    if value is None:
        return None
    return cast(call(torch.neg, call(torch.unsqueeze, value, -1)), logits.dtype, call)


_KL_DIV = ("target", "size_average", "reduce", "reduction", "log_target")


def _target(logits: Logits, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str] | None:
    """Return a KL divergence's target, log-probabilities that require no grad, and its reduction, or None."""
    options: dict[str, Any] = {"size_average": None, "reduce": None, "reduction": "mean", "log_target": False}
    options |= {**dict(zip(_KL_DIV, args, strict=False)), **kwargs}
    if (
        not logits.is_log_probs
        or logits.classes_second
        or set(options) != set(_KL_DIV)
        or options["log_target"] is not True
    ):
        return None
    target, hidden = value_of(options["target"]), value_of(logits.hidden)
    plain = isinstance(target, torch.Tensor) and target.is_floating_point() and not target.requires_grad
    if not plain or not same_sizes(target.shape, logits.shape) or target.device != hidden.device:
        return None
    no_deprecated = options["size_average"] is None and options["reduce"] is None
    return (options["target"], options["reduction"]) if no_deprecated else None


def _each_divergence(logits: Logits, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Logits | None:
    """Follow an unreduced KL divergence, whose summands may be summed row by row later."""
    divergence = _target(logits, args, kwargs)
    same = divergence is not None and value_of(divergence[0]).dtype == logits.dtype
    return (
        logits.with_step("kl_div", divergence[0])
        if divergence is not None and same and divergence[1] == "none"
        else None
    )


def _divergences(
    name: str, logits: Logits, args: Sequence[Any], kwargs: Mapping[str, Any], call: Call, chunk_bytes: int
) -> Any:
    """Compute the sum of unreduced KL terms over the classes."""
    dims = args[0] if args else kwargs.get("dim")
    last = dims[0] if isinstance(dims, (tuple, list)) and len(dims) == 1 else dims
    if name != "sum" or len(args) + len(kwargs) != 1 or last not in (-1, logits.rank - 1):
        return None
    target = logits.steps[-1][1]
    value = _kl_div(replace(logits, steps=logits.steps[:-1]), target, call, chunk_bytes, reduce=False)
    return cast(value, logits.dtype, call)


def _divergence(logits: Logits, args: Sequence[Any], kwargs: Mapping[str, Any], call: Call, chunk_bytes: int) -> Any:
    """Compute a KL divergence summed over everything, and divided by a size for batchmean and mean."""
    divergence = _target(logits, args, kwargs)
    if divergence is None or divergence[1] not in ("sum", "batchmean", "mean"):
        return None
    target, reduction = divergence
    value = _kl_div(logits, target, call, chunk_bytes, reduce=True)
    if value is not None and reduction == "batchmean":
        value = call(torch.div, value, call("size", target, 0))
    elif value is not None and reduction == "mean":
        value = call(torch.div, value, call("numel", target))
    return cast(value, torch.promote_types(logits.dtype, value_of(target).dtype), call)


def _kl_div(logits: Logits, target: Any, call: Call, chunk_bytes: int, *, reduce: bool) -> Any:
    form = logits.softmax_form()
    if form is None:
        return None
    inputs = _inputs(logits, target, call)
    marks = ahead(logits.trained, by_row=not reduce)
    return call(operator.getitem, call(torch.ops.fastft.linear_kl_div, *inputs, *form, chunk_bytes, reduce, marks), 0)


def _inputs(logits: Logits, compared: Any, call: Call) -> tuple[Any, ...]:
    """Return the tensors that a loss op of a head takes."""
    head = logits.head
    hidden, weight = cast(logits.hidden, head.dtype, call), head.dense_weight(call)
    return hidden, weight, compared, cast(head.vector(call), head.dtype, call), *head.adapter(logits.hidden, call)


def ahead(trained: Sequence[bool], *, by_row: bool) -> list[bool]:
    """Return which gradients forward computes: a gradient summed over rows cannot be scaled by row afterwards."""
    summed = any(mark and not row for mark, row in zip(trained, BY_ROW, strict=True))
    return [False] * 5 if by_row and summed else list(trained)


def _loss(logits: Logits, loss: Loss, call: Call, chunk_bytes: int) -> Any:
    """Compute a cross entropy by linear_cross_entropy; None if it cannot express the steps."""
    form = logits.softmax_form()
    if form is None:
        return None
    by_row = loss.reduction == "none"
    results = call(
        torch.ops.fastft.linear_cross_entropy, *_inputs(logits, loss.labels, call), loss.ignore_index,
        loss.label_smoothing, 0.0, *form, chunk_bytes, not by_row, ahead(logits.trained, by_row=by_row),
    )  # fmt: skip
    value = call(operator.getitem, results, 0)
    if loss.reduction == "mean":
        value = call(torch.div, value, call(torch.sum, call(torch.ne, loss.labels, loss.ignore_index)))
    return value
