"""What to do: policies, forecasters, the ledger and the planner that both worlds share.

Knows numpy and traces. A policy sees no clock, tensor, thread or file; the planner turns what
it says into moves, and a world (``sim`` or ``runtime``) carries them out and keeps time.
"""

from policies.base import (
    Context,
    Forecast,
    Forecaster,
    Policy,
    Prediction,
    Service,
    Substitute,
    Training,
)
from policies.registry import parameter, register, register_forecaster
from policies.routing import Routing, Step

__all__ = [
    "Context",
    "Forecast",
    "Forecaster",
    "Policy",
    "Prediction",
    "Routing",
    "Service",
    "Step",
    "Substitute",
    "Training",
    "parameter",
    "register",
    "register_forecaster",
]
