"""Bring every call of a graph into one canonical form.

Methods, operators and functions become one call; arguments become positional with defaults dropped; dimensions count
from the end; casts and dropouts that change nothing are dropped.  Models and the patterns' references go through the
same function, so that they can be compared.  A call that the table does not list stays as it is.

A model is normalised in a copy that is only matched against: what is not lifted runs as the user wrote it.  The
canonical form is bitwise equal to the original spelling, forward and backward, wherever nothing overflows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from fastft.compat.fake_tensors import value_of

_UNARY = signature(lambda input: ...)

# The canonical functions and their parameters; a method of the same name is the same call.
SIGNATURES: dict[Callable, Signature] = {
    torch.add: signature(lambda input, other, *, alpha=1: ...),
    torch.sub: signature(lambda input, other, *, alpha=1: ...),
    torch.mul: signature(lambda input, other: ...),
    torch.div: signature(lambda input, other, *, rounding_mode=None: ...),
    torch.pow: signature(lambda input, exponent: ...),
    torch.mean: signature(lambda input, dim=None, keepdim=False, *, dtype=None: ...),
    torch.sum: signature(lambda input, dim=None, keepdim=False, *, dtype=None: ...),
    torch.square: _UNARY,
    torch.rsqrt: _UNARY,
    torch.sqrt: _UNARY,
    torch.neg: _UNARY,
    torch.sigmoid: _UNARY,
    torch.tanh: _UNARY,
    torch.relu: signature(lambda input, inplace=False: ...),
    F.silu: signature(lambda input, inplace=False: ...),
    F.gelu: signature(lambda input, *, approximate="none": ...),
    F.dropout: signature(lambda input, p=0.5, training=True, inplace=False: ...),
    torch.cat: signature(lambda tensors, dim=0: ...),
    torch.stack: signature(lambda tensors, dim=0: ...),
    torch.flatten: signature(lambda input, start_dim=0, end_dim=-1: ...),
    torch.transpose: signature(lambda input, dim0, dim1: ...),
    F.linear: signature(lambda input, weight, bias=None: ...),
    torch.matmul: signature(lambda input, other: ...),
    torch.baddbmm: signature(lambda input, batch1, batch2, beta=1, alpha=1: ...),
    torch.rms_norm: signature(lambda input, normalized_shape, weight=None, eps=None: ...),
    F.layer_norm: signature(lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: ...),
    torch.masked_fill: signature(lambda input, mask, value: ...),
    torch.softmax: signature(lambda input, dim, dtype=None: ...),
    F.scaled_dot_product_attention: signature(
        lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False: ...
    ),
}

ALIASES: dict[Callable, Callable] = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
    operator.pow: torch.pow,
    torch.multiply: torch.mul,
    torch.subtract: torch.sub,
    torch.divide: torch.div,
    torch.true_divide: torch.div,
    F.rms_norm: torch.rms_norm,
    F.relu: torch.relu,
    F.sigmoid: torch.sigmoid,
    F.tanh: torch.tanh,
    F.softmax: torch.softmax,
    torch.negative: torch.neg,
    operator.neg: torch.neg,
    operator.matmul: torch.matmul,
    torch.concat: torch.cat,
    torch.concatenate: torch.cat,
    torch.swapaxes: torch.transpose,
    torch.swapdims: torch.transpose,
}
_RENAMED_METHODS = [function for function in ALIASES if getattr(torch, function.__name__, None) is function]
_METHODS = {function.__name__: function for function in [*SIGNATURES, *_RENAMED_METHODS]}
NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "self": "input"}  # NumPy's argument names, which torch accepts too

COMMUTATIVE = frozenset({torch.add, torch.mul})
_CASTS = ("float", "half", "bfloat16", "double", "to", "type", "type_as")


def view(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """Return a normalised copy of ``graph``, and the original node of each of its nodes."""
    copy = Graph()
    copies: dict[Node, Node] = {}
    copy.output(copy.graph_copy(graph, copies))
    normalize(copy)
    kept = set(copy.nodes)
    originals = {node: original for original, node in copies.items() if node in kept}
    return copy, originals | {copy.output_node(): graph.output_node()}


def normalize(graph: Graph) -> None:
    """Bring every call of ``graph`` into its canonical form, in place; it can then be compared, but not run."""
    for node in list(graph.nodes):
        if isinstance(value_of(node), Tensor):
            _normalize_node(node)


def _normalize_node(node: Node) -> None:
    if (dtype := cast_dtype(node)) is not None:
        _normalize_cast(node, dtype)
    elif node.target is operator.getitem:
        _normalize_index(node)
    elif (function := _canonical_function(node)) is not None:
        _normalize_call(node, function)


def _canonical_function(node: Node) -> Callable | None:
    target: Any = _METHODS.get(str(node.target)) if node.op == "call_method" else node.target
    if node.op not in ("call_function", "call_method"):
        return None
    function = ALIASES.get(target, target)
    return function if function in SIGNATURES else None


def _normalize_call(node: Node, function: Callable) -> None:
    number_first = len(node.args) == 2 and not isinstance(value_of(node.args[0]), Tensor)
    if function in COMMUTATIVE and number_first and not node.kwargs:
        node.args = node.args[::-1]  # a number comes second
    if node.args and not isinstance(value_of(node.args[0]), (Tensor, tuple, list)):
        return  # 1 - x, 1 / x: the functions take no number first
    bound = _bind(SIGNATURES[function], node)
    if bound is None:
        return
    args, kwargs = bound
    if function is F.dropout and node.args and _drops_nothing(args):
        _erase(node)
        return
    if _is_square(function, args):
        function, args = torch.pow, (args[0], 2)
    elif function in _FORMS:
        args = _FORMS[function](args, node)
    node.op, node.target, node.args, node.kwargs = "call_function", function, args, kwargs


def _is_square(function: Callable, args: tuple) -> bool:
    """Tell whether this is x * x, x.square(), x ** 2 or x ** 2.0, of a floating-point x."""
    if not _is_float(args[0]):
        return False
    by_itself = function is torch.mul and args[0] is args[1]
    return by_itself or function is torch.square or (function is torch.pow and args[1] == 2)


def _completed(args: tuple, defaults: tuple, required: int) -> tuple[Any, ...]:
    """Append the defaults of the arguments that were left out; the first ``required`` have none."""
    return args + defaults[len(args) - required :]


def _drops_nothing(args: tuple) -> bool:
    """Tell whether a dropout returns its input unchanged."""
    _, p, training, inplace = _completed(args, (0.5, True, False), 1)
    return (p == 0 or training is False) and not inplace


def _rms_norm_form(args: tuple, node: Node) -> tuple:
    """Write out the default eps: the machine epsilon of the dtype that it computes in."""
    computed_in = torch.promote_types(value_of(args[0]).dtype, torch.float32)
    return args if len(args) == 4 else (*args, *(None,) * (3 - len(args)), torch.finfo(computed_in).eps)


def _layer_norm_form(args: tuple, node: Node) -> tuple:
    """Write out all five arguments."""
    return _completed(args, (None, None, 1e-5), 2)


def _dropout_form(args: tuple, node: Node) -> tuple:
    """Write out the default probability."""
    return _completed(args, (0.5,), 1)


def _softmax_form(args: tuple, node: Node) -> tuple:
    """Drop the dtype where it is the input's."""
    source, dim, dtype = _completed(args, (None,), 2)
    dim = _from_end(dim, value_of(source).dim())
    return (source, dim) if dtype in (None, value_of(source).dtype) else (source, dim, dtype)


