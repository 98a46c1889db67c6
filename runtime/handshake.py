"""What the host and one captured graph of a whole decode step tell each other while it runs.

All of it lies in pinned host memory, which the device reads and writes across the link: the
number of the last gate that has answered, the numbers of the last events that the host has
planned and settled, and for every expert its slot and the copy that fills that. No call of the
driver is needed in between. The host's stores become visible in their order, as on x86-64.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterable, Sequence

import torch

from policies.moves import Move
from runtime.bank import ABSENT
from runtime.engine import Engine
from runtime.errors import OffloadError
from runtime.kernels.gate import (
    FAILED,
    GUESSED,
    NEVER,
    PLANNED,
    POSTED,
    RELEASED,
    SETTLED,
    WORDS,
    stamp_now,
)
from runtime.lanes import CudaLanes, Lanes, view_of

#: Processors whose stores others see in their order.
ORDERED = ("x86_64", "AMD64")

#: The longest that a kernel waits for the host or for a copy.
LIMIT_S = 5.0

#: How often the two clocks of a device are compared.
CLOCK_TRIES = 5

#: Looks for an answer between two looks at the clock.
LOOKS = 4096


def entry(slot: int, ticket: int) -> int:
    """The table's 64 bits for an expert in *slot*, filled by copy number *ticket*."""
    return ticket << 32 | slot & 0xFFFFFFFF


#: The entry of an expert that is in no slot.
EMPTY = entry(ABSENT, 0)


class SharedTable:
    """For every expert, slot and ticket: pinned int64 [layers, experts], written as moves are made.

    A ticket is the number of the copy that fills the slot; an expert is there once the copy lane
    has come to it.
    """

    def __init__(self, layers: int, experts: int, slots: int, *, pin: bool) -> None:
        self._total = layers * experts
        self.entries = torch.full((layers, experts), EMPTY, dtype=torch.int64, pin_memory=pin)
        self._now = view_of(self.entries.view(-1))
        self._ticket = [0] * slots

    def coming(self, moves: Iterable[Move]) -> None:
        """*moves* are decided: who loses a slot, and who gets it once a copy has filled it."""
        now, total, tickets = self._now, self._total, self._ticket
        for move in moves:
            tickets[move.slot] = NEVER
            if 0 <= move.victim < total:
                now[move.victim] = EMPTY
            if move.copy < total:
                now[move.copy] = NEVER << 32 | move.slot

    def issued(self, moves: Sequence[Move], ticket: int) -> None:
        """*moves* are on their way as copy number *ticket*."""
        now, total, tickets = self._now, self._total, self._ticket
        for move in moves:
            tickets[move.slot] = ticket
            if move.copy < total:
                now[move.copy] = ticket << 32 | move.slot

    def of_slot(self, slot: int) -> int:
        """The entry of whatever lies in *slot*, or of nothing."""
        return entry(slot, 0 if slot == ABSENT else self._ticket[slot])


def can_shake(lanes: Lanes) -> bool:
    """Whether the device of *lanes*, its kernels and this processor have a handshake."""
    known = platform.machine() in ORDERED and importlib.util.find_spec("triton") is not None
    return isinstance(lanes, CudaLanes) and known


def handshake_for(engine: Engine) -> Handshake | None:
    """The handshake of *engine*, where there can be one; it must see every move from the first."""
    lanes = engine.lanes
    if not can_shake(lanes):
        return None
    context, cache = engine.planner.context, engine.planner.cache
    slots = cache.full_slots + cache.low_slots
    made = Handshake(context.layers, context.experts, slots, lanes, LIMIT_S)
    made.follow(engine)
    return made


