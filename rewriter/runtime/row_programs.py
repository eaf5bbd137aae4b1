"""Row programs: calls on lazy logits that treat each row by itself, computed for a chunk of rows at a time.

A program is the user's own calls, as a graph from hidden states and a head to a tensor [*rows, V] that nobody computes.
Where such a tensor is reduced over its classes, the calls run on one chunk of rows after another; backward runs them
again, chunk by chunk, and adds up the gradients of all tensors that went in.  No [rows, V] tensor outlives its chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastft.compat import eager, fsdp
from fastft.compat.fake_tensors import leaves, tree_map_only
from fastft.kernels.chunked_head import WHOLE
from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.registry import wide
from fastft.rewriter.loss.head import STEPS, Logits, run
from fastft.rewriter.loss.logits import on_rows
from fastft.rewriter.runtime.logits_computation import Watched, is_parameter, unread, versions_of


class NotByRow(Exception):  # noqa: N818 - tells the caller to compute all rows
    """Some call gave another number of rows than its chunk has."""


@dataclass(eq=False)
class Input:
    """A tensor that a program reads, or the number of its place.

    by_row: it is [*rows, k], with any k, and each row reads its own part; otherwise every row reads all of it.
    """

    tensor: Any
    by_row: bool


@dataclass(eq=False)
class Node:
    """A call; Nodes and Inputs among its arguments stand for tensors.

    autocast: the dtype of autocast on the logits' device when the user made the call, None where it was off.
    bytes: of one row of the result.
    """

    function: Callable | str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: torch.dtype | None
    bytes: int

    def operands(self) -> list[Any]:
        """List the Nodes and Inputs among the arguments."""
        return [one for one in leaves((self.args, dict(self.kwargs))) if isinstance(one, (Node, Input))]

    def call(self, values: Mapping[Any, Any], device: str) -> Any:
        """Make the call, with ``values`` in the places of its operands."""
        args, kwargs = tree_map_only((Node, Input), values.__getitem__, (self.args, dict(self.kwargs)))
        enabled = self.autocast is not None
        with torch.autocast(device, dtype=self.autocast, enabled=enabled, cache_enabled=False):
            return run(self.function, *args, **kwargs)


def autocast_now(device: str) -> torch.dtype | None:
    """Return the dtype of autocast on this kind of device, None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@dataclass(frozen=True, eq=False)
