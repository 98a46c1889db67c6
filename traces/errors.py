"""The one error a user can cause: bad input, said in one line."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, row or option, what was found and what
    was expected. The command line prints it and leaves with exit code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of *error*'s message, for one that came from a library."""
    return (str(error) or type(error).__name__).splitlines()[0]
