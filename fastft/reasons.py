"""Why fastft leaves something as it was: a sentence for people, with a code by which advice is found."""

from __future__ import annotations


class Reason(str):
    """A sentence that says why something is declined, with a code such as ``mask.trained``.

    A plain str serves where nothing can be advised.  The advice for each code is in rewriter/report/advice.py.
    """

    code: str

    def __new__(cls, text: str, code: str) -> Reason:
        made = super().__new__(cls, text)
        made.code = code
        return made

    def behind(self, text: str) -> Reason:
        """Put words before the sentence and keep the code."""
        return Reason(text + self, self.code)


def with_prefix(text: str, reason: str) -> str:
    """Put words before a reason, whose code stays if it has one."""
    return reason.behind(text) if isinstance(reason, Reason) else text + reason


class Declined(Exception):  # noqa: N818  (nothing went wrong)
    """Raised where a rewrite turns out not to be safe; what is there stays, and the report gives the reason."""

    def __init__(self, reason: str, code: str = "") -> None:
        super().__init__(reason)
        self.reason = Reason(reason, code) if code else reason
