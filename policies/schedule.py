"""Which sequences decode together in each step of a run with a token scheduler.

The rule is stated in :mod:`policies.batching`. A replayed trace routes as it was recorded
whoever runs together, so that the whole schedule can be decided before the run, each division
from what is known at its moment; both worlds then run the same steps. A model that generates
asks for one step after the other (:class:`UnitRun`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from policies.scheduling import BoolArray, Coming, TokenScheduler
from policies.token_paths import PathSource, in_one_line
from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import IntArray, TokenSequence

#: Consecutive batches that decode together.
Unit = Sequence[Sequence[TokenSequence]]


@dataclass(frozen=True)
class RowMove:
    """A sequence's keys and values go from one row of the unit's KV cache to another."""

    source: int
    target: int
    kv_tokens: int


@dataclass(frozen=True)
class Seating:
    """How one decode step of a unit lies in the KV cache, and what precedes it.

    The cache has *batch* rows for each group: group g's begin at ``g * batch``. *rows* are
    those of the step's sequences, in the order of its tokens. Before the step, *moves* are
    made, all at once: a row may be source and target. *divided* counts the tokens that were
    divided into groups before it (0: none were), in *host_s* seconds by the scheduler's
    constants and *measured_s* by the clock that the schedule was made with, if any; *beside*
    tells whether that could be done while the step before ran. *first* is the first decode
    step of a unit.
    """

    group: int
    rows: IntArray
    kv: str
    first: bool = False
    moves: Sequence[RowMove] = ()
    divided: int = 0
    beside: bool = False
    host_s: float = 0.0
    measured_s: float = 0.0

    @property
    def key(self) -> tuple[int, int]:
        """First row and number of rows that the step's cache begins with; 0 if it gathers."""
        return (0 if self.kv == "reindex" else int(self.rows[0]), len(self.rows))


@dataclass(frozen=True)
class GroupedStep:
    """One decode step: which sequences of the unit run (indices, in order), and how."""

    members: IntArray
    round: int
    seating: Seating


@dataclass
class Tally:
    """What a schedule amounts to, in counts: the same in both worlds.

    *distinct* and *distinct_file_order* sum, over decode steps and layers, the distinct
    experts of the groups and of groups of the same sizes in file order.
    """

    steps: int = 0
    divisions: int = 0
    moved: int = 0
    moved_kv_tokens: int = 0
    distinct: int = 0
    distinct_file_order: int = 0


