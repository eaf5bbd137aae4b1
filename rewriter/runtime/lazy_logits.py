"""Logits that are computed when they are read: a tensor by all it says of itself, of no memory until its numbers count.

LazyLogits holds hidden states and a head.  What keeps the vocabulary whole (casts, slices along tokens, reshapes) gives
another one; a cross entropy, or the log-probabilities of given tokens, is computed in chunks.  Anything else computes
the logits, once, and from then on works with the tensor they became.

It takes part in autograd as any result of a model does: whatever gradient arrives at it goes on to the hidden states
and the head, be it from the tensor that it became or from an autograd.Function that was given it.
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

from fastft.compat import eager, fake_tensors
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
# What a tensor tells of itself without its numbers.
_GETTERS = (
    "shape dtype device layout ndim requires_grad is_leaf grad_fn is_cuda is_cpu is_meta is_sparse is_quantized "
    "is_nested is_mkldnn is_mps is_xpu is_xla names itemsize nbytes output_nr retains_grad"
)
_METHODS = (
    "size dim ndimension numel nelement element_size is_floating_point is_complex get_device __len__ __hash__ "
    "is_signed is_contiguous stride storage_offset is_inference is_conj is_neg"
)


def _metadata() -> frozenset[Any]:
    getters = [getattr(Tensor, name) for name in _GETTERS.split() if hasattr(Tensor, name)]
    found = [one.__get__ for one in getters] + [getattr(Tensor, name) for name in _METHODS.split()]
    functions = (torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference)
    return frozenset((*found, *functions))


METADATA = _metadata()


@dataclass(eq=False)
class Source:
    """What some logits are made of, and what they became.

    logits: of tensors that belong to the graph of autograd, or of detached ones where no gradient is wanted.
    versions: how often they had been written to.  base, view: the logits that these share memory with, and the call
    that made them of those.
    """

    logits: Logits
    computation: Computation
    chunk_bytes: int
    reads: Counter[str]
    versions: list[tuple[Tensor, int]]
    base: LazyLogits | None = None
    view: Callable[[Tensor], Tensor] | None = None
    views: list[weakref.ref[Source]] = field(default_factory=list)
    values: Tensor | None = None  # without a history
    read: Tensor | None = None  # what anyone who reads them gets
    written: bool = False

    def numbers(self) -> Tensor:
        """The logits, apart from the graph of autograd."""
        if self.values is None:
            self.check()
            self.reads[_reader()] += 1
            self.values = self.computation.run(self.logits.values)
        return self.values.detach()

    def check(self) -> None:
        """Raise where a tensor is not what it was in the model's forward."""
        self.computation.check()
        if changed(self.versions):
            raise RuntimeError(STALE)


class LazyLogits(Tensor):
    """Logits [..., V] that are computed when something needs their numbers; the module says what does not."""

    source: Source
    node: Any  # its place in autograd's graph when it was made

    @staticmethod
    def __new__(cls, source: Source) -> LazyLogits:
        logits = source.logits
        made = eager.without_storage(cls, logits.shape, logits.dtype, logits.hidden.device)
        made.source = source
        return made

    @classmethod
    def of(cls, logits: Logits, chunk_bytes: int, reads: Counter[str], derived: LazyLogits | None = None) -> LazyLogits:
        """These logits, which others may be derived from.  A gradient reaches what they are made of in grad mode."""
        tensors = logits.values
        if derived is None:
            versions = versions_of(tensors)
        else:
            versions = derived.source.versions
        if not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors)):
            apart = logits.with_values([one.detach() for one in tensors])
            logits = replace(apart, trained=(False,) * len(logits.trained))
        parameters = [(one, count) for one, count in versions if is_parameter(one)]
        computation = Computation(logits.with_values(range(len(logits.values))), parameters)
        computation.stale = derived is not None and derived.source.computation.stale
        unread.add(computation)
        made = _Made.apply(Source(logits, computation, chunk_bytes, reads, versions), *logits.values)
        made.node = made.grad_fn
        return made

    @classmethod
    @torch.compiler.disable  # what is compiled breaks here, and goes on with results
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with eager.as_plain_tensors():
            lazy = args[0] if args and isinstance(args[0], LazyLogits) else None
            if lazy is not None and not _is_read(lazy):
                if func in METADATA:
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
        """Below autograd, for callers that do not ask: those that are given the tensor itself, autograd.Functions."""
        args, kwargs = fake_tensors.tree_map_only(
            LazyLogits, lambda lazy: lazy.source.numbers(), (tuple(args), kwargs or {})
        )
        return func(*args, **kwargs)


