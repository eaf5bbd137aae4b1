"""Writes to lazy logits: which share memory, which were written to, and what is done to logits that nobody has read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.rewriter.fx.effects import names_a_write
from fastft.rewriter.loss.head import run
from fastft.rewriter.loss.logits import follow
from fastft.rewriter.runtime.row_programs import Program

if TYPE_CHECKING:
    from fastft.rewriter.runtime.lazy_logits import LazyLogits

_APART = (
    "logits are written to in place of which another part was read before: read and write the same tensor, or compile "
    "with options={'lazy_logits': False}."
)
_TAKEN = (
    "a torch.autograd.Function takes logits that were written to in place, and its gradient would not know of that: "
    "write `logits = logits * x` for `logits *= x`, or compile with options={'lazy_logits': False}."
)
_SCALED = {"mul_": "mul", "multiply_": "mul", "__imul__": "mul", "div_": "div", "divide_": "div", "__itruediv__": "div"}


def is_read(lazy: LazyLogits) -> bool:
    """Return whether these logits have become a tensor, or share memory with one that was written to."""
    base = lazy.source.base
    return lazy.source.read is not None or (base is not None and is_written(base))


def is_written(lazy: LazyLogits) -> bool:
    """Return whether somebody has written to these logits' memory, other than by a scale before all reads."""
    base = lazy.source.base
    return lazy.source.written or (base is not None and is_written(base))


def as_view(made: LazyLogits, base: LazyLogits, func: Any, args: Sequence[Any], kwargs: Any) -> LazyLogits:
    """Note that ``made``, the result of a call on ``base``, shares memory with it; return ``made``."""
    made.source.base, made.source.view = base, lambda tensor: func(tensor, *args, **kwargs)
    base.source.views.append(weakref.ref(made))
    return made


def writes(func: Any, kwargs: Any) -> bool:
    """Return whether a call writes to its first argument, or to ``out``."""
    return names_a_write(getattr(func, "__name__", "")) or kwargs.get("out") is not None


def before_write(lazy: LazyLogits) -> None:
    """Mark the base as written to, so that all logits that share its memory become views of one tensor.

    Raises RuntimeError where some of them were read as separate tensors before.
    """
    source = lazy.source
    if source.base is not None and not is_written(source.base):
        if source.read is not None:
            raise RuntimeError(_APART)
        before_write(source.base)
    elif source.base is None and not source.written:
        if any(view.source.read is not None for view in _all_views(lazy)):
            raise RuntimeError(_APART)
        source.written = True


def _all_views(lazy: LazyLogits) -> list[LazyLogits]:
    own = [view for reference in lazy.source.views if (view := reference()) is not None]
    return own + [deeper for view in own for deeper in _all_views(view)]


def sharing_memory(lazy: LazyLogits) -> list[LazyLogits]:
    """List all lazy logits that share these logits' memory, themselves too."""
    while lazy.source.base is not None:
        lazy = lazy.source.base
    return [lazy, *_all_views(lazy)]


class Refused(torch.autograd.Function):
    """Logits that were written to as another tensor: an autograd.Function that takes them gets no gradient through."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits) -> LazyLogits:
        ctx.mark_dirty(lazy)  # so that one that saved them before knows, too
        return lazy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(_TAKEN)


def scaled_in_place(lazy: LazyLogits, func: Any, args: Sequence[Any], kwargs: Any) -> bool:
    """Multiply or divide logits in place that share their memory with no others and that nobody has read.

    Return False, having done nothing, for any other call.
    """
    source, name = lazy.source, _SCALED.get(getattr(func, "__name__", ""))
    if name is None or isinstance(source.logits, Program) or source.values is not None:
        return False
    if source.base is not None or _all_views(lazy) or lazy.grad_fn is not lazy.node:
        return False
    if lazy.is_inference() or (lazy.requires_grad and not torch.is_grad_enabled()):
        return False
    followed = follow(name, source.logits, args, kwargs, run)
    if followed is None:
        return False
    source.check()
    if lazy.requires_grad:
        _Scaled.apply(lazy, name, args[0])
    else:
        torch.autograd.graph.increment_version(lazy)
    source.logits, lazy.node = followed, lazy.grad_fn
    source.scales.append((name, args[0]))
    return True


class _Scaled(torch.autograd.Function):
    """Logits that are multiplied or divided in place before they are computed."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits, name: str, number: float) -> LazyLogits:
        ctx.mark_dirty(lazy)
        ctx.name, ctx.number = name, number
        return lazy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return getattr(grad, ctx.name)(ctx.number), None, None
