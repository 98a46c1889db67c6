"""Text of several prompts at a time: batches that a scheduler arranges, or divides as they go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from policies.base import Context
from policies.registry import FORECASTERS, SCHEDULERS
from policies.routing import Step
from policies.schedule import GroupedStep, RowMove, Schedule, Scheduling, Seating, Tally, UnitRun
from policies.scheduling import BatchScheduler, TokenScheduler
from policies.token_paths import (
    ForecastPaths,
    HistoryPaths,
    PathSource,
    PreviousPaths,
    path_forecaster,
)
from runtime.capture import end_tokens, left_padded
from runtime.generate import Offloaded, Streamer, Written
from runtime.load import fitting
from runtime.predictor.names import check_runs_live, is_live
from runtime.replay_caches import Key, ReplayCaches
from runtime.sampling import Sampler, Sampling
from traces.errors import InputError
from traces.trace import IntArray, TokenSequence

#: What a checkpoint's generation settings may ask for that only transformers' own loop does.
_UNKNOWN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}


@dataclass(frozen=True)
class Arrangement:
    """How prompts run together: *batch* at a time, as *scheduler* says.

    A token scheduler is shown the paths that *paths* knows, by default those of tokens that ran.
    """

    batch: int
    scheduler: BatchScheduler
    paths: Callable[[Context], PathSource] | None = None

    @property
    def rows(self) -> int:
        """Sequences whose keys and values are held at once."""
        return self.batch * self.unit

    @property
    def unit(self) -> int:
        """Batches that decode together."""
        return self.scheduler.unit if isinstance(self.scheduler, TokenScheduler) else 1


@dataclass
class _Growing:
    """A sequence that is being written: *member* has room for all of it, *made* are its tokens."""

    prompt: int
    text: str
    member: TokenSequence
    streamer: Streamer
    made: int = 0
    ended: bool = False

    @property
    def decoded(self) -> int:
        """Tokens that were decoded or will be: the last one is never run."""
        return self.made - self.ended

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.member.prefill

    def take(self, token: int) -> None:
        """The next *token* has been chosen."""
        tokens = self.member.tokens
        assert tokens is not None
        if self.length + self.made < len(tokens):
            tokens[self.length + self.made] = token
        self.made += 1
        self.streamer.put(torch.tensor([token]))


@dataclass
class Grouped:
    """What writing in groups amounted to; *decode_s* are the seconds of all decode steps.

    *divide_s* of them went into dividing sequences into groups, which nothing hides here.
    """

    tally: Tally = field(default_factory=Tally)
    tokens: int = 0
    decode_s: float = 0.0
    divide_s: float = 0.0

    def rates(self) -> dict[str, float]:
        """Seconds of decoding, and tokens per second of all sequences together."""
        rate = self.tokens / self.decode_s if self.decode_s else 0.0
        return {"decode_s": self.decode_s, "tokens_per_s": rate}

    def to_dict(self, kv_bytes_per_token: int) -> dict[str, float]:
        """As a result's ``schedule`` has it, as far as it is known here."""
        tally, steps = self.tally, self.tally.steps or 1
        return {
            "divisions": tally.divisions,
            "moved": tally.moved,
            "moved_bytes": tally.moved_kv_tokens * kv_bytes_per_token,
            "divide_s": self.divide_s,
            "distinct_experts": tally.distinct / steps,
            "distinct_in_file_order": tally.distinct_file_order / steps,
        }


