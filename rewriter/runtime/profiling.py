"""Ranges by module in a profile: ``model.layers.7 forward`` and ``model.layers.7 backward``.

A kind of layer is compiled once and called for every layer, so the range's name belongs to the call.  While torch's
profiler runs, each call is a ``record_function`` range, and hooks on the backward nodes that it made open and close
another.  Otherwise a call only checks whether a profiler runs; no hook is registered.

Tools that read only NVTX, such as Nsight Systems, get NVTX ranges in the same way; under ``emit_nvtx`` torch emits
these itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from fastft.compat import eager
from fastft.rewriter.outline.partition import Piece


def wants_nvtx(environment: Mapping[str, str]) -> bool:
    """Return whether to emit NVTX ranges: by FASTFT_NVTX, else by the variable with which tools attach to NVTX."""
    asked = environment.get("FASTFT_NVTX", environment.get("NVTX_INJECTION64_PATH", ""))
    return asked not in ("", "0") and torch.version.cuda is not None


NVTX = wants_nvtx(os.environ)


def named(pieces: Sequence[Piece], calls: Mapping[Piece, Callable]) -> dict[Piece, Callable]:
    """Return the pieces' calls, each within a profiler range of its piece's name."""
    return {piece: in_range(piece.name, calls[piece]) if piece.name else calls[piece] for piece in pieces}


def in_range(name: str, function: Callable) -> Callable:
    """Return a function that does the same, with its forward and backward in ranges of this name in a profiler."""

    def call(*inputs: Any) -> Any:
        if eager.is_profiling() or NVTX:
            with _range(f"{name} forward"):
                results = function(*inputs)
            _Backward.watch(f"{name} backward", inputs, results)
            return results
        return function(*inputs)

    return call


def span(first: str, last: str) -> str:
    """Return a name for a stack that begins and ends with these layers: ``layers.0 … 31``."""
    return first if first == last else f"{first} … {last.removeprefix(first.rpartition('.')[0] + '.')}"


def _range(name: str, *, crosses: bool = False) -> AbstractContextManager:
    """Make a range.  crosses: it begins in one range of the autograd engine and ends in another, so is on no stack."""
    if crosses and eager.is_emitting_nvtx():
        return _nvtx_off_stack(name)
    return torch.profiler.record_function(name) if eager.is_profiling() else torch.cuda.nvtx.range(name)


@contextmanager
def _nvtx_off_stack(name: str) -> Iterator[None]:
    started = torch.cuda.nvtx.range_start(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_end(started)


class _OpenRanges(threading.local):
    """The open backward ranges of a thread: usually one, more where a node starts a backward of its own."""

    def __init__(self) -> None:
        self.stack: list[_Open] = []

    def settle(self) -> None:
        """Close the ranges that are over, from the innermost outwards."""
        while self.stack and self.stack[-1].over:
            self.stack.pop().range.__exit__(None, None, None)


_ranges = _OpenRanges()


class _Backward:
    """The backward of one call, whose nodes have this object's methods as hooks; it refers to no node and no tensor.

    exits: the number of nodes by which a backward leaves it.  crosses: whether it has several nodes.  The autograd
    engine has a range for each node; those of the first and the last node are then only partly within this one.
    """

    def __init__(self, name: str, exits: int, *, crosses: bool) -> None:
        self.name, self.exits, self.crosses = name, exits, crosses

    @classmethod
    def watch(cls, name: str, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        """Register hooks that make the backward from these results to these inputs a range."""
        entries, exits = ends(inputs, results)
        backward = cls(name, len(exits), crosses=len(entries) > 1 or entries != exits)
        for node in entries:
            node.register_prehook(backward.begin)
        for node in exits:
            node.register_hook(backward.leave)

    @torch.compiler.disable
    def begin(self, _: Any) -> None:
        """Open the range before the first node.  A backward is in one range at a time: another call's ends here."""
        task = eager.backward_id()
        if not (eager.is_profiling() or NVTX) or task < 0:
            return
        if _ranges.stack and _ranges.stack[-1].task == task:
            if _ranges.stack[-1].backward is self:
                return
            _ranges.stack[-1].over = True
        _ranges.settle()
        _ranges.stack.append(opened := _Open(self, task))
        eager.after_backward(_AtEnd(opened))

    @torch.compiler.disable
    def leave(self, *_: Any) -> None:
        """Close the range after the last node.

        If some of its nodes do not run, because nothing needs their gradients, whatever runs next closes it.
        """
        opened = _ranges.stack[-1] if _ranges.stack else None
        if opened is not None and opened.backward is self:
            opened.exits -= 1
            opened.over |= not opened.exits
            _ranges.settle()


class _Open:
    """An open range.  task: the run of the autograd engine that it is in.  exits: exit nodes that have yet to run."""

    def __init__(self, backward: _Backward, task: int) -> None:
        self.backward, self.task, self.exits, self.over = backward, task, backward.exits, False
        self.range = _range(backward.name, crosses=backward.crosses)
        self.range.__enter__()


class _AtEnd:
    """Ends a range that is still open when the engine's run ends, which calls this, or fails, which deletes this."""

    def __init__(self, opened: _Open) -> None:
        self.opened = opened

    def __call__(self) -> None:
        self.opened.over = True  # the range's own thread, if it is another, closes it when it opens the next
        _ranges.settle()

    __del__ = __call__


def ends(inputs: Sequence[Any], results: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the nodes by which a backward enters the graph from these inputs to these results, and those it leaves by.

    The first node that runs is one of the former, the last one of the latter.
    """
    outside = _makers(inputs)
    entries = [node for node in _makers(results) if node not in outside]
    known, exits = dict.fromkeys(entries), []
    todo = list(entries)
    while todo:
        node = todo.pop()
        following = {successor for successor, _ in node.next_functions if successor is not None}
        inside = [  # without the nodes of leaves, which have no next functions
            successor for successor in following if successor not in outside and successor.next_functions
        ]
        if len(inside) < len(following) or not following:
            exits.append(node)
        todo += [successor for successor in inside if successor not in known]
        known.update(dict.fromkeys(inside))
    return entries, exits


def _makers(values: Sequence[Any]) -> dict[Any, None]:
    """Return the backward nodes of tensors, in order, each once."""
    return {value.grad_fn: None for value in values if isinstance(value, Tensor) and value.grad_fn is not None}
