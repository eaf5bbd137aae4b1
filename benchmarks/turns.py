"""Several measurements on one machine: they compile side by side, and are timed one after the other."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TextIO

_held: list[TextIO | None] = []  # until the process ends, whoever forgets its Turns


class Turns:
    """Of all processes that name the same file: ``prepare`` waits while one is timed, ``time`` until it is alone.

    It is alone from then on until its process ends.  Without a file nothing waits.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.file = None if path is None else Path(path).open("a")  # noqa: SIM115  (see _held)
        _held.append(self.file)

    def prepare(self) -> None:
        self._wait(fcntl.LOCK_SH)

    def time(self) -> None:
        self._wait(fcntl.LOCK_EX)

    def _wait(self, how: int) -> None:
        if self.file is not None:
            fcntl.flock(self.file, how)
