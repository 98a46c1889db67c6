"""Moves and their queue: what both worlds carry out, in the order they must."""

from __future__ import annotations

from collections import deque
from enum import IntEnum


class MoveState(IntEnum):
    """Where a move stands. Only a queued one can still be cancelled."""

    QUEUED = 0
    ISSUED = 1
    CANCELLED = 2


class Move:
    """One copy of one expert from the host to *slot*; whatever the slot held is dead.

    *copy* is the expert's number or low-precision handle, *demand* tells a missed expert
    from a prefetch, *victim* is what lost the slot (-1: it was free). The rest belongs to
    the world that carries it out: *urgent* once the gate asked for it, *land_s* when its
    copy has landed or will.
    """

    __slots__ = ("copy", "demand", "land_s", "slot", "state", "submit_s", "urgent", "victim")

    def __init__(self, copy: int, slot: int, victim: int, demand: bool) -> None:
        self.copy = copy
        self.slot = slot
        self.victim = victim
        self.demand = demand
        self.urgent = demand
        self.state = MoveState.QUEUED
        self.submit_s = 0.0
        self.land_s = float("inf")


class MoveQueue:
    """Moves not yet issued: demand overtakes prefetch, each kind first in first out.

    Every operation takes constant amortised time, however long the queue is.
    """

    def __init__(self) -> None:
        self._urgent: deque[Move] = deque()
        self._early: deque[Move] = deque()
        self._queued = 0

    def __len__(self) -> int:
        return self._queued

    def push(self, move: Move) -> None:
        """Append *move* behind those of its kind."""
        (self._urgent if move.urgent else self._early).append(move)
        self._queued += 1

    def promote(self, move: Move) -> None:
        """The gate has asked for a prefetch still waiting: it now counts as demand."""
        if move.state is MoveState.QUEUED and not move.urgent:
            move.urgent = True
            self._urgent.append(move)

    def cancel(self, move: Move) -> bool:
        """Drop *move* if it still waits; whether it did."""
        if move.state is not MoveState.QUEUED:
            return False
        move.state = MoveState.CANCELLED
        self._queued -= 1
        return True

    def peek(self) -> Move | None:
        """The move to issue next."""
        urgent, early = self._urgent, self._early
        while urgent and urgent[0].state is not MoveState.QUEUED:
            urgent.popleft()
        if urgent:
            return urgent[0]
        while early and (early[0].urgent or early[0].state is not MoveState.QUEUED):
            early.popleft()
        return early[0] if early else None

    def pop(self) -> Move | None:
        """Take the move to issue next."""
        move = self.peek()
        if move is not None:
            (self._urgent if move.urgent else self._early).popleft()
            move.state = MoveState.ISSUED
            self._queued -= 1
        return move
