"""LazyLogits: a tensor subclass with metadata and no storage, computed at the first read.

LazyLogits holds hidden states and a head.  Calls that keep the vocabulary dimension whole (casts, slices along tokens,
reshapes) return further LazyLogits; a cross entropy, or the log-probabilities of given tokens, is computed in chunks.
Any other call computes the logits, once, and all later calls use the computed tensor.

It takes part in autograd like any output of a model: whatever gradient arrives goes on to the hidden states and the
head, both from the computed tensor and from an autograd.Function that takes the LazyLogits itself as an input.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.compat import eager, fake_tensors, fsdp
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.effects import names_a_write
from fastft.rewriter.loss.head import Logits, run
from fastft.rewriter.loss.logits import CASTS, consume, follow
from fastft.rewriter.loss.losses import Deferred
from fastft.rewriter.runtime.logits_computation import STALE, Computation, changed, is_parameter, unread, versions_of

_APART = (
    "logits are written to in place of which another part was read before: read and write the same tensor, or compile "
    "with options={'lazy_logits': False}."
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


@dataclass(eq=False)
class Source:
    """What some logits are computed from, and the tensor that they became.

    logits: their tensors are in the autograd graph, or detached where no gradient is wanted.  versions: the tensors
    with their version counters at that time.  base, view: the logits that these share memory with, and the call that
    made these from those.
    """

    logits: Logits
    computation: Computation
    chunk_bytes: int
    reads: Counter[str]
    versions: list[tuple[Tensor, int]]
    base: LazyLogits | None = None
    view: Callable[[Tensor], Tensor] | None = None
    views: list[weakref.ref[Source]] = field(default_factory=list)
    values: Tensor | None = None  # detached
    read: Tensor | None = None  # the tensor that every reader gets
    written: bool = False

    def numbers(self) -> Tensor:
        """Return the values of the logits, detached; compute them at the first call and count the read.

        Raises RuntimeError where a tensor that they are computed from has changed.
        """
        if self.values is None:
            self.check()
            self.reads[_reader()] += 1
            self.values = self.computation.run(self.logits.values)
        return self.values.detach()

    def check(self) -> None:
        """Raise RuntimeError where a tensor has been written to since the model's forward."""
        self.computation.check()
        if changed(self.versions):
            raise RuntimeError(STALE)