class GroupedWriter:
    """Continues *prompts* (text, token ids) in the groups of an *arrangement*.

    Each sequence keeps its own keys and values in a row, sees no padding, and draws its tokens
    from a random stream of its own: what it says does not depend on who runs with it.
    """

    def __init__(
        self,
        opened: Offloaded,
        prompts: Sequence[tuple[str, Sequence[int]]],
        sampling: Sampling,
        max_new_tokens: int,
        arrangement: Arrangement,
        note: Callable[[Sequence[float]], None] = lambda times_s: None,
    ) -> None:
        check_settings(opened.model)
        self._opened, self._arrangement, self._most = opened, arrangement, max_new_tokens
        self._model, self._device = opened.model, opened.device
        self._prompts, self._note = prompts, note
        self._longest = max(len(ids) for _, ids in prompts) + max_new_tokens
        self._steps = opened.keep_routing(keep=opened.steps is not None)
        self._ends = end_tokens(opened.model)
        self._sampler = Sampler(sampling, range(len(prompts)), max_new_tokens, self._device)
        scheduler = arrangement.scheduler
        self._kv = scheduler.kv if isinstance(scheduler, TokenScheduler) else "merge"
        rows = Schedule(self._kv, rows=arrangement.rows)
        self._caches = ReplayCaches(self._model, self._device, self._longest, rows, own_places=True)
        self._known: set[Key] = set()
        if opened.runner.graphs is not None:
            opened.runner.graphs.expect(arrangement.rows)
        self._start_s = 0.0
        #: What it amounted to so far.
        self.found = Grouped()

    def __iter__(self) -> Iterator[Written]:
        """Every prompt's text, in the order of the prompts, as soon as those before are done."""
        waiting: dict[int, Written] = {}
        coming = 0
        # Not while the caller has the word: no_grad would be the caller's, too.
        for number, unit in enumerate(self._units()):
            with torch.no_grad(), fitting(self._device):
                self._run_unit(number, unit)
            for sequence in (s for batch in unit for s in batch):
                waiting[sequence.prompt] = self._written(sequence)
            while coming in waiting:
                yield waiting.pop(coming)
                coming += 1
        self._caches.clear()

    def _units(self) -> Iterator[list[list[_Growing]]]:
        """The sequences, in batches that decode together, numbered as they are read."""
        plain = [self._growing(number) for number in range(len(self._prompts))]
        by_id = {s.prompt: s for s in plain}
        arrangement, next_id = self._arrangement, 0
        batches = arrangement.scheduler.batches((s.member for s in plain), arrangement.batch)
        while unit := list(islice(batches, arrangement.unit)):
            found = [[by_id[member.id] for member in batch] for batch in unit]
            for sequence in (s for batch in found for s in batch):
                sequence.member = replace(sequence.member, id=next_id)
                next_id += 1
            yield found

    def _growing(self, number: int) -> _Growing:
        text, ids = self._prompts[number]
        spec = self._opened.spec
        room = len(ids) + self._most
        tokens = np.zeros(room, dtype=np.int32)
        tokens[: len(ids)] = ids
        experts = np.zeros((room, spec.layers, spec.top_k), dtype=np.int16)
        positions = np.arange(room, dtype=np.int32)
        member = TokenSequence(number, experts, positions, len(ids), tokens)
        streamer = Streamer(self._opened.tokenizer, lambda text: None, self._note)
        streamer.put(torch.tensor(list(ids)))
        return _Growing(number, text, member, streamer)

    def _run_unit(self, number: int, unit: Sequence[Sequence[_Growing]]) -> None:
        """Read the prompts, then decode until everybody has ended."""
        batch = self._arrangement.batch
        self._prepare((0, min(batch, len(unit[0]))))
        self._start_s = time.monotonic()
        for group, sequences in enumerate(unit):
            self._prefill(sequences, range(group * batch, group * batch + len(sequences)))
        everybody = [s for sequences in unit for s in sequences]
        begun = time.monotonic()
        for step in self._plan(number, unit):
            self._decode(step, [everybody[i] for i in step.members.tolist()])
        self.found.decode_s += time.monotonic() - begun

    def _plan(self, number: int, unit: Sequence[Sequence[_Growing]]) -> Iterator[GroupedStep]:
        """The decode steps of *unit*, each decided when the one before has run."""
        everybody = [s for sequences in unit for s in sequences]

        def decoded() -> IntArray:
            return np.array([s.decoded for s in everybody])

        scheduler, batch = self._arrangement.scheduler, self._arrangement.batch
        if not isinstance(scheduler, TokenScheduler):
            return in_file_order(decoded, [s.length for s in everybody])
        if number == 0:
            self._scheduling = self._begin(scheduler, batch)
        members = [[s.member for s in sequences] for sequences in unit]
        return iter(UnitRun(self._scheduling, number, members, decoded))

    def _begin(self, scheduler: TokenScheduler, batch: int) -> Scheduling:
        """A scheduler that knows nothing yet, as a simulation of what runs here begins."""
        spec, context = self._opened.spec, self._opened.runner.engine.planner.context
        context = Context(
            spec.layers,
            spec.experts,
            spec.top_k,
            spec.total_experts,
            batch=batch,
            seed=context.seed,
            training=context.training,
        )
        make = self._arrangement.paths
        paths: PathSource = PreviousPaths(spec.experts)
        if make is not None:
            paths = make(context)
        elif scheduler.paths == "history":
            paths = HistoryPaths(spec.experts)
        scheduler.reset(context)
        return Scheduling(scheduler, paths, spec, batch, time.perf_counter, self.found.tally)

    def _prefill(self, sequences: Sequence[_Growing], rows: Sequence[int]) -> None:
        """Read the prompts of a batch in one pass, whose keys and values go to *rows*."""
        prompts = [self._prompts[s.prompt][1] for s in sequences]
        ids, mask = left_padded(prompts, self._device)
        # Without the configuration windows, too, keep the whole prompt.
        cache = DynamicCache()
        logits = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self._caches.take(cache, rows, [s.length for s in sequences])
        self._keep(sequences)
        self._choose(sequences, logits)

    def _decode(self, step: GroupedStep, sequences: Sequence[_Growing]) -> None:
        """One token of each of *sequences*."""
        seating, round = step.seating, step.round
        key = seating.key
        self._prepare(key)
        positions = np.array([s.length + round for s in sequences])
        inputs = self._caches.inputs(len(sequences), seating)
        self._caches.follow(seating, positions)
        self._caches.show(key, positions)
        tokens = [int(s.member.tokens[s.length + round]) for s in sequences]  # type: ignore[index]
        inputs["input_ids"].copy_(torch.tensor(tokens).unsqueeze(1))
        self._steps.seat(np.array([s.member.id for s in sequences]), positions)
        logits = self._model(**inputs).logits
        self._keep(sequences)
        self._choose(sequences, logits)
        self.found.tokens += len(sequences)
        self.found.divide_s += seating.measured_s

    def _choose(self, sequences: Sequence[_Growing], logits: torch.Tensor) -> None:
        """Choose and take the next token of each of *sequences*."""
        rows, steps = [s.prompt for s in sequences], [s.made for s in sequences]
        chosen = self._sampler.of(rows, steps, logits[:, -1]).tolist()
        for sequence, token in zip(sequences, chosen, strict=True):
            sequence.take(token)
            sequence.ended = token in self._ends or sequence.made == self._most

    def _keep(self, sequences: Sequence[_Growing]) -> None:
        """What the step that ran took, for those who divide the next one."""
        step: Step | None = self._steps.last
        assert step is not None
        assert step.positions is not None
        for sequence in sequences:
            mine = np.flatnonzero(step.sequence_ids == sequence.member.id)
            sequence.member.experts[step.positions[mine]] = step._experts[mine]  # type: ignore[index]

    def _prepare(self, key: Key) -> None:
        """A cache for steps of *key*, its shapes learnt in a pass without experts."""
        if key in self._known:
            return
        self._known.add(key)
        inputs = self._caches.make(key)
        runner = self._opened.runner
        with runner.hook.without_experts():
            runner.plain_forward(**inputs)
        self._caches.settle(key)
        inputs["past_key_values"].begun = True

    def _written(self, sequence: _Growing) -> Written:
        sequence.streamer.end()  # type: ignore[no-untyped-call]
        times = [at - self._start_s for at in sequence.streamer.times_s]
        return Written(sequence.text, sequence.streamer.text, sequence.length, times)


