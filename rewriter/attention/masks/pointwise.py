"""Read calls that compute the elements of an attention mask: constants, casts, arithmetic, conditions, choices.

A handler takes the reader, the node, the index of the element and the call's arguments; see reader.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastft.compat.fake_tensors import value_of
from fastft.reasons import Declined
from fastft.rewriter.attention.masks.reader import (
    INTEGERS,
    Cases,
    Index,
    Reader,
    Value,
    are_exact,
    as_cases,
    as_condition,
    as_sum,
    call_name,
    combined,
    dtype_of,
    literal,
    merged,
    reads,
    scalar,
    size_of,
)
from fastft.rewriter.attention.masks.runs import flags_of
from fastft.rewriter.attention.masks.terms import (
    Condition,
    Sum,
    absolute,
    every,
    extreme,
    floor,
    negate,
    non_negative,
    select,
    some,
    whole,
    zero,
)


@reads("arange", form=lambda *limits, start=None, end=None, step=None, dtype=None, device=None, **_: ...)
def _arange(reader: Reader, node: Node, index: Index, *limits: Any, **named: Any) -> Value:
    alone = len(limits) == 1 and named["end"] is None
    named |= dict(zip(("end",) if alone else ("start", "end", "step"), limits, strict=False))
    if dtype_of(node) not in INTEGERS or named["end"] is None:
        return reader.data(node, index)
    first, step = (
        whole(otherwise) if named[name] is None else literal(named[name])
        for name, otherwise in (("start", 0), ("step", 1))
    )
    if not isinstance(first, Sum) or not isinstance(step, Sum) or step.literal is None:
        return reader.data(node, index)
    return first + index[0] * step.literal


def _constant(reader: Reader, node: Node, index: Index, number: Any) -> Value:
    """Read an element of a tensor that is this number everywhere."""
    if isinstance(number, Node) and isinstance(value_of(number), Tensor):
        return reader.data(node, index, ())
    return _cast(reader, node, index, literal(number))


@reads("ones", form=lambda *size, dtype=None, device=None, **_: ...)
@reads("ones_like", form=lambda input, dtype=None, device=None, **_: ...)
@reads("new_ones", form=lambda input, *size, dtype=None, device=None, **_: ...)
def _ones(reader: Reader, node: Node, index: Index, *_: Any, **__: Any) -> Value:
    return _constant(reader, node, index, 1)


@reads("zeros", form=lambda *size, dtype=None, device=None, **_: ...)
@reads("zeros_like", form=lambda input, dtype=None, device=None, **_: ...)
@reads("new_zeros", form=lambda input, *size, dtype=None, device=None, **_: ...)
def _zeros(reader: Reader, node: Node, index: Index, *_: Any, **__: Any) -> Value:
    return _constant(reader, node, index, 0)


@reads("full", form=lambda size, fill_value, *, dtype=None, device=None, **_: ...)
@reads("full_like", "new_full", form=lambda input, *rest, dtype=None, device=None, **_: ...)
def _full(reader: Reader, node: Node, index: Index, *rest: Any, fill_value: Any = None, **_: Any) -> Value:
    number = rest[-1] if fill_value is None else fill_value
    return reader.data(node, index, ()) if isinstance(number, (tuple, list)) else _constant(reader, node, index, number)


@reads("tensor", "scalar_tensor", form=lambda data, dtype=None, device=None, **_: ...)
def _tensor(reader: Reader, node: Node, index: Index, data: Any, *_: Any, **__: Any) -> Value:
    return reader.data(node, index) if isinstance(data, (tuple, list)) else _constant(reader, node, index, data)


# Casts


@reads("to", "type", "type_as", form=lambda input, *rest, dtype=None, device=None, other=None, **_: ...)
@reads("float", "double", "half", "bfloat16", "int", "long", "bool", "cpu", "cuda", form=lambda input: ...)
def _to(reader: Reader, node: Node, index: Index, source: Node, *_: Any, **__: Any) -> Value:
    value = reader.value(source, index)
    return value if dtype_of(source) == dtype_of(node) else _cast(reader, node, index, value)


def _cast(reader: Reader, node: Node, index: Index, value: Value) -> Value:
    """Convert a value to the dtype of node."""
    dtype = dtype_of(node)
    assert dtype is not None
    converted: Value | None
    if dtype == torch.bool:
        converted = as_condition(value)
    elif dtype in INTEGERS:
        converted = as_sum(value)
    else:
        converted = as_cases(value, dtype)
    return reader.opaque(node, index, value) if converted is None else converted


# Arithmetic

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    name: getattr(torch, name)
    for name in ("add", "sub", "mul", "div", "neg", "abs", "minimum", "maximum", "remainder", "floor_divide")
}


@reads("add", "sub", "rsub", form=lambda input, other, *, alpha=1: ...)
@reads("mul", "remainder", "floor_divide", form=lambda input, other: ...)
@reads("div", form=lambda input, other, *, rounding_mode=None: ...)
@reads("minimum", "maximum", form=lambda input, other: ...)
@reads("neg", "abs", form=lambda input: ...)
def _arithmetic(
    reader: Reader, node: Node, index: Index, *operands: Any, alpha: Any = 1, rounding_mode: str | None = None
) -> Value:
    name = call_name(node)
    if name == "rsub":
        name, operands = "sub", operands[::-1]
    name = {"floor": "floor_divide", "trunc": "truncate"}.get(rounding_mode or "", name)
    values = [reader.operand(operand, node, index) for operand in operands]
    result: Value | None = None
    if alpha == 1 and dtype_of(node) in INTEGERS:
        result = _of_integers(name, [as_sum(value) for value in values])
    elif alpha == 1 and dtype_of(node) == torch.bool:
        joined = {"add": some, "mul": every, "maximum": some, "minimum": every}.get(name)
        conditions = [as_condition(value) for value in values]
        if joined is not None and None not in conditions:
            result = joined(condition for condition in conditions if condition is not None)
    elif alpha == 1 and name in _FUNCTIONS:
        result = _of_numbers(_FUNCTIONS[name], node, operands, values)
    return reader.opaque(node, index, *values) if result is None else result


def _of_integers(name: str, terms: Sequence[Sum | None]) -> Sum | None:
    if any(term is None for term in terms):
        return None
    first, second = (*(term for term in terms if term is not None), whole(0))[:2]
    if name in ("add", "sub", "neg", "abs"):
        return {"add": first + second, "sub": first - second, "neg": first * -1}.get(name) or absolute(first)
    if name in ("minimum", "maximum"):
        return extreme(name, (first, second))
    if name == "mul" and first.literal is not None:
        first, second = second, first
    by = second.literal
    if by is None or name not in ("mul", "floor_divide", "remainder") or (name != "mul" and by <= 0):
        return None
    return {"mul": first * by}.get(name) or (
        floor(first, by) if name == "floor_divide" else first - floor(first, by) * by
    )


def _of_numbers(function: Callable, node: Node, operands: Sequence[Any], values: Sequence[Value]) -> Cases | None:
    """Compute with torch, tensors in the result's dtype and Python numbers as they are.  Raises Declined."""
    dtype = dtype_of(node)
    assert dtype is not None
    if any(other is not None and other.is_floating_point and other != dtype for other in map(dtype_of, operands)):
        return None
    known = _numbers(values, operands, dtype)
    if known is not None and function in (torch.div, torch.floor_divide) and 0 in dict(known[1].numbers):
        raise Declined("it is divided by zero")  # zeros have signs, which are not distinguished
    tensors = [dtype_of(operand) is not None for operand in operands]

    def apply(*numbers: float) -> float | int:
        arguments = [
            scalar(number).to(dtype) if is_tensor else number
            for number, is_tensor in zip(numbers, tensors, strict=True)
        ]
        return function(*arguments).to(dtype).item()

    return None if known is None else combined(apply, *known)


