"""Moves and their queue: what both worlds carry out, in the order they must."""

from __future__ import annotations

from collections import deque


class Move:
    """One copy of one expert from the host to *slot*; whatever the slot held is dead.

    *copy* is the expert's number or low-precision handle, *demand* tells a missed expert
    from a prefetch, *victim* is what lost the slot (-1: it was free). The rest belongs to
    the world that carries it out: *queued* while it can still be cancelled, *submit_s* and
    *land_s* when it was asked for and when its copy has landed or will.
    """

    queued = False
    submit_s = 0.0
    land_s = float("inf")

    def __init__(self, copy: int, slot: int, victim: int, demand: bool) -> None:
        self.copy = copy
        self.slot = slot
        self.victim = victim
        self.demand = demand

    def __repr__(self) -> str:
        cause = "demand" if self.demand else "prefetch"
        return f"Move({self.copy} -> slot {self.slot}, {cause}, for {self.victim})"


class MoveQueue:
    """Moves not yet issued: demand before prefetch, each kind first in first out.

    Every operation takes constant amortised time, however long the queue is: what is taken
    out of turn or cancelled is passed over when its turn comes.
    """

    def __init__(self) -> None:
        self._demand: deque[Move] = deque()
        self._prefetch: deque[Move] = deque()
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, move: Move) -> None:
        """Append *move* behind those of its kind."""
        move.queued = True
        (self._demand if move.demand else self._prefetch).append(move)
        self._waiting += 1

    def peek(self) -> Move:
        """The move whose turn it is; the queue must not be empty."""
        for line in (self._demand, self._prefetch):
            while line and not line[0].queued:
                line.popleft()
            if line:
                return line[0]
        raise IndexError("no move waits")

    def take(self, move: Move) -> bool:
        """Take *move* out, in or out of turn, to issue or to cancel it; whether it waited."""
        if not move.queued:
            return False
        move.queued = False
        self._waiting -= 1
        return True
