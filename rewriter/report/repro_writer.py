"""A captured graph as a Python file that compiles it again: ``python repro.py``.  repro.py, beside this, runs it.

The file holds the graph's calls with their modules and source lines, shapes and dtypes of its inputs, the options, and
what is installed.  It holds no weights, batches or texts: inputs are drawn when it is run.  Numbers and strings that
the model's code passes to functions (eps, "silu") are part of the calls.

torch's own writers were not enough: FX's code forgets modules and lines, and its pickles are tied to one torch.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors, operators, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.metadata import place_of
from fastft.rewriter.options import Options

log = logging.getLogger("fastft")
PREFIX, FILE = "fastft-repro-", "repro.py"
LONG = 24  # characters of a name
_PACKAGES = ("fastft", "torch", "triton", "transformers", "peft", "bitsandbytes")

_FILE = '''\
"""A graph as torch.compile gave it to fastft.{failure}

python {file}               compiles it, runs it forward and backward, and compares that with the graph as it is
python {file} --eager       the same without Inductor
python {file} --device cpu  the same on another device

Inputs are drawn at random: nothing here is anybody's data.  Written with {versions}.
"""

import torch
from math import inf, nan

OPTIONS = {options}
STATE = {state}


{graphs}

if __name__ == "__main__":
    from fastft.rewriter.backend import fastft
    from fastft.rewriter.report import repro

    repro.main(graph, fastft, OPTIONS, STATE)
'''


def text(gm: GraphModule, options: Options | None = None, failure: str = "") -> str:
    """Write a graph, before it is rewritten, as such a file; "" where that fails, which is never worth an error."""
    try:
        return _FILE.format(
            file=FILE,
            failure=f"  It failed with {_in_docstring(failure)}" if failure else "",
            versions=", ".join(_versions()),
            options=repr(_told(options or Options())),
            state=repr(_state()),
            graphs="\n".join(_Writer(gm).function("graph")),
        )
    except Exception as error:
        log.debug("a graph has no reproducer: %r", error)
        return ""


def write(written: str, folder: Path) -> Path:
    """Write the file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(written, encoding="utf-8")
    return folder / FILE


def saved_as(written: str) -> str:
    """Write the file of a graph that failed into a new folder, and say where, as what ends a warning; "" if it fails.

    The folder is among temporary files, or in that which the environment variable FASTFT_DUMP names.
    """
    try:
        if not written:
            return ""
        around = os.environ.get("FASTFT_DUMP") or None
        if around is not None:
            Path(around).mkdir(parents=True, exist_ok=True)
        path = write(written, Path(tempfile.mkdtemp(prefix=PREFIX, dir=around)))
        return f"; `python {path}` shows it."
    except Exception as error:
        log.debug("the reproducer was not written: %r", error)
        return ""


def dump(gm: GraphModule, options: Options, folder: Path) -> None:
    """Write the file of a graph that is to be compiled into a folder, if that is possible."""
    try:
        if written := text(gm, options):
            write(written, folder)
    except Exception as error:
        log.debug("a graph has no reproducer: %r", error)


