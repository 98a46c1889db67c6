"""Offload a model's experts to host memory: the runtime's front door."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from policies.base import Forecaster, Policy, Training
from policies.budget import Budget
from policies.costs import Costs
from policies.hardware import HardwareProfile, load_profile
from policies.planner import Planner
from policies.registry import FORECASTERS, POLICIES
from policies.session import COMPUTE as WAYS
from policies.session import POOLS, check_pool
from policies.training import check_taught, learn
from runtime.bank import SlotBank
from runtime.capture import vocabulary_of
from runtime.engine import Engine
from runtime.errors import OffloadError
from runtime.families import Gate, find_gates, model_spec
from runtime.hook import GateReader, Hook, install
from runtime.lanes import lanes_for
from runtime.layout import ExpertLayout
from runtime.load import pick_device
from runtime.maths import Fused, Reference
from runtime.predictor.following import BATCHES
from runtime.predictor.forecaster import LivePath, live_forecaster
from runtime.predictor.names import check_runs_live, is_live
from runtime.runner import Runner
from runtime.steps import LiveSteps
from runtime.store import HostStore, drop_experts, experts_of
from traces.errors import first_line
from traces.model import ModelSpec
from traces.store import open_trace

COMPUTE = ("auto", *WAYS)

#: Profiles that policies reckon with where none is named: of captured steps, and of eager ones, by
#: whose times a link beside captured steps never seems busy.
CAPTURED, EAGER = "h100-captured", "h200-pcie5"

KERNELS = ("generate", "batched_mm", "grouped_mm")


@dataclass(frozen=True)
class Options:
    """How a model is offloaded; ``docs/runtime.md`` explains each.

    One of *slots*, *cache* (``"25%"``) and *gpu_memory* (``"8GiB"``) is the budget, half of
    the experts by default. *compute* is ``graph`` (our kernels, a decode step in one CUDA graph
    where that can be), ``fused`` (our kernels, a graph from each gate to the next), ``reference``
    (transformers' own *kernel*) or ``auto``: graph on CUDA, reference elsewhere. *max_tokens*
    bounds the key-value cache that *gpu_memory* leaves room for, for each of the *batch*
    sequences of *turns* batches that decode by turns. *graphs* captures decode steps where that
    can be done, *compiled* has ``torch.compile`` make them first. *pin* false keeps the experts
    in pageable memory. *record* keeps the routing, *timed* the time of every stretch. *name* is
    what traces call the model, its type unless given: published ones are known by it.
    """

    slots: int | None = None
    cache: str | None = None
    gpu_memory: str | None = None
    device: str = "auto"
    compute: str = "auto"
    kernel: str = "generate"
    forecaster: str | None = None
    pool: str = "global"
    hardware: str = "auto"
    train: str | None = None
    depth: int = 2
    batch: int = 1
    turns: int = 1
    max_tokens: int = 4096
    seed: int = 0
    pin: bool = True
    graphs: bool = True
    compiled: bool = False
    record: bool = False
    timed: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        for name, known in (("compute", COMPUTE), ("kernel", KERNELS), ("pool", POOLS)):
            if getattr(self, name) not in known:
                raise OffloadError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        for name in ("depth", "batch", "turns", "max_tokens"):
            if getattr(self, name) < 1:
                raise OffloadError(f"{name} is {getattr(self, name)}, expected at least 1")

    def computes(self, device: torch.device) -> str:
        """The way to compute on *device*: *compute*, with ``auto`` resolved."""
        if self.compute == "auto":
            return "graph" if device.type == "cuda" else "reference"
        return self.compute

    def whole_steps(self, device: torch.device) -> bool:
        """Whether decode steps are to run as one graph each on *device*, where they can."""
        return device.type == "cuda" and self.computes(device) == "graph"

    def reckons_with(self, device: torch.device) -> str:
        """The profile for policies on *device*: *hardware*, with ``auto`` resolved."""
        if self.hardware == "auto":
            return CAPTURED if device.type == "cuda" else EAGER
        return self.hardware


def offload(
    model: Any, policy: str | Policy = "lru", *, store: HostStore | None = None, **options: Any
) -> Any:
    """Keep the experts of *model* in host memory and only some on the device; returns it.

    *model* is a transformers causal language model on the CPU, or what
    :func:`runtime.streaming.open_checkpoint` opened. Options are those of :class:`Options`.
    With a *store* that another model of the same weights has filled, no expert is read.
    Afterwards ``model.generate`` works as ever and ``model.expert_cache`` tells what
    happened. Raises :class:`OffloadError` or another :class:`traces.errors.InputError` and
    frees what it took if the model, the machine or an option does not allow it.
    """
    known = [field.name for field in dataclasses.fields(Options)]
    for name in options:
        if name not in known:
            raise OffloadError(f"offload: unknown option {name!r}, expected {', '.join(known)}")
    return _Builder(model, policy, Options(**options)).build(store)


class _Builder:
    """Puts one offloaded model together, and takes it apart again where that fails."""

    def __init__(self, model: Any, policy: str | Policy, options: Options) -> None:
        checkpoint = None if isinstance(model, PreTrainedModel) else model
        self.model = model if checkpoint is None else checkpoint.model
        self.options = options
        if hasattr(self.model, "expert_cache"):
            raise OffloadError(f"{type(self.model).__name__}: is offloaded already")
        self.gates: list[Gate] = find_gates(self.model)
        self.layout = ExpertLayout.of(self.gates[0].experts)
        self.spec: ModelSpec = model_spec(self.model, options.name or self.model.config.model_type)
        self.device = pick_device(options.device)
        self.profile: HardwareProfile = load_profile(options.reckons_with(self.device))
        self.policy = POLICIES.build(policy) if isinstance(policy, str) else policy
        self.forecaster = self._forecaster()
        self._check_policy()
        self.source: Callable[[], Any] = (
            partial(experts_of, self.gates) if checkpoint is None else checkpoint.experts
        )

    def _forecaster(self) -> Forecaster | None:
        if not self.policy.forecasts:
            return None
        text = self.options.forecaster or "ahead"
        check_runs_live(text)
        if not is_live(text):
            return FORECASTERS.build(text)
        found = live_forecaster(text)
        known = vocabulary_of(self.model)
        batches = max(self.options.turns, BATCHES)
        found.attach(self.spec, known, self.device, keep=self.options.record, batches=batches)
        return found

    def _check_policy(self) -> None:
        for kind, plugin in (("policy", self.policy), ("forecaster", self.forecaster)):
            if plugin is None:
                continue
            if plugin.offline:
                raise OffloadError(
                    f"{kind} {plugin.name!r} needs the future, expected one that can run live"
                )
            if {"training", "popularity"} & set(plugin.needs) and not self.options.train:
                raise OffloadError(
                    f"{kind} {plugin.name!r} learns from a trace, expected train=FILE"
                )

    def build(self, filled: HostStore | None) -> Any:
        """Offload with the experts of *filled*, or with those of the model."""
        model = self.model
        planner = self._planner()
        store = filled or self._store()
        if (store.layers, store.experts, store.layout) != self._shape:
            raise OffloadError(
                f"the store holds {store.layers} layers of {store.experts} experts of "
                f"{store.layout.size_bytes} bytes, expected {self.spec.layers} of "
                f"{self.spec.experts} of {self.layout.size_bytes} in the same order"
            )
        bank: SlotBank | None = None
        try:
            # Slots first: that they do not fit is to be known before the experts are read.
            bank = SlotBank.of(planner, self.layout, self.device)
            if filled is None:
                store.fill(self.source())
            if bank.low_layout is not None:
                store.add_low(bank.low_layout, self.device)
            drop_experts(self.gates)
            model.to(self.device)
            runner = self._runner(planner, store, bank)
        except BaseException as error:
            self._undo(store, bank)
            if isinstance(error, torch.OutOfMemoryError):
                slots = planner.cache.full_slots
                raise OffloadError(
                    f"out of memory on {self.device} for what is not experts, expected room "
                    f"beside {slots} slots; give fewer slots ({first_line(error)[:120]})"
                ) from None
            raise
        if runner.graphs is not None and model.generation_config is not None:
            _generate_over_static_cache(model.generation_config)
        model.expert_cache = ExpertCacheHandle(runner)
        return model

    @property
    def _shape(self) -> tuple[int, int, ExpertLayout]:
        return self.spec.layers, self.spec.experts, self.layout

    def _store(self) -> HostStore:
        """An empty store for the experts."""
        return HostStore(*self._shape, pin=self.options.pin and self.device.type == "cuda")

    def _undo(self, store: HostStore, bank: SlotBank | None) -> None:
        """Give back what a failed attempt took, on the device too."""
        store.close()
        if bank is not None:
            bank.free()
        if isinstance(self.forecaster, LivePath):
            self.forecaster.close()
        if self.device.type == "cuda":
            # What is still on meta cannot be moved, and has taken nothing.
            with contextlib.suppress(NotImplementedError, RuntimeError):
                self.model.to("cpu")
            torch.cuda.empty_cache()

    def _planner(self) -> Planner:
        options = self.options
        costs = Costs(self.profile, self.spec, self.policy.low_bits)
        training = self._training()
        context = dataclasses.replace(
            costs.context(self.policy.name, self._slots()),
            pool=options.pool,
            batch=options.batch,
            seed=options.seed,
            has_weights="weights" in self.policy.needs,
            popularity=training.popularity if training else None,
            training=training,
        )
        share = costs.low_bytes / costs.full_bytes
        return Planner(self.policy, context, self.forecaster, low_bytes_share=share)

    def _training(self) -> Training | None:
        train = self.options.train
        if not train:
            return None
        found = learn(open_trace(train), self.spec)
        if self.forecaster is not None:
            check_taught(self.forecaster, found, train)
        return found

    def _slots(self) -> int:
        """What the budget buys on this device, as ``simctl run`` would reckon it."""
        options = self.options
        budget = Budget(options.cache, options.slots, options.gpu_memory)
        profile = self.profile
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
            gpu = dataclasses.replace(profile.gpu, memory_bytes=memory)
            profile = dataclasses.replace(profile, gpu=gpu)
        beside = 0
        if isinstance(self.forecaster, LivePath):
            beside = self.forecaster.expected_bytes(options.batch, options.max_tokens)
        kv_tokens = options.max_tokens * options.batch * options.turns
        slots = budget.resolve(self.spec, profile, kv_tokens, beside)
        check_pool(options.pool, slots, self.spec, option="pool")
        return slots

    def _runner(self, planner: Planner, store: HostStore, bank: SlotBank) -> Runner:
        options = self.options
        lanes = lanes_for(self.device, timed=options.timed)
        engine = Engine(planner, store, bank, lanes, options.depth)
        ahead = _ahead_depth(self.forecaster, self.spec.layers)
        whole = options.whole_steps(self.device)
        read_ids = whole and not all(map(_is_ours, (planner.policy, planner.forecaster)))
        steps = LiveSteps(self.spec, ahead=ahead, keep=options.record, read_ids=read_ids)
        engine.watch.on = options.timed
        hook = make_hook(self.model, self.gates, engine, options, ahead)
        hook.steps = steps
        return Runner(
            self.model, hook, steps, graphs=options.graphs, compiled=options.compiled,
            whole=whole,
        )  # fmt: skip


def make_hook(
    model: Any, gates: Sequence[Gate], engine: Engine, options: Options, ahead: int = 0
) -> Hook:
    """Let *engine* compute the experts of *model*; *ahead* gates are asked beside each."""
    device, planner = engine.lanes.device, engine.planner
    reader = GateReader(
        gates,
        with_weights="weights" in planner.policy.needs or options.record,
        ahead=ahead,
        width=min(2 * gates[0].top_k, gates[0].num_experts) if ahead else 0,
        pin=device.type == "cuda",
    )
    reference = options.computes(device) == "reference"
    maths = Reference(engine, gates, options.kernel) if reference else Fused(engine, gates)
    hook = Hook(engine, gates, reader, maths)
    install(model, gates, hook)
    return hook


def _is_ours(plugin: Policy | Forecaster | None) -> bool:
    """Whether *plugin* is known not to read token ids while a step is under way."""
    return plugin is None or type(plugin).__module__.partition(".")[0] in ("policies", "runtime")


def _ahead_depth(forecaster: Forecaster | None, layers: int) -> int:
    if forecaster is None or "ahead" not in forecaster.needs:
        return 0
    return min(3, layers - 1)


def _generate_over_static_cache(config: Any) -> None:
    """Let ``generate`` use what decode graphs need, unless the user has chosen another cache."""
    if config.cache_implementation is None:
        config.cache_implementation = "static"
        # Compiling would trace through the hook.
        config.disable_compile = True


class ExpertCacheHandle:
    """``model.expert_cache``: what happened so far, and the way to free everything."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def stats(self) -> dict[str, Any]:
        """Counts and bytes since the start, and what Belady would have missed (None live).

        ``held`` splits into ``hit`` and ``late``; ``held_ratio`` and ``hit_ratio`` are shares
        of the ``accesses``. ``predictor``: what a predictor beside the model cost, if there is one.
        """
        return self.runner.stats()

    def trace(self) -> list[Any]:
        """The routing kept so far (``record=True``), as sequences of a trace."""
        return self.runner.sequences()

    def close(self) -> None:
        """Free the slots and the host store; the model cannot run any more."""
        self.runner.close()