def _attention_form(args: tuple, node: Node) -> tuple:
    """Write out all eight arguments, the scale too."""
    *others, scale, grouped = _completed(args, (None, 0.0, False, None, False), 3)
    head_dim = value_of(args[0]).shape[-1]
    if scale is None and isinstance(head_dim, int):
        scale = 1.0 / math.sqrt(head_dim)
    return (*others, scale, grouped)


def _reduction_form(args: tuple, node: Node) -> tuple:
    return (args[0], _from_end(args[1], value_of(args[0]).dim()), *args[2:]) if len(args) > 1 else args


def _join_form(args: tuple, node: Node) -> tuple:
    """Put the tensors of cat or stack first, one by one, and then the dimension of the result."""
    tensors, dim = (*args, 0)[:2]
    return (*tensors, _from_end(dim, value_of(node).dim()))


def _flatten_form(args: tuple, node: Node) -> tuple:
    tensor, *dims = _completed(args, (0, -1), 1)
    return (tensor, *(_from_end(dim, value_of(tensor).dim()) for dim in dims))


def _transpose_form(args: tuple, node: Node) -> tuple:
    return (args[0], *sorted(_from_end(dim, value_of(args[0]).dim()) for dim in args[1:]))


_FORMS: dict[Callable, Callable[[tuple, Node], tuple]] = {
    torch.mean: _reduction_form,
    torch.sum: _reduction_form,
    torch.softmax: _softmax_form,
    F.dropout: _dropout_form,
    F.scaled_dot_product_attention: _attention_form,
    torch.rms_norm: _rms_norm_form,
    F.layer_norm: _layer_norm_form,
    torch.cat: _join_form,
    torch.stack: _join_form,
    torch.flatten: _flatten_form,
    torch.transpose: _transpose_form,
}


