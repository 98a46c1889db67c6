"""The nearest known name, for messages about an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the nearest of *known*, '' when none is near.

    A known name that begins with *name* comes before one that merely looks like it.
    """
    names, wanted = list(known), name.lower()
    begin = [candidate for candidate in names if wanted and candidate.startswith(wanted)]
    near = begin or difflib.get_close_matches(wanted, names, n=1, cutoff=0.3)
    return f"; did you mean {near[0]!r}?" if near else ""
