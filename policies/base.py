"""The policy interface: told what happened, asked what to do, never doing it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, NamedTuple, overload

from policies.routing import Routing, Step
from traces.trace import FloatArray, IntArray


@dataclass(frozen=True)
class Training:
    """What a separate training trace taught, for policies and forecasters that learn offline.

    *popularity* [layers * experts] counts uses; *token_experts* maps a token id to its uses
    per expert, [layers * experts].
    """

    popularity: IntArray
    token_experts: Mapping[int, IntArray] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a policy may know before the first token.

    *slots* is the budget in full-precision experts, of which the planner gives up some for
    *low_slots* low-precision ones; *pool* says whether it is one global pool or split by
    layer. The calibrated constants come from the hardware profile, the same in both worlds:
    *transfer_s* and *transfer_low_s* move one expert over the link, *layer_s* is one layer of
    a one-token step with everything resident, *expert_s* one expert's share of it.
    """

    layers: int
    experts: int
    top_k: int
    slots: int
    pool: str = "global"
    low_slots: int = 0
    batch: int = 1
    transfer_s: float = 0.0
    transfer_low_s: float = 0.0
    layer_s: float = 0.0
    expert_s: float = 0.0
    seed: int = 0
    has_weights: bool = False
    popularity: IntArray | None = None
    training: Training | None = None

    @property
    def total(self) -> int:
        """Experts over all layers."""
        return self.layers * self.experts

    def expert(self, layer: int, id: int) -> int:
        """The number of expert *id* of *layer*."""
        return layer * self.experts + id

    def low(self, expert: int) -> int:
        """The handle of the low-precision copy of *expert*."""
        return expert + self.total

    def is_low(self, copy: int) -> bool:
        """Whether *copy* is a low-precision handle."""
        return copy >= self.total

    def name(self, copy: int) -> str:
        """A copy in words: ``layer 3 expert 17``, with ``(low)`` where it is."""
        layer, id = divmod(copy % self.total, self.experts)
        return f"layer {layer} expert {id}" + (" (low)" if self.is_low(copy) else "")


class Service(Enum):
    """How a missed expert is served. All but ``LOAD`` and ``CPU`` change the output."""

    LOAD = "load"  #: copy it to the GPU at full precision
    LOW = "low"  #: use, or copy, its low-precision version
    SKIP = "skip"  #: leave its contribution out
    CPU = "cpu"  #: compute it on the CPU


@dataclass(frozen=True)
class Substitute:
    """Serve a missed expert by *expert* of the same layer, which must be held."""

    expert: int


class Prediction(NamedTuple):
    """What a forecaster expects of one coming event.

    The event lies *ahead* events after the present one (1 is the next); *experts* come most
    likely first, *scores* are their probabilities in the same order.
    """

    ahead: int
    experts: Sequence[int]
    scores: Sequence[float]


#: Predictions for coming events, nearest first.
Forecast = Sequence[Prediction]


class Path(Sequence[Prediction]):
    """Predictions as columns: a :class:`Prediction` is made only when somebody looks at one.

    A path has one for every layer, and is read again at every event. *aheads* (rising),
    *experts* and *scores* are lists of the fields, of one length. What is left of a path
    later has the same *origin*.
    """

    __slots__ = ("aheads", "experts", "origin", "scores")

    def __init__(
        self,
        aheads: list[int],
        experts: list[Sequence[int]],
        scores: list[Sequence[float]],
        origin: object = None,
    ) -> None:
        self.aheads, self.experts, self.scores = aheads, experts, scores
        self.origin = object() if origin is None else origin

    @classmethod
    def of(cls, forecast: Iterable[Prediction]) -> Path:
        """*forecast* as columns; itself, if it is."""
        if isinstance(forecast, Path):
            return forecast
        made = list(forecast)
        return Path([p.ahead for p in made], [p.experts for p in made], [p.scores for p in made])

    @classmethod
    def of_layers(
        cls, experts: Sequence[int], scores: Sequence[float], ends: Iterable[int]
    ) -> Path:
        """One for each layer, the first one event ahead.

        *experts* and *scores* are those of all layers one after the other, most likely first,
        those of a layer up to before its *ends*. A layer without any has no prediction.
        """
        path, first = cls([], [], []), 0
        for ahead, end in enumerate(ends, start=1):
            if end > first:
                path.aheads.append(ahead)
                path.experts.append(experts[first:end])
                path.scores.append(scores[first:end])
                first = end
        return path

    def __len__(self) -> int:
        return len(self.aheads)

    def __iter__(self) -> Iterator[Prediction]:
        return map(Prediction, self.aheads, self.experts, self.scores)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> Path: ...
    def __getitem__(self, index: int | slice) -> Prediction | Path:
        made: type[Prediction | Path] = Path if isinstance(index, slice) else Prediction
        return made(self.aheads[index], self.experts[index], self.scores[index])  # type: ignore[arg-type]

    def __add__(self, other: Path) -> Path:
        """The predictions of *other* after these."""
        columns = self.experts + other.experts, self.scores + other.scores
        return Path(self.aheads + other.aheads, *columns)

    def after(self, events: int) -> Path:
        """What is left, as seen so many *events* later."""
        first = bisect_right(self.aheads, events)
        aheads = [ahead - events for ahead in self.aheads[first:]]
        return Path(aheads, self.experts[first:], self.scores[first:], self.origin)