def _normalize_index(node: Node) -> None:
    """Write slices of the last axis as x[..., a:b], and the parts of chunk and split too."""
    source, index = node.args
    if isinstance(source, Node) and isinstance(index, int):
        part = _part(source, index)
        if part is not None:
            _take(node, source.args[0], part)
        return
    index = index if isinstance(index, tuple) else (index,)
    rank = value_of(source).dim() if isinstance(value_of(source), Tensor) else None
    reaches_last = len(index) == rank or (Ellipsis in index[:1] and len(index) > 1)
    *others, last = index
    if rank is None or not reaches_last or not isinstance(last, slice):
        return
    if all(item is Ellipsis or item == slice(None) for item in others):
        step = None if last.step == 1 else last.step
        _take(node, source, slice(None if _is_zero(last.start) else last.start, last.stop, step))


def _take(node: Node, source: Any, part: slice) -> None:
    index: Any = (Ellipsis, part)
    node.args = (source, index)


def _part(source: Node, index: int) -> slice | None:
    """Return the slice of the last axis that result ``index`` of a chunk or split is, or None."""
    form = _split_form(source)
    whole = value_of(source.args[0]) if source.args else None
    if form is None or not isinstance(whole, Tensor):
        return None
    bound = _bind(form, source)
    if bound is None or len(bound[0]) < 3 or _from_end(bound[0][2], whole.dim()) != -1:
        return None
    size, count = whole.shape[-1], bound[0][1]
    if not isinstance(count, int) or not isinstance(size, int) or index < 0:
        return None
    length = -(-size // count) if form is _CHUNK else count
    start, stop = index * length, (index + 1) * length
    return slice(start or None, None if stop >= size else stop, None)


def splits(node: Node) -> bool:
    """Tell whether this call only makes views of parts of its argument."""
    return node.op in ("call_function", "call_method") and _split_form(node) is not None


def _split_form(node: Node) -> Signature | None:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return {"chunk": _CHUNK, "split": _SPLIT}.get(str(name))


_CHUNK = signature(lambda input, chunks, dim=0: ...)
_SPLIT = signature(lambda input, split_size_or_sections, dim=0: ...)


def _is_zero(value: Any) -> bool:
    return type(value) is int and value == 0


def arguments_of(node: Node) -> tuple[tuple, dict[str, Any]] | None:
    """Return a call's positional arguments, without trailing defaults, and its keyword-only ones; None if the call
    is not known.
    """
    form = SIGNATURES.get(node.target) if callable(node.target) else None
    return None if form is None else _bind(form, node)


def _bind(form: Signature, node: Node) -> tuple[tuple, dict[str, Any]] | None:
    """Return positional arguments without trailing defaults, and keyword-only ones that differ from the default."""
    named = {NUMPY_NAMES.get(name, name): argument for name, argument in node.kwargs.items()}
    try:
        bound = form.bind(*node.args, **named)
    except TypeError:
        return None  # out=, or a form that the table does not know
    bound.apply_defaults()
    args, kwargs = list(bound.args), {}
    parameters = list(form.parameters.values())
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and bound.arguments[parameter.name] != parameter.default:
            kwargs[parameter.name] = bound.arguments[parameter.name]
    while args and parameters[len(args) - 1].default is not Parameter.empty:
        if not _is_default(args[-1], parameters[len(args) - 1].default):
            break
        args.pop()
    return tuple(args), kwargs


def _is_default(argument: Any, default: Any) -> bool:
    return argument is default or (type(argument) is type(default) and argument == default)


def _from_end(dim: Any, rank: int) -> Any:
    """Return a dimension, or a list of one, as a negative number; a longer list as a sorted tuple of them."""
    if isinstance(dim, (tuple, list)) and all(isinstance(axis, int) for axis in dim):
        dims = tuple(sorted(axis - rank if axis >= 0 else axis for axis in dim))
        return dims[0] if len(dims) == 1 else dims
    return dim - rank if isinstance(dim, int) and dim >= 0 else dim


def _is_float(node: Any) -> bool:
    return isinstance(value := value_of(node), Tensor) and value.is_floating_point()


def cast_dtype(node: Node) -> torch.dtype | None:
    """Return the dtype this node casts to, if all that it does is to cast its first argument, or None."""
    if node.op != "call_method" or node.target not in _CASTS:
        return None
    source, result = value_of(node.args[0]), value_of(node)
    copies = any(argument is True for argument in node.args[1:])  # non_blocking or copy, given by position
    if copies or not set(node.kwargs) <= {"dtype", "device", "other", "non_blocking"}:
        return None
    return result.dtype if isinstance(source, Tensor) and source.device == result.device else None


def _normalize_cast(node: Node, dtype: torch.dtype) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    if value_of(source).dtype == dtype:  # .to() then returns its own input
        _erase(node)
    else:
        node.op, node.target, node.args, node.kwargs = "call_method", "to", (source, dtype), {}


def _erase(node: Node) -> None:
    """Remove a call that returns its first argument."""
    source = node.args[0]
    assert isinstance(source, Node)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
