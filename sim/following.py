"""A token scheduler's costs on the timelines: dividing, and keys and values that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from policies.kv_moves import KvCosts, SchedulingTimes, seating_of, waited_s
from policies.routing import Step

if TYPE_CHECKING:
    from sim.world import World


class Following:
    """Makes the steps of *world* wait for their division, and moves or gathers KV for them.

    *times* is what it has cost so far; *gather_s* and *issue_gather_s* are what each layer of
    the present step takes longer on the GPU and on the host.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        graph = world.costs.graph
        self._kv = KvCosts(world.costs, graph.cache_tokens if graph is not None else 0)
        self.times = SchedulingTimes()
        self.gather_s = self.issue_gather_s = 0.0

    def begin(self, step: Step) -> None:
        """*step* begins, host and GPU being free; the GPU makes the copies as they are launched."""
        seating = seating_of(step)
        self.gather_s = self.issue_gather_s = 0.0
        if seating is None:
            return
        world, times, kv = self._world, self.times, self._kv
        before_s = world.decode_step_s[-1] if world.decode_step_s else 0.0
        waited = waited_s(seating, seating.host_s, before_s)
        issue, moved = kv.issue_s(seating.moves), kv.move_s(seating.moves)
        self.gather_s = kv.gather_s(step, seating)
        self.issue_gather_s = kv.issue_gather_s if self.gather_s else 0.0
        times.host_s += seating.host_s
        times.waited_s += waited
        times.kv_s += moved + self.gather_s * len(step.demand)
        begin = world.gpu_free_s + waited
        world.host_free_s, world.gpu_free_s = begin + issue, begin + max(issue, moved)
        world.attention_s += moved
        world.host_s += waited + max(issue - moved, 0.0)
        world.bound_host_s += waited + issue
        world.bound_gpu_s += waited + max(issue, moved)
        if world.observer is not None:
            world.observer.span("GPU", "move KV", begin, begin + moved)
