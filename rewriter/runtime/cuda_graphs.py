"""A stack of layers as two CUDA graphs: one launch for its forward, one for its backward.

What is captured reads and writes fixed addresses.  Parameters are read where they lie; what moves from call to call is
copied into buffers first.  Outputs and gradients are copied out, so that whatever a training loop keeps (the losses of
earlier steps, accumulated gradients) is its own.  Activations stay inside, where a second forward would overwrite them:
while one waits for its backward, a further call is run without graphs.

The method is that of torch.cuda.make_graphed_callables, which hands out its static outputs and gradients themselves.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.compat import eager
from fastft.rewriter.runtime import profiling
from fastft.rewriter.runtime.offload import Offloader

log = logging.getLogger("fastft")
_one_at_a_time = threading.Lock()  # captures share a stream
MOST_SHAPES = 64  # that are remembered until they come again
MOST_CAPTURES = 8  # of one stack: for shapes, and for parameters that were moved


class Graphed:
    """``call`` as CUDA graphs, once it has been called twice with inputs of the same shapes.

    call takes tensors and numbers and returns tensors; it writes to none of its inputs.  moving: positions
    of inputs that are at another address in every call.  name: what profiles call the graphs.
    """

    def __init__(
        self, call: Callable[..., tuple], moving: Sequence[int], offloader: Offloader | None = None,
        name: str = "(the layers)",
    ) -> None:  # fmt: skip
        self.replay = profiling.in_range(name, _Replay.apply)
        self.call, self.moving, self.offloader = call, sorted(moving), offloader
        self.enabled, self.pool_bytes = True, 0
        self.addresses: dict[Any, list[int | None]] = {}  # by shapes: where the inputs were in the last plain call
        self.captures: dict[Any, Capture] = {}
        self.moved_once: set[int] = set()
        self.attempts = 0
        self.pool: Any = None
        self.waiting: weakref.ref | None = None  # a forward whose backward may still come

    def __call__(self, *inputs: Any) -> tuple:
        if not self.enabled or not torch.is_grad_enabled() or (self.waiting is not None and self.waiting() is not None):
            return self.call(*inputs)
        shapes = tuple(_shape(inputs[place]) for place in self.moving)
        capture = self.captures.get(shapes)
        if capture is None or not capture.fits(inputs):
            capture = self._capture(shapes, inputs)
            if capture is None:
                return self.call(*inputs)
        token = ReplayToken()
        self.waiting = weakref.ref(token)
        return self.replay(capture, token, inputs, *(inputs[place] for place in capture.trained))

    def reset(self, *, enabled: bool) -> None:
        """Let go of what was captured, and capture anew if enabled: the layers will do something else."""
        self.enabled, self.attempts, self.pool, self.pool_bytes = enabled, 0, None, 0
        self.captures.clear()

    def _capture(self, shapes: Any, inputs: Sequence[Any]) -> Capture | None:
        """Capture from the second call on; None if not yet, or if it cannot be done."""
        before = self.addresses.get(shapes)
        while before is None and len(self.addresses) >= MOST_SHAPES:
            del self.addresses[next(iter(self.addresses))]
        self.addresses[shapes] = _addresses(inputs)
        if before is None or self.attempts >= MOST_CAPTURES or not _on_current_device(inputs):
            return None
        if self._moved(shapes, before):
            self.addresses[tuple(_shape(inputs[place]) for place in self.moving)] = self.addresses[shapes]
            return None
        self.attempts += 1
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # what lies in the cache is of no use to a graph, which has memory of its own
        reserved = torch.cuda.memory_reserved()
        try:
            with _one_at_a_time:
                self.captures[shapes] = Capture.of(self.call, self.moving, inputs, self.pool, self.offloader)
        except Exception as error:
            self.attempts = MOST_CAPTURES
            _end_capture_of_random_numbers()
            log.warning("no CUDA graph: %s", error)
        self.pool_bytes += torch.cuda.memory_reserved() - reserved
        return self.captures.get(shapes)

    def _moved(self, shapes: Any, before: Sequence[int | None]) -> bool:
        """Whether inputs that are read in place have moved; those that do so again and again are copied from now on.

        What moves before anything is captured is the batch.  Later it may be the parameters, once (``model.to``), or
        an input that lay at one address by chance.
        """
        pairs = enumerate(zip(before, self.addresses[shapes], strict=True))
        moved = {place for place, (old, new) in pairs if old != new} - set(self.moving)
        again = moved if self.captures.pop(shapes, None) is None else moved & self.moved_once
        self.moved_once |= moved
        if again:
            self.moving = sorted(again | set(self.moving))
            self.captures.clear()
        return bool(moved)


class ReplayToken:
    """Lives as long as a forward may be followed by its backward."""


@dataclass
class Buffer:
    """Where an input that moves is copied to; ``written`` is the part of it that is no repetition (stride 0)."""

    static: Tensor
    written: Tensor

    @classmethod
    def like(cls, value: Tensor) -> Buffer:
        part = _without_repetition(value)
        written = torch.empty_strided(part.shape, part.stride(), dtype=value.dtype, device=value.device)
        static = written.as_strided(value.shape, value.stride()).requires_grad_(value.requires_grad)
        return cls(static, written)


@dataclass
class Capture:
    """The two graphs of a stack for inputs of one kind, and the tensors at their ends."""

    places: list[int]  # of the inputs that stay
    pointers: list[int | None]  # of all inputs
    buffers: dict[int, Buffer]
    trained: list[int]  # places of the inputs that need a gradient
    outputs: list[Tensor] = field(default_factory=list)
    differentiable: list[bool] = field(default_factory=list)  # which of them have a gradient
    forward: Any = None
    backward: Any = None
    grad_outputs: list[Tensor] = field(default_factory=list)  # of those outputs that have one
    grad_inputs: list[Tensor | None] = field(default_factory=list)  # in the order of trained

    @classmethod
    def of(
        cls, call: Callable[..., tuple], moving: Sequence[int], inputs: Sequence[Any], pool: Any,
        offloader: Offloader | None = None,
    ) -> Capture:  # fmt: skip
        """Run once to compile and to tune what has not been yet, then capture.  The random state stays as it is."""
        tensors = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        buffers = {place: Buffer.like(inputs[place]) for place in moving if isinstance(inputs[place], Tensor)}
        places = [place for place in tensors if place not in buffers]
        trained = [place for place in tensors if inputs[place].requires_grad]
        capture = cls(places, _addresses(inputs), buffers, trained)
        capture.load(inputs)
        static = list(inputs)
        for place in trained:  # leaves of their own: no hook of the user's parameters belongs into a graph
            static[place] = inputs[place].detach().requires_grad_()
        for place, buffer in buffers.items():
            static[place] = buffer.static
        state = torch.cuda.get_rng_state()
        stream = _stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            capture._run(call, static, nullcontext)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_rng_state(state)
        torch.cuda.empty_cache()
        # threads that load data may go on meanwhile; torch's own stream for captures may be another device's
        capturing = functools.partial(torch.cuda.graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with offloader.owned_by(capture) if offloader is not None else nullcontext():
            capture._run(call, static, capturing)
        return capture

    def _run(self, call: Callable[..., tuple], static: Sequence[Any], capturing: Callable) -> None:
        """Forward and backward, each in the context that ``capturing`` makes of its graph."""
        leaves = [static[place] for place in self.trained]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with capturing(self.forward):
            outputs = call(*static)
        if any(eager.clone_all([output])[0].stride() != output.stride() for output in outputs):
            raise ValueError("a stack of layers returns a tensor with gaps or repetitions")
        grown = [output for output in outputs if output.requires_grad]
        self.grad_outputs = [torch.zeros_like(output) for output in grown]
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if grown and leaves:
            with capturing(self.backward):
                grads = torch.autograd.grad(grown, leaves, self.grad_outputs, allow_unused=True)
        self.outputs = [output.detach() for output in outputs]
        self.differentiable = [output.requires_grad for output in outputs]
        self.grad_inputs = list(grads)

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Whether the inputs that are read in place are where they were."""
        return eager.same_addresses(inputs, self.pointers, self.places)

    def load(self, inputs: Sequence[Any]) -> None:
        """Copy in what moves."""
        with torch.no_grad():
            for place, buffer in self.buffers.items():
                buffer.written.copy_(_without_repetition(inputs[place]))


