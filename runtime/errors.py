"""What goes wrong while a model is offloaded: the user's to mend, said in one line."""

from __future__ import annotations

from traces.errors import InputError


class OffloadError(InputError):
    """The machine, the checkpoint or a policy cannot do what was asked; nothing was left behind."""
