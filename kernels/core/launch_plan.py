"""Plan an op's launches once for all sizes: Inductor's code calls a plan where it would call an opaque op.

An op runs much Python for few kernel launches: it checks shapes, chooses a GEMM and a tile, computes strides.  A plan
runs it once on fake tensors whose sizes are symbols, and generates a function that makes the same calls in the same
order for any sizes (launch_recorder.py).  What the op decides by sizes holds as long as the same comparisons have the
same results: these are the conditions at the top of the function, and where one fails, the op is recorded for such
sizes too.  Kernels are compiled for what is known for all sizes, so that no length compiles another one.

What cannot be recorded, such as a call that reads a value, runs as the op does, under the same conditions.
"""

from __future__ import annotations

import itertools
import linecache
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.compat import symbolic_sizes, triton_launch
from fastft.compat.symbolic_sizes import SymbolicSizes
from fastft.kernels.core import launch_recorder, registry
from fastft.kernels.core.launch_recorder import LARGEST_INT32, Launch, Recorder

log = logging.getLogger("fastft")
PLANNED_ON = {"cuda"}  # types of devices: on a CPU kernels take longer than what is before them
MOST_VARIANTS = 16  # functions of a plan, for different results of comparisons

Size = int | str  # a number, or an expression of sizes that have names
_plans: dict[str, Plan] = {}
_numbers = itertools.count()


class Described(NamedTuple):
    """A tensor argument: shape and stride of numbers and of expressions of names, such as "n0" and "4096*n0".

    aligned: whether its address is sure to be a multiple of 16 bytes.
    """

    dtype: torch.dtype
    device: str
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    aligned: bool


class Named(NamedTuple):
    """An integer argument that may change: its name."""

    name: str


def plan(name: str, *arguments: Any) -> Plan:
    """Return the plan of an op for such arguments: Described in place of tensors, and Named of integers that change.

    Equal ones are one plan.
    """
    key = repr((name, arguments))
    if key not in _plans:
        _plans[key] = Plan(registry.REGISTRY[name].run, arguments, name)
    return _plans[key]


def record_ahead(described: str, sizes: Mapping[str, int]) -> None:
    """Record a plan for such sizes before it is called.  described: the arguments of ``plan``, as text."""
    try:
        names = {"plan": plan, "Described": Described, "Named": Named, "torch": torch}
        eval(f"plan({described})", names).record_ahead(sizes)
    except Exception as error:  # such as no process that may have others: kernels are compiled when they are launched
        log.debug("nothing is compiled ahead of %s: %s", described[:100], error)