class LazyLogits(Tensor):
    """Logits [..., V] that are computed when a call needs their values; the module's docstring says which do not."""

    source: Source
    node: Any  # its grad_fn when it was made

    @staticmethod
    def __new__(cls, source: Source) -> LazyLogits:
        logits = source.logits
        made = eager.without_storage(cls, logits.shape, logits.dtype, logits.hidden.device)
        made.source = source
        return made

    @classmethod
    def of(cls, logits: Logits, chunk_bytes: int, reads: Counter[str], derived: LazyLogits | None = None) -> LazyLogits:
        """Make lazy logits.  In grad mode, gradients reach the tensors that they are computed from.

        reads: counts the reads by source line.  derived: the lazy logits that these are derived from, if any.
        """
        tensors = logits.values
        if derived is None:
            versions = versions_of(tensors)
        else:
            versions = derived.source.versions
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            detached = logits.with_values([fsdp.detach(tensor) for tensor in tensors])
            logits = replace(detached, trained=(False,) * len(logits.trained))
        parameters = [(tensor, version) for tensor, version in versions if is_parameter(tensor)]
        computation = Computation(logits.with_values(range(len(logits.values))), parameters)
        computation.stale = derived is not None and derived.source.computation.stale
        unread.add(computation)
        made = _Made.apply(Source(logits, computation, chunk_bytes, reads, versions), *logits.values)
        made.node = made.grad_fn
        return made

    @classmethod
    @torch.compiler.disable  # compiled code has a graph break here, and goes on with the results
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with eager.as_plain_tensors():
            lazy = args[0] if args and isinstance(args[0], LazyLogits) else None
            if lazy is not None and not _is_read(lazy):
                if func in METADATA or (func is Tensor.register_hook and fsdp.is_hook(args[1])):
                    return func(*args, **kwargs)
                result = _lazily(lazy, func, args[1:], kwargs)
                if result is not None:
                    return result
            if _writes(func, kwargs):
                fake_tensors.tree_map_only(LazyLogits, _before_write, (args[:1], kwargs.get("out")))
            args, kwargs = fake_tensors.tree_map_only(LazyLogits, read, (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an op on the computed values, below autograd, for callers that bypass __torch_function__.

        These are callers that take the tensor itself, such as autograd.Functions.
        """
        args, kwargs = fake_tensors.tree_map_only(
            LazyLogits, lambda lazy: lazy.source.numbers(), (tuple(args), kwargs or {})
        )
        return func(*args, **kwargs)


def _lazily(lazy: LazyLogits, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """Return the result of a call that needs no values, or only chunks of them; None for any other call."""
    name, source = getattr(func, "__name__", ""), lazy.source
    if name == "kl_div":  # a teacher's log-probabilities are needed as a tensor
        args, kwargs = fake_tensors.tree_map_only(LazyLogits, read, (tuple(args), kwargs))
    if lazy.grad_fn is not lazy.node or _mentions_lazy(args, kwargs):
        return None  # another autograd.Function returned it: gradients have to go through that
    make = functools.partial(LazyLogits.of, chunk_bytes=source.chunk_bytes, reads=source.reads, derived=lazy)
    widened, copies = _widened(name, source.logits), any(argument is True for argument in (*args, kwargs.get("copy")))
    if name == "detach" and not args and not kwargs:
        with torch.no_grad():
            return _as_view(make(source.logits), lazy, func, args, kwargs)
    followed = follow(name, source.logits, args, kwargs, run, widened)
    if followed is None:
        source.check()
        return consume(name, source.logits, args, kwargs, _run_whole, source.chunk_bytes, widened)
    if name == "contiguous" or (name in CASTS and followed.dtype == source.logits.dtype and not copies):
        return lazy
    made = make(followed)
    return _as_view(made, lazy, func, args, kwargs) if name in VIEWS else made


def _run_whole(function: Callable | str, *args: Any, **kwargs: Any) -> Any:
    """Run a call, with what is sharded as a whole."""
    args, kwargs = fake_tensors.tree_map_only(Tensor, fsdp.whole, (args, kwargs))
    return run(function, *args, **kwargs)


def _as_view(made: LazyLogits, base: LazyLogits, func: Any, args: Sequence[Any], kwargs: Any) -> LazyLogits:
    """Note that ``made``, the result of a call on ``base``, shares memory with it; return ``made``."""
    made.source.base, made.source.view = base, lambda tensor: func(tensor, *args, **kwargs)
    base.source.views.append(weakref.ref(made.source))
    return made


def _mentions_lazy(args: Sequence[Any], kwargs: Any) -> bool:
    lazy: list[Any] = []
    fake_tensors.tree_map_only(LazyLogits, lazy.append, (tuple(args), kwargs))
    return bool(lazy)


def _widened(name: str, logits: Logits) -> torch.dtype | None:
    """Return the dtype that autocast gives the result of a softmax or a loss; None for other calls or without it."""
    device = logits.hidden.device.type
    if name not in autocast.LOSSES or not torch.is_autocast_enabled(device):
        return None
    return autocast.dtype_of_loss(name, device, logits.dtype, torch.get_autocast_dtype(device))


def _is_read(lazy: LazyLogits) -> bool:
    """Return whether these logits have become a tensor, or share memory with one that was written to."""
    base = lazy.source.base
    return lazy.source.read is not None or (base is not None and _is_written(base))


def _is_written(lazy: LazyLogits) -> bool:
    base = lazy.source.base
    return lazy.source.written or (base is not None and _is_written(base))


def read(lazy: LazyLogits) -> Tensor:
    """Return the tensor that these logits become: the same one at every call, so that in-place writes to it persist."""
    source = lazy.source
    if source.read is None and source.base is not None and _is_written(source.base):
        assert source.view is not None
        source.read = source.view(read(source.base))
    elif source.read is None and lazy.requires_grad:
        with torch.enable_grad():
            source.read = _Read.apply(lazy, *source.logits.values)
    elif source.read is None:
        source.read = source.numbers()
    return source.read


def _writes(func: Any, kwargs: Any) -> bool:
    """Return whether a call writes to its first argument, or to ``out``."""
    return names_a_write(getattr(func, "__name__", "")) or kwargs.get("out") is not None


def _before_write(lazy: LazyLogits) -> None:
    """Mark the base as written to, so that all logits that share its memory become views of one tensor.

    Raises RuntimeError where some of them were read as separate tensors before.
    """
    source = lazy.source
    if source.base is not None and not _is_written(source.base):
        if source.read is not None:
            raise RuntimeError(_APART)
        _before_write(source.base)
    elif source.base is None and not source.written:
        if any(view.read is not None for view in _all_views(source)):
            raise RuntimeError(_APART)
        source.written = True


def _all_views(source: Source) -> list[Source]:
    own = [view for reference in source.views if (view := reference()) is not None]
    return own + [deeper for view in own for deeper in _all_views(view)]


def _reader() -> str:
    """Return ``file:line`` of the code that reads: the innermost frame that is in neither torch nor this package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "").split(".")[0]
        if name not in ("torch", "fastft", "contextlib", "functools"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


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