def triples(forecast: Forecast) -> Iterable[tuple[int, Sequence[int], Sequence[float]]]:
    """(ahead, experts, scores) of each prediction, making none of a :class:`Path`."""
    if isinstance(forecast, Path):
        return zip(forecast.aheads, forecast.experts, forecast.scores, strict=True)
    return forecast


class Reuse(NamedTuple):
    """How soon experts are used again, as seen from a step that has begun.

    ``chances[w, expert]`` is the probability that the next ``windows[w]`` tokens of any of the
    step's sequences use the expert. The step's own tokens do not count: of those the forecast
    of its path tells. *windows* are whole numbers of tokens, rising; *chances* is
    [windows, layers * experts].
    """

    windows: Sequence[int]
    chances: FloatArray


class StepForecast(Path):
    """The forecast of a step's path, which also answers what is used after the step.

    *reuse* is the forecaster's method of that name. It answers for the step that runs.
    """

    __slots__ = ("reuse",)

    def __init__(self, path: Iterable[Prediction], reuse: Callable[[], Reuse | None]) -> None:
        path = Path.of(path)
        super().__init__(path.aheads, path.experts, path.scores, path.origin)
        self.reuse = reuse


class Forecaster(ABC):
    """Guesses which experts the coming events will demand.

    Like a policy it is told what happened and sees no clock, tensor, thread or file.
    """

    name: ClassVar[str] = ""
    #: Needs the future of the trace (an oracle): cannot run live.
    offline: ClassVar[bool] = False
    #: What the trace must carry: any of ``ahead``, ``tokens``, ``training``.
    needs: ClassVar[tuple[str, ...]] = ()

    def reset(self, context: Context) -> None:
        """Forget everything; a run is about to start."""

    def reveal(self, demand: Iterable[Sequence[int]]) -> None:
        """Take every event's demand in order: called on offline forecasters only."""

    def on_step(self, step: Step) -> Forecast:
        """A step begins: the forecast of its path, layer 0 being one event ahead.

        A forecaster that answers :meth:`reuse` says so by ``StepForecast(path, self.reuse)``.
        """
        return ()

    def reuse(self) -> Reuse | None:
        """What the tokens after the step that has begun use again; None if nothing is known.

        Asked at most once in a step, and only where something must be evicted by it.
        """
        return None

    @abstractmethod
    def on_route(self, routing: Routing) -> Forecast:
        """A gate has chosen: learn from it and return the forecast of the next events."""


class Policy(ABC):
    """Chooses which experts stay on the accelerator.

    A world (the simulator or the CUDA runtime) tells the policy what happened through the
    ``on_*`` hooks and asks it what to do through :meth:`victims`, :meth:`prefetch`,
    :meth:`plan_step` and :meth:`serve`. The order of calls is fixed for every event:
    ``on_route``, ``serve`` if anything is missed, then ``victims``/``on_evict``/``on_load``
    for each placed expert, then ``prefetch`` and again the placing. A policy holds no clock,
    tensor, thread or file, so one object runs unchanged in both worlds.
    """

    name: ClassVar[str] = ""
    #: Never changes the model's output. Only a policy that is not may skip, substitute or go low.
    exact: ClassVar[bool] = True
    #: Reads ``routing.next_use``: it can replay a trace, not run live.
    offline: ClassVar[bool] = False
    #: Wants forecasts in :meth:`plan_step` and :meth:`prefetch`.
    forecasts: ClassVar[bool] = False
    #: What the trace must carry: any of ``weights``, ``training``.
    needs: ClassVar[tuple[str, ...]] = ()
    #: :meth:`serve` may leave experts to the CPU. A class whose own ``serve`` never does may say
    #: False: its decode steps can then run as one graph each.
    uses_cpu: ClassVar[bool] = True

    #: :meth:`victims` may refuse demand a slot though something could go, so that an event's
    #: experts come in waves: decode steps are not one graph each then.
    refuses_victims: bool = False

    #: Bits of a low-precision copy, and the share of the budget's bytes given to such copies.
    low_bits: int = 4
    low_share: float = 0.0

    def reset(self, context: Context) -> None:
        """Forget everything; a run in *context* is about to start."""

    def on_route(self, routing: Routing) -> None:
        """A gate has chosen: its experts, held or not, are about to be used."""

    def serve(
        self, routing: Routing, missed: Sequence[int]
    ) -> Mapping[int, Service | Substitute] | None:
        """How to serve missed experts; those not named are loaded at full precision."""
        return None

    def on_load(self, copy: int) -> None:
        """*copy* has been given a slot."""

    def on_evict(self, copy: int) -> None:
        """*copy* has lost its slot."""

    def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
        """Copies worth loading before layer 0, most urgent first."""
        return ()

    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        """Copies worth loading now for later events, most urgent first."""
        return ()

    @abstractmethod
    def victims(self, incoming: int) -> Iterable[int]:
        """Held copies in the order to give up for *incoming*.

        The ledger takes the first that is not pinned and frees a slot of the right kind; it
        passes over the rest. Yielding nothing refuses: a prefetch is then not made.
        """


def spares_cpu(policy: Policy) -> bool:
    """Whether *policy* is known to leave no expert to the CPU.

    It has no ``serve`` of its own, or the class that wrote it, or one built on that, says
    ``uses_cpu = False``. What is said of one ``serve`` does not hold for another that replaces it.
    """
    for cls in type(policy).__mro__:
        if vars(cls).get("serve") is Policy.serve:
            return True
        if "uses_cpu" in vars(cls):
            return not vars(cls)["uses_cpu"]
        if "serve" in vars(cls):
            return False
    return False
