"""Write down as Python what an op does for tensors of symbolic sizes: its ATen calls and launches of Triton kernels.

A view is no line of its own: a kernel gets the address of the memory it begins at, and an ATen call gets one view of
the tensor that owns the memory.  Memory is allocated by one call in C, and freed after its last use.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.compat import eager, fake_tensors, operators, triton_launch
from fastft.compat.symbolic_sizes import SymbolicSizes, divisible, is_symbol
from fastft.compat.triton_launch import ALIGNMENT

LARGEST_INT32 = 2**31 - 1

_thread = threading.local()  # recorder: of this thread's recording, if there is one
_constants: dict[int, Tensor] = {}


class NotRecordable(Exception):  # noqa: N818
    """Raised where a call cannot be written down."""


def recording() -> Recorder | None:
    """Return this thread's recorder while an op is recorded."""
    return getattr(_thread, "recorder", None)


def constant(tensor: Tensor) -> Tensor:
    """Register a tensor that recordings may refer to, as it is never freed and never changes; return it."""
    _constants[id(tensor)] = tensor
    return tensor


def setting(read: Callable[[], Any]) -> Any:
    """Return a setting that may change between calls; a recording holds for as long as it reads the same."""
    value = read()
    if (recorder := recording()) is not None:
        recorder.settings[read] = value
    return value


def is_aligned(tensor: Tensor) -> bool:
    """Return whether a tensor's address is, or in a recording is sure to be, a multiple of ALIGNMENT bytes."""
    recorder = recording()
    return tensor.data_ptr() % ALIGNMENT == 0 if recorder is None else recorder.is_aligned(tensor)