def _numbers(values: Sequence[Value], operands: Sequence[Any], dtype: torch.dtype) -> list[Cases] | None:
    """Return the numbers that operands may be: elements of tensors in dtype, Python numbers as they are; or None."""
    converted = []
    for value, operand in zip(values, operands, strict=True):
        python = torch.float64 if isinstance(value, Cases) else torch.int64
        converted.append(as_cases(value, dtype if dtype_of(operand) else python))
    known = [cases for cases in converted if cases is not None]
    return known if len(known) == len(converted) else None


@reads("clamp", "clip", form=lambda input, min=None, max=None: ...)
@reads("clamp_min", form=lambda input, min: ...)
def _clamp(reader: Reader, node: Node, index: Index, source: Node, low: Any, high: Any = None) -> Value:
    limits = [(name, limit) for name, limit in (("maximum", low), ("minimum", high)) if limit is not None]
    value = reader.operand(source, node, index)
    others = [reader.operand(limit, node, index) for _, limit in limits]
    result = as_sum(value)
    if dtype_of(source) not in INTEGERS or dtype_of(node) not in INTEGERS or result is None:
        return reader.opaque(node, index, value, *others)
    for (name, _), other in zip(limits, others, strict=True):
        if not isinstance(other, Sum):
            return reader.opaque(node, index, value, *others)
        result = extreme(name, (result, other))
    return result


