"""What a token scheduler gains: distinct experts per step, hit ratio and speed beside none.

PYTHONPATH=. python benchmarks/token_scheduler.py TRACE... [--batch 8,16] [--json FILE] [options]
PYTHONPATH=. python benchmarks/token_scheduler.py --switch [--json FILE] [options]
PYTHONPATH=. python benchmarks/token_scheduler.py --host

Simulated. For each trace and batch size: no scheduler; units of batches that decode in turn in
file order (``expertflow:rounds=0``); and the scheduler, shown the previous token's experts and the
paths of each --forecaster. `experts` is the mean number of distinct experts that a decode step
takes over all layers, `fewer` how much that is less than by groups of the same sizes in file
order. `gain` compares tokens per second with none. --switch draws traces in the shape of the
paper's models (12 layers, top-1 of 32, 64 and 128 experts) with the statistics of the sample
granular-64x8. --host measures how long dividing tokens takes on one core, beside the constants
that the simulator takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from policies.base import Context
from policies.budget import Budget
from policies.registry import SCHEDULERS
from policies.schedulers.expertflow import ExpertFlow
from policies.scheduling import Coming, TokenScheduler
from policies.session import Setup
from sim.session import Session
from traces.errors import InputError
from traces.sizes import model_sizes
from traces.store import write_trace
from traces.synth import SynthSettings, synthesise
from traces.writing import replacing

#: The numbers of experts of the paper's Switch models.
SWITCH_EXPERTS = (32, 64, 128)

#: What is divided by --host: tokens, layers, experts, top-k, groups.
HOST_CASES = (
    (16, 8, 64, 8, 2),
    (16, 24, 64, 8, 2),
    (32, 12, 128, 1, 2),
    (32, 24, 64, 8, 2),
    (32, 48, 128, 8, 2),
    (64, 24, 128, 8, 4),
)


@dataclass(frozen=True)
class Row:
    """One run."""

    trace: str
    batch: int
    scheduler: str
    paths: str
    experts: float
    fewer: float
    held_ratio: float
    hit_ratio: float
    tokens_per_s: float
    gain: float
    moved_bytes: float
    follow_s: float
    waited_s: float
    decode_s: float


def switch_trace(folder: Path, experts: int, sequences: int) -> Path:
    """A trace in the shape of Switch with *experts* experts, as the sample is skewed."""
    path = folder / f"switch-base-{experts}.parquet"
    spec = model_sizes(f"switch-base-{experts}")
    settings = SynthSettings(
        layers=spec.layers,
        experts=experts,
        top_k=1,
        sequences=sequences,
        prompt=(16, 16),
        decode=(48, 48),
        skew=0.112,
        repetition=0.118,
        correlation=0.326,
        domains=6,
        token_information=0.519,
        seed=1,
    )
    write_trace(path, spec, synthesise(settings), source="synthetic", license="none")
    return path


def rows_of(options: argparse.Namespace, trace: str, batch: int) -> Iterator[Row]:
    """All runs of one trace and batch size, that without a scheduler first."""
    name = options.scheduler
    join = "," if ":" in name else ":"
    cells: list[tuple[str, str | None]] = [("none", None), (f"{name}{join}rounds=0", None)]
    cells += [(name, forecaster) for forecaster in (None, *options.forecaster)]
    plain = 0.0
    for scheduler, forecaster in cells:
        setup = Setup(
            trace,
            batch=batch,
            hardware=options.hardware,
            sizes=options.sizes,
            forecaster=forecaster,
            scheduler=scheduler,
            train=options.train,
            seed=options.seed,
        )
        found, _ = Session(setup).run(options.policy, Budget(cache=options.cache))
        schedule, speed = found.schedule or {}, found.time["tokens_per_s"]
        plain = plain or speed
        experts = schedule.get("distinct_experts", 0.0)
        before = schedule.get("distinct_in_file_order", 0.0)
        yield Row(
            Path(trace).stem,
            batch,
            scheduler,
            _shown(scheduler, forecaster),
            experts,
            1 - experts / before if before else 0.0,
            found.held_ratio,
            found.hit_ratio,
            speed,
            speed / plain - 1,
            schedule.get("moved_bytes", 0.0),
            schedule.get("follow_s", 0.0),
            schedule.get("waited_s", 0.0),
            found.time["decode_s"],
        )


def _shown(scheduler: str, forecaster: str | None) -> str:
    """Whose paths *scheduler* is shown."""
    built = SCHEDULERS.build(scheduler)
    if not isinstance(built, TokenScheduler):
        return ""
    return (forecaster or "previous") if built.paths in ("auto", "forecaster") else built.paths


def show(row: Row) -> str:
    """*row* as a line of the table."""
    costs = (row.follow_s + row.waited_s) / row.decode_s
    return (
        f"{row.trace:<22}{row.batch:>3}  {row.scheduler:<28}{row.paths:<22}{row.experts:8.1f}"
        f"{100 * row.fewer:8.1f}{100 * row.held_ratio:8.1f}{100 * row.hit_ratio:8.1f}"
        f"{row.tokens_per_s:9.1f}{100 * row.gain:8.1f}{100 * costs:8.2f}"
    )


HEAD = (
    f"{'trace':<22}{'B':>3}  {'scheduler':<28}{'paths':<22}{'experts':>8}{'fewer %':>8}"
    f"{'held %':>8}{'hit %':>8}{'tok/s':>9}{'gain %':>8}{'cost %':>8}"
)


def host_times() -> Iterator[str]:
    """How long the scheduler's default settings take to divide tokens of four domains."""
    scheduler = ExpertFlow()
    random = np.random.default_rng(0)
    yield f"{'tokens':>7}{'values':>8}{'groups':>8}{'median ms':>11}{'worst':>8}{'constant':>10}"
    for n, layers, experts, top_k, groups in HOST_CASES:
        scheduler.reset(Context(layers, experts, top_k, layers * experts))
        seconds = []
        for _ in range(50):
            popular = random.gumbel(size=(4, layers, experts))[random.integers(0, 4, n)]
            noise = random.gumbel(size=(n, layers, experts))
            best = np.argsort(-(popular + noise), axis=2)[:, :, :top_k]
            paths = np.zeros((n, layers, experts), dtype=bool)
            np.put_along_axis(paths, best, True, axis=2)
            count = np.arange(n)
            coming = Coming(0, 1, groups, n // groups, paths, count % groups, count, count)
            begun = time.perf_counter()
            scheduler.divide(coming)
            seconds.append(time.perf_counter() - begun)
        median, values = statistics.median(seconds), layers * experts
        yield (
            f"{n:>7}{values:>8}{groups:>8}{1e3 * median:>11.2f}{1e3 * max(seconds):>8.2f}"
            f"{1e3 * scheduler.host_s(n, values):>10.2f}"
        )


def main(words: Sequence[str]) -> None:
    """Run what *words* ask for."""
    parse = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parse.add_argument("traces", nargs="*")
    parse.add_argument("--switch", action="store_true", help="also traces in Switch's shape")
    parse.add_argument("--sequences", type=int, default=96, help="of a --switch trace")
    parse.add_argument("--host", action="store_true", help="measure dividing instead")
    parse.add_argument("--batch", default="8,16")
    parse.add_argument("--forecaster", action="append", default=[])
    parse.add_argument("--scheduler", default="expertflow")
    parse.add_argument("--policy", default="lru")
    parse.add_argument("--cache", default="50%")
    parse.add_argument("--hardware", default="h200-pcie5")
    parse.add_argument("--sizes")
    parse.add_argument("--train")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--json", type=Path)
    options = parse.parse_args(words)
    if options.host:
        print(*host_times(), sep="\n")
        return
    print(HEAD)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        drawn = SWITCH_EXPERTS if options.switch else ()
        traces = [*options.traces]
        traces += [str(switch_trace(Path(folder), n, options.sequences)) for n in drawn]
        for trace in traces:
            for batch in map(int, options.batch.split(",")):
                for row in rows_of(options, trace, batch):
                    print(show(row), flush=True)
                    rows.append(row)
    if options.json:
        with replacing(options.json) as unfinished:
            unfinished.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"token_scheduler: {error}")
