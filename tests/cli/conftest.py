"""How the tests of the command start it, and the few files that they share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = ("--lower", "eager", "--device", "cpu", "--batch-size", "2", "--seq-len", "32")


@pytest.fixture
def fastft(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in a process of its own, in an empty folder."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastft", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def tiny() -> tuple[str, ...]:
    """Options that make a run of few steps take seconds."""
    return TINY