@dataclass
class Schedule:
    """The decode steps of every unit of a run, and what they amount to.

    *rows* is how many rows the KV cache needs, *kv* how keys and values follow.
    """

    kv: str
    rows: int = 0
    units: list[list[GroupedStep]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def decode_shapes(self) -> set[tuple[int, int]]:
        """Every :attr:`Seating.key` that occurs."""
        return {step.seating.key for steps in self.units for step in steps}


def no_clock() -> float:
    """Always 0: a schedule is made without measuring anything."""
    return 0.0


def make_schedule(
    units: Iterable[Unit],
    scheduler: TokenScheduler,
    paths: PathSource,
    model: ModelSpec,
    batch: int,
    clock: Callable[[], float] = no_clock,
) -> Schedule:
    """Decide every step of *units*; *scheduler* has been reset.

    *clock* tells seconds: a world that has one may measure what dividing takes.
    """
    made = Schedule(scheduler.kv)
    run = Scheduling(scheduler, paths, model, batch, clock, made.tally)
    for number, unit in enumerate(units):
        steps = list(UnitRun(run, number, unit))
        prefilled = max(i * batch + len(members) for i, members in enumerate(unit))
        seated = max((int(step.seating.rows.max()) + 1 for step in steps), default=0)
        made.rows = max(made.rows, prefilled, seated)
        made.units.append(steps)
    return made


@dataclass(frozen=True)
class Scheduling:
    """What the units of a run have in common; see :func:`make_schedule`."""

    scheduler: TokenScheduler
    paths: PathSource
    model: ModelSpec
    batch: int
    clock: Callable[[], float] = no_clock
    tally: Tally = field(default_factory=Tally)


class UnitRun:
    """The decode rounds of one unit, from the batches as they were prefilled, one by one.

    A model that generates finds out as it goes how long its sequences become. It gives
    *decoded*: how many tokens of each member have been or will be decoded, as far as anybody
    knows; the members have room for more, and hold what is known when a step is asked for.
    """

    def __init__(
        self,
        run: Scheduling,
        number: int,
        unit: Unit,
        decoded: Callable[[], IntArray] | None = None,
    ) -> None:
        self._tally, self._number = run.tally, number
        self._scheduler, self._paths = run.scheduler, run.paths
        self._model, self._batch, self._clock = run.model, run.batch, run.clock
        self._members = [m for members in unit for m in members]
        homes = [(group, row) for group, members in enumerate(unit) for row in range(len(members))]
        self._group: IntArray = np.array([group for group, _ in homes])
        self._row: IntArray = np.array([group * run.batch + row for group, row in homes])
        self._groups = len(unit)
        recorded: IntArray = np.array([len(m) - m.prefill for m in self._members])
        self._decoded = decoded or (lambda: recorded)
        #: Sequences of the last decode step: their tokens are not known while it runs.
        self._running: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[GroupedStep]:
        every = self._scheduler.every
        first = 0
        while len(self._live(first)):
            yield from self._rounds(range(first, first + every))
            first += every

    def _rounds(self, rounds: range) -> Iterator[GroupedStep]:
        """The steps of *rounds*, divided before the first of them."""
        kv = self._scheduler.kv
        seating = self._divide(rounds[0])
        done: set[int] = set()
        for number, group, inside in self._order(rounds):
            done.add(number)
            if number > rounds[0]:
                seating = Seating(group, self._row, kv, moves=self._seat(number, inside))
            inside = inside[np.argsort(self._row[inside], kind="stable")]
            yield GroupedStep(inside, number, replace(seating, group=group, rows=self._row[inside]))
            seating = Seating(group, self._row, kv)
            self._running = frozenset(inside.tolist())
        for number in done:
            self._count(number)

    def _order(self, rounds: range) -> Iterator[tuple[int, int, IntArray]]:
        """Rounds, groups and who is in them, in the order in which they run."""
        if self._scheduler.in_a_row:
            for group in range(self._groups):
                for number in rounds:
                    inside = self._live(number, group)
                    if not len(inside):
                        break
                    yield number, group, inside
            return
        for number in rounds:
            if not len(self._live(number)):
                break
            for group in range(self._groups):
                inside = self._live(number, group)
                if len(inside):
                    yield number, group, inside

    def _live(self, number: int, group: int | None = None) -> IntArray:
        """The sequences, of *group* or of all, that have a token for round *number*."""
        live = self._decoded() > number
        return np.flatnonzero(live if group is None else live & (self._group == group))

    def _divide(self, number: int) -> Seating:
        """Groups for the rounds from *number* on; what that means for the first step."""
        scheduler, live = self._scheduler, self._live(number)
        divided, measured_s = 0, 0.0
        count = -(-len(live) // self._batch)
        if 1 < count < len(live):
            labels, measured_s = self._divided(number, live, count)
            divided = len(live)
        else:
            labels = np.arange(len(live)) % count
        self._group[live] = self._kept_near(number, live, labels)
        self._tally.divisions += divided > 0
        return Seating(
            0,
            self._row,
            scheduler.kv,
            first=number == 0,
            moves=self._seat(number, live),
            divided=divided,
            beside=scheduler.overlap and number > 0,
            host_s=scheduler.host_s(divided, self._model.total_experts) if divided else 0.0,
            measured_s=measured_s,
        )

    def _divided(self, number: int, live: IntArray, count: int) -> tuple[IntArray, float]:
        """The scheduler's group of each live sequence, and the clock's seconds for it."""
        coming = Coming(
            self._number,
            number,
            count,
            self._batch,
            np.stack([self._path(i, number) for i in live.tolist()]),
            self._group[live],
            np.array([self._members[i].id for i in live.tolist()]),
            self._kv_tokens(number, live),
        )
        begun = self._clock()
        with in_one_line(self._scheduler, f"in unit {self._number}, round {number}"):
            labels: IntArray = np.asarray(self._scheduler.divide(coming))
        measured_s = self._clock() - begun
        self._check(labels, coming)
        return labels.astype(np.int64), measured_s

    def _path(self, i: int, number: int) -> BoolArray:
        """The path of the coming token of sequence *i*, or of the one that still runs."""
        member = self._members[i]
        index = member.prefill + number
        beside = self._scheduler.overlap and number > 0 and i in self._running
        return self._paths.path(member, index - 1 if beside else index)

    def _check(self, labels: IntArray, coming: Coming) -> None:
        """A division that breaks the rule is the scheduler's mistake."""
        n = len(coming.present)
        where = f"scheduler {self._scheduler.name!r}: unit {coming.unit}, round {coming.round}"
        if labels.shape != (n,) or labels.dtype.kind not in "iu":
            raise InputError(
                f"{where}: groups are {labels.dtype} {list(labels.shape)}, expected {n} numbers"
            )
        if labels.min() < 0 or labels.max() >= coming.groups:
            raise InputError(
                f"{where}: group {labels.min() if labels.min() < 0 else labels.max()} found, "
                f"expected 0 to {coming.groups - 1}"
            )
        sizes = np.bincount(labels)
        if sizes.max() > self._batch:
            raise InputError(
                f"{where}: a group of {sizes.max()} sequences, expected at most {self._batch}"
            )

    def _kv_tokens(self, number: int, live: IntArray) -> IntArray:
        """Tokens before the coming one, whose keys and values each sequence holds."""
        members = [self._members[i] for i in live.tolist()]
        return np.array([int(m.positions[m.prefill + number]) for m in members])

    def _kept_near(self, number: int, live: IntArray, labels: IntArray) -> IntArray:
        """*labels* renumbered, so that few keys and values change their group.

        Two groups trade numbers while that keeps more tokens where they are.
        """
        present = self._group[live]
        if self._scheduler.kv != "merge":
            return labels
        stay = np.zeros((self._groups, self._groups), dtype=np.int64)
        np.add.at(stay, (labels, present), self._kv_tokens(number, live) + 1)
        order = np.arange(self._groups)
        improved = True
        while improved:
            improved = False
            for a, b in combinations(range(self._groups), 2):
                now = stay[a, order[a]] + stay[b, order[b]]
                if stay[a, order[b]] + stay[b, order[a]] > now:
                    order[[a, b]] = order[[b, a]]
                    improved = True
        return order[labels]

    def _seat(self, number: int, live: IntArray) -> list[RowMove]:
        """Rows for *live*, whole groups: filled from the first, and who can stays.

        A sequence that leaves a gap behind by ending has the last one of its group follow.
        """
        moves: list[RowMove] = []
        if self._scheduler.kv != "merge":
            return moves
        kv_tokens = dict(zip(live.tolist(), self._kv_tokens(number, live).tolist(), strict=True))
        for group in range(self._groups):
            inside = live[self._group[live] == group].tolist()
            first = group * self._batch
            rows = range(first, first + len(inside))
            comers = [i for i in inside if self._row[i] not in rows]
            free = sorted(set(rows).difference(self._row[i] for i in inside))
            moves += [
                RowMove(int(self._row[i]), row, kv_tokens[i])
                for i, row in zip(comers, free, strict=True)
            ]
        self._tally.moved += len(moves)
        self._tally.moved_kv_tokens += sum(move.kv_tokens for move in moves)
        target = {move.source: move.target for move in moves}
        self._row[live] = [target.get(row, row) for row in self._row[live].tolist()]
        return moves

    def _count(self, number: int) -> None:
        """Add round *number* to the tally, its groups being what they are."""
        tally, live = self._tally, self._live(number)
        members = [self._members[i] for i in live.tolist()]
        chosen = np.stack([m.experts[m.prefill + number] for m in members]).astype(np.int64)
        taken = np.zeros((*chosen.shape[:2], self._model.experts), dtype=bool)
        np.put_along_axis(taken, chosen, True, axis=2)
        order = np.argsort(self._group[live], kind="stable")
        _, sizes = np.unique(self._group[live], return_counts=True)
        ends = np.cumsum(sizes)[:-1]
        tally.steps += len(sizes)
        tally.distinct += sum(map(_distinct, np.split(taken[order], ends)))
        tally.distinct_file_order += sum(map(_distinct, np.split(taken, ends)))


def _distinct(taken: BoolArray) -> int:
    """Distinct experts of all layers, from bool [n, L, E]."""
    return int(taken.any(axis=0).sum())
