"""Record the ATen and Triton calls of an op for one metadata signature; replay them as generated Python.

An op runs much Python for few kernel launches: it checks shapes, chooses a GEMM and a tile, computes strides.  All of
it depends on the arguments' metadata alone, so the same metadata leads to the same calls.  The second time that a
signature occurs, these calls, PyTorch's and Triton's, are recorded, and a function is generated that makes the same
calls in the same order and frees each tensor after its last use.  For small batches, whose kernels take less time than
the Python between them, a step without CUDA graphs waits for that Python (docs/performance.md).

An op may be replayed if its calls depend on nothing else: not on values, global settings or random numbers.  If a
recording meets something that it cannot write down, such as a number read from a tensor or a tensor that is neither an
argument nor made in the op, the op runs without replay for this signature from then on.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.compat import eager, fake_tensors, operators

log = logging.getLogger("fastft")
MOST_KINDS = 1024  # metadata signatures that an op remembers
ALIGNMENT = 16  # bytes: what Triton's kernels are specialised on

Text = tuple[str, list[str]]  # a Python expression, and the names of tensors in it
Owner = tuple[str, int]  # the tensor that owns some memory: its name and address

_thread = threading.local()  # recorder: of this thread's recording, if there is one
_constants: dict[int, Tensor] = {}
_numbers = itertools.count()


class NotReplayable(Exception):  # noqa: N818
    """Raised where a call cannot be recorded."""


def constant(tensor: Tensor) -> Tensor:
    """Register a tensor that recordings may refer to, as it is never freed and never changes; return it."""
    _constants[id(tensor)] = tensor
    return tensor


def on_grid(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return Triton's kernel[grid], or a function that also records the launch while a recording is under way."""
    recorder = getattr(_thread, "recorder", None)
    return kernel[grid] if recorder is None else functools.partial(recorder.launch, kernel, grid)


class Replayed:
    """A function of tensors, lists of them and other values; recorded, then replayed, for each metadata signature.

    name: the name of the replayed code in tracebacks and profiles.
    """

    def __init__(self, compute: Callable[..., Any], name: str = "an op") -> None:
        self.compute, self.name = compute, name
        self.functions: dict[Any, Callable[..., Any] | None] = {}  # by signature; None where it cannot be replayed
        self.met: set[Any] = set()  # signatures that have occurred

    def __call__(self, *arguments: Any) -> Any:
        kind = kind_of(arguments)
        function = self.functions.get(kind)
        if function is not None:
            with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
                return function(*arguments)
        if kind in self.functions or getattr(_thread, "recorder", None) is not None:
            return self.compute(*arguments)
        if kind not in self.met:  # lengths that occur only once are not worth recording
            if len(self.met) >= MOST_KINDS:
                self.met.clear()
                self.functions.clear()
            self.met.add(kind)
            return self.compute(*arguments)
        results, self.functions[kind] = recorded(self.compute, arguments, self.name)
        return results


