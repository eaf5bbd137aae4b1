"""What the user can put right: one sentence, exit code 2, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what was asked for; the message is one sentence that says what to do."""


def describe(error: BaseException) -> str:
    """An error's class and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
