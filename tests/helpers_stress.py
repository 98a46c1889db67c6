"""Random policies, routings and delays against the engine, and what must come out, in float64.

No model is involved: a driver asks the engine as the hook and the graphs do, with random
gates and hidden states, and compares every output with one computed from the store alone.
Import it only after ``pytest.importorskip("torch")``.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from policies.base import Context, Forecast, Policy, Service, Substitute
from policies.landing import cut
from policies.moves import Move
from policies.planner import Plan, Planner
from policies.routing import DECODE, PREFILL, Routing, Step
from runtime.arrivals import Arrivals
from runtime.bank import ExpertTable, SlotBank
from runtime.copier import Copier
from runtime.engine import Engine
from runtime.lanes import Lanes, Mark
from runtime.layout import ExpertLayout, LowLayout
from runtime.maths import CpuExperts, Fused
from runtime.quantise import dequantise
from runtime.store import HostStore
from tests.helpers import landing_in_groups
from tests.helpers_kernels import experts_module

HIDDEN, INTERMEDIATE = 32, 24
#: A byte that makes NaN of every number it is part of.
SPOILT = 255


@dataclass(frozen=True)
class Case:
    """One run: its shape, its budget, how its policy serves, and the seed of everything else.

    *bits* 0 means no low precision. *tokens* is the most of a decode step; prefill steps have
    up to five times as many. Copies land in groups of *together* at the least and up to twice as
    many: experts here are far too small for the bytes that the rule has.
    """

    seed: int
    layers: int = 3
    experts: int = 6
    top_k: int = 2
    slots: int = 5
    pool: str = "global"
    bits: int = 0
    low_share: float = 0.3
    serves: bool = True
    cpu: bool = True
    depth: int = 2
    tokens: int = 3
    steps: int = 5
    together: int = 1


def whole(case: Case) -> Case:
    """*case* with slots for all that a decode step may demand, and nothing left to the CPU."""
    most = min(case.tokens * case.top_k, case.experts)
    least = most * (case.layers if case.pool == "layer" else 1)
    return replace(case, slots=max(case.slots, least), cpu=False)


class Chaotic(Policy):
    """Names random victims, prefetches and services, as far as the ledger allows."""

    name = "chaotic"
    exact: ClassVar[bool] = False

    def __init__(self, case: Case) -> None:
        self.low_bits = case.bits or 4
        self.low_share = case.low_share if case.bits else 0.0
        self._serves, self._cpu, self._seed = case.serves, case.cpu, case.seed

    def reset(self, context: Context) -> None:
        self._context = context
        self._random = random.Random(self._seed)
        self._held: dict[int, None] = {}
        self._fetched: set[int] = set()

    def on_route(self, routing: Routing) -> None:
        self._fetched = set()

    def on_load(self, copy: int) -> None:
        self._held[copy] = None

    def on_evict(self, copy: int) -> None:
        del self._held[copy]

    def victims(self, incoming: int) -> Iterable[int]:
        if incoming in self._fetched and self._random.random() < 0.2:
            return ()
        return self._random.sample(list(self._held), len(self._held))

    def serve(self, routing: Routing, missed: Sequence[int]) -> dict[int, Service | Substitute]:
        if not self._serves:
            return {}
        return {expert: self._service(expert) for expert in missed if self._random.random() < 0.6}

    def _service(self, expert: int) -> Service | Substitute:
        context, experts = self._context, self._context.experts
        kinds: list[Service | Substitute] = [Service.LOAD, Service.SKIP]
        if self._cpu:
            kinds.append(Service.CPU)
        if context.low_slots:
            kinds += [Service.LOW] * 4
        alike = [e for e in self._held if e // experts == expert // experts]
        if alike:
            kinds += [Substitute(self._random.choice(alike)) for _ in range(3)]
        return self._random.choice(kinds)

    def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
        return self._wanted()

    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        return self._wanted()

    def _wanted(self) -> list[int]:
        copies = self._context.total * (2 if self._context.low_slots else 1)
        count = self._random.choice((0, 0, 1, 2, 5))
        wanted = [self._random.randrange(copies) for _ in range(count)]
        self._fetched = set(wanted)
        return wanted


class Frugal(Chaotic):
    """The same, but the CPU is left out, and the runtime knows it."""

    uses_cpu = False

    def serve(self, routing: Routing, missed: Sequence[int]) -> dict[int, Service | Substitute]:
        return super().serve(routing, missed)


class Plain(Chaotic):
    """The same, but all that is missed is loaded, and the runtime knows it."""

    serve = Policy.serve


class RacingLanes(Lanes):
    """Two lanes that run whenever chance says so, as far as they wait for each other.

    What the computing lane is given (:meth:`do`) runs later, as on a GPU. A copy has two
    parts, between which its target is spoilt: whatever reads it then, or overwrites what is
    still to be read, shows in the numbers.
    """

    def __init__(self, seed: int) -> None:
        self.device = torch.device("cpu")
        self._random = random.Random(seed)
        #: How often the computing lane comes first where both could go on.
        self._bias = self._random.choice((0.03, 0.5, 0.97))
        self._computing: deque[tuple[Mark | None, Callable[[], None]]] = deque()
        self._copying: deque[tuple[Mark | None, Callable[[], None]]] = deque()

    def do(self, work: Callable[[], None]) -> None:
        """Append *work* to the computing lane."""
        self._computing.append((None, work))

    def mark(self) -> Mark:
        return self._mark(self._computing)

    def _mark(self, lane: deque[tuple[Mark | None, Callable[[], None]]]) -> Mark:
        mark = Mark(False)
        lane.append((None, lambda: setattr(mark, "event", True)))
        return mark

    def copy(self, target: Tensor, source: Tensor) -> tuple[Mark, Mark]:
        begin = self._mark(self._copying)
        self._copying.append((None, lambda: spoil(target)))
        self._copying.append((None, lambda: _copy(target, source)))
        return begin, self._mark(self._copying)

    def copy_all(
        self, pairs: Sequence[tuple[Tensor, Tensor]], begun: tuple[Mark, Mark] | None = None
    ) -> tuple[Mark, Mark]:
        """Behind the first they land in any order, as a driver takes them that is given all."""
        rest = self._random.sample(pairs[1:], len(pairs) - 1)
        return super().copy_all([*pairs[:1], *rest], begun)

    def passed(self, mark: Mark) -> bool:
        for _ in range(self._random.choice((0, 1, 5))):
            self._go_on()
        return bool(mark.event)

    def compute_after(self, mark: Mark) -> None:
        self._computing.append((mark, lambda: None))

    def copy_after(self, mark: Mark) -> None:
        self._copying.append((mark, lambda: None))

    def copy_after_compute(self) -> None:
        self._copying.append((self.mark(), lambda: None))

    def write(self, target: Tensor, values: Sequence[tuple[int, int]]) -> None:
        told = tuple(values)
        self.do(lambda: super(RacingLanes, self).write(target, told))

    def read(self, mark: Mark) -> float:
        return 0.0

    def finish(self) -> None:
        while self._go_on():
            pass

    def _go_on(self) -> bool:
        """One more piece of work in either lane; whether there was any."""
        ready = [lane for lane in (self._computing, self._copying) if lane and _ready(lane[0][0])]
        if not ready:
            assert not self._computing
            assert not self._copying, "the lanes wait for each other"
            return False
        lane = ready[0] if len(ready) == 1 or self._random.random() < self._bias else ready[1]
        lane.popleft()[1]()
        return True


def _ready(mark: Mark | None) -> bool:
    return mark is None or bool(mark.event)


def spoil(target: Tensor) -> None:
    """Make NaN of every number in *target*."""
    target.fill_(SPOILT)


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _add(target: Tensor, rows: Callable[[], Tensor]) -> None:
    target.add_(rows())


@cache
def store_of(layers: int, experts: int, bits: int, device: str = "cpu") -> HostStore:
    """A store of random float32 experts, pinned beside a GPU, with low copies if *bits*."""
    module = experts_module("concatenated", torch.float32, HIDDEN, INTERMEDIATE, experts)
    store = HostStore(layers, experts, ExpertLayout.of(module), pin=device == "cuda")
    draw = torch.Generator().manual_seed(layers * 100 + experts)
    for layer in range(layers):
        for id in range(experts):
            parts = {
                part.name: torch.randn(part.shape, generator=draw) / 3
                for part in store.layout.parts
            }
            store.put((layer, id, parts))
    if bits:
        store.add_low(LowLayout(store.layout, bits), torch.device(device))
    return store


class Truth:
    """What experts compute, from the store's weights, with nothing of the code under test."""

    def __init__(self, store: HostStore) -> None:
        layout = store.layout
        full = torch.stack([e[: layout.size_bytes].view(torch.float32) for e in store.full])
        flat = full.double()
        if store.low_layout is not None:
            low = torch.stack(list(store.low))
            flat = torch.cat([flat, dequantise(low, store.low_layout, torch.float64)])
        edge = layout.part("down_proj").first
        self._first = flat[:, :edge].view(-1, 2 * INTERMEDIATE, HIDDEN)
        self._second = flat[:, edge:].view(-1, HIDDEN, INTERMEDIATE)
        self._total, self._experts = len(store), store.experts

    def output(
        self,
        routing: Routing,
        served: Mapping[int, Service | Substitute],
        inputs: Sequence[Tensor],
    ) -> Tensor:
        """The sum float64 [T, H] of an event's experts, each as it is *served*."""
        hidden, index, weights = inputs
        top_k = index.shape[1]
        rows, shares = [], weights.double().reshape(-1).clone()
        for pair, id in enumerate(index.reshape(-1).tolist()):
            expert = routing.layer * self._experts + id
            service = served.get(expert, Service.LOAD)
            if isinstance(service, Substitute):
                expert = service.expert
            elif service is Service.LOW:
                expert += self._total
            elif service is Service.SKIP:
                shares[pair] = 0.0
            rows.append(expert)
        states = hidden.double().repeat_interleave(top_k, dim=0).unsqueeze(2)
        gate, up = (self._first[rows] @ states).chunk(2, dim=1)
        out = (self._second[rows] @ (F.silu(gate) * up)).squeeze(2) * shares.unsqueeze(1)
        return out.view(len(hidden), top_k, -1).sum(dim=1)


