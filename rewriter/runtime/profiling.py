"""Ranges by module in a profile: ``model.layers.7 forward`` and ``model.layers.7 backward``.

A kind of layer is compiled once and called for every layer, so it is the call that has a name.  While a profiler of
torch runs, each call is a range of ``record_function``, and hooks on the backward nodes that it has made open and close
another.  Otherwise a call asks whether one runs, and that is all: nothing is attached to anything.

Tools that read NVTX alone, as Nsight Systems does, are told in the same way; under ``emit_nvtx`` torch tells them
itself.
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
    """Whether NVTX ranges are asked for: by FASTFT_NVTX, else by the variable with which tools attach to NVTX."""
    asked = environment.get("FASTFT_NVTX", environment.get("NVTX_INJECTION64_PATH", ""))
    return asked not in ("", "0") and torch.version.cuda is not None


NVTX = wants_nvtx(os.environ)


def named(pieces: Sequence[Piece], calls: Mapping[Piece, Callable]) -> dict[Piece, Callable]:
    """The pieces' calls, each of which tells profilers whose it is."""
    return {piece: in_range(piece.name, calls[piece]) if piece.name else calls[piece] for piece in pieces}


def in_range(name: str, function: Callable) -> Callable:
    """A function that does the same, within a range of this name while a profiler runs."""

    def call(*inputs: Any) -> Any:
        if eager.is_profiling() or NVTX:
            with _range(f"{name} forward"):
                results = function(*inputs)
            _Backward.watch(f"{name} backward", inputs, results)
            return results
        return function(*inputs)

    return call


def span(first: str, last: str) -> str:
    """A name for what begins and ends with these: ``layers.0 … 31``."""
    return first if first == last else f"{first} … {last.removeprefix(first.rpartition('.')[0] + '.')}"


def _range(name: str, *, crosses: bool = False) -> AbstractContextManager:
    """A range.  crosses: it begins within one of the engine's own and ends within another, so it is on no stack."""
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
    """The backward ranges that are open in a thread: one, and more where a node starts a backward of its own."""

    def __init__(self) -> None:
        self.stack: list[_Open] = []

    def settle(self) -> None:
        """Close those that are over, from the innermost outwards."""
        while self.stack and self.stack[-1].over:
            self.stack.pop().range.__exit__(None, None, None)


_ranges = _OpenRanges()


class _Backward:
    """What a call has made for its backward, whose nodes have its methods as hooks; it holds no node and no tensor.

    exits: by how many nodes a backward leaves it.  crosses: whether it is several nodes, each of which is a range of
    the engine's: the first node's and the last one's are then partly in this one.
    """

    def __init__(self, name: str, exits: int, *, crosses: bool) -> None:
        self.name, self.exits, self.crosses = name, exits, crosses

    @classmethod
    def watch(cls, name: str, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        """Let the backward of these results, as far as these inputs, be a range."""
        entries, exits = ends(inputs, results)
        backward = cls(name, len(exits), crosses=len(entries) > 1 or entries != exits)
        for node in entries:
            node.register_prehook(backward.begin)
        for node in exits:
            node.register_hook(backward.leave)

    @torch.compiler.disable
    def begin(self, _: Any) -> None:
        """Open the range before the first node.  A backward is in one range at a time, so another's ends here."""
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

        Where some of its nodes are not run, nobody having asked for what they give, what runs next closes it.
        """
        opened = _ranges.stack[-1] if _ranges.stack else None
        if opened is not None and opened.backward is self:
            opened.exits -= 1
            opened.over |= not opened.exits
            _ranges.settle()


class _Open:
    """A range that is open: of which call, in which run of autograd's engine.  exits: nodes that have yet to run."""

    def __init__(self, backward: _Backward, task: int) -> None:
        self.backward, self.task, self.exits, self.over = backward, task, backward.exits, False
        self.range = _range(backward.name, crosses=backward.crosses)
        self.range.__enter__()


class _AtEnd:
    """Ends a range that is still open with the engine's run, which calls this, or lets go of it where it fails."""

    def __init__(self, opened: _Open) -> None:
        self.opened = opened

    def __call__(self) -> None:
        self.opened.over = True  # in another thread than the range's, which closes it when it opens the next
        _ranges.settle()

    __del__ = __call__


def ends(inputs: Sequence[Any], results: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The nodes by which a backward enters what has made these results of those inputs, and those by which it leaves.

    The first node that runs is one of the former, the last one of the latter.
    """
    outside = _makers(inputs)
    entries = [node for node in _makers(results) if node not in outside]
    found, exits = dict.fromkeys(entries), []
    todo = list(entries)
    while todo:
        node = todo.pop()
        following = {one for one, _ in node.next_functions if one is not None}
        inside = [one for one in following if one not in outside and one.next_functions]  # a leaf's node has none
        if len(inside) < len(following) or not following:
            exits.append(node)
        todo += [one for one in inside if one not in found]
        found.update(dict.fromkeys(inside))
    return entries, exits


def _makers(values: Sequence[Any]) -> dict[Any, None]:
    """The backward nodes of tensors, in order, each once."""
    return {one.grad_fn: None for one in values if isinstance(one, Tensor) and one.grad_fn is not None}
