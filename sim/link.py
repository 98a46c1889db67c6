"""The host-to-device link: one FIFO engine behind a software queue, as arithmetic.

What is issued cannot be called back; at most *depth* copies are issued ahead, so demand
overtakes the prefetches that still wait. A copy into an idle engine pays a start-up time
that a queued one hides (``copy_s`` isolated and queued in the hardware profile).

A queued prefetch is taken to be issued the moment a place is free. A real host does so when
it next polls: while it spins for a gate's answer, and at each event. With *depth* copies
ahead the engine does not run dry meanwhile, unless copies are shorter than the host is busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from policies.moves import Move, MoveQueue


class Link:
    """Carries moves one after the other; knows when each has landed or will.

    *bytes_of* gives the bytes of a copy, *queued_s* and *idle_s* the seconds that many bytes
    take behind another copy and into an idle engine. Times passed in must not go back.
    """

    def __init__(
        self,
        bytes_of: Callable[[int], int],
        queued_s: Callable[[int], float],
        idle_s: Callable[[int], float],
        depth: int = 2,
    ) -> None:
        self._bytes_of = bytes_of
        self._queued_s, self._idle_s = queued_s, idle_s
        self._costs: dict[int, tuple[float, float, int]] = {}
        self._queue = MoveQueue()
        #: Landing times of the last *depth* copies issued: the next may follow the first.
        self._ahead = deque([0.0] * depth, maxlen=depth)
        self._flying: deque[Move] = deque()
        self._free_s = 0.0
        #: Prefetches not yet landed, by copy: what a held expert may still have to wait for.
        self.pending: dict[int, Move] = {}
        self.busy_s = 0.0
        self.demand_bytes = 0
        self.prefetch_bytes = 0
        self.cancelled = 0
        #: Called with (move, start, end) of each issued copy, if set.
        self.on_copy: Callable[[Move, float, float], None] | None = None

    def __len__(self) -> int:
        """Moves waiting in the software queue."""
        return len(self._queue)

    def demand(
        self, moves: Sequence[Move], now_s: float, issue_s: float, free_s: float = 0.0
    ) -> float:
        """Issue missed experts at once, one after the other from *now_s* on.

        The queue lets them overtake, and their event waits for them, so their landing times
        are final. Their slots are read until *free_s*; what is issued behind them waits, too.
        Each takes the host *issue_s*; returns when it is free again.
        """
        for move in moves:
            if self.pending:
                self.advance(now_s)
                self._drop(move.victim)
            self._issue(move, now_s if now_s > free_s else free_s)
            now_s += issue_s
        return now_s

    def prefetch(self, moves: Sequence[Move], now_s: float, issue_s: float) -> float:
        """Queue moves for later events; returns when the host is free again."""
        for move in moves:
            self.advance(now_s)
            self._drop(move.victim)
            move.submit_s = now_s
            self.pending[move.copy] = move
            self._queue.push(move)
            now_s += issue_s
        return now_s

    def want(self, move: Move, now_s: float) -> None:
        """The gate asks for a copy still on its way: if queued, it overtakes the others."""
        if self._queue.take(move):
            self._issue(move, now_s)
            self._flying.append(move)

    def advance(self, now_s: float) -> None:
        """Issue what may be issued by *now_s* and forget what has landed."""
        queue, flying, pending = self._queue, self._flying, self.pending
        while queue:
            head = queue.peek()
            at = max(head.submit_s, self._ahead[0])
            if at > now_s:
                break
            queue.take(head)
            self._issue(head, at)
            flying.append(head)
        while flying and flying[0].land_s <= now_s:
            landed = flying.popleft()
            if pending.get(landed.copy) is landed:
                del pending[landed.copy]

    def _drop(self, victim: int) -> None:
        """The copy lost its slot: cancel its move if it waits, else forget that it flies."""
        move = self.pending.pop(victim, None)
        if move is not None and self._queue.take(move):
            self.cancelled += 1

    def _issue(self, move: Move, at_s: float) -> None:
        copy = move.copy
        if copy not in self._costs:
            size = self._bytes_of(copy)
            self._costs[copy] = self._queued_s(size), self._idle_s(size), size
        took, idle, size = self._costs[copy]
        leave = self._ahead[0]
        if leave > at_s:
            at_s = leave
        start = self._free_s
        if start <= at_s:
            start, took = at_s, idle
        move.land_s = self._free_s = end = start + took
        self._ahead.append(end)
        self.busy_s += took
        if move.demand:
            self.demand_bytes += size
        else:
            self.prefetch_bytes += size
        if self.on_copy is not None:
            self.on_copy(move, start, end)
