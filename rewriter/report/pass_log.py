"""Watch the passes: what each does to a graph and how long it takes, for the log, for tlparse, and as files.

``FASTFT_DUMP=folder`` writes every graph that fastft compiles as readable text, before the first pass and after each
that changes something.  Whatever goes wrong in watching is dropped: it must never cost a graph.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.fx import GraphModule

from fastft.compat import dynamo
from fastft.rewriter.fx.bodies import bodies
from fastft.rewriter.fx.metadata import name_of
from fastft.rewriter.report.data import PassRecord

log = logging.getLogger("fastft")
_numbers = itertools.count()  # of the graphs that are dumped in this process


class PassLog:
    """Watches the passes over one graph.  place: the code that the graph is from, for the names of files."""

    def __init__(self, gm: GraphModule, place: str = "") -> None:
        self.gm = gm
        self.records: list[PassRecord] = []
        self.folder = _folder(place)
        self.text = ""
        self._show("captured", lambda: readable(gm))

    @contextmanager
    def observe(self, name: str) -> Iterator[None]:
        """Record what happens to the graph meanwhile as the pass of this name."""
        before, began = calls(self.gm), time.perf_counter()
        yield
        seconds, after = time.perf_counter() - began, calls(self.gm)
        record = PassRecord(name, seconds, before.total(), after.total(), _difference(before, after))
        self.records.append(record)
        log.debug("pass %s", record)
        self._show(name, lambda: f"# pass {record}\n{readable(self.gm)}")

    def _show(self, name: str, text: Callable[[], str]) -> None:
        """Hand the graph to torch's trace log, if there is one, and write it to the folder, if it has changed."""
        title = f"{len(self.records):02}_{name}"
        try:
            dynamo.trace_artifact(f"fastft_{title}", text)
            if self.folder is not None:
                new = readable(self.gm)
                if new != self.text:
                    (self.folder / f"{title}.py").write_text(text(), encoding="utf-8")
                self.text = new
        except Exception as error:
            log.debug("a graph is not shown: %s", error)


def _folder(place: str) -> Path | None:
    """Make a folder of its own for a graph under FASTFT_DUMP, None where that is not set or cannot be written."""
    root = os.environ.get("FASTFT_DUMP")
    if not root:
        return None
    name = re.sub(r"\W+", "_", place.partition(" ")[0]).strip("_") or "graph"
    folder = Path(root) / f"{os.getpid()}_{next(_numbers):03}_{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("FASTFT_DUMP=%s cannot be written: %s", root, error.strerror)
        return None
    return folder


def readable(gm: GraphModule) -> str:
    """Spell a graph and those nested in it as Python, with shapes, dtypes and the user's lines."""
    return gm.print_readable(print_output=False, include_stride=True, include_device=True)


def calls(gm: GraphModule) -> Counter[str]:
    """Count the nodes of a graph and of those nested in it by what they call; others by their kind."""
    return Counter(
        name_of(node.target) if node.op in ("call_function", "call_method") else node.op
        for body in bodies(gm)
        for node in body.graph.nodes
    )


def _difference(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """How many more of each call there are afterwards, those that are more first."""
    changes = {name: after[name] - before[name] for name in (*before, *after) if after[name] != before[name]}
    return dict(sorted(changes.items(), key=lambda change: (-change[1], change[0])))