class Handshake:
    """The words, the table and the ring of one engine, whatever graphs run under it."""

    def __init__(self, layers: int, experts: int, slots: int, lanes: Lanes, limit_s: float) -> None:
        self._lanes, self._limit_s = lanes, limit_s
        pin = lanes.device.type == "cuda"
        self.layers, self.experts = layers, experts
        self.words = torch.zeros(WORDS, dtype=torch.int32, pin_memory=pin)
        self._words = view_of(self.words)
        self.table = SharedTable(layers, experts, slots, pin=pin)
        self.served = torch.zeros((2, experts), dtype=torch.int64, pin_memory=pin)
        self._served = view_of(self.served.view(-1))
        self.stamps = torch.zeros((layers, 4), dtype=torch.int64, pin_memory=pin)
        device = lanes.device
        self._origin_ns = self._clock_ns() if pin else 0
        #: Events so far, and whether one was given up, as the device knows them.
        self.count = torch.zeros(2, dtype=torch.int32, device=device)
        self.slots = torch.full((layers, experts), ABSENT, dtype=torch.int32, device=device)
        self.landed = lanes.count_landings()
        #: Guesses posted so far, as the device knows them.
        self.guessed = torch.zeros(1, dtype=torch.int32, device=device)
        #: Events and guesses so far, as the host knows them; all are settled between steps.
        self.events = self.guesses = 0

    def follow(self, engine: Engine) -> None:
        """Keep the table as the moves of *engine* want it, from its first move on."""
        engine.on_place = self.table.coming
        engine.copier.on_issue = lambda moves, mark: self.table.issued(moves, mark.ticket)

    @property
    def limit_ns(self) -> int:
        """The longest that a kernel waits, in nanoseconds."""
        return int(self._limit_s * 1e9)

    def await_answer(self, poll: Callable[[], None] | None) -> None:
        """Wait on the host for the next gate, calling *poll*, if any, meanwhile."""
        self._await(POSTED, self.events + 1, poll)

    def await_guesses(self, poll: Callable[[], None] | None) -> None:
        """The same for the guesses that belong to the present gate."""
        self.guesses += 1
        self._await(GUESSED, self.guesses, poll)

    def _await(self, word: int, wanted: int, poll: Callable[[], None] | None) -> None:
        words = self._words
        looks, begun = 0, 0.0
        while words[word] < wanted:
            if poll is not None:
                poll()
            looks += 1
            if looks % LOOKS == 0:
                now = self._lanes.now()
                begun = begun or now
                if words[FAILED] or now - begun > 2 * self._limit_s:
                    self._raise(self.events + 1)
        self.check()

    def _raise(self, number: int) -> None:
        raise OffloadError(
            f"event {number - 1} of the captured decode steps: device and host waited for each "
            f"other for more than {self._limit_s:g} s, expected an answer; the step was given up"
        )

    def waits(self, stalls: Sequence[str]) -> list[tuple[str, float, float]]:
        """What the device waited for in the last step, which is over: causes, begins and ends.

        For the host at every gate, then for the copies of the event, whose cause is in *stalls*.
        Seconds of the clock of the lanes' marks. What the device computes meanwhile, experts that
        are there, counts as waiting.
        """
        found = []
        for stall, stamps in zip(stalls, self.stamps.tolist(), strict=True):
            # As whole numbers: a double of all nanoseconds since 1970 is off by a hundred.
            answered, _, planned, landed = ((ns - self._origin_ns) * 1e-9 for ns in stamps)
            found += [("host", answered, planned), (stall, planned, landed)]
        return found

    def _clock_ns(self) -> int:
        """What the clock of stamps shows when that of marks is 0, as near as can be seen.

        A stamp lies somewhere between two marks: half-way, where those are nearest.
        """
        stamp = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        read, apart = self._lanes.read, []
        for _ in range(CLOCK_TRIES):
            before = self._lanes.mark()
            stamp_now(stamp)
            after = self._lanes.mark()
            self._lanes.finish()
            begin_s, end_s = read(before), read(after)
            between_ns = round((begin_s + end_s) / 2 * 1e9)
            apart.append((end_s - begin_s, int(stamp[0]) - between_ns))
        return min(apart)[1]

    def serve(self, first: int, slots: Iterable[tuple[int, int]]) -> None:
        """Where the present event reads its experts: pairs of expert and slot, *first* being
        the layer's first expert.
        """
        row = self._served
        base = (self.events % 2) * self.experts - first
        for expert, slot in slots:
            row[base + expert] = self.table.of_slot(slot)

    def planned(self) -> None:
        """The present event's copies are issued and in the table."""
        self._words[PLANNED] = self.events + 1

    def settled(self) -> None:
        """The present event's prefetches are decided too; the next gate may be classified."""
        self.events += 1
        self._words[SETTLED] = self.events

    def check(self) -> None:
        """Raise :class:`OffloadError` if the device has given up an event."""
        if self._words[FAILED]:
            self._raise(self._words[FAILED])

    def release(self) -> None:
        """The device waits for nothing more, and computes what it finds, until :meth:`renew`."""
        self._words[PLANNED] = self._words[SETTLED] = RELEASED

    def renew(self) -> None:
        """Wait until the device has run out, and begin anew.

        On all streams: a kernel that still looks at the words would wait for what they say no more.
        """
        self._lanes.finish_all()
        for word in (POSTED, GUESSED, FAILED, PLANNED, SETTLED):
            self._words[word] = 0
        self.events = self.guesses = 0
        self.count.zero_()
        self.guessed.zero_()
        self._lanes.finish()
