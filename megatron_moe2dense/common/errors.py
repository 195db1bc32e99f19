"""The one exception for what a user can fix; everything else that escapes is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. The CLI prints it without a traceback and exits 2.

    Args:
        found: what is there, with the path or key it was found at.
        expected: what should have been there.
        do: the next step for the user.
    """

    def __init__(self, found: str, expected: str, do: str):
        self.found, self.expected, self.do = found, expected, do
        super().__init__(f"found:    {found}\nexpected: {expected}\ndo:       {do}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """Ranks send each other their errors."""
        return type(self), (self.found, self.expected, self.do)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest known name, else an empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""
