"""From a gate's answer to the policy's view of it: steps that are learnt as they run."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.routing import DECODE, PREFILL, Routing, Step
from runtime.errors import OffloadError
from traces.model import ModelSpec
from traces.trace import TokenSequence

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]


class Answer:
    """What one gate said of a step's T tokens, on the host.

    *experts* [T, k] ids within the layer by falling weight where the model sorts them,
    *weights* [T, k] if anybody wants them, *ahead* the guesses of the next gates, [T, m] each.
    *one* has the ids of the only token as numbers, where they are to be had at little cost.
    """

    __slots__ = ("ahead", "experts", "one", "weights")

    def __init__(
        self,
        experts: Ints,
        weights: Floats | None = None,
        ahead: Sequence[Ints] = (),
        one: Sequence[int] | None = None,
    ) -> None:
        self.experts, self.weights, self.ahead, self.one = experts, weights, ahead, one


class LiveStep(Step):
    """A step under way, whose token ids stay on the device until somebody reads them.

    Reading them waits for the device, which every step would otherwise do before it begins.
    """

    __slots__ = ("_ids", "_mask", "_tokens")

    def __init__(self, number: int, phase: str, tokens: Any, mask: npt.NDArray[np.bool_]) -> None:
        """*tokens* int [B, S] on any device, those of the step where *mask* [B, S] is true."""
        super().__init__(number, phase, int(np.count_nonzero(mask)))
        self._tokens, self._mask = tokens, mask

    @property
    def token_ids(self) -> Ints | None:
        """Ids [T] of the step's tokens."""
        if self._tokens is not None:
            tokens, self._tokens = self._tokens, None
            host = tokens.cpu().numpy() if hasattr(tokens, "cpu") else tokens
            self._ids: Ints | None = host[self._mask]
        return self._ids

    @token_ids.setter
    def token_ids(self, ids: Ints | None) -> None:
        self._tokens, self._ids = None, ids


class LiveSteps:
    """Steps of a model that generates: what they demand is known gate by gate.

    With *keep* the routing of every sequence is kept for :meth:`sequences`. A new key-value
    cache means new sequences. With *read_ids* token ids are read when a step begins: where a
    captured step runs nobody could wait for them, for it waits for the host.
    """

    def __init__(
        self, spec: ModelSpec, *, ahead: int = 0, keep: bool = False, read_ids: bool = False
    ) -> None:
        self._layers, self._experts, self._k = spec.layers, spec.experts, spec.top_k
        self._ahead = ahead
        self._number = 0
        self._next_sequence = 0
        self._positions: Ints = np.zeros(0, dtype=np.int64)
        self._ids: Ints = np.zeros(0, dtype=np.int64)
        self._real: Ints | None = None
        #: The experts of the step under way, [T, layers, k] one after the other.
        self._chosen: Any = memoryview(b"")
        self._kept: dict[int, list[tuple[Step, int]]] | None = {} if keep else None
        # What is kept must not change when the caller writes over its tensor.
        self.reads_ids = keep or read_ids

    def begin(self, tokens: Any, real: npt.NDArray[np.bool_] | None, fresh: bool) -> Step:
        """The step that runs *tokens* int [B, S]; *real* [B, S] is False for padding.

        *tokens* are an array or a tensor on any device, whose values are brought to the host
        for what is kept, else when a plug-in asks for them. *fresh* says that the sequences
        are new ones. Padding demands nothing.
        """
        batch = len(tokens)
        if not fresh and real is None and tokens.shape[1] == 1 and len(self._ids) == batch:
            return self._next_tokens(tokens)
        if fresh or len(self._ids) != batch:
            self._ids = np.arange(self._next_sequence, self._next_sequence + batch)
            self._next_sequence += batch
            self._positions = np.zeros(batch, dtype=np.int64)
        mask = np.ones(tuple(tokens.shape), dtype=bool) if real is None else real
        counts = mask.sum(axis=1)
        step = self._new(PREFILL if fresh else DECODE, tokens, mask)
        self._real = None if real is None or real.all() else np.flatnonzero(mask.reshape(-1))
        step.sequence_ids = np.repeat(self._ids, counts)
        step.positions = np.concatenate(
            [start + np.arange(n) for start, n in zip(self._positions, counts, strict=True)]
        )
        self._positions = self._positions + counts
        step.kv_tokens = int((step.positions + 1).sum())
        return step

    def _next_tokens(self, tokens: Any) -> Step:
        """The step that runs one more token of every sequence: what most steps are."""
        batch, positions = len(tokens), self._positions
        step = self._new(DECODE, tokens, np.ones((batch, 1), dtype=bool))
        self._real = None
        # Neither is ever written to.
        step.sequence_ids, step.positions = self._ids, positions
        step.kv_tokens = int(positions.sum()) + batch
        self._positions = positions + 1
        return step

    def _new(self, phase: str, tokens: Any, mask: npt.NDArray[np.bool_]) -> LiveStep:
        """The next step, with room for what its gates will choose."""
        step = LiveStep(self._number, phase, tokens, mask)
        if self.reads_ids:
            step.token_ids = step.token_ids
        self._number += 1
        step._experts = np.zeros((step.size, self._layers, self._k), dtype=np.int16)
        self._chosen = memoryview(step._experts.data).cast("B").cast("h")
        step._counts = []
        return step

    def route(self, step: Step, layer: int, answer: Answer, event: int) -> Routing:
        """Tell *step* what the gate of *layer* answered; the event that this is."""
        one = answer.one if step.size == 1 else None
        if one is not None and answer.weights is None and self._real is None:
            return self._route_one(step, layer, one, answer.ahead, event)
        rows = self._real
        chosen = answer.experts if rows is None else answer.experts[rows]
        if len(chosen) != step.size:
            raise OffloadError(
                f"layer {layer}: the gate answered for {len(chosen)} tokens, expected {step.size}"
            )
        weights = answer.weights
        if weights is not None and rows is not None:
            weights = weights[rows]
        if weights is not None:
            chosen, weights = _falling(chosen, _as_kept(weights))
            if step._weights is None:
                shape = (step.size, self._layers, self._k)
                step._weights = np.zeros(shape, dtype=np.float32)
            step._weights[:, layer] = weights
        step._experts[:, layer] = chosen  # type: ignore[index]
        self.note_ahead(step, layer, answer.ahead)
        demand, counts = _demand(chosen, layer * self._experts)
        step.demand.append(demand)
        step._counts.append(counts)  # type: ignore[union-attr]
        return Routing(step, layer, demand, event)

    def _route_one(
        self, step: Step, layer: int, one: Sequence[int], ahead: Sequence[Ints], event: int
    ) -> Routing:
        """The same for one token: the copies of its experts wait for this, so without arrays."""
        at, base = layer * self._k, layer * self._experts
        self._chosen[at : at + self._k] = array("h", one)
        if ahead:
            self.note_ahead(step, layer, ahead)
        demand = sorted([base + expert for expert in one])
        step.demand.append(demand)
        step._counts.append([1] * len(demand))  # type: ignore[union-attr]
        return Routing(step, layer, demand, event)

    def note_ahead(self, step: Step, layer: int, ahead: Sequence[Ints]) -> None:
        """What the gate input of *layer* lets expect of the next gates, [T, m] each."""
        if ahead and not step._ahead:
            shape = (step.size, self._layers, ahead[0].shape[1])
            step._ahead = tuple(np.full(shape, -1, dtype=np.int16) for _ in range(self._ahead))
        for target, guess in zip(step._ahead, ahead, strict=False):
            target[:, layer] = guess if self._real is None else guess[self._real]

    def end(self, step: Step) -> None:
        """*step* has run."""
        if self._kept is None:
            return
        ids: Ints = step.sequence_ids  # type: ignore[assignment]
        for sequence in np.unique(ids).tolist():
            self._kept.setdefault(sequence, []).append((step, sequence))

    def sequences(self) -> Iterator[TokenSequence]:
        """What was kept, as the sequences of a trace, in order."""
        for sequence, steps in (self._kept or {}).items():
            yield _sequence(sequence, [step for step, _ in steps])