# Comparisons and conditions

_COMPARED: dict[str, Callable[[Sum, Sum], Condition]] = {
    "eq": lambda left, right: zero(left - right),
    "ne": lambda left, right: negate(zero(left - right)),
    "le": lambda left, right: non_negative(right - left),
    "lt": lambda left, right: non_negative(right - left - 1),
    "ge": lambda left, right: non_negative(left - right),
    "gt": lambda left, right: non_negative(left - right - 1),
}


@reads(*_COMPARED, form=lambda input, other: ...)
def _compare(reader: Reader, node: Node, index: Index, *operands: Any) -> Value:
    values = [reader.operand(operand, node, index) for operand in operands]
    result: Value | None = None
    dtypes = [dtype for dtype in map(dtype_of, operands) if dtype is not None]
    if all(dtype in (*INTEGERS, torch.bool) for dtype in dtypes) and all(map(_small, values)):
        left, right = map(as_sum, values)
        if left is not None and right is not None:
            result = _COMPARED[call_name(node)](left, right)
    if result is None:
        result = _compare_numbers(call_name(node), operands, values)
    if result is None:
        return reader.opaque(node, index, *values)
    return result if dtype_of(node) == torch.bool else _cast(reader, node, index, result)  # in place it keeps its dtype


def _small(value: Value) -> bool:
    """Tell whether comparing integers with this value is a comparison of integers."""
    return not isinstance(value, Cases) or are_exact(value)