def on_grid(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return Triton's kernel[grid], or a function that records the launch while a recording is under way."""
    recorder = recording()
    return kernel[grid] if recorder is None else functools.partial(recorder.launch, kernel, grid)


class Owner(NamedTuple):
    """A tensor that owns memory: its name, itself, and whether its address is known to be aligned."""

    name: str
    tensor: Tensor
    aligned: bool


class Launch(NamedTuple):
    """A launch of a Triton kernel: its grid and arguments as text, and the arguments as the compiler is to see them."""

    kernel: Any
    grid: list[str]
    texts: list[Any]
    described: list[Any]
    meta: Mapping[str, Any]


class Line(NamedTuple):
    """A line of Python, or a launch; the names of tensors it reads and makes; needed: kept even if these are unread."""

    what: str | Launch
    read: list[str]
    made: list[str]
    needed: bool


class Recorder(eager.TorchDispatchMode):
    """Record the calls that are made within it on tensors of these symbolic sizes."""

    def __init__(self, sizes: SymbolicSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.owners: dict[int, Owner] = {}  # by the storage, all of which are kept alive here
        self.lines: list[Line] = []
        self.globals: dict[str, Any] = {}
        self.places: dict[Any, str] = {}  # the names of globals by value or id
        self.views: dict[str, str] = {}  # the names of views by text
        self.numbers: dict[str, str] = {}  # the names of sizes by text
        self.settings: dict[Callable[[], Any], Any] = {}
        self.integers: dict[str, None] = {}  # what is passed to kernels in 32 bits

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread calls."""
        before, _thread.recorder = recording(), self
        try:
            with self.sizes.computing(), self:
                yield
        finally:
            _thread.recorder = before

    def own(self, tensor: Tensor, name: str, aligned: bool = True) -> None:
        """Note the name of a tensor that owns its memory."""
        self.owners[fake_tensors.storage_key(tensor)] = Owner(name, tensor, aligned)

    def is_aligned(self, tensor: Tensor) -> bool:
        """Return whether a tensor is sure to begin at a multiple of ALIGNMENT bytes."""
        owner = self.owners.get(fake_tensors.storage_key(tensor))
        return owner is not None and owner.aligned and divisible(_offset_bytes(tensor), ALIGNMENT)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if operators.is_view(func) or not fake_tensors.tensors_in((args, kwargs, result)):
            if func is torch.ops.aten.as_strided.default and self._of(args[0])[0].name[0] == "a":
                raise NotRecordable("it counts from where an argument's storage begins")
        elif str(func).removeprefix("aten.").startswith(("empty", "new_empty")):
            self._allocate(result)
        else:
            self._call(func, args, kwargs, result)
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        """Record the launch of a Triton kernel."""
        meta = {name: bool(value) if isinstance(value, torch.SymBool) else value for name, value in meta.items()}
        if any(map(is_symbol, meta.values())):
            raise NotRecordable(f"{kernel.__name__} would be compiled for one size")
        read: list[str] = []
        compiled = triton_launch.is_compiled(kernel)
        texts = [self._operand(argument, read) if compiled else self.text(argument, read) for argument in args]
        described = [self._described(argument) for argument in args] if compiled else []
        launch = Launch(kernel, [self.text(size, read) for size in grid], texts, described, meta)
        self.lines.append(Line(launch, read, [], needed=True))

    def _allocate(self, tensor: Tensor) -> None:
        name = f"t{len(self.lines)}"
        layout, dtype = (
            f"{self.text(tuple(tensor.shape))}, {self.text(tuple(tensor.stride()))}",
            self.name_of(tensor.dtype),
        )
        if tensor.device.type == "cuda":
            text = f"{self.name_of(eager.empty_strided_cuda)}({layout}, {dtype})"
        else:
            text = f"{self.name_of(torch.empty_strided)}({layout}, dtype={dtype})"
        self.own(tensor, name)
        self.lines.append(Line(f"{name} = {text}", [], [name], needed=False))

    def _call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        read: list[str] = []
        texts = [self.text(argument, read) for argument in args]
        texts += [f"{name}={self.text(argument, read)}" for name, argument in kwargs.items()]
        call = f"{self.name_of(_quick(func))}({', '.join(texts)})"
        many = isinstance(result, (tuple, list))
        made: list[str] = []
        names: list[str] = []
        new = []
        for index, value in enumerate(result if many else [result]):
            known = not isinstance(value, Tensor) or fake_tensors.storage_key(value) in self.owners
            names.append("_" if known else f"t{len(self.lines)}_{index}")
            if not known:
                made.append(names[-1])
                new.append(value)
                self.own(value, names[-1])
        text = f"{', '.join(names)}{',' if many else ''} = {call}" if made else call
        self.lines.append(Line(text, read, made, needed=operators.is_mutable(func)))
        for name, tensor in zip(made, new, strict=True):  # a kernel of torch's may lay out otherwise what is read later
            laid_out = f"{name}, {self.text(tuple(tensor.shape))}, {self.text(tuple(tensor.stride()))}"
            self.lines.append(Line(f"{self.name_of(eager.assert_size_stride)}({laid_out})", [], [name], False))

    def text(self, value: Any, read: list[str] | None = None) -> str:
        """Write an argument as Python, and note the names of tensors in it."""
        if isinstance(value, Tensor):
            return self._tensor(value, read if read is not None else [])
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list, torch.Size):
            inside = "".join(f"{self.text(item, read)}, " for item in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and isfinite(value)):
            return repr(value)
        if isinstance(value, (float, torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return self.name_of(value)
        raise NotRecordable(f"an argument {value!r}")

    def _size(self, value: torch.SymInt) -> str:
        """Return the name of a size, which is computed once."""
        text = self.sizes.text(value)
        if text.isidentifier() or text.isdigit():
            return text
        if text not in self.numbers:
            self.numbers[text] = f"e{len(self.numbers)}"
            self.lines.append(Line(f"{self.numbers[text]} = {text}", [], [], needed=True))
        return self.numbers[text]

    def _of(self, tensor: Tensor) -> tuple[Owner, bool]:
        """Return the owner of a tensor's memory, and whether the tensor is all of it, laid out in the same way."""
        owner = self.owners.get(fake_tensors.storage_key(tensor))
        if owner is None:
            raise NotRecordable("a tensor from elsewhere")
        return owner, self._layout(tensor) == self._layout(owner.tensor)

    def _layout(self, tensor: Tensor) -> list[Any]:
        """List what two views of one owner can differ in."""
        sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        return [tensor.dtype, *map(self.sizes.text, sizes)]

    def _tensor(self, tensor: Tensor, read: list[str]) -> str:
        if id(tensor) in _constants:
            return self.name_of(tensor)
        owner, whole = self._of(tensor)
        read.append(owner.name)
        if whole:
            return owner.name
        if tensor.dtype != owner.tensor.dtype:
            raise NotRecordable("a view of another dtype")
        offset = tensor.storage_offset() - owner.tensor.storage_offset()
        sizes = f"{self.text(tuple(tensor.shape))}, {self.text(tuple(tensor.stride()))}, {self.text(offset)}"
        text = f"{self.name_of(eager.reinterpret_tensor)}({owner.name}, {sizes})"
        if text not in self.views:
            self.views[text] = name = f"v{len(self.lines)}"
            self.lines.append(Line(f"{name} = {text}", [owner.name], [name], needed=False))
        read.append(self.views[text])
        return self.views[text]

    def _operand(self, value: Any, read: list[str]) -> Any:
        """Write an argument of a compiled kernel, a tensor as the address where it begins; tuples stay tuples."""
        if isinstance(value, tuple):
            return tuple(self._operand(item, read) for item in value)
        if not isinstance(value, Tensor):
            return self.text(value)
        if id(value) in _constants:
            self.name_of(value)  # keeps it alive
            return repr(value.data_ptr())
        owner, _ = self._of(value)
        read.append(owner.name)
        offset = self.text(_offset_bytes(value) - _offset_bytes(owner.tensor))
        return f"{owner.name}.data_ptr()" + ("" if offset == "0" else f" + {offset}")

    def _described(self, value: Any) -> Any:
        """Describe an argument as far as it is known for all sizes."""
        if isinstance(value, tuple):
            return tuple(self._described(item) for item in value)
        if isinstance(value, Tensor):
            aligned = value.data_ptr() % ALIGNMENT == 0 if id(value) in _constants else self.is_aligned(value)
            return triton_launch.Pointer(value.dtype, aligned)
        if not is_symbol(value):
            return int(value) if isinstance(value, torch.SymInt) else value
        if self.sizes.may_exceed(value, LARGEST_INT32):
            self.integers[self.sizes.text(value)] = None
        return triton_launch.integer(divisible(value, ALIGNMENT))

    def name_of(self, value: Any) -> str:
        """Return the name of a global with this value."""
        key = value if isinstance(value, (torch.device, torch.dtype)) else id(value)
        if key not in self.places:
            self.places[key] = f"g{len(self.places)}"
            self.globals[self.places[key]] = value  # kept alive, so that its id stays unique
        return self.places[key]


def _offset_bytes(tensor: Tensor) -> Any:
    return tensor.storage_offset() * tensor.element_size()


def _quick(func: Any) -> Any:
    """Return torch's own function where it is quicker to call than the operator."""
    return {torch.ops.aten.mm.out: torch.mm, torch.ops.aten.mm.default: torch.mm}.get(func, func)


def live(lines: Sequence[Line], returned: Sequence[str]) -> list[tuple[str | Launch, list[str]]]:
    """Return the lines that are needed or whose results are read, each with the names that nobody reads after it."""
    wanted, kept = set(returned), []
    for what, read, made, needed in reversed(lines):
        if not needed and not wanted.intersection(made):
            continue
        ended = [name for name in dict.fromkeys((*made, *read)) if name[0] in "tv" and name not in wanted]
        kept.append((what, ended))
        wanted.update(read)
    return kept[::-1]
