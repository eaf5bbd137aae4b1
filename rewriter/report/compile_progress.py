"""A line that says what is being compiled: in a terminal for as long as it takes, elsewhere in the log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import rich
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

log = logging.getLogger("fastft")
_ERASE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
_show: Callable[[str], None] | None = None


@contextmanager
def shown_by(show: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile ``show`` gets the text of the line instead of the terminal, and "" once there is nothing to say."""
    global _show
    before, _show = _show, show
    try:
        yield
    finally:
        _show = before


@contextmanager
def line() -> Iterator[Callable[[str], None]]:
    """Gives a function that says what is being compiled now; what it said disappears in the end.

    Drawing is never worth a compilation: what goes wrong in it is dropped.
    """
    show = _show or (_draw if _own_terminal() else _note)
    try:
        yield lambda text: _safely(show, text)
    finally:
        _safely(show, "")


def _safely(show: Callable[[str], None], text: str) -> None:
    with suppress(Exception):
        show(text)


def _note(text: str) -> None:
    if text:
        log.info("%s", text)


def _draw(text: str) -> None:
    """Draw one line without a newline over the one before: a process can have but one live display."""
    console = Console(stderr=True)
    console.control(_ERASE)
    if text:
        console.print(Text(f"fastft: {text}", style="dim"), end="", no_wrap=True, overflow="ellipsis")
        console.file.flush()


def _own_terminal() -> bool:
    """Return whether stderr is a terminal that no live display of rich draws on."""
    try:
        shared = rich.get_console()
        live = getattr(shared, "_live_stack", None) or getattr(shared, "_live", None)
        return sys.stderr.isatty() and not live and not Console(stderr=True).is_dumb_terminal
    except Exception:
        return False
