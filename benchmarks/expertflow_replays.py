"""Replays for ``expertflow_gpu``: real sizes and forced routing, simulated and measured.

Every cell goes through :mod:`reports.validation.replay`, as in ``simctl validate``; here is only
which cells there are and what is read off them.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.expertflow_rows import Clock, Row, attempt, ratio
from policies.budget import Budget
from policies.session import Setup
from reports.validation.cut import Cut
from reports.validation.replay import replay
from reports.validation.request import Done, Request, budget_words
from runtime.dimensions import fit_dimensions
from runtime.load import pick_device
from runtime.predictor.data import read_corpus
from runtime.predictor.files import load_predictor
from runtime.predictor.forecasting import forecast
from runtime.session import ReplaySession
from traces.errors import InputError
from traces.model import ModelSpec
from traces.sizes import model_sizes, resize
from traces.store import open_trace, write_trace
from traces.trace import MemoryTrace

TRACES = Path(__file__).resolve().parents[1] / "traces"

#: Models whose layers are measured, and the sample whose routing is forced on them.
SOURCES = (
    ("mixtral-8x7b", "coarse-8x2"),
    ("qwen1.5-moe", "granular-64x8"),
    ("switch-base-128", "granular-64x8"),
)

#: Sequences and decoded tokens of a cell, by the sequences that run together.
LOADS = {1: (2, 24), 16: (16, 8), 32: (32, 6)}
TINY_LOADS = {1: (1, 2), 16: (3, 2), 32: (4, 3)}

CACHES = ("25%", "50%")
POLICIES = ("lru", "predictive")

#: Schedulers that are measured under each policy, at half of the experts.
SCHEDULERS = {
    "lru": ("none", "expertflow", "expertflow:kv=reindex", "expertflow:overlap=true"),
    "predictive": ("none", "expertflow"),
}


@dataclass(frozen=True)
class Machine:
    """Where cells run and by which profile they are simulated; *tiny* is a dry run."""

    device: str = "auto"
    hardware: str = "h200-pcie5"
    attempts: int = 2
    tiny: bool = False

    @property
    def compute(self) -> str:
        """The kernels of the real runs."""
        return "fused" if pick_device(self.device).type == "cuda" else "reference"


class Replays:
    """The cells of one model: its sizes, one sample's routing, experts that all cells share."""

    def __init__(self, sizes: str, sample: str, machine: Machine, folder: Path) -> None:
        self.name, self.sample, self._machine = sizes, sample, machine
        self._folder = folder / f"{sizes}-{sample}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._loads = TINY_LOADS if machine.tiny else LOADS
        self._whole = open_trace(TRACES / "samples" / f"{sample}.parquet")
        self.stand_in = ""
        self._sizes: str | None = sizes
        self._spec: ModelSpec = self._whole.model
        if machine.tiny:
            self._sizes = None
        else:
            self._stand_in()
        self._kept: ReplaySession | None = None
        self._done: dict[Any, Done] = {}

    def _stand_in(self) -> None:
        """Where the runtime has no such family: gated experts of as many bytes."""
        try:
            fit_dimensions(self._whole.model, self._sizes)
        except InputError as error:
            spec = resize(self._whole.model, model_sizes(self.name))
            inner = spec.expert_params // (3 * spec.hidden)
            self._sizes = None
            self._spec = dataclasses.replace(
                spec, name=f"like {self.name}", intermediate=inner,
                expert_params=3 * spec.hidden * inner,
            )  # fmt: skip
            self.stand_in = (
                f"{error}; run as gated experts of {spec.hidden} x {inner} with "
                f"{self._spec.expert_params / spec.expert_params:.3f} of the weights"
            )

    @property
    def top_k(self) -> int:
        """Experts of a token in a layer: the fewest slots with which a token decodes."""
        return self._spec.top_k

    @property
    def half(self) -> int:
        """The batch of which two make what a token scheduler divides."""
        return self._loads[32][0] // 2

    def trace(self, rows: int) -> Path:
        """The routing of cells of *rows* sequences, all as long as the others."""
        count, tokens = self._loads[rows]
        path = self._folder / f"{rows}.parquet"
        if not path.exists():
            long = [s for s in self._whole.sequences() if len(s) - s.prefill >= tokens][:count]
            part = Cut(count, tokens).apply(MemoryTrace(self._spec, long))
            whole = self._whole
            write_trace(path, self._spec, part, source=whole.source, license=whole.license)
        return path

    def forecasts(self, rows: int) -> Path:
        """What the shipped predictor says of that trace, as ``predictor forecast`` writes it."""
        path = self._folder / f"{rows}.npz"
        if not path.exists():
            file = TRACES / "predictors" / f"{self.sample}.safetensors"
            predictor = load_predictor(file, pick_device(self._machine.device))
            corpus, spec = read_corpus(self.trace(rows)), predictor.spec
            forecast(predictor, corpus, path, min(2 * spec.top_k, spec.experts), spec.windows)
        return path

    def open(self) -> None:
        """Put the experts into host memory, once for all cells."""
        if self._kept is None:
            # Models that generated before lie in cycles, and would count as memory in use.
            gc.collect()
            self._kept = self._session(Setup(str(self.trace(1)), sizes=self._sizes))
            self._kept.open()

    def close(self) -> None:
        """Free them."""
        if self._kept is not None:
            self._kept.close()
        self._kept = None

    def _session(self, setup: Setup, like: Any = None) -> ReplaySession:
        machine, like = self._machine, like or self._kept
        return ReplaySession(setup, device=machine.device, compute=machine.compute, like=like)

    def cell(
        self, policy: str, budget: Budget, batch: int = 1, scheduler: str = "none", rows: int = 0
    ) -> Done:
        """One cell in both worlds; the same cell is run once."""
        rows = rows or batch
        key = policy, budget, batch, scheduler, rows
        if key not in self._done:
            machine = self._machine
            setup = Setup(
                str(self.trace(rows)), hardware=machine.hardware, sizes=self._sizes,
                forecaster=f"routing-path:{self.forecasts(rows)}", scheduler=scheduler,
            )  # fmt: skip
            request = Request(
                setup, [policy], [budget], [batch], device=machine.device,
                compute=machine.compute, attempts=machine.attempts,
            )  # fmt: skip
            self.open()
            (self._done[key],) = replay(request, lambda session, label: iter, self._session)
        return self._done[key]


