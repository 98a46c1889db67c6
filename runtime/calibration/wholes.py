"""Everything that a profile says of decode steps in one graph each: its section ``[whole]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from runtime.calibration.bench import Bench
from runtime.calibration.fits import significant
from runtime.calibration.handshakes import (
    Ping,
    fit_follow,
    measure_launch,
    measure_ping,
    measure_publish,
)
from runtime.calibration.hosts import HostCosts
from runtime.calibration.runs import SMALL, WARM_STEPS, sessions
from runtime.calibration.whole_layers import WholeLayers

#: How runs compute whose decode steps are one graph each.
WHOLE = "graph"

#: A policy with which the host has next to nothing to do, and one with which it is late.
QUIET, LATE = "lru", "predictive"

#: How often :func:`measure_wholes` calls *advance*.
STEPS = 3


class Wholes(NamedTuple):
    """What was measured of such steps; figures as in :class:`policies.hardware.Whole`."""

    layers: WholeLayers
    ping: Ping
    launch_s: float
    publish_s: float
    follow_s: float

    def values(self) -> dict[str, Any]:
        """The section of a profile; what is nothing and need not be said is left out."""
        one, several = self.layers.floors()
        found: dict[str, Any] = {
            "handshake_s": significant(self.layers.handshake_s),
            "answer_s": significant(self.ping.way_s),
            "notice_s": significant(self.ping.way_s),
            "publish_s": significant(self.publish_s),
            "follow_s": significant(self.follow_s),
            "launch_s": significant(self.launch_s),
        }
        for name, floors in (("layer_floor_s", one), ("several_floor_s", several)):
            found[name] = {family: significant(s) for family, s in floors.items()}
        return found


def measure_wholes(
    bench: Bench, layers: WholeLayers, host: HostCosts, advance: Callable[[], None]
) -> Wholes | None:
    """What is not known yet of steps in one graph; None where there are no *layers* of them.

    *host* has the host's costs of a chain of graphs.
    """
    ping = measure_ping(bench) if layers.one_s and layers.several_s else None
    advance()
    if ping is None:
        return None
    launch_s, publish_s = measure_launch(bench), measure_publish(bench)
    advance()
    with sessions(SMALL, (1,), bench.device.type, WHOLE) as found:
        quiet, late = (
            found[1].timed(policy, cache).from_step(WARM_STEPS)
            for policy, cache in ((QUIET, "100%"), (LATE, "50%"))
        )
    bench.free()
    advance()
    follow_s = fit_follow(quiet, [late], host, publish_s)
    return Wholes(layers, ping, launch_s, publish_s, follow_s)
