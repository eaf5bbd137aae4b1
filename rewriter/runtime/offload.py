"""Activations in pinned host memory: copied out behind the layer that made them, back before the layer that reads them.

Copies run on a stream of their own.  A layer's tensors stay on the device until the next layer has been launched, and
come back while the layer above is at work, so that one layer's are on their way in either direction (double buffering).
Host memory is taken from a bounded pool and given back as soon as nobody can read it any more; where the pool is full,
or a tensor is not what was planned, it stays on the device.

What autograd saves is an OffloadedTensor, so that a forward that never goes backward, several forwards before one
backward, and retain_graph need nothing more.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastft.compat import eager


class Pool:
    """Pinned buffers by size, which is a power of two: so torch allocates them, and lengths that change share them.

    limit_bytes: what all of them may take.
    """

    def __init__(self, limit_bytes: int, *, pinned: bool) -> None:
        self.limit_bytes, self.pinned = limit_bytes, pinned
        self.total_bytes = 0
        self.free: dict[int, list[Tensor]] = defaultdict(list)

    def take(self, size: int) -> Tensor | None:
        """A buffer of at least this many bytes; None if there is no room for it."""
        size = _rounded(size)
        if self.free[size]:
            return self.free[size].pop()
        if self.total_bytes + size > self.limit_bytes:
            self.shrink()
        if self.total_bytes + size > self.limit_bytes:
            return None
        self.total_bytes += size
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)

    def give(self, buffer: Tensor) -> None:
        self.free[buffer.numel()].append(buffer)

    def shrink(self) -> None:
        """Let go of the buffers that nobody uses."""
        self.total_bytes -= sum(size * len(buffers) for size, buffers in self.free.items())
        self.free.clear()


class OffloadedTensor:
    """A tensor that is on the host, or will be: what autograd saves in its place."""

    def __init__(self, offloader: Offloader, transfer: LayerTransfer, tensor: Tensor, buffer: Tensor) -> None:
        self.transfer, self.buffer = transfer, buffer
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.outgoing: Tensor | None = tensor
        self.incoming: Tensor | None = None
        if offloader.captured is None:
            weakref.finalize(self, offloader.pool.give, buffer).atexit = False
        else:  # a CUDA graph writes there whenever it is replayed
            offloader.captured.append(buffer)

    def on_host(self) -> Tensor:
        """The buffer, laid out like the tensor."""
        return self.buffer.view(self.dtype).as_strided(self.shape, self.stride)


class LayerTransfer:
    """One layer's tensors in one forward.

    previous_layer: that of the nearest layer before it, which comes back next.
    """

    def __init__(self, previous_layer: LayerTransfer | None) -> None:
        self.previous_layer = weakref.ref(previous_layer) if previous_layer is not None else None
        self.tensors: list[weakref.ref[OffloadedTensor]] = []
        self.arrived: Any = None
        self.departed: Any = None
        self.leaving: list[OffloadedTensor] = []


class Offloader:
    """Of one graph.  captured: while a CUDA graph is captured, the buffers that it will use, for it to own."""

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        self.cuda = device.type == "cuda"
        self.device, self.pool = device, Pool(limit_bytes, pinned=self.cuda)
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.captured: list[Tensor] | None = None
        self.last: weakref.ref[LayerTransfer] | None = None
        self.leaving: LayerTransfer | None = None

    @contextmanager
    def owned_by(self, owner: Any) -> Iterator[None]:
        """Buffers that are taken meanwhile are used for as long as their owner lives."""
        taken: list[Tensor] = []
        self.captured = taken
        try:
            yield
        finally:
            self.captured = None
            for buffer in taken:
                weakref.finalize(owner, self.pool.give, buffer).atexit = False

    def begin(self) -> None:
        """A forward begins: nothing below its first layer comes back with it."""
        self.last = None
        self.wait()

    def call(self, function: Callable, inputs: Sequence[Any], chosen: Set[int]) -> Any:
        """Run a layer.  chosen: which of the tensors that it saves go to the host, by their place."""
        before, self.leaving = self.leaving, None  # if function raises, nothing of the layer before is held here
        if not chosen or eager.has_saved_tensors_hooks():  # the user's own hooks: theirs is the say
            results = function(*inputs)
            if before is not None:
                self._finish_copy_out(before)
            return results
        transfer = LayerTransfer(self.last() if self.last is not None else None)
        place = -1

        def pack(tensor: Tensor) -> Any:
            nonlocal place
            place += 1
            return self._offload(transfer, tensor) if place in chosen else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            results = function(*inputs)
        self._start_copy_out(transfer)
        if before is not None:
            self._finish_copy_out(before)
        self.last = weakref.ref(transfer) if transfer.tensors else self.last
        return results

    def _offload(self, transfer: LayerTransfer, tensor: Tensor) -> Any:
        size = _extent(tensor)
        buffer = self.pool.take(size) if size > 0 and tensor.device == self.device else None
        if buffer is None:
            return tensor
        offloaded = OffloadedTensor(self, transfer, tensor, buffer)
        transfer.tensors.append(weakref.ref(offloaded))
        transfer.leaving.append(offloaded)
        return offloaded

    def _start_copy_out(self, transfer: LayerTransfer) -> None:
        """Copy a layer's tensors out behind what has been launched."""
        if not transfer.leaving:
            return
        with self._on_copy_stream() as event:
            for offloaded in transfer.leaving:
                assert offloaded.outgoing is not None
                offloaded.on_host().copy_(offloaded.outgoing, non_blocking=True)
        transfer.departed = event()
        self.leaving = transfer

    def _finish_copy_out(self, transfer: LayerTransfer) -> None:
        """What is launched from now on may use the memory of what was copied out."""
        self._wait_for(transfer.departed)
        for offloaded in transfer.leaving:
            offloaded.outgoing = None
        transfer.leaving = []

    def wait(self) -> None:
        """Nothing is on its way out any more."""
        if self.leaving is not None:
            self._finish_copy_out(self.leaving)
            self.leaving = None

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, OffloadedTensor):
            return packed
        transfer, tensor = packed.transfer, packed.outgoing
        if tensor is None:  # it has left
            if packed.incoming is None:
                self._fetch(transfer)
            self._wait_for(transfer.arrived)
            tensor, packed.incoming = packed.incoming, None
        previous = transfer.previous_layer() if transfer.previous_layer is not None else None
        if previous is not None and previous.arrived is None:
            self._fetch(previous)
        assert tensor is not None
        return tensor.detach()

    def _fetch(self, transfer: LayerTransfer) -> None:
        """Copy a layer's tensors back, behind what has been launched."""
        tensors = [offloaded for reference in transfer.tensors if (offloaded := reference()) is not None]
        coming = [offloaded for offloaded in tensors if offloaded.incoming is None and offloaded.outgoing is None]
        for offloaded in coming:  # made on the stream that will free them
            offloaded.incoming = torch.empty_strided(
                offloaded.shape, offloaded.stride, dtype=offloaded.dtype, device=self.device
            )
        with self._on_copy_stream() as event:
            for offloaded in coming:
                assert offloaded.incoming is not None
                offloaded.incoming.copy_(offloaded.on_host(), non_blocking=True)
        transfer.arrived = event()

    @contextmanager
    def _on_copy_stream(self) -> Iterator[Callable[[], Any]]:
        """On the stream of copies, behind what has been launched; gives what makes the event of their end."""
        if self.stream is None:
            yield lambda: True
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), torch.no_grad():
            yield self.stream.record_event

    def _wait_for(self, event: Any) -> None:
        if self.stream is not None and event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def _rounded(size: int) -> int:
    """What torch's allocator of pinned memory takes for so many bytes: the next power of two."""
    return 1 << (size - 1).bit_length()


def _extent(tensor: Tensor) -> int:
    """The bytes of a tensor without gaps or repetitions; -1 for any other."""
    steps = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    expected = 1
    for step, size in steps:
        if step != expected:
            return -1
        expected *= size
    return tensor.numel() * tensor.element_size()
