"""An event computed call by call on the timelines of host and GPU, as its copies land."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from policies.landing import cut
from policies.moves import Move

if TYPE_CHECKING:
    from sim.world import World

#: A copy on its way and the GPU seconds of its expert.
Arrival = tuple[Move, float]


class Arrivals:
    """The calls of one event in *world*: what is held, then groups of what lands.

    The host, free at *host_free_s*, launches one call after the other and waits for none. The GPU,
    free at *gpu_free_s*, begins a call when the host does and all of its copies have landed; it
    is not done before all has been launched. A call of n experts has the least GPU seconds and
    the host's of ``group_s[n]``. A move of a further wave waits for the call that last read
    its slot, and for no other.
    """

    def __init__(
        self,
        world: World,
        group_s: Sequence[tuple[float, float]],
        host_free_s: float,
        gpu_free_s: float,
    ) -> None:
        self.host_free_s, self.gpu_free_s = host_free_s, gpu_free_s
        self._world, self._group_s = world, group_s
        #: When the call was done that computed a copy.
        self._done_s: dict[int, float] = {}

    def make(self, wave: Sequence[Move]) -> None:
        """Issue the demanded moves of a *wave*, in the groups in which they are computed."""
        world = self._world
        for group in cut(wave, world.bytes_of):
            free_s = max(self._done_s.get(move.victim, 0.0) for move in group)
            issue_s = world.costs.copy_issue_s
            self.host_free_s = world.link.demand(group, self.host_free_s, issue_s, free_s)

    def held(self, seconds: Mapping[int, float]) -> None:
        """Compute copies that are there, which take *seconds* each."""
        if seconds:
            self._call(seconds, ())

    def land(self, arriving: Sequence[Arrival]) -> None:
        """Compute what is *arriving*, in that order, in groups as they land."""
        for group in cut(arriving, lambda arrival: self._world.bytes_of(arrival[0])):
            seconds = {move.copy: seconds for move, seconds in group}
            self._call(seconds, [move for move, _ in group])

    def close(self) -> tuple[float, float]:
        """When the host has launched and the GPU has computed it all."""
        self._await_host()
        return self.host_free_s, self.gpu_free_s

    def _call(self, seconds: Mapping[int, float], moves: Sequence[Move]) -> None:
        """One call for the copies of *seconds*, which waits for *moves*."""
        world = self._world
        least, launching = self._group_s[len(seconds)]
        self._await_host()
        self.host_free_s += launching
        for move in moves:
            self.gpu_free_s = world.await_copy(move, self.gpu_free_s, world.costs.wake_s)
        work = max(sum(seconds.values()), least)
        if world.observer is not None:
            world.observer.span("GPU", "experts", self.gpu_free_s, self.gpu_free_s + work)
        world.experts_s += work
        self.gpu_free_s += work
        self._await_host()
        self._done_s.update(dict.fromkeys(seconds, self.gpu_free_s))

    def _await_host(self) -> None:
        """The GPU has nothing to do before the host gets there."""
        behind_s = self.host_free_s - self.gpu_free_s
        if behind_s > 0:
            self._world.host_s += behind_s
            self.gpu_free_s = self.host_free_s
