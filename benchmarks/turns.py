"""Several measurements on one machine: they compile side by side, and are timed one after the other."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Turns:
    """Of all processes that name the same file: ``prepare`` waits while one is timed, ``time`` until it is alone.

    It is alone from then on until its process ends.  Without a file nothing waits.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.descriptor = None if path is None else os.open(path, os.O_RDWR | os.O_CREAT)  # which no collection closes

    def prepare(self) -> None:
        self._wait(fcntl.LOCK_SH)

    def time(self) -> None:
        self._wait(fcntl.LOCK_EX)

    def _wait(self, how: int) -> None:
        if self.descriptor is not None:
            fcntl.flock(self.descriptor, how)
