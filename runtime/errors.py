"""What goes wrong while a model is offloaded: the user's to mend, said in one line."""

from __future__ import annotations

import warnings

from traces.errors import InputError


class OffloadError(InputError):
    """The machine, the checkpoint or a policy cannot do what was asked; nothing was left behind."""


def warn_uncaptured(why: str) -> None:
    """Say that decode steps are slower than they might be, and *why*, in a few words."""
    warnings.warn(
        f"decode steps cannot be captured as CUDA graphs ({why}); they run as they are",
        RuntimeWarning,
        stacklevel=3,
    )


def warn_uncompiled(why: str) -> None:
    """Say that decode steps have more kernels than they might have, and *why*, in a few words."""
    warnings.warn(
        f"decode steps cannot be compiled ({why}); they run as transformers has them",
        RuntimeWarning,
        stacklevel=3,
    )
