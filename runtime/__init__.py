"""The real world: models, gates, GPUs.

Knows torch and transformers, and imports them only when a model is touched, so that the
command line and `simctl doctor` work without them. Knows nothing of simulated time.
"""

from __future__ import annotations

from typing import Any

__all__ = ["offload"]


def offload(model: Any, policy: Any = "lru", **options: Any) -> Any:
    """Keep a model's experts in host memory under *policy*; see :mod:`runtime.offloading`."""
    from runtime.offloading import offload as run

    return run(model, policy, **options)