class Driver:
    """Runs the events of a :class:`Case` through an engine on *lanes*.

    *launch* takes each piece of work for the computing lane: it runs it at once, as torch
    does, or later.
    """

    def __init__(
        self,
        case: Case,
        lanes: Lanes,
        launch: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        self.case, self.lanes, self.launch = case, lanes, launch
        device = lanes.device
        store = store_of(case.layers, case.experts, case.bits, device.type)
        low = store.low_layout
        share = low.size_bytes / store.layout.size_bytes if low else 0.0
        context = Context(case.layers, case.experts, case.top_k, case.slots, pool=case.pool)
        kind = (Chaotic if case.cpu else Frugal) if case.serves else Plain
        self.planner = Planner(kind(case), context, low_bytes_share=share)
        cache = self.planner.cache
        self.bank = SlotBank(
            store.layout, cache.full_slots, device,
            low_layout=low if cache.low_slots else None, low=cache.low_slots,
        )  # fmt: skip
        # A slot that nobody has filled must not be read either.
        self.bank.full.fill_(SPOILT)
        if self.bank.low is not None:
            self.bank.low.fill_(SPOILT)
        self.engine = Engine(self.planner, store, self.bank, lanes, case.depth)
        module = experts_module("concatenated", torch.float32, HIDDEN, INTERMEDIATE, case.experts)
        gates: Any = [SimpleNamespace(experts=module, top_k=case.top_k)]
        self.maths = Fused(self.engine, gates)
        self.cpu = CpuExperts(store, gates)
        self.truth = Truth(store)
        self.random = random.Random(case.seed + 1)
        self.draw = torch.Generator().manual_seed(case.seed)
        #: Whether the copies of an event that is whole share their marks, as before a graph.
        self.together = False
        self.engine.copier.marks_each = self.random.random() < 0.2
        self.events = self.waves = self.late = self.shared = 0
        #: Groups of several copies, and further waves that are cut into several groups.
        self.grouped = self.overlapping = 0
        self.served: set[str] = set()
        self.demand_bytes = 0
        self._checks: list[tuple[str, Tensor, Tensor]] = []

    def run(self) -> None:
        """Every step of the case; then every output is compared."""
        least = self.case.together * self.bank.layout.size_bytes
        try:
            with landing_in_groups(least, 2 * least):
                for number in range(self.case.steps):
                    self._step(number)
        finally:
            # What is on its way writes to slots that are about to be freed.
            self.lanes.finish()
        self.check()
        assert self.engine.copier.demand_bytes == self.demand_bytes

    def check(self) -> None:
        """Compare what was computed since the last check; the lanes must have finished."""
        for name, found, expected in self._checks:
            found = found.double().cpu()
            assert not found.isnan().any(), f"{name}: computed from a slot that was being written"
            worst = float((found - expected).abs().max())
            scale = 1.0 + float(expected.abs().max())
            assert worst < 1e-4 * scale, f"{name}: off by {worst:g}"
        self._checks.clear()

    def _step(self, number: int) -> None:
        case = self.case
        prefill = self.random.random() < 0.3
        size = self.random.randint(1, case.tokens) * (self.random.randint(1, 5) if prefill else 1)
        step = Step(number, PREFILL if prefill else DECODE, size)
        step._experts = np.zeros((size, case.layers, case.top_k), dtype=np.int16)
        self.engine.start()
        self.engine.begin(step)
        self.layers(step, size)
        self.engine.end()

    def layers(self, step: Step, size: int) -> None:
        """Every event of a step of *size* tokens."""
        for layer in range(self.case.layers):
            self._event(step, layer, size)

    def inputs(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random hidden states, experts and weights of *size* tokens, on the host."""
        case = self.case
        hidden = torch.randn(size, HIDDEN, generator=self.draw)
        scores = torch.rand(size, case.experts, generator=self.draw)
        index = scores.topk(case.top_k, dim=1).indices
        weights = torch.rand(size, case.top_k, generator=self.draw)
        return hidden, index, weights

    def send(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """*inputs* on the device; nothing waits for them."""
        device = self.lanes.device
        if device.type == "cpu":
            return tuple(inputs)
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in inputs)

    def _event(self, step: Step, layer: int, size: int) -> None:
        engine = self.engine
        inputs = self.inputs(size)
        sent = self.send(inputs)
        self._await_gate()
        routing = self.routed(step, layer, inputs[1])
        self.together = self.random.random() < 0.5
        plan, late = engine.decide(routing, together=self.together)
        self.note(plan, late)
        found = self.compute(routing, plan, late, sent)
        engine.after(plan, late)
        self.expect(routing, plan, inputs, found)

    def routed(self, step: Step, layer: int, index: Tensor) -> Routing:
        """The event of a gate that chose *index* [T, k]."""
        step._experts[:, layer] = index.numpy()  # type: ignore[index]
        first = layer * self.case.experts
        chosen = [first + expert for expert in torch.unique(index).tolist()]
        return Routing(step, layer, chosen, self.engine.events)

    def expect(self, routing: Routing, plan: Plan, inputs: Sequence[Tensor], found: Tensor) -> None:
        """*found* [T, H] is what came out of an event: it is compared when all is over."""
        name = f"{self.case}, event {routing.event}, {plan.served or 'all loaded'}"
        self._checks.append((name, found, self.truth.output(routing, plan.served or {}, inputs)))

    def _await_gate(self) -> None:
        """Read a gate as the hook does: the computing lane has done all that came before."""
        mark = self.lanes.mark()
        while not self.lanes.passed(mark):
            if self.engine.copier.pending:
                self.engine.copier.poll()

    def note(self, plan: Plan, late: Sequence[int]) -> None:
        assert len(set(late)) == len(late), "a late copy is computed twice"
        self.events += 1
        self.late += len(late)
        self.waves += max(0, len(plan.waves) - 1)
        for service in (plan.served or {}).values():
            kind = "substitute" if isinstance(service, Substitute) else service.value
            self.served.add(kind)
        if self.together and plan.whole and not self.engine.copier.marks_each:
            self.shared += any(len(wave) > 1 for wave in plan.waves)
        if not (self.together and plan.whole):
            groups = [cut(wave, self.engine.copier.size_of) for wave in plan.waves]
            self.grouped += sum(len(group) > 1 for wave in groups for group in wave)
            self.overlapping += sum(len(wave) > 1 for wave in groups[1:])
        for wave in plan.waves:
            self.demand_bytes += sum(map(self.engine.copier.size_of, wave))

    def compute(
        self, routing: Routing, plan: Plan, late: Sequence[int], inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """The event's output float32 [T, H], by one of the ways in which the runtime does it."""
        engine = self.engine
        if plan.whole and self.together:
            engine.at_once(plan, late)
            out = torch.zeros_like(inputs[0])
            self._group(routing, inputs, out)
            return out
        out = self.apart(routing, plan, late, inputs)
        if self.random.random() < 0.5:
            # As before a captured graph, which must find nothing left to compute.
            engine.hide(routing)
            self._group(routing, inputs, out)
        return out

    def apart(
        self, routing: Routing, plan: Plan, late: Sequence[int], inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """The same computed group by group."""
        out = torch.zeros_like(inputs[0])

        def on_cpu(experts: Sequence[int]) -> None:
            rows = partial(self.cpu.rows, routing.layer, experts, *inputs)
            self.launch(lambda: _add(out, rows))

        group = partial(self._group, routing, inputs, out)
        self.engine.in_groups(routing, plan, late, group, on_cpu)
        return out

    def _group(self, routing: Routing, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        hidden, index, weights = inputs
        run, table = self.maths.kernels.run, self.engine.table.slots[routing.layer]
        self.launch(lambda: run(hidden, index, weights, table, out, accumulate=True))


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """*count* cases of all kinds, the same for the same *seed*."""
    draw = random.Random(seed)
    for number in range(count):
        layers, experts = draw.randint(1, 4), draw.randint(2, 8)
        top_k = draw.randint(1, min(3, experts))
        pool = draw.choice(("global", "global", "layer"))
        least = top_k * (layers if pool == "layer" else 1)
        yield Case(
            seed=seed * 100_000 + number,
            layers=layers,
            experts=experts,
            top_k=top_k,
            slots=draw.randint(least, layers * experts),
            pool=pool,
            bits=draw.choice((0, 4, 8)),
            low_share=draw.choice((0.2, 0.5)),
            serves=draw.random() < 0.7,
            depth=draw.randint(1, 4),
            together=draw.randint(1, 3),
        )


def _keeps_victims(self: Engine, moves: Sequence[Move]) -> None:
    """``Engine._place`` without its note that a victim is absent."""
    for move in moves:
        self._slot.pop(move.victim, None)
        self._slot[move.copy] = move.slot
        if move.copy < self.total:
            self.table.set(move.copy, move.slot)
        elif move.demand:
            self._borrow(move.copy - self.total, move.slot)


def _shows_all(self: Arrivals, slots: Any, *, shown: bool) -> None:
    """``Arrivals._show`` that hides nothing."""
    if shown:
        _SHOW(self, slots, shown=True)


_SHOW = Arrivals._show


def _nothing(self: Any, *arguments: Any) -> None:
    """Leaves out a piece of the runtime."""


#: Pieces that the runtime cannot do without -> what takes their place.
FAULTS: dict[str, Any] = {
    "Copier.wait": (Copier, "wait", _nothing),
    "Copier._drop": (Copier, "_drop", _nothing),
    "copy_after": (Lanes, "copy_after", _nothing),
    "copy_after_compute": (Lanes, "copy_after_compute", _nothing),
    "absent victims": (Engine, "_place", _keeps_victims),
    "hidden until it has landed": (Arrivals, "_show", _shows_all),
    "hide": (Engine, "hide", _nothing),
    "flush": (ExpertTable, "flush", _nothing),
}


@contextmanager
def broken(fault: str, lanes: type[Lanes]) -> Iterator[None]:
    """The runtime without one of :data:`FAULTS`, on lanes of a kind."""
    owner, name, instead = FAULTS[fault]
    owner = lanes if owner is Lanes else owner
    whole = getattr(owner, name)
    setattr(owner, name, instead)
    try:
        yield
    finally:
        setattr(owner, name, whole)