def _as_kept(weights: Floats) -> Floats:
    """Gate weights as a trace holds them: a policy that saw more would decide otherwise there."""
    kept: Floats = weights.astype(np.float16).astype(np.float32)
    return kept


def _falling(chosen: Ints, weights: Floats) -> tuple[Ints, Floats]:
    """Some families answer unsorted; policies are promised falling weights."""
    if weights.shape[1] < 2 or bool((weights[:, :-1] >= weights[:, 1:]).all()):
        return chosen, weights
    order = np.argsort(-weights, axis=1, kind="stable")
    return np.take_along_axis(chosen, order, 1), np.take_along_axis(weights, order, 1)


def _sequence(sequence: int, steps: Sequence[Step]) -> TokenSequence:
    rows = [np.flatnonzero(step.sequence_ids == sequence) for step in steps]

    def join(of: Callable[[Step], Any]) -> Any:
        return np.concatenate([of(s)[r] for s, r in zip(steps, rows, strict=True)])

    first = steps[0]
    weights = join(lambda s: s._weights).astype(np.float16) if first._weights is not None else None
    return TokenSequence(
        id=sequence,
        experts=join(lambda s: s._experts),
        positions=join(lambda s: s.positions).astype(np.int32),
        prefill=sum(len(r) for s, r in zip(steps, rows, strict=True) if s.phase == PREFILL),
        tokens=join(lambda s: s.token_ids).astype(np.int32),
        weights=weights,
        ahead=tuple(join(partial(_guess, depth)) for depth in range(len(first._ahead))),
    )


def _guess(depth: int, step: Step) -> Any:
    return step._ahead[depth]


class ReplayedSteps:
    """Steps of a trace: what they demand is known, and the gates must answer just that."""

    reads_ids = False

    def __init__(self, spec: ModelSpec) -> None:
        self._experts = spec.experts

    def route(self, step: Step, layer: int, answer: Answer, event: int) -> Routing:
        """The event of *layer*, after comparing the gate's *answer* with the trace."""
        demand, _ = _demand(answer.experts, layer * self._experts)
        if demand != step.demand[layer]:
            raise OffloadError(
                f"step {step.number}, layer {layer}: the gate chose {demand}, expected the "
                f"trace's {step.demand[layer]}"
            )
        return Routing(step, layer, demand, event)

    def note_ahead(self, step: Step, layer: int, ahead: Sequence[Ints]) -> None:
        """Nothing: the trace has its guesses."""

    def end(self, step: Step) -> None:
        """*step* has run."""


def _demand(chosen: Ints, base: int) -> tuple[list[int], list[int]]:
    """Distinct experts of *chosen* [T, k] in ascending order, and the tokens of each."""
    if len(chosen) == 1:
        demand = sorted([base + expert for expert in chosen[0].tolist()])
        return demand, [1] * len(demand)
    tally = np.bincount(chosen.reshape(-1))
    found = tally.nonzero()[0]
    return (found + base).tolist(), tally.take(found).tolist()