class _Replay(torch.autograd.Function):
    """Replays a capture's forward, and its backward, once."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, token: ReplayToken, inputs: Sequence[Any], *trained: Tensor) -> tuple:
        capture.load(inputs)
        capture.forward.replay()
        outputs = tuple(eager.clone_all(capture.outputs))
        ctx.capture, ctx.token = capture, token
        ctx.inputs = inputs  # they are read again, at their addresses
        ctx.save_for_backward(*trained)  # so that one that changes before backward is an error, as ever
        ctx.mark_non_differentiable(
            *(one for one, grown in zip(outputs, capture.differentiable, strict=True) if not grown)
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        if ctx.token is None:
            raise RuntimeError("a CUDA graph goes backward once; set cuda_graphs=False to use retain_graph=True.")
        capture, _ = ctx.capture, ctx.saved_tensors
        given = [one for one, grown in zip(grad_outputs, capture.differentiable, strict=True) if grown]
        for buffer, grad in zip(capture.grad_outputs, given, strict=True):
            buffer.copy_(grad)
        capture.backward.replay()
        grads = iter(eager.clone_all([grad for grad in capture.grad_inputs if grad is not None]))
        ctx.token = ctx.inputs = None
        return None, None, None, *(next(grads) if grad is not None else None for grad in capture.grad_inputs)


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The one stream that everything is captured on: cuBLAS keeps a workspace, 64 MiB, for each that it was used on."""
    return torch.cuda.Stream(device)


def _end_capture_of_random_numbers() -> None:
    """Let torch draw random numbers again.

    Where a capture fails, torch leaves the device's generator as if it were still under way, and every later call for a
    random number is an error.  A copy of its state is not in a capture.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def _on_current_device(inputs: Sequence[Any]) -> bool:
    """Whether a stream that is made now is one of the device that the layers run on."""
    return all(one.device.index == torch.cuda.current_device() for one in inputs if isinstance(one, Tensor))


def _addresses(inputs: Sequence[Any]) -> list[int | None]:
    """Where the inputs lie; None for numbers."""
    return [one.data_ptr() if isinstance(one, Tensor) else None for one in inputs]


def _shape(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.dtype, value.shape, value.stride(), value.requires_grad


def _without_repetition(value: Tensor) -> Tensor:
    """One of each element of an expanded tensor."""
    return value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