def kind_of(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Return the metadata signature of a call: everything that an op's calls may depend on."""
    return tuple(
        [
            _metadata(argument)
            if isinstance(argument, Tensor)
            else tuple([_metadata(inner) if isinstance(inner, Tensor) else inner for inner in argument])
            if isinstance(argument, (list, tuple))
            else argument
            for argument in arguments
        ]
    )


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % ALIGNMENT


def recorded(compute: Callable[..., Any], arguments: Sequence[Any], name: str) -> tuple[Any, Callable[..., Any] | None]:
    """Return compute(*arguments), and a function that replays it for the same metadata; None if that is impossible."""
    arguments = _distinct(arguments)
    recorder = Recorder(arguments)
    _thread.recorder = recorder
    try:
        with recorder:
            results = compute(*arguments)
    finally:
        _thread.recorder = None
    try:
        return results, recorder.function(results, name)
    except NotReplayable as reason:
        log.debug("%s is not replayed: %s", name, reason)
        return results, None


def _distinct(arguments: Sequence[Any]) -> list[Any]:
    """Give each use of a tensor that is passed twice an object of its own: the next call may pass two tensors."""
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        twice = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.detach() if twice else tensor

    return fake_tensors.tree_map_only(Tensor, own, list(arguments))


class Line(NamedTuple):
    """A recorded call as a line of Python, and the names it reads and makes; needed: kept even if these are unread."""

    text: str
    read: list[str]
    made: list[str]
    needed: bool


class Recorder(eager.TorchDispatchMode):
    """Record calls as lines of Python, one line for each call.

    names: by the id of each live tensor: its name, and the name and address of the tensor that owns its memory.  For a
    view, the owner is its base, so that a kernel that takes an address needs no view.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.names: dict[int, tuple[str, Owner]] = {}
        self.views: dict[str, str] = {}  # the names of views by the text of the calls that made them
        self.references: dict[int, weakref.ref[Tensor]] = {}
        self.lines: list[Line] = []
        self.globals: dict[str, Any] = {}
        self.places: dict[Any, str] = {}  # the names of globals by value or id
        self.reason = ""  # why the op cannot be replayed
        self.busy = False  # within a call that is recorded as a whole
        self.unpacked: list[str] = []
        for index, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                self._name(argument, f"a{index}")
            elif (
                isinstance(argument, (list, tuple))
                and argument
                and all(isinstance(inner, Tensor) for inner in argument)
            ):
                names = [self._name(inner, f"a{index}_{number}") for number, inner in enumerate(argument)]
                self.unpacked.append(f"{', '.join(names)}, = a{index}")
        self.count = len(arguments)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self._own_call() as outermost:  # calls and launches within a fastft op are part of it
            result = func(*args, **(kwargs or {}))
        if not outermost or self.reason or not fake_tensors.tensors_in((args, kwargs, result)):
            return result  # a call on dtypes, for example, has the same result at every replay
        mutable = operators.is_mutable(func)
        same = next((argument for argument in args if _is_whole(result, argument)), None)
        if same is not None and id(same) in self.names and not mutable:
            self._name(result, *self.names[id(same)])
        else:
            self._note(func, args, kwargs or {}, result, needed=mutable)
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        """Launch a Triton kernel and record the launch."""
        with self._own_call() as outermost:  # Triton's interpreter calls ATen ops itself
            compiled = kernel[grid](*args, **meta)
        if not outermost or self.reason:
            return
        if compiled is None:
            self._note(kernel[grid], args, meta, None, needed=True)
            return
        # A compiled kernel takes all arguments in order, constants too.
        arguments = (*args, *(meta[name] for name in kernel.arg_names[len(args) :]))
        self._note(compiled[(*grid, 1, 1)[:3]], arguments, {}, None, needed=True, write=self._address)

    @contextmanager
    def _own_call(self) -> Iterator[bool]:
        """Enter a call; yield whether the op itself makes it, not another call."""
        outermost, self.busy = not self.busy, True
        try:
            yield outermost
        finally:
            self.busy = not outermost

    def function(self, results: Any, name: str) -> Callable[..., Any]:
        """Generate the function that makes all recorded calls and returns results; else raise NotReplayable."""
        if self.reason:
            raise NotReplayable(self.reason)
        returned, read = self._text(results)
        body = [*self.unpacked, *_live(self.lines, read), f"return {returned}"]
        source = f"def replay({', '.join(f'a{index}' for index in range(self.count))}):\n    " + "\n    ".join(body)
        file = f"<replay {next(_numbers)} of {name}>"
        exec(compile(source, file, "exec"), self.globals)
        function = self.globals.pop("replay")  # removed, as it would keep itself alive there
        if unknown := set(function.__code__.co_names) - set(self.globals) - {"data_ptr"}:
            raise NotReplayable(f"it would read {unknown}")  # a bug in the recorder
        _show_source(function, file, source)
        return function

    def _note(
        self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, *, needed: bool,
        write: Callable[[Tensor], Text] | None = None,
    ) -> None:  # fmt: skip
        """Record one call.  write: writes a tensor argument as text, by default its name."""
        results = [] if result is None else list(result) if isinstance(result, (tuple, list)) else [result]
        try:
            texts = [self._text(argument, write or self._named) for argument in args]
            texts += [
                (f"{name}={text}", read) for name, argument in kwargs.items() for text, read in [self._text(argument)]
            ]
            if not all(isinstance(tensor, Tensor) for tensor in results):
                raise NotReplayable("it gives what is no tensor")
            if function is torch.ops.aten.as_strided.default:
                raise NotReplayable("it counts from where a storage begins")
        except NotReplayable as reason:
            self.reason = f"{function}: {reason}"
            return
        call = f"{self._global(function)}({', '.join(text for text, _ in texts)})"
        owner = self._owner(result, args) if isinstance(result, Tensor) and not needed else None
        if owner is not None and (id(result) in self.names or call in self.views):
            if id(result) not in self.names:
                self._name(result, self.views[call], owner)
            return
        is_new = [id(tensor) not in self.names for tensor in results]
        made = [f"t{len(self.lines)}_{index}" if new else "_" for index, new in enumerate(is_new)]
        new_names = [self._name(tensor, name, owner) for tensor, name in zip(results, made, strict=True) if name != "_"]
        if owner is not None:
            self.views[call] = made[0]
        comma = "," if isinstance(result, (tuple, list)) else ""
        text = f"{', '.join(made)}{comma} = {call}" if new_names else call
        self.lines.append(Line(text, [name for _, read in texts for name in read], new_names, needed))

    def _owner(self, result: Tensor, args: Sequence[Any]) -> Owner | None:
        """Return the owner of a result's memory if it is known and the result shares it with an argument."""
        storage = result.untyped_storage().data_ptr()
        sources = [
            argument
            for argument in args
            if isinstance(argument, Tensor) and argument.untyped_storage().data_ptr() == storage
        ]
        owners = {self.names[id(source)][1] for source in sources if id(source) in self.names}
        return owners.pop() if len(owners) == 1 and storage else None

    def _name(self, tensor: Tensor, name: str, owner: Owner | None = None) -> str:
        key = id(tensor)
        self.names[key] = name, owner or (name, tensor.data_ptr())
        self.references[key] = weakref.ref(tensor, lambda _: self._forget(key, name))
        return name

    def _forget(self, key: int, name: str) -> None:
        if key in self.names and self.names[key][0] == name:  # another tensor may have its id by now
            del self.names[key]

    def _named(self, tensor: Tensor) -> Text:
        if id(tensor) in self.names:
            name, _ = self.names[id(tensor)]
            return name, [name]
        if id(tensor) in _constants:
            return self._global(tensor), []
        raise NotReplayable("a tensor from elsewhere")

    def _address(self, tensor: Tensor) -> Text:
        """Return a tensor's address as text, its owner's plus an offset: Triton also takes numbers as pointers."""
        if id(tensor) not in self.names:
            return self._named(tensor)
        owner, begin = self.names[id(tensor)][1]
        offset = tensor.data_ptr() - begin
        return f"{owner}.data_ptr()" + (f" + {offset}" if offset else ""), [owner]

    def _text(self, value: Any, write: Callable[[Tensor], Text] | None = None) -> Text:
        """Return an argument as Python text, and the names in it.  write: writes a tensor, by default its name."""
        if isinstance(value, Tensor):
            return (write or self._named)(value)
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list, torch.Size):
            texts = [self._text(item, write) for item in value]
            inside = "".join(f"{text}, " for text, _ in texts)
            return (f"[{inside}]" if isinstance(value, list) else f"({inside})"), [n for _, read in texts for n in read]
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and isfinite(value)):
            return repr(value), []
        if isinstance(value, (float, torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return self._global(value), []
        raise NotReplayable(f"an argument {value!r}")

    def _global(self, value: Any) -> str:
        key = value if isinstance(value, (torch.device, torch.dtype)) else id(value)
        if key not in self.places:
            self.places[key] = f"g{len(self.globals)}"
            self.globals[self.places[key]] = value  # kept alive, so that its id stays unique
        return self.places[key]


def _show_source(function: Callable[..., Any], file: str, source: str) -> None:
    """Let tracebacks and debuggers find a function's lines under the name of its file, for as long as it lives."""
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # None: it is on no disk
    weakref.finalize(function, linecache.cache.pop, file, None).atexit = False


def _is_whole(view: Any, tensor: Any) -> bool:
    """Return whether a view covers all of a tensor with the same layout, as a slice of everything does."""
    both = isinstance(view, Tensor) and isinstance(tensor, Tensor) and view is not tensor and view.numel() > 0
    return both and _metadata(view) == _metadata(tensor) and view.data_ptr() == tensor.data_ptr()


def _live(lines: Sequence[Line], returned: Sequence[str]) -> Iterator[str]:
    """Return the lines that are needed or whose results are read, each with a del of the names that it reads last."""
    wanted, kept = set(returned), []
    for text, read, made, needed in reversed(lines):
        if not needed and not wanted.intersection(made):
            continue
        ended = [name for name in dict.fromkeys((*made, *read)) if name[0] == "t" and name not in wanted]
        kept.append(f"{text}; del {', '.join(ended)}" if ended else text)
        wanted.update(read)
    return reversed(kept)
