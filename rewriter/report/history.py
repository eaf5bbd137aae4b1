"""``fastft.compilations``: what the backend has compiled in this process, and why."""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.fx import GraphModule

from fastft.compat import aot, dynamo
from fastft.compat.fake_tensors import value_of
from fastft.kernels import expert_load
from fastft.rewriter.fx.metadata import without_scope
from fastft.rewriter.report.data import ExpertLoad, GraphReport
from fastft.rewriter.report.report import Report

LIMIT = 256
_graphs: deque[GraphReport] = deque(maxlen=LIMIT)
_listeners: list[list[GraphReport]] = []


def compilations() -> Report:
    """Report the last 256 graphs that fastft compiled in this process, in their order, fallbacks included.

    It holds text and numbers alone: no graph, tensor or model lives longer for it.  Where tokens chose experts it says
    how evenly, and waits for the device to know.
    """
    return Report(graphs=list(_graphs), loads=_loads() if _graphs else [])


def _loads() -> list[ExpertLoad]:
    found = expert_load.totals().items()
    return [ExpertLoad(experts, sum(each), max(each), each.count(0)) for experts, each in found if any(each)]


@contextmanager
def recorded() -> Iterator[list[GraphReport]]:
    """Collect the reports of the graphs that are compiled meanwhile."""
    reports: list[GraphReport] = []
    _listeners.append(reports)
    try:
        yield reports
    finally:
        _listeners[:] = [other for other in _listeners if other is not reports]


class Recording:
    """One compilation from its beginning; the circumstances are noted at once, since lowering changes the graph."""

    def __init__(self, gm: GraphModule) -> None:
        self.began = time.perf_counter()
        self.reason, self.place, self.dynamic = _reason(), _place(), _dynamic(gm)
        self.cache = aot.cache_counts()

    def end(self, report: GraphReport) -> None:
        """Complete the graph's report and keep it."""
        report.reason, report.place, report.dynamic = self.reason, self.place, self.dynamic
        report.cache = Counter(aot.cache_counts())
        report.cache.subtract(self.cache)
        report.seconds = time.perf_counter() - self.began
        for reports in (_graphs, *_listeners):
            reports.append(report)


def _reason() -> str:
    """Return Dynamo's reason in one line, without the number of the compilation and the remark behind it."""
    try:
        return " ".join(re.sub(r"^\d+/\d+: |\s+# .*", "", dynamo.recompile_reason(), flags=re.DOTALL).split())[:300]
    except Exception:  # told by a part of torch that is not for others to read
        return "unknown"


def _place() -> str:
    """Name the code that Dynamo compiles: ``Class.forward (file:line)``."""
    try:
        code, owner = dynamo.current_code()
    except Exception:  # called without Dynamo
        return ""
    is_forward = getattr(getattr(type(owner), "forward", None), "__code__", None) is code  # whatever decorates it
    name = "forward" if is_forward else code.co_name
    prefix = f"{type(owner).__name__}." if owner is not None else ""
    return f"{prefix}{name} ({code.co_filename}:{code.co_firstlineno})"


def _dynamic(gm: GraphModule) -> list[str]:
    """List the sizes of inputs that are symbols, such as ``batch['input_ids'].size(1)``; each symbol once."""
    first: dict[str, str] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        for at, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if not isinstance(size, int) and not str(size).isdecimal():  # a symbol that turned out to be one number
                first.setdefault(str(size), f"{_input_name(node.name, dynamo.source_name(node))}.size({at})")
    return list(first.values())


def _input_name(name: str, source: str) -> str:
    """``L['kwargs']['input_ids']`` as ``input_ids``, ``L['args'][0]`` as ``args[0]``."""
    return without_scope(re.sub(r"^L\['\w+'\]\['(\w+)'\]$", r"\1", source)) or name
