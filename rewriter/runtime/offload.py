"""Activations in pinned host memory: copied out after the layer that makes them, back before the layer that reads them.

Copies run on a stream of their own.  A layer's tensors stay on the device until the next layer has been launched, and
come back while the layer above runs, so that one layer's tensors are in flight in either direction (double buffering).
Host memory is taken from a bounded pool and returned as soon as nothing can read it any more; a tensor stays on the
device where the pool is full, or where the tensor is not as planned.

What autograd saves is an OffloadedTensor.  A forward without a backward, several forwards before one backward, and
retain_graph therefore need no special handling.
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
    """Pinned buffers by size, a power of two: torch's allocator rounds up to one, and varying lengths share buffers.

    limit_bytes: the most that all buffers may take together.
    """

    def __init__(self, limit_bytes: int, *, pinned: bool) -> None:
        self.limit_bytes, self.pinned = limit_bytes, pinned
        self.total_bytes = 0
        self.free: dict[int, list[Tensor]] = defaultdict(list)

    def take(self, size: int) -> Tensor | None:
        """Return a buffer of at least ``size`` bytes; None if there is no room for it."""
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
        """Return a buffer to the pool."""
        self.free[buffer.numel()].append(buffer)

    def shrink(self) -> None:
        """Free the buffers that are not in use."""
        self.total_bytes -= sum(size * len(buffers) for size, buffers in self.free.items())
        self.free.clear()


class OffloadedTensor:
    """A tensor that is on the host or on its way there: what autograd saves in its place."""

    def __init__(self, offloader: Offloader, transfer: LayerTransfer, tensor: Tensor, buffer: Tensor) -> None:
        self.transfer, self.buffer = transfer, buffer
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.outgoing: Tensor | None = tensor
        self.incoming: Tensor | None = None
        if offloader.captured is None:
            weakref.finalize(self, offloader.pool.give, buffer).atexit = False
        else:  # a CUDA graph writes to it at every replay
            offloader.captured.append(buffer)

    def on_host(self) -> Tensor:
        """Return the host buffer as a tensor with the original's shape, strides and dtype."""
        return self.buffer.view(self.dtype).as_strided(self.shape, self.stride)


class LayerTransfer:
    """The offloaded tensors of one layer in one forward.

    previous_layer: the transfer of the nearest layer before it that offloads, which is fetched next.
    """

    def __init__(self, previous_layer: LayerTransfer | None) -> None:
        self.previous_layer = weakref.ref(previous_layer) if previous_layer is not None else None
        self.tensors: list[weakref.ref[OffloadedTensor]] = []
        self.arrived: Any = None
        self.departed: Any = None
        self.leaving: list[OffloadedTensor] = []


class Offloader:
    """Offloads one graph's activations.

    captured: during a CUDA graph capture, the buffers that the graph will use and own; otherwise None.
    """

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        self.cuda = device.type == "cuda"
        self.device, self.pool = device, Pool(limit_bytes, pinned=self.cuda)
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.captured: list[Tensor] | None = None
        self.last: weakref.ref[LayerTransfer] | None = None
        self.leaving: LayerTransfer | None = None

    @contextmanager
    def owned_by(self, owner: Any) -> Iterator[None]:
        """Let the buffers that are taken meanwhile stay in use for as long as their owner lives."""
        taken: list[Tensor] = []
        self.captured = taken
        try:
            yield
        finally:
            self.captured = None
            for buffer in taken:
                weakref.finalize(owner, self.pool.give, buffer).atexit = False

    def begin(self) -> None:
        """Begin a forward: its first layer has no previous layer to fetch."""
        self.last = None
        self.wait()

    def call(self, function: Callable, inputs: Sequence[Any], chosen: Set[int]) -> Any:
        """Run a layer.  chosen: the tensors to offload, by their positions among all that autograd saves in it."""
        before, self.leaving = self.leaving, None  # cleared first, so that it is not kept alive if function raises
        if not chosen or eager.has_saved_tensors_hooks():  # saved tensor hooks of the user's own take precedence
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
        """Start copying a layer's tensors to the host, after all work launched so far."""
        if not transfer.leaving:
            return
        with self._on_copy_stream() as event:
            for offloaded in transfer.leaving:
                assert offloaded.outgoing is not None
                offloaded.on_host().copy_(offloaded.outgoing, non_blocking=True)
        transfer.departed = event()
        self.leaving = transfer

    def _finish_copy_out(self, transfer: LayerTransfer) -> None:
        """Let work that is launched from now on reuse the device memory of the tensors that were copied out."""
        self._wait_for(transfer.departed)
        for offloaded in transfer.leaving:
            offloaded.outgoing = None
        transfer.leaving = []

    def wait(self) -> None:
        """Finish the copies to the host that are still pending."""
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
        """Start copying a layer's tensors back to the device, after all work launched so far."""
        tensors = [offloaded for reference in transfer.tensors if (offloaded := reference()) is not None]
        coming = [offloaded for offloaded in tensors if offloaded.incoming is None and offloaded.outgoing is None]
        for offloaded in coming:  # allocated on the stream that will free them
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
        """Enter the copy stream, after all work launched so far; yield a function that records the copies' event."""
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
    """Round bytes up to what torch's pinned memory allocator takes for them: the next power of two."""
    return 1 << (size - 1).bit_length()


def _extent(tensor: Tensor) -> int:
    """Return the bytes of a tensor without gaps or repetitions; -1 for any other tensor."""
    steps = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    expected = 1
    for step, size in steps:
        if step != expected:
            return -1
        expected *= size
    return tensor.numel() * tensor.element_size()