class Program:
    """What computes a tensor [*rows, V].

    requires_grad: whether that would require grad.  classes_second: the user has its last two axes transposed.
    stacked: how many such tensors it is, stacked along a new first axis; 0 for one by itself.
    """

    root: Node
    rows: tuple[int, ...]
    classes: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    classes_second: bool = False
    stacked: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor, as the user has it."""
        if self.stacked:
            return (self.stacked, *self.rows, self.classes)
        return (*self.rows[:-1], self.classes, self.rows[-1]) if self.classes_second else (*self.rows, self.classes)

    @property
    def rank(self) -> int:
        """The number of its axes."""
        return len(self.rows) + 1

    def detached(self) -> Program:
        """Return the same program, which leads to no gradient."""
        return (
            replace(self, root=Node("detach", (self.root,), {}, None, 0), requires_grad=False)
            if self.requires_grad
            else self
        )

    @functools.cached_property
    def order(self) -> list[Node | Input]:
        """All Nodes and Inputs, each behind what it reads."""
        found: dict[Node | Input, None] = {}
        stack: list[tuple[Any, bool]] = [(self.root, False)]
        while stack:
            one, read = stack.pop()
            if read or isinstance(one, Input):
                found.setdefault(one)
            elif one not in found:
                stack += [(one, True), *((operand, False) for operand in one.operands())]
        return list(found)

    @functools.cached_property
    def inputs(self) -> list[Input]:
        """What it reads, in a fixed order."""
        return [one for one in self.order if isinstance(one, Input)]

    @property
    def values(self) -> list[Any]:
        """The tensors that it reads."""
        return [one.tensor for one in self.inputs]

    def with_values(self, values: Sequence[Any]) -> Program:
        """Return the same program with other tensors, in the order of ``values``."""
        places = dict(zip(self.inputs, values, strict=True))
        return self._mapped(lambda one: Input(places[one], one.by_row), self.rows)

    def moved(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program | None:
        """Return the program of a call that moves rows and leaves each as it is; None for any other call."""

        def move(one: Input) -> Input:
            if not one.by_row:
                return one
            call = on_rows(name, self.rows, self.classes, one.tensor.shape[-1], args, kwargs)
            assert call is not None
            return Input(run(call[0], one.tensor, *call[1]), True)

        if self.stacked or on_rows(name, self.rows, self.classes, self.classes, args, kwargs) is None:
            return None
        moved = self._mapped(move, self.rows)
        rows = next(tuple(one.tensor.shape[:-1]) for one in moved.inputs if one.by_row)
        return replace(moved, rows=rows)

    def _mapped(self, change: Callable[[Input], Input], rows: tuple[int, ...]) -> Program:
        """Return the same program with other inputs."""
        made: dict[Any, Any] = {}
        for one in self.order:
            if isinstance(one, Input):
                made[one] = change(one)
            else:
                args, kwargs = tree_map_only((Node, Input), made.__getitem__, (one.args, dict(one.kwargs)))
                made[one] = replace(one, args=args, kwargs=kwargs)
        return replace(self, root=made[self.root], rows=rows)

    def compute(self) -> Any:
        """Make all calls, on all rows at once."""
        return self._run(self.values)

    def _run(self, values: Sequence[Any]) -> Any:
        """Make the calls with these tensors; each result is let go behind its last use."""
        known: dict[Any, Any] = dict(zip(self.inputs, values, strict=True))
        for one, last_of in self._with_last_uses:
            if isinstance(one, Node):
                known[one] = one.call(known, self.device.type)
            for done in last_of:
                del known[done]
        return known[self.root]

    @functools.cached_property
    def _with_last_uses(self) -> list[tuple[Node | Input, list[Node]]]:
        """Pair the order with those Nodes that nothing behind reads."""
        last = {read: one for one in self.order if isinstance(one, Node) for read in one.operands()}
        freed: dict[Any, list[Node]] = {}
        for read, one in last.items():
            freed.setdefault(one, []).extend([read] if isinstance(read, Node) else [])
        return [(one, freed.get(one, [])) for one in self.order]

    def run_chunk(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Make the calls for some rows: tensors by row are [n, k] here.  Return the results as [n, ...].

        Raises NotByRow where a result has other rows.
        """
        leading, rank = (1,) * (self.rank - 2), self.rank
        count = next(len(value) for one, value in zip(self.inputs, values, strict=True) if one.by_row)
        parts = [
            value.reshape(*leading, *value.shape) if one.by_row and rank > 1 else value[0] if one.by_row else value
            for one, value in zip(self.inputs, values, strict=True)
        ]
        results = self._run(parts)
        results = results if isinstance(results, tuple) else (results,)
        if any(tuple(one.shape[: rank - 1]) != ((*leading, count) if rank > 1 else ()) for one in results):
            raise NotByRow
        return [one.reshape(count, *one.shape[rank - 1 :]) for one in results]

    def chunks(self, chunk_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield the first row of each chunk and the one behind its last, of all rows in a row; one chunk at least.

        The results of all calls for a chunk are within ``chunk_bytes`` together, those of one call where so few rows
        would keep the device from multiplying at its speed.
        """
        count, sizes = math.prod(self.rows), [one.bytes for one in self.order if isinstance(one, Node)]
        together, widest = chunk_bytes // max(1, sum(sizes)), chunk_bytes // max(1, *sizes)
        most = max(1, together, min(WHOLE, widest))
        size = max(1, cdiv(count, max(1, cdiv(count, most))))
        yield from ((start, min(start + size, count)) for start in range(0, max(count, 1), size))


def program_of(logits: Logits, known: dict[Any, Any]) -> Program:
    """Return the program of logits as their head makes them.

    known: the Nodes made so far, by what they compute, so that logits of one head share its product.
    """
    row_bytes = logits.head.classes * wide(logits.dtype).itemsize
    known[id(logits.head)] = logits.head  # held, as each Input holds its tensor, so that no other gets its id
    key: tuple[Any, ...] = (id(logits.hidden), id(logits.head))
    if key not in known:
        product = replace(logits, steps=(), classes_second=False)
        operands = tuple(Input(value, number == 0) for number, value in enumerate(product.values))
        bare = product.with_values(range(len(operands)))
        known[key] = Node(lambda *values: bare.with_values(values).compute(), operands, {}, None, row_bytes)
    for name, operand in logits.steps:
        tensor = isinstance(operand, Tensor)
        more = () if operand is None else (Input(operand, True) if tensor else operand,)
        before, key = known[key], (*key, name, id(operand) if tensor else operand)
        known.setdefault(key, Node(STEPS[name], (before, *more), {}, None, row_bytes))
    trained, second = logits.requires_grad, logits.classes_second
    return Program(known[key], logits.rows, logits.head.classes, logits.dtype, logits.device, trained, second)


def part_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return rows of a tensor [*rows, k] as [n, k]; only these are copied where they do not lie in a row."""
    try:
        return tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1])[start:stop]
    except RuntimeError:
        numbers = torch.arange(start, stop, device=tensor.device)
        return tensor[torch.unravel_index(numbers, tensor.shape[:-1])]


def evaluate(program: Program, chunk_bytes: int) -> Any:
    """Compute what a program returns whose last call reduces its classes, as a tensor [*rows, ...] or a tuple of some.

    Gradients reach the tensors that it reads, where grad mode is on.
    """
    bare = program.with_values(range(len(program.inputs)))
    results = _Evaluated.apply(bare, chunk_bytes, *program.values)
    return results if len(results) > 1 else results[0]


