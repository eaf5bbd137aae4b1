"""Watch the passes: what each does to a graph and how long it takes, for the log, for tlparse, and as files.

``FASTFT_DUMP=folder`` writes every graph that fastft compiles as readable text, before the first pass and after each
that changes something.  Whatever goes wrong in watching is dropped: it must never cost a graph.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.fx import GraphModule

from fastft.compat import dynamo
from fastft.rewriter.fx.bodies import bodies
from fastft.rewriter.fx.metadata import name_of
from fastft.rewriter.report.data import PassRecord

log = logging.getLogger("fastft")


class PassLog:
    """Watches the passes over one graph.  folder: where it is written to after each that changes it, if anywhere."""

    def __init__(self, gm: GraphModule, folder: Path | None = None) -> None:
        self.gm, self.folder = gm, folder
        self.records: list[PassRecord] = []
        self.text = ""
        self.calls = calls(gm)
        self._show("captured")

    @contextmanager
    def observe(self, name: str) -> Iterator[None]:
        """Record what happens to the graph meanwhile as the pass of this name."""
        before, began = self.calls, time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        after = self.calls = calls(self.gm)
        record = PassRecord(name, seconds, before.total(), after.total(), _difference(before, after))
        self.records.append(record)
        log.debug("pass %s", record)
        self._show(name, f"# pass {record}\n")

    def _show(self, name: str, head: str = "") -> None:
        """Hand the graph to torch's trace log, if there is one, and write it to the folder, if it has changed."""
        title, text = f"{len(self.records):02}_{name}", functools.cache(lambda: readable(self.gm))
        try:
            dynamo.trace_artifact(f"fastft_{title}", lambda: head + text())
            if self.folder is not None:
                if text() != self.text:
                    (self.folder / f"{title}.py").write_text(head + text(), encoding="utf-8")
                self.text = text()
        except Exception as error:
            log.debug("a graph is not shown: %s", error)


def dump_folder(place: str) -> Path | None:
    """Make a new folder for a graph in the one that FASTFT_DUMP names; None without it, or where that fails.

    place: the code that the graph is from, which the folder is called after.
    """
    root = os.environ.get("FASTFT_DUMP")
    name = re.sub(r"\W+", "_", place.partition(" ")[0]).strip("_") or "graph"
    for number in itertools.count() if root else ():
        folder = Path(root or "") / f"{number:03}_{name}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another graph's, or another process's
            continue
        except OSError as error:
            log.warning("FASTFT_DUMP=%s cannot be written: %s", root, error.strerror)
            break
    return None


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
    """Return how many more of each call there are afterwards, the largest gain first."""
    changes = {name: after[name] - before[name] for name in (*before, *after) if after[name] != before[name]}
    return dict(sorted(changes.items(), key=lambda change: (-change[1], change[0])))
