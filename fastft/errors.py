"""Errors that the user can fix: one sentence, exit code 2, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what was asked for; the message is one sentence that says what to do."""


def describe(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
