"""Runs in the real world on a real checkpoint: it generates text, and its routing is a trace."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from policies.budget import Budget
from policies.costs import Costs
from policies.decisions import DecisionLog
from policies.hardware import load_profile
from policies.memory import Shape, activations_bytes, predicted_bytes
from policies.outcome import precisions, result_of
from policies.recording import Recording
from policies.registry import POLICIES
from policies.result import Result
from policies.session import Setup, TraceSession, no_garbage_collection
from runtime.capture import left_padded
from runtime.errors import OffloadError
from runtime.fullspeed import at_full_speed
from runtime.generate import (
    Offloaded,
    Progress,
    check_room,
    encode,
    generation_config,
    no_progress,
    open_offloaded,
)
from runtime.load import find_folder, fitting, load_tokenizer
from runtime.measuring import Measured, RealWorld
from runtime.peaks import forget_peaks, host_peak_bytes, peak_bytes
from runtime.predictor.names import replayed
from runtime.sampling import Sampling
from runtime.store import KeptStore
from traces.errors import InputError

#: Passes over one cache that warming up makes beyond the prompt.
_WARM_PASSES = 8


@dataclass(frozen=True)
class LiveSettings:
    """How a checkpoint generates: as the options of :class:`runtime.offloading.Options`.

    *batch* prompts run together; *max_new_tokens* are made greedily after each. One at a time
    they stop at the model's end tokens; larger batches run on, so that no sequence leaves
    before the others.
    """

    hardware: str = "h200-pcie5"
    batch: int = 1
    max_new_tokens: int = 64
    device: str = "auto"
    compute: str = "auto"
    kernel: str = "generate"
    dtype: str = "auto"
    pageable: bool = False
    forecaster: str | None = None
    pool: str = "global"
    train: str | None = None
    depth: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")

    def setup(self, trace: Path) -> Setup:
        """What a simulation of the recorded *trace* must be told to decide alike.

        A predictor that ran beside the model left its forecasts beside the trace.
        """
        return Setup(
            str(trace),
            batch=self.batch,
            hardware=self.hardware,
            forecaster=replayed(self.forecaster, trace),
            pool=self.pool,
            train=self.train,
            seed=self.seed,
            depth=self.depth,
        )

    def options(self, budget: Budget, max_tokens: int) -> dict[str, Any]:
        """The options with which the model is offloaded; *max_tokens* per sequence."""
        names = (
            "hardware", "batch", "device", "compute", "kernel", "forecaster", "pool", "train",
            "depth", "seed",
        )  # fmt: skip
        chosen = {name: getattr(self, name) for name in names}
        chosen |= {"slots": budget.slots, "cache": budget.cache, "gpu_memory": budget.gpu_memory}
        return chosen | {"pin": not self.pageable, "max_tokens": max_tokens, "timed": True}


def run_live(  # noqa: PLR0913
    model: Path | str,
    *,
    prompts: Sequence[str],
    policy: str,
    budget: Budget,
    out: Path,
    spans: bool = False,
    log: DecisionLog | None = None,
    progress: Progress = no_progress,
    kept: KeptStore | None = None,
    **settings: Any,
) -> tuple[Path, Result, Recording | None, Measured]:
    """Let *model* continue *prompts* under *policy*; its routing becomes the trace *out*.

    *settings* are those of :class:`LiveSettings`. Returns *out*, the result (world ``gpu`` or
    ``cpu``), a recording if *spans* were asked for, and what was measured. *log* takes the
    decisions: a simulation of *out* with :meth:`LiveSettings.setup` must make the same ones.
    The experts are those of *kept*, if it has some, and stay there.
    """
    chosen = LiveSettings(**settings)
    if "popularity" in POLICIES.build(policy).needs:
        raise InputError(
            f"policy {policy!r} knows beforehand how popular each expert is, expected one that "
            "a live run and a simulation of what it recorded can both run"
        )
    if not prompts:
        raise InputError("no prompts given, expected at least one")
    folder = find_folder(model)
    tokens = encode(load_tokenizer(folder), prompts)
    longest = check_room(folder, [len(ids) for ids in tokens], chosen.max_new_tokens)
    options = chosen.options(budget, longest)
    if kept is not None and kept.store is not None:
        options["store"] = kept.store
    with open_offloaded(
        model, policy, dtype=chosen.dtype, record=True, progress=progress, **options
    ) as opened:
        if kept is not None:
            kept.take(opened.runner.engine.store)
        if log is not None:
            opened.runner.engine.planner.log = log
        result, recording, measured = run_opened(
            opened, chosen, tokens, policy=policy, out=out, spans=spans, progress=progress
        )
    return out, result, recording, measured


def run_opened(  # noqa: PLR0913
    opened: Offloaded,
    settings: LiveSettings,
    tokens: Sequence[Sequence[int]],
    *,
    policy: str,
    out: Path,
    spans: bool = False,
    progress: Progress = no_progress,
) -> tuple[Result, Recording | None, Measured]:
    """Let an *opened* model, whose routing is kept, continue the prompts *tokens*.

    It was offloaded under *policy* with the options of *settings*. Its routing becomes *out*.
    """
    run = _LiveRun(opened, settings, tokens)
    with progress("generating", len(tokens)) as advance:
        world, recording, memory = run.run(spans, advance)
    costs = opened.runner.predictor_costs()
    words = f"routing of {opened.spec.name} on {len(tokens)} prompts, generated greedily"
    notes = {"policy": policy, "max_new_tokens": settings.max_new_tokens}
    opened.write_trace(out, words, {**notes, "batch": settings.batch})
    session = TraceSession(settings.setup(out))
    result = result_of(session, world)
    measured = world.measured()
    measured.predictor = costs
    measured.gpu_peak_bytes, measured.host_peak_bytes = memory, host_peak_bytes()
    measured.gpu_predicted_bytes = predicted_bytes(result.memory | run.memory(session, world))
    if costs is not None:
        measured.gpu_predicted_bytes += costs["device_bytes"]
    return result, recording, measured


@contextmanager
def live_runs() -> Iterator[Callable[..., Any]]:
    """:func:`run_live` for several runs of one checkpoint, whose experts are read once."""
    with KeptStore() as kept:
        yield functools.partial(run_live, kept=kept)


class _LiveRun:
    """Drives ``generate`` over the batches of prompts and times every forward pass.

    A step lasts from its tokens on the device to the next ones on the host, as in a replay;
    what ``generate`` does between two passes is not part of it.
    """

    def __init__(
        self, opened: Offloaded, settings: LiveSettings, tokens: Sequence[Sequence[int]]
    ) -> None:
        self._opened, self._settings, self._tokens = opened, settings, tokens
        self._longest = max(map(len, tokens))
        self._length = self._longest + max(settings.max_new_tokens, _WARM_PASSES)
        greedy = Sampling(temperature=0.0)
        self._config = generation_config(
            opened.model, greedy, settings.max_new_tokens, stop=settings.batch == 1
        )

    @property
    def _groups(self) -> list[Sequence[Sequence[int]]]:
        """The tokens of the prompts, batch by batch."""
        batch = self._settings.batch
        return [self._tokens[at : at + batch] for at in range(0, len(self._tokens), batch)]

    def run(
        self, spans: bool, advance: Callable[[int], None]
    ) -> tuple[RealWorld, Recording | None, int]:
        """Generate; the finished world, the recording and the device's peak in bytes."""
        opened = self._opened
        engine, device = opened.runner.engine, opened.device
        groups = self._groups
        recording = Recording(engine.planner.context, with_spans=True) if spans else None
        kind = "gpu" if device.type == "cuda" else device.type
        forget_peaks(device)
        with fitting(device), no_garbage_collection():
            for size in sorted({len(group) for group in groups}, reverse=True):
                self._warm_up(size)
                if opened.runner.beside is not None:
                    opened.runner.beside.warm(size, self._longest, self._settings.max_new_tokens)
            world = RealWorld(engine, self._costs(), kind, recording)
            with at_full_speed(device) as world.cores, self._timing(world):
                for group in groups:
                    ids, mask = left_padded(group, torch.device("cpu"))
                    opened.generate(ids, mask, self._config, self._length)
                    gc.collect()
                    advance(len(group))
            engine.lanes.finish()
            world.finish()
        return world, recording, peak_bytes(device)

    def memory(self, session: TraceSession, world: RealWorld) -> dict[str, float]:
        """What a result's memory is here: prompts are padded, and so is the cache.

        *session* is that of the recorded trace, *world* the finished run.
        """
        groups, length = self._groups, self._length
        prompts = max(len(group) * max(map(len, group)) for group in groups)
        sizes = {len(group) for group in groups}
        shape = Shape(prompts, max(sizes), length)
        # A cache is kept for every size.
        padding = max(sum(sizes) * length - session.kv_tokens, 0)
        return {
            "activations_bytes": activations_bytes(session.model, shape, precisions(world)),
            "padding_bytes": padding * session.model.kv_bytes_per_token,
        }

    def _costs(self) -> Costs:
        """What bytes weigh and copies cost, from the dimensions that the trace states too."""
        policy = self._opened.runner.engine.planner.policy
        return Costs(load_profile(self._settings.hardware), self._opened.spec, policy.low_bits)

    @contextmanager
    def _timing(self, world: RealWorld) -> Iterator[None]:
        """Every forward pass of the model is a step of *world* inside the block."""
        model, steps = self._opened.model, self._opened.steps
        lanes, inner = world.engine.lanes, model.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            lanes.finish()
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            world.begin(decoding=ids.shape[1] == 1)
            begun = lanes.now()
            output = inner(*args, **kwargs)
            output.logits[:, -1].argmax(dim=-1).cpu()
            step = steps.last if steps is not None else None
            if step is None:
                raise OffloadError("a forward pass made no step, expected one")
            world.add(step, lanes.now() - begun)
            return output

        model.forward = forward
        try:
            yield
        finally:
            model.forward = inner

    def _warm_up(self, size: int) -> None:
        """Set up what is set up lazily, and capture decode graphs, for *size* sequences.

        The experts are left out and nobody plans: neither slots nor decisions change.
        """
        opened = self._opened
        runner, graphs = opened.runner, opened.runner.graphs
        if graphs is None:
            return
        hook, model, plain = runner.hook, opened.model, runner.plain_forward
        inner = model.forward

        @functools.wraps(inner)
        def forward(**kwargs: Any) -> Any:
            with hook.without_experts():
                output = plain(**kwargs)
            if kwargs["input_ids"].shape[1] == 1:
                graphs.warm(kwargs)
            return output

        longest = max(self._longest, 2)
        ids = torch.zeros(size, longest, dtype=torch.int64)
        config = generation_config(model, Sampling(temperature=0.0), 2, stop=False)
        model.forward = forward
        try:
            opened.generate(ids, torch.ones_like(ids), config, self._length)
        finally:
            model.forward = inner