class _Evaluated(torch.autograd.Function):
    """The results of a program, which saves nothing but what the program reads."""

    @staticmethod
    def forward(ctx: Any, program: Program, chunk_bytes: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        values, count = [fsdp.whole(tensor) for tensor in tensors], math.prod(program.rows)
        results: list[Tensor] = []
        for start, stop in program.chunks(chunk_bytes):
            parts = program.run_chunk(_parts(program, values, start, stop))
            results = results or [part.new_empty((*program.rows, *part.shape[1:])) for part in parts]
            for result, part in zip(results, parts, strict=True):
                result.view(count, *part.shape[1:])[start:stop] = part
            del parts
        ctx.program, ctx.chunk_bytes = program, chunk_bytes
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        # parameters stay alive anyway: hooks that copy saved tensors should not copy them
        ctx.parameters = [tensor if is_parameter(tensor) else None for tensor in tensors]
        ctx.watched = Watched(versions_of([tensor for tensor in tensors if is_parameter(eager.base(tensor))]))
        unread.add(ctx.watched)
        ctx.save_for_backward(*(tensor for tensor in tensors if not is_parameter(tensor)))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.watched.check()
        saved = iter(ctx.saved_tensors)
        tensors = [next(saved) if parameter is None else parameter for parameter in ctx.parameters]
        if all(grad is None for grad in grads):
            return None, None, *(None for _ in tensors)
        with torch.no_grad():
            found = _gradients(ctx, tensors, ctx.needs_input_grad[2:], grads)
        if torch.is_grad_enabled():  # once_differentiable looks at grads alone, and these depend on more
            found = [
                grad if grad is None else _NotTwice.apply(grad, grad.new_zeros(()).requires_grad_()) for grad in found
            ]
        return None, None, *found


class _NotTwice(torch.autograd.Function):
    """A gradient that cannot be differentiated; its second argument makes it one that would have to be."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "second derivatives of what was computed of logits without them: compile with "
            "options={'lazy_logits': False}."
        )


def _parts(program: Program, values: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    return [part_of(value, start, stop) if one.by_row else value
            for one, value in zip(program.inputs, values, strict=True)]  # fmt: skip


def _gradients(
    ctx: Any, tensors: Sequence[Tensor], wanted: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of what a program read from those of its results, None where none is wanted."""
    program: Program = ctx.program
    leaves = [fsdp.detach(tensor).requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
    with torch.enable_grad():
        wholes = [fsdp.whole(leaf) for leaf in leaves]
    totals = [_Total(whole, one.by_row) if want else None
              for whole, one, want in zip(wholes, program.inputs, wanted, strict=True)]  # fmt: skip
    flat = [None if grad is None else grad.reshape(math.prod(program.rows), *grad.shape[program.rank - 1 :])
            for grad in grads]  # fmt: skip
    for start, stop in program.chunks(ctx.chunk_bytes):
        with torch.enable_grad():
            parts = [part.detach().requires_grad_(want) for part, want in
                     zip(_parts(program, wholes, start, stop), wanted, strict=True)]  # fmt: skip
            results = program.run_chunk(parts)
        used = [(result, grad[start:stop]) for result, grad in zip(results, flat, strict=True)
                if grad is not None and result.requires_grad]  # fmt: skip
        del results
        if not used:
            continue
        outputs, incoming = zip(*used, strict=True)
        inputs = [part for part in parts if part.requires_grad]
        found = iter(torch.autograd.grad(outputs, inputs, incoming, allow_unused=True))
        del used, outputs
        for total in totals:
            if total is not None:
                total.add(next(found), start, stop)
    return [None if total is None else _through(whole, leaf, total.result())
            for whole, leaf, total in zip(wholes, leaves, totals, strict=True)]  # fmt: skip


class _Total:
    """A gradient that is put together from those of chunks: row by row, or as their sum in float32 at least."""

    def __init__(self, tensor: Tensor, by_row: bool) -> None:
        self.dtype, self.by_row, self.shape = tensor.dtype, by_row, tensor.shape
        self.sum: Tensor | None = tensor.new_zeros(tensor.shape) if by_row else None

    def add(self, grad: Tensor | None, start: int, stop: int) -> None:
        """Add the gradient of a chunk's rows; None is zero."""
        if grad is None:
            return
        if self.by_row:
            assert self.sum is not None
            self.sum.view(-1, grad.shape[-1])[start:stop] = grad
        elif self.sum is None:
            self.sum = grad.to(wide(grad.dtype), copy=True)
        else:
            self.sum += grad

    def result(self) -> Tensor | None:
        """Return the gradient, None if nothing was added."""
        return None if self.sum is None else self.sum.to(self.dtype)


def _through(whole: Tensor, leaf: Tensor, grad: Tensor | None) -> Tensor | None:
    """Return the gradient of a tensor that may be sharded, from that of the whole one.

    Of a sharded one every process has to ask for it: there, None is zeros.
    """
    if whole is leaf:
        return grad
    return torch.autograd.grad(whole, leaf, torch.zeros_like(whole) if grad is None else grad)[0]
