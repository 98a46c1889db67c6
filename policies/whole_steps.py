"""Which decode steps run as one graph each, which the device goes through by itself.

Between its layers a handshake with the host takes the place of a launch. Device and host go
by these rules in both worlds:

- At the gate of an event the device posts the answer, waits until the host has *settled* the
  event before (its plan and its prefetches are in the table of experts), and looks up what the
  event demands. If all of it has landed, the device goes on.
- Else it waits until the host has *planned* this event, and for the copies it lacks. What is
  there it computes meanwhile.
- Where a policy has a say in how experts are served, held ones too may be computed otherwise
  than the table says: every gate waits for the plan of its own event.

No decision depends on any of it.
"""

from __future__ import annotations

from policies.planner import Planner


def runs_whole(planner: Planner, tokens: int) -> bool:
    """Whether decode steps of *tokens* tokens can run as one graph each.

    A graph cannot be interrupted: whatever such a step's events demand must fit the slots at
    once, at each precision that there is, and nothing may be left to the CPU. A policy that
    refuses to give up slots can still part an event into waves, and is to say so.
    """
    context, cache = planner.context, planner.cache
    most = min(tokens * context.top_k, context.experts)
    pools = context.layers if context.pool == "layer" else 1
    fits = cache.full_slots // pools >= most
    if cache.low_slots:
        fits = fits and cache.low_slots // pools >= most
    return fits and planner.spares_cpu and not planner.policy.refuses_victims


def awaits_plan(planner: Planner) -> bool:
    """Whether every gate waits for the plan of its own event, what is held notwithstanding."""
    return planner.serves
