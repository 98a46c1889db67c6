"""The one error a user can cause: bad input, said in one line."""

from __future__ import annotations

import traceback


class InputError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, row or option, what was found and what
    was expected. The command line prints it and leaves with exit code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of *error*'s message, for one that came from a library."""
    return (str(error) or type(error).__name__).splitlines()[0]


def kind_and_line(error: BaseException) -> str:
    """The same behind the kind of *error*: ``KeyError: 'x'``."""
    return f"{type(error).__name__}: {first_line(error)}"


def raised_line(name: str, error: BaseException, when: str, frame: traceback.FrameSummary) -> str:
    """That a user's own plug-in *name* raised *error*: *when*, and in which of its lines."""
    where = f"{frame.filename}:{frame.lineno} in {frame.name}"
    return f"{name!r} raised {kind_and_line(error)} {when}, {where}"
