"""One event's experts, group by group: the table shows each call just those it is to compute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from policies.landing import cut
from policies.moves import Move
from runtime.bank import ABSENT
from runtime.lanes import Mark

if TYPE_CHECKING:
    from runtime.engine import Engine

#: Compute what the table shows of the event's demand.
Compute = Callable[[], None]


class Arrivals:
    """The experts of an event whose copies have not all landed, as they are computed.

    First :meth:`held`, then :meth:`land` for all that arrives in the order it lands. The table
    shows an expert for the one call that computes it. With *waves*, :meth:`make` issues those
    behind the first: each copy waits for the call that last read its slot, and for no other.
    :meth:`close` when all has been launched.
    """

    def __init__(
        self, engine: Engine, experts: Sequence[int], compute: Compute, *, waves: bool
    ) -> None:
        self._engine, self._compute, self._waves = engine, compute, waves
        #: Which experts of the event read a slot.
        self._readers: dict[int, list[int]] = {}
        #: Marks behind the calls so far, if there are waves; and which was the last, by slot.
        self._marks: list[Mark] = []
        self._read: dict[int, int] = {}
        #: Calls that the copy lane waits for already.
        self._awaited = 0
        slot_of = engine.table.slot
        for expert in experts:
            slot = slot_of(expert)
            if slot != ABSENT:
                self._readers.setdefault(slot, []).append(expert)
        self._show(self._readers, shown=False)

    def held(self, arriving: Collection[int]) -> None:
        """Compute what does not lie in the slots of the copies *arriving*."""
        slots = set(map(self._engine.slot_of, arriving))
        there = [slot for slot in self._readers if slot not in slots]
        if there:
            self._call(there)

    def land(self, copies: Sequence[int], cause: str) -> None:
        """Compute *copies* in groups as they land; *cause* is what waiting for them is called."""
        engine = self._engine
        for group in cut(copies, engine.copier.bytes_of):
            self._call([engine.slot_of(copy) for copy in group], group, cause)

    def make(self, wave: Sequence[Move]) -> None:
        """Issue the moves of a further *wave*, each group behind those that read its slots."""
        engine = self._engine
        for group in cut(wave, engine.copier.size_of):
            calls = max((self._read.get(move.slot, 0) for move in group), default=0)
            if calls > self._awaited:
                engine.lanes.copy_after(self._marks[calls - 1])
                self._awaited = calls
            engine.demand(group)
            for move in group:
                self._readers[move.slot] = [move.copy % engine.total]
            self._show([move.slot for move in group], shown=False)

    def close(self) -> None:
        """All has been launched: nobody asks for the marks any more."""
        self._engine.lanes.recycle(self._marks)
        self._marks = []

    def _call(self, slots: Sequence[int], copies: Sequence[int] = (), cause: str = "") -> None:
        """Compute what lies in *slots* as soon as *copies* have landed."""
        engine = self._engine
        watch = engine.watch
        self._show(slots, shown=True)
        engine.table.flush()
        watch.split("host")
        if copies:
            engine.copier.wait(*copies)
            watch.split(cause)
        self._compute()
        watch.split("experts")
        self._show(slots, shown=False)
        if self._waves:
            self._marks.append(engine.lanes.mark())
            self._read.update(dict.fromkeys(slots, len(self._marks)))

    def _show(self, slots: Collection[int], *, shown: bool) -> None:
        """Let the table show the experts that read *slots*, or none of them."""
        change = self._engine.table.set
        for slot in slots:
            for expert in self._readers.get(slot, ()):
                change(expert, slot if shown else ABSENT)
