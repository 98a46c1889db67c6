"""No scheduling: sequences run in file order."""

from __future__ import annotations

from policies.registry import register_scheduler
from policies.scheduling import FileOrder

register_scheduler("none")(FileOrder)