def in_file_order(decoded: Callable[[], IntArray], prompts: Sequence[int]) -> Iterator[GroupedStep]:
    """Steps of one batch: all that live, in order; those after one that has ended move up."""
    row = np.arange(len(prompts))
    round = 0
    while True:
        live = np.flatnonzero(decoded() > round)
        if not len(live):
            return
        target = np.arange(len(live))
        moves = [
            RowMove(int(row[i]), int(to), prompts[i] + round)
            for i, to in zip(live.tolist(), target.tolist(), strict=True)
            if row[i] != to
        ]
        row[live] = target
        yield GroupedStep(live, round, Seating(0, target, "merge", round == 0, moves))
        round += 1


def arranged(batch: int, text: str, forecaster: str | None, train: str | None) -> Arrangement:
    """*batch* prompts at a time under the scheduler *text*, shown what *forecaster* knows.

    The paths of a predictor beside the model are not to be had: it follows what runs. What else
    cannot be is an :class:`InputError`, too.
    """
    scheduler = SCHEDULERS.build(text)
    if not isinstance(scheduler, TokenScheduler):
        return Arrangement(batch, scheduler)
    where = f"--scheduler {scheduler.name}"
    check_runs_live(forecaster)
    live = is_live(forecaster)
    if live and scheduler.paths == "forecaster":
        raise InputError(
            f"{where}:paths=forecaster: --forecaster {forecaster} runs beside the model and "
            "knows only what runs, expected paths=previous or history"
        )
    named = FORECASTERS.build(forecaster) if forecaster and not live else None
    chosen = path_forecaster(scheduler, named, forecaster)
    if chosen is None:
        return Arrangement(batch, scheduler)
    if chosen.offline:
        raise InputError(f"{where}: --forecaster {forecaster} needs the future, expected another")
    if "training" in chosen.needs and not train:
        raise InputError(
            f"{where}: --forecaster {forecaster} learns from a trace, expected --train"
        )
    return Arrangement(batch, scheduler, lambda context: ForecastPaths(chosen, context))


def check_settings(model: Any) -> None:
    """Refuse a checkpoint whose generation settings ask for what is not done here."""
    config = model.generation_config
    for name, plain in _UNKNOWN.items():
        value = getattr(config, name, None)
        if value not in (None, plain):
            raise InputError(
                f"generation_config.json: {name} is {value}, expected none with --batch or "
                "--scheduler"
            )