def figures(done: Done) -> Row:
    """What a cell says; a failed one raises what it says."""
    cell = done.cell
    if cell.failed:
        raise RuntimeError(cell.failed)
    sim, real = done.results
    return {
        "policy": cell.policy.partition(" ")[0],
        "slots": cell.slots,
        "batch": cell.batch,
        "tokens_per_s_gpu": real.time["tokens_per_s"],
        "tokens_per_s_sim": sim.time["tokens_per_s"],
        "tpot_error": cell.error,
        "decisions_equal": cell.decisions_equal,
        "hit_ratio": real.hit_ratio,
        "held_ratio": real.held_ratio,
        "gpu_peak_bytes": cell.gpu_peak_bytes,
        "gpu_predicted_bytes": cell.gpu_predicted_bytes,
        "attempts": cell.attempts,
        "disturbed": cell.disturbed,
    }


def about(runs: Replays) -> Row:
    """What names a model."""
    return {"sizes": runs.name, "routing": runs.sample, "stand_in": runs.stand_in}


def _run(runs: Replays, words: Row, work: Callable[[], Done], clock: Clock) -> Row:
    return attempt(about(runs) | words, lambda: figures(work()), clock)


def speed(runs: Replays, clock: Clock) -> Iterator[Row]:
    """The policies against LRU at every budget and batch, and against loading on demand."""
    budget = Budget(slots=runs.top_k)
    words = {"cache": budget_words(budget), "batch": 1, "policy": "load-on-demand"}
    demand = _run(runs, words, lambda: runs.cell("lru", budget), clock) | words
    yield demand
    for batch in (1, 16):
        for cache in CACHES:
            base: Row = {}
            for policy in POLICIES:
                words = {"policy": policy, "cache": cache, "batch": batch}
                budget = Budget(cache=cache)
                row = _run(
                    runs, words, lambda p=policy, b=budget, n=batch: runs.cell(p, b, n), clock
                )
                base = base or row
                row |= ratio(row, base, "over_lru")
                yield row | (ratio(row, demand, "over_demand") if batch == 1 else {})


def memory(runs: Replays, clock: Clock) -> Iterator[Row]:
    """Peaks at the smallest budget and at a quarter, against every expert on the GPU."""
    whole: Row = {}
    for budget in (Budget(cache="100%"), Budget(cache="25%"), Budget(slots=runs.top_k)):
        for policy in POLICIES if whole else POLICIES[:1]:
            words = {"policy": policy, "cache": budget_words(budget), "batch": 1}
            row = _run(runs, words, lambda p=policy, b=budget: runs.cell(p, b), clock)
            whole = whole or row
            for world, name in (("gpu", "gpu_peak_bytes"), ("sim", "gpu_predicted_bytes")):
                most, least = whole.get(name), row.get(name)
                row[f"saved_{world}"] = 1 - least / most if most and least else None
            yield row | ratio(row, whole, "over_resident")


def scheduling(runs: Replays, clock: Clock) -> Iterator[Row]:
    """Token schedulers against none: what dividing takes, what moves, what it wins."""
    batch = runs.half
    cache = CACHES[-1]
    for policy, schedulers in SCHEDULERS.items():
        base: Row = {}
        for scheduler in schedulers:
            words = {"policy": policy, "cache": cache, "batch": batch, "scheduler": scheduler}

            def work(p: str = policy, s: str = scheduler) -> Row:
                done = runs.cell(p, Budget(cache=cache), batch, s, rows=32)
                return figures(done) | scheduled(done)

            row = attempt(about(runs) | words, work, clock)
            base = base or row
            yield row | ratio(row, base, "over_none")


def scheduled(done: Done) -> Row:
    """What the schedule of a cell did and cost in each world; nothing without a scheduler."""
    found: Row = {}
    for world, result in zip(("sim", "gpu"), done.results, strict=True):
        schedule = result.schedule
        if schedule is None:
            continue
        divisions = schedule["divisions"] or 1
        found |= {
            "divisions": schedule["divisions"],
            "moved": schedule["moved"],
            "moved_bytes": schedule["moved_bytes"],
            "distinct_experts": schedule["distinct_experts"],
            "distinct_in_file_order": schedule["distinct_in_file_order"],
            f"division_ms_{world}": 1e3 * schedule["divide_s"] / divisions,
            f"waited_s_{world}": schedule["waited_s"],
            f"follow_s_{world}": schedule["follow_s"],
            f"decode_s_{world}": result.time["decode_s"],
        }
    return found
