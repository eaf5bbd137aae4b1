"""A stack of layers as two CUDA graphs: one launch for its forward, one for its backward.

Where gradients are sent to other devices as they are made, backward is several graphs, one for each part of the layers,
and as many autograd nodes: a part's gradients are on their way while those below it are computed.

A captured graph reads and writes fixed addresses.  Parameters are read in place; inputs whose address changes from call
to call are copied into static buffers first.  Outputs and gradients are copied out, so that no replay overwrites what a
training loop keeps (the losses of earlier steps, accumulated gradients).  Activations stay in the graphs' memory pool,
where a second forward would overwrite them: while a forward waits for its backward, further calls run without graphs.

The method is that of torch.cuda.make_graphed_callables, which returns its static outputs and gradients themselves.
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
from fastft.rewriter.runtime.part import Part

log = logging.getLogger("fastft")
_one_at_a_time = threading.Lock()  # captures share a stream
MOST_SHAPES = 64  # that are remembered until they occur a second time
MOST_CAPTURES = 12  # of one stack: for different shapes, and after parameters were moved
MOST_RESETS = 4  # after which captures are counted on: a plan that changes with each size would have them made anew


class Graphed:
    """``call`` as CUDA graphs, captured once it has been called ``patience`` times in a row with the same shapes; at
    the second such call where patience is 2, whatever was between, and while ``settled``: a caller sets it who knows
    that shapes will come again.

    call takes tensors and numbers and returns tensors; it writes to none of its inputs.  outputs: the names of what it
    returns.  moving: positions of inputs whose address changes with every call.  name: the name of the graphs in
    profiles.  parts: the same as ``call`` in parts, whose inputs are named by their positions; if there are any, and
    while ``in_parts``, each goes backward by itself.
    """

    def __init__(
        self, call: Callable[..., tuple], outputs: Sequence[Any], moving: Sequence[int],
        offloader: Offloader | None = None, name: str = "(the layers)", patience: int = 2, parts: Sequence[Part] = (),
    ) -> None:  # fmt: skip
        self.parts, self.outputs, self.in_parts = parts, outputs, True
        self.patience, self.row, self.settled = patience, 0, False
        self.last: Any = None  # the shapes of the last call, and how often they came in a row
        self.replay = profiling.in_range(name, _replay)
        self.call, self.moving, self.offloader = call, sorted(moving), offloader
        self.enabled, self.pool_bytes = True, 0
        self.addresses: dict[Any, list[int | None]] = {}  # by shapes: of the inputs in the last uncaptured call
        self.captures: dict[Any, Capture] = {}
        self.moved_once: set[int] = set()
        self.attempts = self.resets = 0
        self.pool: Any = None
        self.waiting: weakref.ref | None = None  # a forward whose backward may still come

    @property
    def is_awaited(self) -> bool:
        """Whether nothing is captured yet but may be."""
        return self.enabled and not self.pool_bytes and self.attempts < MOST_CAPTURES

    def __call__(self, *inputs: Any) -> tuple:
        if not self.enabled or not torch.is_grad_enabled() or (self.waiting is not None and self.waiting() is not None):
            return self.call(*inputs)
        shapes = tuple(_shape(inputs[place]) for place in self.moving)
        self.row = self.row + 1 if shapes == self.last else 1
        self.last = shapes
        capture = self.captures.get(shapes)
        if capture is None or not capture.fits(inputs):
            capture = self._capture(shapes, inputs)
            if capture is None:
                return self.call(*inputs)
        token = ReplayToken()
        self.waiting = weakref.ref(token)
        return self.replay(capture, token, *inputs)

    def reset(self, *, enabled: bool) -> None:
        """Drop all captures because the layers' choices change; if enabled, later calls capture again."""
        self.enabled, self.pool, self.pool_bytes = enabled, None, 0
        self.resets += 1
        if self.resets <= MOST_RESETS:
            self.attempts = 0
        self.captures.clear()

    def _capture(self, shapes: Any, inputs: Sequence[Any]) -> Capture | None:
        """Capture from the second call on; return None if it is too early or impossible."""
        before = self.addresses.get(shapes)
        while before is None and len(self.addresses) >= MOST_SHAPES:
            del self.addresses[next(iter(self.addresses))]
        self.addresses[shapes] = _addresses(inputs)
        if self.patience > 2 and self.row < self.patience and not self.settled:
            return None
        if before is None or self.attempts >= MOST_CAPTURES or not _on_current_device(inputs):
            return None
        if self._moved(shapes, before):
            self.addresses[tuple(_shape(inputs[place]) for place in self.moving)] = self.addresses[shapes]
            return None
        self.attempts += 1
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # a graph cannot use cached blocks: it has a memory pool of its own
        reserved = torch.cuda.memory_reserved()
        try:
            with _one_at_a_time:
                whole = Part(self.call, range(len(inputs)), self.outputs)
                parts = (self.in_parts and self.parts) or [whole]
                self.captures[shapes] = Capture.of(parts, self.outputs, self.moving, inputs, self.pool, self.offloader)
        except Exception as error:
            self.attempts = MOST_CAPTURES
            _end_capture_of_random_numbers()
            log.warning("no CUDA graph: %s", error)
        else:
            self.pool_bytes += torch.cuda.memory_reserved() - reserved
        return self.captures.get(shapes)

    def _moved(self, shapes: Any, before: Sequence[int | None]) -> bool:
        """Return whether inputs that are read in place have moved; copy those that move repeatedly from now on.

        What moves before the first capture is the batch.  Later it may be the parameters, once (``model.to``), or an
        input that kept its address by chance.
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
    """A token that lives as long as a forward may still be followed by its backward."""


@dataclass
class Buffer:
    """A static copy of a moving input; ``written`` is the part of it without repetition (stride 0)."""

    static: Tensor
    written: Tensor

    @classmethod
    def like(cls, value: Tensor) -> Buffer:
        """Allocate a buffer with the layout of a tensor."""
        part = _without_repetition(value)
        written = torch.empty_strided(part.shape, part.stride(), dtype=value.dtype, device=value.device)
        static = written.as_strided(value.shape, value.stride()).requires_grad_(value.requires_grad)
        return cls(static, written)


@dataclass
class Capture:
    """The CUDA graphs of a stack for inputs of one kind, with their static inputs and outputs."""

    places: list[int]  # of the inputs that are read in place
    pointers: list[int | None]  # of all inputs
    buffers: dict[int, Buffer]
    trained: list[list[int]]  # by part: places of the inputs that need a gradient, which is complete behind it
    link: Tensor  # stands for what goes from one part to the next
    outputs: list[Tensor] = field(default_factory=list)
    differentiable: list[bool] = field(default_factory=list)  # which of them have a gradient
    forward: Any = None
    backward: list[Any] = field(default_factory=list)  # by part; None where it has no gradient to compute
    grad_outputs: list[Tensor] = field(default_factory=list)  # of the outputs that have one
    grad_inputs: dict[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, parts: Sequence[Part], outputs: Sequence[Any], moving: Sequence[int], inputs: Sequence[Any], pool: Any,
        offloader: Offloader | None = None,
    ) -> Capture:  # fmt: skip
        """Run the stack once, which compiles and tunes what has not been yet, then capture it.

        The RNG state is left unchanged.  Raises ValueError where an output has gaps or repetitions.
        """
        capture = cls.prepared(parts, moving, inputs)
        static = capture.static(inputs)
        state = torch.cuda.get_rng_state()
        stream = _stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            capture.run(parts, outputs, static, nullcontext)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_rng_state(state)
        torch.cuda.empty_cache()
        # thread_local: data loading threads may go on; stream: torch's own for captures may be on another device
        capturing = functools.partial(torch.cuda.graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with offloader.owned_by(capture) if offloader is not None else nullcontext():
            capture.run(parts, outputs, static, capturing)
        return capture

    @classmethod
    def prepared(cls, parts: Sequence[Part], moving: Sequence[int], inputs: Sequence[Any]) -> Capture:
        """Allocate the buffers for inputs like these."""
        tensors = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        buffers = {place: Buffer.like(inputs[place]) for place in moving if isinstance(inputs[place], Tensor)}
        lowest = {key: number for number, part in reversed(list(enumerate(parts))) for key in part.taken}
        trained: list[list[int]] = [[] for _ in parts]
        for place in tensors:
            if inputs[place].requires_grad:
                trained[lowest.get(place, 0)].append(place)
        places = [place for place in tensors if place not in buffers]
        return cls(places, _addresses(inputs), buffers, trained, torch.empty(0, device=inputs[tensors[0]].device))

    def static(self, inputs: Sequence[Any]) -> list[Any]:
        """Return what is captured in place of these inputs: those themselves that do not move, else their buffers."""
        self.load(inputs)
        return [
            self.buffers[place].static if place in self.buffers else _leaf(value) for place, value in enumerate(inputs)
        ]

    def run(self, parts: Sequence[Part], outputs: Sequence[Any], static: Sequence[Any], capturing: Callable) -> None:
        """Run forward and backward, each in the context that ``capturing`` makes for its graph."""
        values: dict[Any, Any] = dict(enumerate(static))
        taken, made = [], []  # by part: its own leaves, and what it returned
        self.forward = torch.cuda.CUDAGraph()
        with capturing(self.forward):
            for part in parts:
                taken.append({key: _leaf(values[key]) for key in part.taken})
                made.append(part(taken[-1]))
                values |= made[-1]
        self.outputs = [values[key].detach() for key in outputs]
        self.differentiable = [values[key].requires_grad for key in outputs]
        if any(eager.clone_all([output])[0].stride() != output.stride() for output in self.outputs):
            raise ValueError("a stack of layers returns a tensor with gaps or repetitions")
        grown = [key for key in outputs if values[key].requires_grad]
        gradients: dict[Any, Tensor] = {key: torch.zeros_like(values[key]) for key in grown}
        self.grad_outputs = [gradients[key] for key in grown]
        values.clear()
        self.backward = [self._run_back(taken.pop(), made.pop(), gradients, capturing) for _ in parts][::-1]
        self.grad_inputs = gradients

    def _run_back(
        self, taken: dict[Any, Any], made: dict[Any, Tensor], gradients: dict[Any, Tensor], capturing: Callable
    ) -> Any:  # fmt: skip
        """Run a part's backward and return its graph; add to the gradients of what it has taken."""
        wanted = {key: value for key, value in taken.items() if isinstance(value, Tensor) and value.requires_grad}
        grown = [(value, gradients.pop(key)) for key, value in made.items() if key in gradients and value.requires_grad]
        if not wanted or not grown:
            return None
        ends, incoming = zip(*grown, strict=True)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph):
            found = torch.autograd.grad(ends, list(wanted.values()), incoming, allow_unused=True)
            for key, gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    gradients[key] = gradients[key] + gradient if key in gradients else gradient
        return graph

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Return whether the inputs that are read in place are still at their captured addresses."""
        return eager.same_addresses(inputs, self.pointers, self.places)

    def load(self, inputs: Sequence[Any]) -> None:
        """Copy the moving inputs into their static buffers."""
        with torch.no_grad():
            for place, buffer in self.buffers.items():
                buffer.written.copy_(_without_repetition(inputs[place]))


def _replay(capture: Capture, token: ReplayToken, *inputs: Any) -> tuple:
    """Replay a capture: its forward now, and a part of its backward in each of as many autograd nodes."""
    link, results = None, ()
    for number, trained in enumerate(capture.trained):
        results = _Replay.apply(capture, number, token, inputs, link, *(inputs[place] for place in trained))
        link = results[0]
    return results


class _Replay(torch.autograd.Function):
    """Replays a capture's forward, and a part of its backward at most once.

    The first part replays the whole forward, the last returns its results, the others a link to the next.
    """

    @staticmethod
    def forward(
        ctx: Any, capture: Capture, number: int, token: ReplayToken, inputs: Sequence[Any], link: Tensor | None,
        *trained: Tensor,
    ) -> tuple:  # fmt: skip
        if number == 0:
            capture.load(inputs)
            capture.forward.replay()
        ctx.capture, ctx.number, ctx.token = capture, number, token
        ctx.inputs = inputs  # kept alive: backward reads them at their addresses
        ctx.save_for_backward(*trained)  # so that autograd raises where one is written to before backward
        if number < len(capture.trained) - 1:
            return (torch.empty_like(capture.link),)
        outputs = tuple(eager.clone_all(capture.outputs))
        ctx.mark_non_differentiable(
            *(output for output, grown in zip(outputs, capture.differentiable, strict=True) if not grown)
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        if ctx.token is None:
            raise RuntimeError("a CUDA graph goes backward once; set cuda_graphs=False to use retain_graph=True.")
        capture, number, _ = ctx.capture, ctx.number, ctx.saved_tensors
        if number == len(capture.trained) - 1:
            incoming = [grad for grad, grown in zip(grad_outputs, capture.differentiable, strict=True) if grown]
            for buffer, grad in zip(capture.grad_outputs, incoming, strict=True):
                buffer.copy_(grad)
        if capture.backward[number] is not None:
            capture.backward[number].replay()
        static = [capture.grad_inputs.get(place) for place in capture.trained[number]]
        grads = iter(eager.clone_all([grad for grad in static if grad is not None]))
        ctx.token = ctx.inputs = None
        link = torch.empty_like(capture.link) if number else None
        return None, None, None, None, link, *(next(grads) if grad is not None else None for grad in static)


def _leaf(value: Any) -> Any:
    """Return a leaf of its own for a value that needs a gradient: hooks on the user's must not be captured."""
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.requires_grad else value


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Return the device's only capture stream: cuBLAS keeps a workspace of 64 MiB for every stream it was used on."""
    return torch.cuda.Stream(device)


def _end_capture_of_random_numbers() -> None:
    """Let torch draw random numbers again after a failed capture.

    Torch leaves the device's generator in capture mode then, and every later use of it raises an error.  A copy of its
    state is not in capture mode.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def _on_current_device(inputs: Sequence[Any]) -> bool:
    """Return whether the layers run on the current device, where the capture stream is created."""
    return all(value.device.index == torch.cuda.current_device() for value in inputs if isinstance(value, Tensor))


def _addresses(inputs: Sequence[Any]) -> list[int | None]:
    """Return the address of each input; None for numbers."""
    return [value.data_ptr() if isinstance(value, Tensor) else None for value in inputs]


def _shape(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.dtype, value.shape, value.stride(), value.requires_grad


def _without_repetition(value: Tensor) -> Tensor:
    """Return the part of an expanded tensor that holds each element once."""
    return value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