def _lazily(lazy: LazyLogits, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """The result of a call that needs no numbers, or none but in chunks; None for any other."""
    name, source = getattr(func, "__name__", ""), lazy.source
    if name == "kl_div":  # a teacher's log-probabilities are needed as they are
        args, kwargs = fake_tensors.tree_map_only(LazyLogits, read, (tuple(args), kwargs))
    if lazy.grad_fn is not lazy.node or _mentions_lazy(args, kwargs):
        return None  # another autograd.Function returned it: gradients have to go through that
    make = functools.partial(LazyLogits.of, chunk_bytes=source.chunk_bytes, reads=source.reads, derived=lazy)
    widened, copies = _widened(name, source.logits), any(one is True for one in (*args, kwargs.get("copy")))
    if name == "detach" and not args and not kwargs:
        with torch.no_grad():
            return _as_view(make(source.logits), lazy, func, args, kwargs)
    followed = follow(name, source.logits, args, kwargs, run, widened)
    if followed is None:
        source.check()
        return consume(name, source.logits, args, kwargs, run, source.chunk_bytes, widened)
    if name == "contiguous" or (name in CASTS and followed.dtype == source.logits.dtype and not copies):
        return lazy
    made = make(followed)
    return _as_view(made, lazy, func, args, kwargs) if name in VIEWS else made


def _as_view(made: LazyLogits, base: LazyLogits, func: Any, args: Sequence[Any], kwargs: Any) -> LazyLogits:
    """Note that these share memory with those."""
    made.source.base, made.source.view = base, lambda tensor: func(tensor, *args, **kwargs)
    base.source.views.append(weakref.ref(made.source))
    return made


def _mentions_lazy(args: Sequence[Any], kwargs: Any) -> bool:
    found: list[Any] = []
    fake_tensors.tree_map_only(LazyLogits, found.append, (tuple(args), kwargs))
    return bool(found)


def _widened(name: str, logits: Logits) -> torch.dtype | None:
    """The dtype that autocast gives the result of a softmax or of a loss; None where it is off."""
    device = logits.hidden.device.type
    if name not in autocast.LOSSES or not torch.is_autocast_enabled(device):
        return None
    return autocast.dtype_of_loss(name, device, logits.dtype, torch.get_autocast_dtype(device))


def _is_read(lazy: LazyLogits) -> bool:
    """Whether these are an ordinary tensor by now, or share memory with one that was written to."""
    base = lazy.source.base
    return lazy.source.read is not None or (base is not None and _is_written(base))


def _is_written(lazy: LazyLogits) -> bool:
    base = lazy.source.base
    return lazy.source.written or (base is not None and _is_written(base))


def read(lazy: LazyLogits) -> Tensor:
    """The tensor that these logits become: always the same one, so that what is written to it stays."""
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
    """Whether a call writes to its first argument, or to another given for that."""
    return names_a_write(getattr(func, "__name__", "")) or kwargs.get("out") is not None


def _before_write(lazy: LazyLogits) -> None:
    """Let all that share memory with these do so as tensors, too."""
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
    own = [one for reference in source.views if (one := reference()) is not None]
    return own + [deeper for one in own for deeper in _all_views(one)]


def _reader() -> str:
    """``file:line`` of the code that reads: the innermost that is neither torch's nor of this package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "").split(".")[0]
        if name not in ("torch", "fastft", "contextlib", "functools"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


class _Made(torch.autograd.Function):
    """The logits in autograd's graph: hidden states and the head below, whatever is done to them above."""

    @staticmethod
    def forward(ctx: Any, source: Source, *tensors: Tensor) -> LazyLogits:
        ctx.computation = source.computation
        ctx.source = weakref.ref(source)  # it holds what was read, which leads back here
        # not saved, so that hooks of the user's do not copy them for every view of logits; let go of by backward
        ctx.tensors = [one if is_parameter(one) else one.detach().requires_grad_(one.requires_grad) for one in tensors]
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
    """The numbers; their gradient is that of the logits, which is told what they are made of."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits, *tensors: Tensor) -> Tensor:
        ctx.computation = lazy.source.computation
        # parameters live anyway: a hook that copies what is saved should not copy them
        ctx.parameters = [one if is_parameter(one) else None for one in tensors]
        ctx.save_for_backward(*(one for one in tensors if not is_parameter(one)))
        return lazy.source.numbers()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        ctx.computation.tensors = [next(saved) if one is None else one for one in ctx.parameters]
        return grad, *(None for _ in ctx.parameters)


def restore(
    compiled: Callable, deferred: Sequence[Deferred], outputs: int, chunk_bytes: int, reads: Counter[str]
) -> Callable:
    """A function that returns what the graph as it was returned; logits as LazyLogits.

    outputs: how many results the graph had before others were appended.
    """
    if not deferred:
        return compiled

    def call(*inputs: Any) -> Any:
        results = list(compiled(*inputs))
        made = {}
        for one in deferred:
            values = [(inputs if kind == "input" else results)[at] for kind, at in one.values]
            logits = one.logits.with_values([results[one.position], *values])
            made[one.position] = LazyLogits.of(logits, chunk_bytes, reads)
        return tuple(made.get(position, result) for position, result in enumerate(results[:outputs]))

    return call
