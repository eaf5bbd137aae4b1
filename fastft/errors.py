"""What the user can put right: one sentence, exit code 2, no traceback."""


class UserError(Exception):
    """A mistake in what was asked for; the message is one sentence that says what to do."""
