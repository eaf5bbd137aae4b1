"""LazyLogits: a tensor subclass with metadata and no storage, computed at the first read.

LazyLogits holds hidden states and a head.  Calls that keep the vocabulary dimension whole (casts, slices along tokens,
reshapes, elementwise ones) return further LazyLogits; a cross entropy, the log-probabilities of given tokens, or what
else reduces rows to a few numbers (row_calls.py) is computed in chunks.  Any other call computes the logits, once, and
all later calls use the computed tensor.

It takes part in autograd like any output of a model: whatever gradient arrives goes on to the hidden states and the
head, both from the computed tensor and from an autograd.Function that takes the LazyLogits itself as an input.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.compat import eager, fake_tensors, fsdp
from fastft.rewriter.fx import autocast
from fastft.rewriter.loss.head import Logits, run
from fastft.rewriter.loss.logits import CASTS, consume, follow
from fastft.rewriter.loss.losses import Deferred
from fastft.rewriter.runtime import row_calls
from fastft.rewriter.runtime.lazy_source import Family, Source
from fastft.rewriter.runtime.lazy_writes import (
    Refused,
    as_view,
    before_write,
    is_read,
    is_written,
    scaled_in_place,
    sharing_memory,
    writes,
)
from fastft.rewriter.runtime.logits_computation import STALE, Computation, changed, is_parameter, unread, versions_of
from fastft.rewriter.runtime.row_call import Call
from fastft.rewriter.runtime.row_programs import Program

_PASSED = (
    "a gradient is asked for at logits of which a loss was computed without them: ask for it before that, by "
    "logits.retain_grad() or logits.register_hook(...), or compile with options={'lazy_logits': False}."
)
VIEWS = frozenset(
    ["view", "reshape", "__getitem__", "flatten", "select", "narrow", "unsqueeze", "squeeze", "transpose", "permute"]
)
# What can be asked of a tensor without computing its values.
_GETTERS = (
    "shape dtype device layout ndim requires_grad is_leaf grad_fn _base is_cuda is_cpu is_meta is_sparse is_quantized "
    "is_nested is_mkldnn is_mps is_xpu is_xla names itemsize nbytes output_nr retains_grad"
)
_METHODS = (
    "size dim ndimension numel nelement element_size is_floating_point is_complex get_device __len__ __hash__ "
    "is_signed is_contiguous stride storage_offset is_inference is_conj is_neg"
)


def _metadata() -> frozenset[Any]:
    getters = [getattr(Tensor, name) for name in _GETTERS.split() if hasattr(Tensor, name)]
    methods = [getter.__get__ for getter in getters] + [getattr(Tensor, name) for name in _METHODS.split()]
    functions = (torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference)
    return frozenset((*methods, *functions))


METADATA = _metadata()


class LazyLogits(Tensor):
    """Logits [..., V] that are computed when a call needs their values; the module's docstring says which do not."""

    source: Source
    node: Any  # its grad_fn when it was made

    @staticmethod
    def __new__(cls, source: Source) -> LazyLogits:
        logits = source.logits
        made = eager.without_storage(cls, logits.shape, logits.dtype, logits.device)
        made.source = source
        return made

    @classmethod
    def of(
        cls, logits: Logits | Program, chunk_bytes: int, reads: Counter[str], parents: Sequence[LazyLogits] = ()
    ) -> LazyLogits:
        """Make lazy logits.  In grad mode, gradients reach the tensors that they are computed from.

        reads: counts the reads by source line.  parents: the lazy logits that these are derived from.
        """
        tensors = logits.values
        known = {id(noted[0]): noted for parent in parents for noted in parent.source.versions}
        versions = [*known.values(), *versions_of([tensor for tensor in tensors if id(tensor) not in known])]
        trained = torch.is_grad_enabled() and logits.requires_grad
        logits = logits if trained else logits.detached()
        parameters = [(tensor, version) for tensor, version in versions if is_parameter(eager.base(tensor))]
        computation = Computation(parameters, logits.with_values(range(len(tensors))))
        computation.stale = any(parent.source.computation.stale for parent in parents)
        unread.add(computation)
        source = Source(logits, computation, chunk_bytes, reads, versions)
        source.family = parents[0].source.family if parents else Family()
        with torch.set_grad_enabled(trained):
            made = _Made.apply(source, *logits.values)
        made.node = made.grad_fn
        return made

    @classmethod
    @torch.compiler.disable  # compiled code has a graph break here, and goes on with the results
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = eager.all_given(func, kwargs or {})
        with eager.as_plain_tensors():
            lazy = args[0] if args and isinstance(args[0], LazyLogits) and not is_read(args[0]) else None
            if lazy is not None and (func in METADATA or (func is Tensor.register_hook and fsdp.is_hook(args[1]))):
                return func(*args, **kwargs)
            if any(one.source.family.passed for one in _asked_for_gradient(func, args, kwargs)):
                raise RuntimeError(_PASSED)
            if writes(func, kwargs):
                if lazy is not None and scaled_in_place(lazy, func, args[1:], kwargs):
                    return lazy
                for written in _lazy_in(args[:1], kwargs.get("out")):
                    _before_write(written)
            else:
                unread = fake_tensors.tree_map_only(LazyLogits, _unread, (tuple(args), dict(kwargs)))
                result = None if lazy is None else _lazily(lazy, func, unread[0][1:], unread[1])
                result = _by_rows(func, *unread) if result is None else result
                if result is not None:
                    return result
            args, kwargs = fake_tensors.tree_map_only(LazyLogits, read, (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an op on the computed values, below autograd, for callers that bypass __torch_function__.

        These are callers that take the tensor itself, such as autograd.Functions.
        """
        args, kwargs = fake_tensors.tree_map_only(LazyLogits, _taken, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _taken(lazy: LazyLogits) -> Tensor:
    """Return the values for a caller below autograd."""
    return read(lazy).detach() if is_written(lazy) else lazy.source.numbers()


def _before_write(lazy: LazyLogits) -> None:
    """Let these logits, and all that share their memory, become parts of one tensor, which then is written to."""
    before_write(lazy)
    for one in sharing_memory(lazy):
        if torch.is_grad_enabled() and one.requires_grad and one.grad_fn is one.node:
            read(one)
            Refused.apply(one)


def _lazily(lazy: LazyLogits, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """Return the result of a call that needs no values, or only chunks of them; None for any other call."""
    name, source = getattr(func, "__name__", ""), lazy.source
    if lazy.grad_fn is not lazy.node or _lazy_in(args, kwargs):
        return None  # another autograd.Function returned it: gradients have to go through that
    if (cuts := row_calls.cuts(name, lazy.shape, args, kwargs)) is not None and not source.program.classes_second:
        parts = [_lazily(lazy, function, rest, {}) for function, *rest in cuts]
        if all(part is not None for part in parts):
            return iter(parts) if name == "__iter__" else tuple(parts)
    make = functools.partial(LazyLogits.of, chunk_bytes=source.chunk_bytes, reads=source.reads, parents=[lazy])
    if name == "detach" and not args and not kwargs:
        with torch.no_grad():
            return as_view(make(source.logits), lazy, func, args, kwargs)
    if isinstance(source.logits, Program):
        moved = source.logits.moved(name, args, kwargs) if name in VIEWS else None
        return lazy if name == "contiguous" else moved and as_view(make(moved), lazy, func, args, kwargs)
    widened = _widened(name, source.logits)
    followed = follow(name, source.logits, args, kwargs, run, widened)
    if followed is None:
        source.check()
        return _noted(consume(name, source.logits, args, kwargs, _run_whole, source.chunk_bytes, widened), [lazy])
    if name == "contiguous" or (_is_cast(name, args, kwargs) and followed.dtype == source.logits.dtype):
        return lazy
    made = make(followed)
    return as_view(made, lazy, func, args, kwargs) if name in VIEWS else made


def _is_cast(name: str, args: Sequence[Any], kwargs: Any) -> bool:
    """Return whether a call may return its argument itself."""
    return name in CASTS and not any(argument is True for argument in (*args, kwargs.get("copy")))


def _by_rows(func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """Return the result of a call that treats each row by itself, lazy or computed in chunks; None for any other."""
    lazies = _lazy_in(args, kwargs)
    if any(lazy.grad_fn is not lazy.node for lazy in lazies) or not _gains(lazies):
        return None
    for lazy in lazies:
        lazy.source.check()
    source = lazies[0].source
    args, kwargs = fake_tensors.tree_map_only(LazyLogits, lambda lazy: lazy.source.program, (args, kwargs))
    result = row_calls.apply(Call(func, tuple(args), kwargs, source.chunk_bytes))
    if not isinstance(result, Program):
        return _noted(result, lazies)
    if _is_cast(func.__name__, args[1:], kwargs) and result.dtype == lazies[0].dtype:
        return lazies[0]
    return LazyLogits.of(result, source.chunk_bytes, source.reads, lazies)


def _noted(result: Any, lazies: Sequence[LazyLogits]) -> Any:
    """Return what was computed without logits, having noted that gradients pass them by."""
    if any(tensor.requires_grad for tensor in fake_tensors.tensors_in(result)):
        for lazy in lazies:
            lazy.source.family.passed = True
    return result


def _asked_for_gradient(func: Any, args: Sequence[Any], kwargs: Any) -> list[LazyLogits]:
    """List the logits at which a call asks for a gradient."""
    if func in (Tensor.retain_grad, Tensor.register_hook):
        return _lazy_in(args[:1], {})
    return _lazy_in(args[1:2], kwargs.get("inputs")) if func is torch.autograd.grad else []


def _gains(lazies: Sequence[LazyLogits]) -> bool:
    """Return whether chunks need less memory: not where no gradient is wanted and all logits are one chunk.

    Where weights are sharded, processes have to decide alike, whatever their numbers of rows.
    """
    trained = torch.is_grad_enabled() and any(lazy.requires_grad for lazy in lazies)
    return any(
        trained or lazy.nbytes > lazy.source.chunk_bytes or any(map(fsdp.is_sharded, lazy.source.logits.values))
        for lazy in lazies
    )


def _run_whole(function: Callable | str, *args: Any, **kwargs: Any) -> Any:
    """Run a call, with what is sharded as a whole."""
    args, kwargs = fake_tensors.tree_map_only(Tensor, fsdp.whole, (args, kwargs))
    return run(function, *args, **kwargs)


def _lazy_in(args: Sequence[Any], kwargs: Any) -> list[LazyLogits]:
    """List the lazy logits among arguments."""
    return [one for one in fake_tensors.leaves((args, kwargs)) if isinstance(one, LazyLogits)]


def _widened(name: str, logits: Logits) -> torch.dtype | None:
    """Return the dtype that autocast gives the result of a softmax or a loss; None for other calls or without it."""
    device = logits.hidden.device.type
    if name not in autocast.LOSSES or not torch.is_autocast_enabled(device):
        return None
    return autocast.dtype_of_loss(name, device, logits.dtype, torch.get_autocast_dtype(device))


def _unread(lazy: LazyLogits) -> Tensor:
    """Return the tensor that these logits have become, or themselves."""
    return read(lazy) if is_read(lazy) else lazy


def read(lazy: LazyLogits) -> Tensor:
    """Return the tensor that these logits become: the same one at every call, so that in-place writes to it persist."""
    source = lazy.source
    if source.read is None and source.base is not None and is_written(source.base):
        assert source.view is not None
        source.read = source.view(read(source.base))
    elif source.read is None and lazy.requires_grad:
        with torch.enable_grad():
            source.read = _Read.apply(lazy, *source.logits.values)
    elif source.read is None:
        source.read = source.numbers()
    return source.read


class _Made(torch.autograd.Function):
    """The node of lazy logits in the autograd graph: its inputs are the hidden states and the head."""

    @staticmethod
    def forward(ctx: Any, source: Source, *tensors: Tensor) -> LazyLogits:
        ctx.computation = source.computation
        ctx.source = weakref.ref(source)  # weak: it holds the tensor that was read, whose grad_fn leads back here
        # not saved tensors, so that the user's hooks do not copy them for every view of the logits; freed by backward
        ctx.tensors = [
            tensor if is_parameter(tensor) else fsdp.detach(tensor).requires_grad_(tensor.requires_grad)
            for tensor in tensors
        ]
        ctx.versions = versions_of(ctx.tensors)
        return LazyLogits(source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        computation, source, tensors = ctx.computation, ctx.source(), ctx.tensors
        if tensors is None and source is not None:
            tensors, ctx.versions = source.logits.values, source.versions
        if computation.computed is None and changed(ctx.versions):
            raise RuntimeError(STALE)
        ctx.tensors, ctx.versions = None, []
        return None, *computation.gradients(grad, tensors)


class _Read(torch.autograd.Function):
    """Reads the values; backward passes their gradient to the logits, and the tensors to the logits' computation."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits, *tensors: Tensor) -> Tensor:
        ctx.computation = lazy.source.computation
        # parameters stay alive anyway: hooks that copy saved tensors should not copy them
        ctx.parameters = [tensor if is_parameter(tensor) else None for tensor in tensors]
        ctx.save_for_backward(*(tensor for tensor in tensors if not is_parameter(tensor)))
        return lazy.source.numbers()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        ctx.computation.tensors = [next(saved) if parameter is None else parameter for parameter in ctx.parameters]
        return grad, *(None for _ in ctx.parameters)


def restore(
    compiled: Callable, deferred: Sequence[Deferred], outputs: int, chunk_bytes: int, reads: Counter[str]
) -> Callable:
    """Return a function that returns what the original graph returned, with deferred logits as LazyLogits.

    outputs: the number of results that the graph had before others were appended.
    """
    if not deferred:
        return compiled

    def call(*inputs: Any) -> Any:
        results = list(compiled(*inputs))
        made = {}
        for output in deferred:
            values = [fsdp.sharded((inputs if kind == "input" else results)[index]) for kind, index in output.values]
            logits = output.logits.with_values([results[output.position], *values])
            made[output.position] = LazyLogits.of(logits, chunk_bytes, reads)
        return tuple(made.get(position, result) for position, result in enumerate(results[:outputs]))

    return call
