"""The link in the real world: carries moves to their slots, demand before prefetch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from policies.moves import Move, MoveQueue
from runtime.bank import SlotBank
from runtime.lanes import Lanes, Mark
from runtime.store import HostStore


class Copied:
    """Copies that were issued together: what moved and the marks around all of it."""

    __slots__ = ("begin", "end", "moves")

    def __init__(self, moves: Sequence[Move], begin: Mark, end: Mark) -> None:
        self.moves, self.begin, self.end = moves, begin, end


class Copier:
    """Issues copies from the store to the bank in the order of the world's queue.

    Demand is issued at once; prefetches wait in a queue of which at most *depth* copies are
    on their way, so that demand overtakes them (what is issued cannot be called back); copies
    issued together count as one. The host moves the queue on whenever it calls :meth:`poll`.
    """

    def __init__(self, store: HostStore, bank: SlotBank, lanes: Lanes, depth: int = 2) -> None:
        self._bank, self._lanes, self._depth = bank, lanes, depth
        self._source = store.full, store.low
        self._total = len(store)
        self._queue = MoveQueue()
        self._flying: deque[Copied] = deque()
        #: Where the bytes of copies lie on the host, once somebody has asked. They keep the store.
        self.pieces: dict[int, Tensor] = {}
        self._size = store.layout.size_bytes
        low = store.low_layout
        self._low_size = 0 if low is None else low.size_bytes
        #: Prefetches not yet known to have landed, by copy.
        self.pending: dict[int, Move] = {}
        self._marks: dict[int, Mark] = {}
        self.demand_bytes = self.prefetch_bytes = 0
        #: Prefetches issued so far.
        self.prefetches = 0
        self.cancelled = 0
        self.busy_s = 0.0
        #: Copies issued since somebody last emptied this list, if there is one.
        self.issued: list[Copied] | None = None
        #: Called with moves and the mark behind them when they are issued, if set.
        self.on_issue: Callable[[Sequence[Move], Mark], None] | None = None
        #: Whether every copy has marks of its own, even where they are issued together.
        self.marks_each = False
        #: A demanded move that is on the link before those it belongs to, and its marks.
        self._hurried: tuple[Move, tuple[Mark, Mark]] | None = None

    def __len__(self) -> int:
        """Moves waiting in the software queue."""
        return len(self._queue)

    def hurry(self, move: Move) -> None:
        """Put *move* on the link, the first of those that :meth:`demand` will be asked for next.

        Nobody is told before that.
        """
        if not self.marks_each:
            pair = self._bank.target(move.slot), self._from(move.copy)
            self._hurried = move, self._lanes.copy_first(*pair)

    def demand(
        self,
        moves: Sequence[Move],
        *,
        together: bool = False,
        place: Callable[[Sequence[Move]], None] | None = None,
    ) -> None:
        """Issue missed experts at once; their slots are free of readers.

        With *together* nobody waits for one of them but for all: they share their marks. *place*
        is called with moves that the link is at work on, before anybody is told that they are
        on their way: what can wait until then is not to keep the link idle.
        """
        if self.pending:
            for move in moves:
                self._drop(move.victim)
        if together and not self.marks_each:
            self._issue(moves, place)
        else:
            for move in moves:
                self._issue((move,), place)

    def prefetch(self, moves: Iterable[Move]) -> None:
        """Queue moves for later events."""
        for move in moves:
            self._drop(move.victim)
            self.pending[move.copy] = move
            self._queue.push(move)
        self.poll()

    def poll(self) -> None:
        """Issue what may be issued now and forget what has landed."""
        flying, passed = self._flying, self._lanes.passed
        while flying and passed(flying[0].end):
            for move in flying.popleft().moves:
                self._landed(move)
        while self._queue and len(flying) < self._depth:
            move = self._queue.peek()
            self._queue.take(move)
            self._issue((move,))

    def arriving(self, copies: Sequence[int]) -> list[int]:
        """Those of *copies* whose prefetch has not landed, in the order in which they will.

        Queued ones overtake the others.
        """
        if not self.pending:
            return []
        self.poll()
        late = []
        for copy in copies:
            move = self.pending.get(copy)
            if move is not None:
                if self._queue.take(move):
                    self._issue((move,))
                late.append(copy)
        if len(late) > 1:
            # They were noted when they were issued, and land in that order.
            wanted = set(late)
            late = [copy for copy in self._marks if copy in wanted]
        return late

    def wait(self, *copies: int) -> None:
        """Let the computing lane wait until *copies* have landed, once for each mark."""
        for mark in dict.fromkeys(map(self._marks.get, copies)):
            if mark is not None:
                self._lanes.compute_after(mark)

    def settle(self, copies: Iterable[int]) -> None:
        """Nobody needs to wait for *copies* any more."""
        for copy in copies:
            self._marks.pop(copy, None)
            self.pending.pop(copy, None)

    def size_of(self, move: Move) -> int:
        """Bytes that *move* carries."""
        return self.bytes_of(move.copy)

    def bytes_of(self, copy: int) -> int:
        """Bytes of *copy*."""
        return self._low_size if copy >= self._total else self._size

    def _issue(
        self, moves: Sequence[Move], place: Callable[[Sequence[Move]], None] | None = None
    ) -> None:
        target = self._bank.target
        source = self._from
        pairs = [(target(move.slot), source(move.copy)) for move in moves]
        begun = None
        if self._hurried is not None:
            # After a policy's error it may be that of an event that came to nothing.
            begun = self._hurried[1] if self._hurried[0] is moves[0] else None
            self._hurried = None
        begin, end = self._lanes.copy_all(pairs, begun)
        if place is not None:
            place(moves)
        if self.on_issue is not None:
            self.on_issue(moves, end)
        copied = Copied(moves, begin, end)
        self._flying.append(copied)
        if self.issued is not None:
            self.issued.append(copied)
        for move in moves:
            self._marks[move.copy] = end
            if move.demand:
                self.demand_bytes += self.size_of(move)
            else:
                self.prefetch_bytes += self.size_of(move)
                self.prefetches += 1

    def _from(self, copy: int) -> Tensor:
        """Where the bytes of *copy* lie on the host."""
        piece = self.pieces.get(copy)
        if piece is None:
            if copy >= self._total:
                piece = self._source[1][copy - self._total][: self._low_size]
            else:
                piece = self._source[0][copy][: self._size]
            self.pieces[copy] = piece
        return piece

    def _landed(self, move: Move) -> None:
        if self.pending.get(move.copy) is move:
            del self.pending[move.copy]
            self._marks.pop(move.copy, None)

    def _drop(self, victim: int) -> None:
        """The copy lost its slot: cancel its move if it waits, else forget that it flies."""
        self._marks.pop(victim, None)
        move = self.pending.pop(victim, None)
        if move is not None and self._queue.take(move):
            self.cancelled += 1
