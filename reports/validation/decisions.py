"""Two decision logs side by side: where they part, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from policies.base import Context

#: Things told of a record from where it departs.
TOLD = 3

#: Words for the service codes of a decision log; from SUBSTITUTE on, code - SUBSTITUTE stands in.
SERVICES = {1: "at low precision", 2: "left out", 3: "on the CPU"}
SUBSTITUTE = 16

#: (copy, slot, victim) of one move; victim -1 means that the slot was free.
Placed = tuple[int, int, int]


@dataclass
class Record:
    """One record of a log: an event that missed or moved, or the prefetches before a step.

    *number* is that of the event or, with *is_step*, of the step; *waves* are the demand's moves,
    *served* (expert, code) of what was not loaded.
    """

    number: int
    is_step: bool = False
    missed: int = 0
    waves: list[list[Placed]] = field(default_factory=lambda: [[]])
    prefetch: list[Placed] = field(default_factory=list)
    served: list[tuple[int, int]] = field(default_factory=list)


def read_records(numbers: Sequence[int]) -> Iterator[Record]:
    """The records of :attr:`policies.decisions.DecisionLog.numbers`, in order."""
    left = iter(numbers)
    record: Record | None = None
    moves: list[Placed] = []
    for number in left:
        if number in (-1, -5):
            if record is not None:
                yield record
            record = Record(next(left), is_step=number == -5)
            if number == -1:
                record.missed = next(left)
            moves = record.prefetch if record.is_step else record.waves[0]
        elif record is None:
            raise ValueError(f"a decision log begins with {number}, expected -1 or -5")
        elif number == -2:
            moves = []
            record.waves.append(moves)
        elif number == -3:
            moves = record.prefetch
        elif number == -4:
            record.served.append((next(left), next(left)))
        else:
            moves.append((number, next(left), next(left)))
    if record is not None:
        yield record


def first_difference(simulated: Sequence[int], measured: Sequence[int], context: Context) -> str:
    """The first record in which two logs differ, and what each world did there; '' for none."""
    pairs = zip_longest(read_records(simulated), read_records(measured))
    for index, (ours, theirs) in enumerate(pairs):
        if ours == theirs:
            continue
        alike = f"after {index} equal records: "
        if ours is None or theirs is None or _place(ours) != _place(theirs):
            first, second = (_whole(record, context) for record in (ours, theirs))
            return f"{alike}simulated {first}; measured {second}"
        where = f"{_when(ours, context)}: "
        return alike + where + _departure(ours, theirs, context)
    return ""


def _place(record: Record) -> tuple[bool, int]:
    return record.is_step, record.number


def _when(record: Record, context: Context) -> str:
    if record.is_step:
        return f"before step {record.number}"
    step, layer = divmod(record.number, context.layers)
    return f"event {record.number} (step {step}, layer {layer})"


def _whole(record: Record | None, context: Context) -> str:
    if record is None:
        return "did nothing more"
    return f"{_when(record, context)}: {_told(list(_deeds(record, context)))}"


def _departure(ours: Record, theirs: Record, context: Context) -> str:
    """What each did from the first thing on in which they differ."""
    first, second = list(_deeds(ours, context)), list(_deeds(theirs, context))
    pairs = enumerate(zip_longest(first, second))
    at = next((i for i, (a, b) in pairs if a != b), 0)
    before = f"{at} alike, then " if at else ""
    return f"{before}simulated {_told(first[at:])}; measured {_told(second[at:])}"


def _told(deeds: Sequence[str]) -> str:
    if not deeds:
        return "nothing more"
    more = len(deeds) - TOLD
    return ", ".join(deeds[:TOLD]) + (f" and {more} more" if more > 0 else "")


def _deeds(record: Record, context: Context) -> Iterator[str]:
    """A record as phrases, in the order in which it was decided."""
    if not record.is_step:
        yield f"{record.missed} missed"
    for expert, code in record.served:
        yield f"serves {context.name(expert)} {_service(code, context)}"
    yield from (_load("loads", move, context) for move in record.waves[0])
    for number, wave in enumerate(record.waves[1:], start=2):
        yield f"begins wave {number}"
        yield from (_load("loads", move, context) for move in wave)
    yield from (_load("prefetches", move, context) for move in record.prefetch)


def _load(verb: str, move: Placed, context: Context) -> str:
    copy, slot, victim = move
    over = f" over {context.name(victim)}" if victim >= 0 else ""
    return f"{verb} {context.name(copy)} into slot {slot}{over}"


def _service(code: int, context: Context) -> str:
    if code >= SUBSTITUTE:
        return f"by {context.name(code - SUBSTITUTE)}"
    return SERVICES.get(code, f"by service {code}")
