"""Turn values of a whole batch into those of its live rows, and what is computed of these into that of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastft.compat import symbolic
from fastft.compat.fake_tensors import value_of
from fastft.compat.symbolic import Sizes
from fastft.kernels.core.registry import wide
from fastft.reasons import Declined
from fastft.rewriter.rows.proof import RowSizes
from fastft.rewriter.rows.selection import Selection

Take = Callable[[Any, Selection], Any]
Restore = Callable[[Any, Selection, tuple[int, int]], Any]


def of_shape(sizes: RowSizes, *shape: int) -> Sizes:
    """Return the values of the symbols of a batch's sizes for such a batch."""
    return {symbol: number for symbol, number in zip(sizes, shape, strict=True) if symbol != 1}


def taker(node: Node, sizes: RowSizes, labels: Mapping[Node, int]) -> Take:
    """Return how a value of the whole batch becomes one of live rows.

    labels: those of losses, with the number that does not count.  Raises Declined.
    """
    value = value_of(node)
    if isinstance(value, torch.SymInt):
        return _take_size(symbolic.expression(value), sizes)
    if not isinstance(value, Tensor):
        return _as_it_is
    axes = sizes.axes(value)
    if node in labels:
        flat, ignored = "bs" in axes or value.dim() == 1, labels[node]
        return lambda given, selected: _take_labels(given, selected, ignored, flat=flat)
    one_sequence = sizes.batch == 1 and axes[:2] == ["", "s"] and symbolic.expression(value.shape[0]) == 1
    by_rows = axes[:2] == ["b", "s"] or one_sequence or axes[:1] == ["bs"]
    if by_rows and (any(axes[2:]) or axes[1:2] == ["bs"] or not value.is_contiguous()):
        raise Declined(f"{node.name} is laid out in another way than by rows")
    if axes[:2] == ["b", "s"] or one_sequence:
        return lambda given, selected: Taken.apply(given.flatten(0, 1), selected.rows, selected.live)[None]
    if axes[:1] == ["bs"]:
        return lambda given, selected: Taken.apply(given, selected.rows, selected.live)
    if "b" not in axes and "bs" not in axes:
        if axes.count("s") == 1 and not value.requires_grad:
            return _take_places(value, axes.index("s"))
        if "s" not in axes:
            return _as_it_is
    raise Declined(f"{node.name} has rows in axes of its own")


def _as_it_is(given: Any, selected: Selection) -> Any:
    return given


def _take_size(expression: Any, sizes: RowSizes) -> Callable[[Any, Selection], Any]:
    if not sizes.depends(expression):
        return _as_it_is

    def size(given: int, selected: Selection) -> int:
        return symbolic.evaluate(expression, of_shape(sizes, 1, selected.size))

    return size


def _take_labels(labels: Tensor, selected: Selection, ignored: int, *, flat: bool) -> Tensor:
    """Take labels, and none for the copies that were added: [N], or [1, N] where these are not flat."""
    taken = labels.flatten().index_select(0, selected.rows)
    taken[selected.live :] = ignored
    return taken if flat else taken[None]


def _take_places(value: Tensor, axis: int) -> Callable[[Any, Selection], Any]:
    """Return how what is the same for all sequences is taken, laid out in memory as it was.  Raises Declined."""
    strides = [symbolic.hint(stride) for stride in value.stride()]
    if any(stride == 0 and symbolic.hint(size) > 1 for stride, size in zip(strides, value.shape, strict=True)):
        raise Declined("what is the same for all sequences is repeated in memory")
    order = sorted(range(value.dim()), key=lambda dim: -strides[dim])
    back = sorted(range(value.dim()), key=order.__getitem__)
    place = order.index(axis)
    return lambda given, selected: given.permute(order).index_select(place, selected.places).permute(back)


def restorer(value: Any, sizes: RowSizes) -> Restore | None:
    """Return how what was computed of live rows becomes what it is of the whole batch; None for what is the same.

    Raises Declined.
    """
    if isinstance(value, torch.SymInt) and sizes.depends(expression := symbolic.expression(value)):
        return lambda part, selected, shape: symbolic.evaluate(expression, of_shape(sizes, *shape))
    if not isinstance(value, Tensor) or not any(axes := sizes.axes(value)):
        return None

    def whole(part: Tensor, selected: Selection, shape: tuple[int, int]) -> Tensor:
        if selected.home is not None:
            return Repeated.apply(part, selected.home.view(shape))
        return Restored.apply(part, selected.rows, selected.live, shape[0] * shape[1])

    first = ["b"] if sizes.batch != 1 else [""]
    one = sizes.batch != 1 or symbolic.expression(value.shape[0]) == 1
    if axes[0] == "bs" and not any(axes[1:]) and value.is_contiguous():
        return whole
    if one and axes[:2] == [*first, "s"] and not any(axes[2:]) and value.is_contiguous():
        return lambda part, selected, shape: whole(part[0], selected, shape).unflatten(0, shape)
    if one and axes == [*first, "", "s", ""]:  # keys and values, by heads
        turned = lambda tensor: tensor.transpose(1, 2)  # noqa: E731
        return lambda part, selected, shape: turned(whole(turned(part)[0], selected, shape).unflatten(0, shape))
    raise Declined("what leaves the graph has rows in axes of its own")


class Taken(torch.autograd.Function):
    """Take rows [M, ...] of which the first ``live`` are all different, and the others not to be trained."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, rows: Tensor, live: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.live, ctx.shape = live, whole.shape
        return whole.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy(0, rows[: ctx.live], grad[: ctx.live]), None, None


class Restored(torch.autograd.Function):
    """Put the first ``live`` rows back into their places of M, beside zeros."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: Tensor, live: int, M: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.live = live
        return part.new_zeros(M, *part.shape[1:]).index_copy_(0, rows[:live], part[:live])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        taken = grad.index_select(0, rows)
        added = torch.arange(len(rows), device=rows.device) >= ctx.live
        return taken.masked_fill(added.view(-1, *[1] * (grad.dim() - 1)), 0.0), None, None, None


class Repeated(torch.autograd.Function):
    """Give each row of a batch [B, S] the one of N that home says; zeros where it says N."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, home: Tensor) -> Tensor:
        ctx.save_for_backward(home)
        ctx.N = len(part)
        none = home.flatten() == ctx.N
        found = part.index_select(0, home.flatten().clamp(max=ctx.N - 1))
        return found.masked_fill_(none.view(-1, *[1] * (part.dim() - 1)), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Sum sequence by sequence, none of which has a row twice: so two runs give the same bits."""
        (home,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.N + 1, *grad.shape[1:], dtype=wide(grad.dtype))
        for places, part in zip(home, grad.unflatten(0, home.shape), strict=True):
            total.index_add_(0, places, part.to(total.dtype))
        return total[: ctx.N].to(grad.dtype), None