def _compare_numbers(name: str, operands: Sequence[Any], values: Sequence[Value]) -> Condition | None:
    kinds = [dtype_of(operand) for operand in operands]
    dtypes = {kind for kind in kinds if kind is not None}
    if len(dtypes) != 1:
        return None
    (dtype,) = dtypes
    known = _numbers(values, operands, dtype)
    if known is None:
        return None

    def apply(*numbers: float) -> int:
        tensors = [scalar(number).to(dtype) if kind else number for number, kind in zip(numbers, kinds, strict=True)]
        left, right = tensors
        if not isinstance(left, Tensor):
            return int(getattr(torch, {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.get(name, name))(right, left))
        return int(getattr(torch, name)(left, right))

    result = combined(apply, *known)
    return None if result is None else as_condition(result)


@reads("bitwise_and", "bitwise_or", "bitwise_xor", form=lambda input, other: ...)
@reads("logical_and", "logical_or", "logical_xor", form=lambda input, other: ...)
@reads("bitwise_not", "logical_not", form=lambda input: ...)
def _logical(reader: Reader, node: Node, index: Index, *operands: Any) -> Value:
    name = call_name(node)
    values = [reader.operand(operand, node, index) for operand in operands]
    if name == "bitwise_not" and dtype_of(node) in INTEGERS and isinstance(values[0], Sum):
        return values[0] * -1 - 1
    conditions = [as_condition(value) for value in values]
    bits = name.startswith("bitwise") and dtype_of(node) != torch.bool
    known = [condition for condition in conditions if condition is not None]
    if bits or len(known) < len(conditions) or dtype_of(node) != torch.bool:
        return reader.opaque(node, index, *values)
    kind = name.split("_")[1]
    if kind == "xor":
        left, right = known
        return some([every([left, negate(right)]), every([negate(left), right])])
    return negate(known[0]) if kind == "not" else (every if kind == "and" else some)(known)


@reads("where", form=lambda condition, input, other: ...)
def _where(reader: Reader, node: Node, index: Index, condition: Any, then: Any, otherwise: Any) -> Value:
    if node.op == "call_method":  # x.where(condition, other)
        condition, then = then, condition
    if flags_of(node) is not None:  # what it is made of says less than that these are runs
        return reader.data(node, index)
    return _chosen(reader, node, index, condition, then, otherwise)


@reads("masked_fill", form=lambda input, mask, value: ...)
def _masked_fill(reader: Reader, node: Node, index: Index, source: Any, mask: Any, value: Any) -> Value:
    return _chosen(reader, node, index, mask, value, source)


def _chosen(reader: Reader, node: Node, index: Index, condition: Any, then: Any, otherwise: Any) -> Value:
    test = as_condition(reader.operand(condition, node, index))
    assert test is not None
    if _is_not_zero(condition, otherwise):  # what is chosen where a number is zero is zero
        options = [reader.operand(then, node, index), Cases(((0.0, True),))]
    else:
        options = [reader.operand(branch, node, index) for branch in (then, otherwise)]
    result = _option(test, dtype_of(node), options)
    return reader.opaque(node, index, test, *options) if result is None else result


def _option(test: Condition, dtype: torch.dtype | None, options: Sequence[Value]) -> Value | None:
    assert dtype is not None
    if dtype == torch.bool:
        first, second = map(as_condition, options)
        known = first is not None and second is not None
        return some([every([test, first]), every([negate(test), second])]) if known else None  # type: ignore[list-item]
    if dtype in INTEGERS:
        left, right = map(as_sum, options)
        return select(test, left, right) if left is not None and right is not None else None
    then, otherwise = (as_cases(option, dtype) for option in options)
    if then is None or otherwise is None:
        return None
    pairs = [(number, every([test, condition])) for number, condition in then.numbers]
    return merged(pairs + [(number, every([negate(test), condition])) for number, condition in otherwise.numbers])


def _is_not_zero(condition: Any, source: Any) -> bool:
    """Tell whether a condition is that a tensor of numbers is not 0."""
    if not isinstance(condition, Node) or not isinstance(source, Node) or not isinstance(value_of(source), Tensor):
        return False
    name, same = call_name(condition), bool(condition.args) and condition.args[0] is source
    if not same or value_of(condition).dtype != torch.bool:
        return False
    casts = name in ("to", "bool", "type") and value_of(source).dtype != torch.bool
    return casts or (name == "ne" and condition.args[1:] in ((0,), (0.0,)))


@reads("tril", "triu", form=lambda input, diagonal=0: ...)
def _triangle(reader: Reader, node: Node, index: Index, source: Node, diagonal: Any) -> Value:
    value = reader.value(source, index)
    place = index[-2] + _offset(diagonal) - index[-1]
    kept = non_negative(place) if call_name(node) == "tril" else non_negative(place * -1)
    result = _option(kept, dtype_of(node), [value, whole(0)])
    return reader.opaque(node, index, kept, value) if result is None else result


def _offset(number: Any) -> Sum:
    return whole(number) if type(number) is int else size_of(number)