class _Writer:
    """Turn a graph and its nested graphs into functions of a builder G (repro_builder.py)."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.place = gm, ("", "")
        self.nested: list[tuple[str, GraphModule]] = []
        self.storages, self.names = _shared_storages(gm), _names(gm)

    def function(self, name: str) -> Iterator[str]:
        """Iterate over the lines of the function that builds this graph, after those of the graphs that it runs."""
        lines = [line for node in self.gm.graph.nodes for line in self._lines(node, name)]
        for inner, body in self.nested:
            yield from _Writer(body).function(inner)
        yield f"def {name}(G):"
        yield from ("    " + line for line in lines or ["pass"])
        yield "\n"

    def _lines(self, node: Node, name: str) -> Iterator[str]:
        value = value_of(node)
        if node.op == "output":
            yield f"G.output({self._text(node.args[0])})"
        elif node.op == "get_attr":
            yield self._attribute(node, name)
        elif node.op == "placeholder":
            yield f"{self.names[node]} = G.{self._input(node.name, value, fake_tensors.stays_in_place(node))}"
        elif not isinstance(value, torch.SymFloat):  # else its users have the number
            place = place_of(node)
            if place != self.place:
                self.place = place
                yield f"G.at({place[0]!r}, {place[1]!r})"
            yield self._call(node) + _remark(value)

    def _attribute(self, node: Node, name: str) -> str:
        owner: Any = self.gm
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        if isinstance(owner, GraphModule):
            inner = f"{name}_{node.name}"
            self.nested.append((inner, owner))
            inputs = len(owner.graph.find_nodes(op="placeholder"))
            return f"{self.names[node]} = G.body({node.name!r}, {inner}, {inputs})"
        if isinstance(owner, Tensor):
            return f"{self.names[node]} = G.{self._input(node.name, owner, None, 'constant')}"
        raise TypeError(f"a graph that holds a {type(owner).__name__} cannot be written")

    def _input(self, name: str, value: Any, static: str | None, kind: str = "input") -> str:
        """Return the call that makes an input, with whatever differs from a new tensor."""
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return f"number({name!r}, {symbolic.number(value)!r}, {_symbol(value)!r})"
        if value is None:
            return f"unknown({name!r})"
        if not isinstance(value, Tensor):
            return f"number({name!r}, {self._text(value)})"
        size, stride = _hints(value.shape), _hints(value.stride())
        more: dict[str, Any] = {"stride": stride} if stride != _dense(size) else {}
        more["offset"] = symbolic.hint(value.storage_offset())
        more["device"] = str(value.device) if value.device.type != "cpu" else ""
        more["requires_grad"], more["parameter"] = value.requires_grad, isinstance(value, nn.Parameter)
        more["static"] = static
        more["symbols"] = {at: _symbol(one) for at, one in enumerate(value.shape) if not isinstance(one, int)}
        more["storage"] = self.storages.get(fake_tensors.storage_key(value))
        said = "".join(f", {key}={what!r}" for key, what in more.items() if what not in (None, "", 0, False, {}))
        said += "" if value.is_leaf else ", leaf=False"
        return f"{kind}({name!r}, {value.dtype}, {size}{said})"

    def _call(self, node: Node) -> str:
        kind = "method" if node.op == "call_method" else "call"
        if node.op not in ("call_function", "call_method"):
            raise TypeError(f"a graph with a {node.op} cannot be written")
        target = str(node.target) if node.op == "call_method" else operators.qualified_name(node.target)
        given = [repr(node.name), repr(target), *map(self._text, node.args)]
        given += [f"{name}={self._text(value)}" for name, value in node.kwargs.items()]
        return f"{self.names[node]} = G.{kind}({', '.join(given)})"

    def _text(self, value: Any) -> str:
        """Spell an argument as Python."""
        if isinstance(value, Node):
            known = value_of(value)
            return repr(symbolic.number(known)) if isinstance(known, torch.SymFloat) else self.names[value]
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return repr(symbolic.number(value))
        if isinstance(value, (tuple, list)):
            inner = ", ".join(map(self._text, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{key!r}: {self._text(one)}" for key, one in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if value is None or isinstance(value, (bool, int, float, complex, str)) or type(value).__module__ == "torch":
            return repr(value)
        return "Ellipsis" if value is Ellipsis else f"G.named({operators.qualified_name(value)!r})"


def _names(gm: GraphModule) -> dict[Node, str]:
    """Name each node for the file: as in the graph, but for inputs whose long names would hide the rest."""
    taken = {node.name for node in gm.graph.nodes}
    numbered = (name for number in itertools.count() if (name := f"in{number}") not in taken)
    short = {node: next(numbered) for node in gm.graph.find_nodes(op="placeholder") if len(node.name) > LONG}
    return {node: short.get(node, node.name) for node in gm.graph.nodes}


def _shared_storages(gm: GraphModule) -> dict[int, tuple[int, int]]:
    """Number each storage that several inputs share; return number and bytes."""
    ends: dict[int, list[int]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(value := value_of(node), Tensor):
            reach = sum(
                (size - 1) * step for size, step in zip(_hints(value.shape), _hints(value.stride()), strict=True)
            )
            end = symbolic.hint(value.storage_offset()) + max(reach, 0) + 1
            ends.setdefault(fake_tensors.storage_key(value), []).append(end * value.itemsize)
    shared = {key: max(reached) for key, reached in ends.items() if len(reached) > 1}
    return {key: (number, size) for number, (key, size) in enumerate(shared.items())}


def _remark(value: Any) -> str:
    """Describe a node's result for the reader."""
    if not isinstance(value, Tensor):
        return ""
    sizes = ", ".join(map(str, value.shape))
    return f"  # {str(value.dtype).removeprefix('torch.')}[{sizes}]" + (" grad" if value.requires_grad else "")


def _hints(sizes: Any) -> tuple[int, ...]:
    return tuple(map(symbolic.hint, sizes))


def _symbol(value: Any) -> str:
    return str(symbolic.expression(value)) if isinstance(value, torch.SymInt) else ""


def _dense(size: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(size, device="meta").stride()


def _told(options: Options) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    default = asdict(Options())
    return {name: value for name, value in asdict(options).items() if value != default[name]}


def _state() -> dict[str, Any]:
    """Return the state around the graph: gradients, autocast."""
    kinds = {kind: str(dtype).removeprefix("torch.") for kind, dtype in autocast.entered().items()}
    return {"grad": torch.is_grad_enabled(), "autocast": kinds}


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        try:
            yield f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    yield f"Python {platform.python_version()}"
    yield torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def _in_docstring(text: str) -> str:
    """Escape a line of text so that it may stand in a docstring."""
    return text.replace("\\", "\\\\").replace('"', "'")