class Plan:
    """Calls an op for arguments that are as described.

    compute: the op.  name: in tracebacks and profiles.  variants: functions of the arguments, which return None where
    their conditions do not hold.  unrecorded: why some of them call the op.
    """

    def __init__(self, compute: Callable[..., Any], described: Sequence[Any], name: str = "an op") -> None:
        self.compute, self.described, self.name = compute, described, name
        self.variants: list[Callable[..., Any]] = []
        self.unrecorded: list[str] = []
        self.lock = threading.Lock()
        self.ahead: Recorded | None = None
        self.places = dict(_named_sizes(described))  # how each named size is read from the arguments
        self.kind = torch.device(described[0].device).type

    def __call__(self, *arguments: Any) -> Any:
        if torch.is_autocast_enabled(self.kind):  # it would cast what was recorded below it
            return self.compute(*arguments)
        try:
            for function in self.variants:
                results = function(*arguments)
                if results is not None:
                    return results
        except AssertionError as error:  # a kernel of torch's laid out its result in another way than torch says
            log.info("%s runs without a plan: %s", self.name, error)
            self.unrecorded.append(str(error))
            self.variants = [self.compute]
            return self.compute(*arguments)
        if self.ahead is not None:
            self.prepare({})
            return self(*arguments)
        read = {f"a{place}": argument for place, argument in enumerate(arguments)}
        self.prepare({name: eval(text, {}, read) for name, text in self.places.items()})
        return self.compute(*arguments)

    def record_ahead(self, sizes: Mapping[str, int]) -> None:
        """Record the op for such sizes, and begin to compile its kernels; for a plan that was not called yet."""
        with self.lock:
            if not self.variants and self.ahead is None:
                self.ahead = self._recorded(sizes)
                for launch in self.ahead.launches:
                    triton_launch.compile_ahead(launch.kernel, launch.described, launch.meta)

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Make a function for such sizes, or for those that were recorded ahead, and compile its kernels."""
        with self.lock:  # backward has a thread of its own
            if len(self.variants) >= MOST_VARIANTS:
                self.variants = [*self.variants[: MOST_VARIANTS - 1], self.compute]
                return
            recorded, self.ahead = self.ahead or self._recorded(sizes), None
            try:
                function = recorded.function(self.name)
            except Exception as error:  # Triton cannot compile a kernel for this device
                recorded.leave_to(self.compute, error)
                function = recorded.function(self.name)
            if recorded.reason:
                log.debug("%s runs without a plan: %s", self.name, recorded.reason)
                self.unrecorded.append(recorded.reason)
            self.variants.append(function)

    def _recorded(self, sizes: Mapping[str, int]) -> Recorded:
        with symbolic_sizes.without_modes():
            return Recorded.of(self.compute, self.described, self.places, sizes)


@dataclass
class Recorded:
    """What an op does for sizes of one kind.

    parameters: the names of its arguments.  begin: the lines before the recorder's.  read: the tensors that are
    returned, written as ``returned``.  reason: why the op is called in place of what was recorded, "" if it is not.
    """

    recorder: Recorder
    parameters: list[str]
    begin: list[str] = field(default_factory=list)
    returned: str = ""
    read: list[str] = field(default_factory=list)
    reason: str = ""

    @classmethod
    def of(
        cls, compute: Callable[..., Any], described: Sequence[Any], places: Mapping[str, str], sizes: Mapping[str, int]
    ) -> Recorded:
        """Record an op; places: how named sizes are read from its arguments."""
        symbols = SymbolicSizes(sizes)
        recorder = Recorder(symbols)
        unpacked: list[str] = []

        def fake(argument: Any, name: str) -> Any:
            if isinstance(argument, Described):
                tensor = symbols.tensor(argument.shape, argument.stride, argument.dtype, torch.device(argument.device))
                recorder.own(tensor, name, argument.aligned)
                return tensor
            if isinstance(argument, Named):
                return symbols.value(argument.name)
            if isinstance(argument, (list, tuple)) and any(isinstance(inner, Described) for inner in argument):
                names = [f"{name}_{number}" for number in range(len(argument))]
                unpacked.append(f"{', '.join(names)}, = {name}")
                return [fake(inner, inner_name) for inner, inner_name in zip(argument, names, strict=True)]
            return argument

        parameters = [f"a{place}" for place in range(len(described))]
        arguments = [fake(argument, name) for argument, name in zip(described, parameters, strict=True)]
        recorded = cls(recorder, parameters)
        try:
            with recorder.recording(), torch.no_grad():
                recorded.returned = recorder.text(compute(*arguments), recorded.read)
        except Exception as error:
            recorded.leave_to(compute, error)
        conditions = [*symbols.assumptions(), *(f"{text} <= {LARGEST_INT32}" for text in recorder.integers)]
        conditions += [f"{recorder.name_of(get)}() == {value!r}" for get, value in recorder.settings.items()]
        recorded.begin = [
            *(f"{name} = {text}" for name, text in places.items()),
            *([f"if not ({' and '.join(conditions)}): return None"] if conditions else []),
            *unpacked, *_stream(arguments),
        ]  # fmt: skip
        return recorded

    def leave_to(self, compute: Callable[..., Any], reason: Exception) -> None:
        """Call the op in place of what was recorded, under the same conditions."""
        self.recorder.lines.clear()
        self.recorder.globals["compute"] = compute
        self.returned, self.read = f"compute({', '.join(self.parameters)})", []
        self.reason = str(reason) or type(reason).__name__

    @property
    def launches(self) -> list[Launch]:
        """The launches of kernels that are compiled."""
        every = [line.what for line in self.recorder.lines if isinstance(line.what, Launch)]
        return [launch for launch in every if launch.described]

    def function(self, name: str) -> Callable[..., Any]:
        """Compile the kernels, and generate the function.  Raises what Triton raises."""
        body = [*self.begin, *self._lines(), f"return {self.returned}"]
        return _function(body, self.parameters, name, self.recorder.globals)

    def _lines(self) -> Iterator[str]:
        """Write the recorded lines, kernels compiled, each with a del of what nobody reads after it."""
        for what, ended in launch_recorder.live(self.recorder.lines, self.read):
            text = self._launch(what) if isinstance(what, Launch) else what
            yield f"{text}; del {', '.join(ended)}" if ended else text

    def _launch(self, launch: Launch) -> str:
        name = f"k{next(_numbers)}"
        if not launch.described:
            self.recorder.globals |= {name: launch.kernel, f"{name}_meta": launch.meta}
            return f"{name}[({', '.join(launch.grid)},)]({', '.join(launch.texts)}, **{name}_meta)"
        made = triton_launch.compiled(launch.kernel, launch.described, launch.meta)
        text, needed = triton_launch.launch(made, name, launch.grid, launch.texts, launch.meta)
        self.recorder.globals |= needed
        return text


def _named_sizes(described: Sequence[Any], prefix: str = "a") -> Iterator[tuple[str, str]]:
    """Yield the name of each size that an argument has by itself, and how it is read there."""
    for place, argument in enumerate(described):
        name = f"{prefix}{place}" if prefix == "a" else f"{prefix}[{place}]"
        if isinstance(argument, Described):
            for sizes, method in ((argument.stride, "stride"), (argument.shape, "size")):
                yield from (
                    (size, f"{name}.{method}({axis})")
                    for axis, size in enumerate(sizes)
                    if isinstance(size, str) and size.isidentifier()
                )
        elif isinstance(argument, Named):
            yield argument.name, name
        elif isinstance(argument, (list, tuple)):
            yield from _named_sizes(argument, name)


def _stream(arguments: Sequence[Any]) -> list[str]:
    device = next(argument for argument in arguments if isinstance(argument, Tensor)).device
    return [f"stream = get_stream({device.index or 0})"] if device.type == "cuda" else []


def _function(body: Sequence[str], parameters: Sequence[str], name: str, scope: dict[str, Any]) -> Callable[..., Any]:
    source = f"def planned({', '.join(parameters)}):\n    " + "\n    ".join(body)
    file = f"<launch plan {next(_numbers)} of {name}>"
    scope = {**scope, "get_stream": triton_launch.raw_stream}
    exec(compile(source, file, "exec"), scope)
    function = scope.pop("planned")  # removed, as it would keep itself alive there
    # Tracebacks and debuggers find its lines under the name of its file, for as long as it lives.
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # None: it is on no disk
    weakref.finalize(function, linecache.cache.pop, file, None).atexit = False
    return function
