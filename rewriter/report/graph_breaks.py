"""Where Dynamo cannot go on with a graph, and why."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from fastft.compat.dynamo import break_log

_IN_LIBRARY = re.compile(r"[/\\](torch|accelerate|peft)[/\\]|" + re.escape(str(Path(__file__).parents[1])))


class _BreakHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.breaks: dict[tuple[str, str], None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        place = re.search(r"in user code at (.+:\d+)$", text, re.MULTILINE)
        reason = re.search(r"^Graph Break Reason: (.+)$", text, re.MULTILINE)
        why = re.search(r"^\s*Explanation: (.+)$", text, re.MULTILINE) or reason
        if not place or not reason or not why:
            return
        explained = why.group(1).strip()
        if "gracefully" in reason.group(1) and any(explained == known for known, _ in self.breaks):
            return  # Dynamo gives up a frame further out, for a reason told before
        frames = [file for file in re.findall(r'File "([^"]+)", line (\d+)', text) if not _IN_LIBRARY.search(file[0])]
        where = place.group(1) if not _IN_LIBRARY.search(place.group(1)) or not frames else ":".join(frames[-1])
        self.breaks[explained, where] = None


@contextlib.contextmanager
def record_breaks(into: list[tuple[str, str]]) -> Iterator[None]:
    """Collect the graph breaks that Dynamo meets meanwhile: the reason, and the ``file:line`` nearest to the user.

    Dynamo tells them in full only to its log; the graphs know just those breaks that ended one of them.
    """
    handler, level, propagate = _BreakHandler(), break_log.level, break_log.propagate
    break_log.addHandler(handler)
    break_log.setLevel(logging.DEBUG)
    break_log.propagate = False
    try:
        yield
    finally:
        break_log.removeHandler(handler)
        break_log.setLevel(level)
        break_log.propagate = propagate
        into.extend(handler.breaks)
