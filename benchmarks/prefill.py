"""How near a prompt comes to the link's speed: seconds beside the larger of computing and copying.

PYTHONPATH=. python benchmarks/prefill.py [--model qwen3-30b] [--tokens 512] [--json FILE]

On this machine's GPU, with random weights in the dimensions of some layers of published models
and synthetic routing, each prompt a step of its own. `compute` is the median of the steps that
miss the fewest experts in a run with a slot for each, mostly none. `copy` is what the step's
moves take at the bandwidth of such copies back to back, measured first, from the same host
memory. `ratio` is the median over the steps but the first of the step's seconds over the larger
of the two; a ratio of at most 1.1 is the aim. `stalled` is the share of the time in which the
GPU waited for copies, from a second run, which is marked.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from policies.budget import Budget
from policies.result import CAUSES
from policies.routing import Routing
from policies.session import Setup
from runtime.lanes import lanes_for
from runtime.load import fitting
from runtime.session import ReplaySession
from traces.errors import InputError
from traces.model import ModelSpec
from traces.sizes import model_sizes
from traces.store import write_trace
from traces.synth import SynthSettings, synthesise

#: Published models, and how many of their layers: some 7 to 9 GB of experts each.
LAYERS = {"qwen3-30b": 6, "mixtral-8x7b": 3}

#: A model of no published dimensions, to try the script on a CPU.
TINY = ModelSpec("tiny", 2, 8, 2, 64, 64, 3 * 64 * 64, 0, 2 * 2 * 64 * 2)

#: Bytes that the link carries to be timed.
LINK_BYTES = 2**31

#: Slots that copies are timed into.
LINK_SLOTS = 4


@dataclass(frozen=True)
class Row:
    """One model, prompt length, policy and budget; medians over the steps but the first."""

    model: str
    layers: int
    tokens: int
    policy: str
    cache: str
    step_s: float
    compute_s: float
    copy_s: float
    ratio: float
    moved_bytes: float
    missed_per_layer: float
    stalled: float


class Prompts(ReplaySession):
    """Runs whose prefill steps are timed one by one."""

    def step_s(self, policy: str, cache: str) -> list[float]:
        """Seconds of each step."""
        return list(self._world(policy, cache, 0).prefill_step_s)

    def stalled(self, policy: str, cache: str) -> float:
        """The share of a marked run's time in which the device waited for copies."""
        world = self._world(policy, cache, 1)
        parts = dict(zip(CAUSES, world.parts_s, strict=True))
        return (parts["stall_demand"] + parts["stall_late"]) / world.total_s

    def _world(self, policy: str, cache: str, mark_every: int) -> Any:
        with fitting(self.device):
            prepared = self.prepare(policy, Budget(cache=cache))
            return self._run(prepared, iter, mark_every=mark_every)[0]

    def moves(self, policy: str, cache: str) -> list[tuple[int, int]]:
        """Experts missed and moves made in each step: what is decided depends on no clock."""
        prepared = self.prepare(policy, Budget(cache=cache))
        planner, event, found = prepared.planner, 0, []
        for step in prepared.steps():
            missed, moved = 0, len(planner.begin(step))
            for layer, experts in enumerate(step.demand):
                plan = planner.plan(Routing(step, layer, experts, event))
                event += 1
                missed += len(plan.missed)
                moved += sum(map(len, plan.waves)) + len(planner.prefetch())
            found.append((missed, moved))
        return found

    def link_bytes_per_s(self) -> float:
        """Bandwidth of experts copied back to back from the store."""
        real = self.real
        assert real is not None
        size, full = real.layout.size_bytes, real.store.full
        slots = torch.empty(LINK_SLOTS, size, dtype=torch.uint8, device=self.device)
        lanes = lanes_for(self.device)
        most = LINK_BYTES if self.device.type == "cuda" else 16 * size
        count = max(most // size, LINK_SLOTS)
        pairs = [(slots[i % LINK_SLOTS], full[i % len(full)][:size]) for i in range(count)]
        lanes.copy_all(pairs[:LINK_SLOTS])
        lanes.finish()
        start = time.perf_counter()
        lanes.copy_all(pairs)
        lanes.finish()
        return count * size / (time.perf_counter() - start)


def prompts_of(spec: ModelSpec, tokens: int, count: int, path: Path) -> None:
    """Write *count* prompts of *tokens* tokens each, without an answer, to *path*."""
    settings = SynthSettings(
        layers=spec.layers,
        experts=spec.experts,
        top_k=spec.top_k,
        sequences=count,
        prompt=(tokens, tokens),
        decode=(0, 0),
        seed=tokens,
    )
    write_trace(path, spec, synthesise(settings), source="synthetic", license="none")


def rows_of(
    session: Prompts, model: str, tokens: int, policies: Sequence[str], caches: Sequence[str]
) -> Iterator[Row]:
    """One row for each policy and budget."""
    bandwidth = session.link_bytes_per_s()
    compute_s, layers = computing_s(session), session.model.layers
    for policy in policies:
        for cache in caches:
            steps = list(
                zip(session.step_s(policy, cache), session.moves(policy, cache), strict=True)
            )[1:]
            moved = [moves * session.model.expert_bytes for _, (_, moves) in steps]
            ratios = [
                seconds / max(compute_s, size / bandwidth)
                for (seconds, _), size in zip(steps, moved, strict=True)
            ]
            yield Row(
                model, layers, tokens, policy, cache,
                step_s=statistics.median(seconds for seconds, _ in steps),
                compute_s=compute_s,
                copy_s=statistics.median(moved) / bandwidth,
                ratio=statistics.median(ratios),
                moved_bytes=statistics.median(moved),
                missed_per_layer=statistics.median(missed for _, (missed, _) in steps) / layers,
                stalled=session.stalled(policy, cache),
            )  # fmt: skip


def computing_s(session: Prompts) -> float:
    """Seconds of a step that finds its experts on the device, or nearly all of them."""
    misses = [missed for missed, _ in session.moves("lru", "100%")]
    steps = zip(session.step_s("lru", "100%"), misses, strict=True)
    return statistics.median(seconds for seconds, missed in steps if missed == min(misses))


def sessions(
    model: str, layers: int | None, tokens: Sequence[int], prompts: int, device: str
) -> Iterator[tuple[int, Prompts]]:
    """An open session for each number of *tokens*, all with the same weights; freed behind."""
    spec, sizes = TINY, None
    if model != TINY.name:
        spec, sizes = model_sizes(model), model
        spec = dataclasses.replace(spec, layers=layers or LAYERS.get(model, spec.layers))
    with tempfile.TemporaryDirectory() as folder:
        opened: list[Prompts] = []
        try:
            for count in tokens:
                path = Path(folder) / f"{count}.parquet"
                prompts_of(spec, count, prompts, path)
                setup = Setup(str(path), sizes=sizes)
                session = Prompts(setup, device, like=opened[0] if opened else None)
                session.open()
                opened.append(session)
                yield count, session
        finally:
            for session in reversed(opened):
                session.close()


def line(row: Row) -> str:
    """*row* for the table."""
    return (
        f"| {row.model} | {row.layers} | {row.tokens} | {row.policy} | {row.cache} "
        f"| {row.missed_per_layer:.1f} | {row.step_s * 1e3:.1f} | {row.compute_s * 1e3:.1f} "
        f"| {row.copy_s * 1e3:.1f} | {row.ratio:.2f} | {row.stalled:.0%} |"
    )


def report(rows: Iterable[Row]) -> Iterator[Row]:
    """Print *rows* as they come, and hand them on."""
    click.echo(
        "| model | layers | tokens | policy | cache | missed per layer | step ms | compute ms "
        "| copy ms | ratio | stalled |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        click.echo(line(row))
        yield row


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--model", "models", multiple=True, help="by name; 'tiny' for a CPU",
              default=tuple(LAYERS), show_default=True)  # fmt: skip
@click.option("--layers", type=click.IntRange(1), help="of the model; some of them if not given")
@click.option("--tokens", multiple=True, type=click.IntRange(1), default=(512, 2048),
              show_default=True, help="of a prompt")  # fmt: skip
@click.option("--policy", "policies", multiple=True, default=("lru", "lfu"), show_default=True)
@click.option("--cache", "caches", multiple=True, default=("50%", "25%"), show_default=True)
@click.option("--prompts", type=click.IntRange(3), default=6, show_default=True)
@click.option("--device", type=click.Choice(("cuda", "cpu")), default="cuda", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False),
              default=Path("docs/performance/prefill.json"), show_default=True)  # fmt: skip
def main(  # noqa: PLR0913
    models: tuple[str, ...],
    layers: int | None,
    tokens: tuple[int, ...],
    policies: tuple[str, ...],
    caches: tuple[str, ...],
    prompts: int,
    device: str,
    out: Path,
) -> None:
    """Run it all, print a table and write it to *out*."""

    def every() -> Iterator[Row]:
        for model in models:
            for count, session in sessions(model, layers, tokens, prompts, device):
                yield from rows_of(session, model, count, policies, caches)

    try:
        rows = list(report(every()))
    except InputError as error:
        click.echo(f"prefill: {error}", err=True)
        sys.exit(2)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    found = {
        "device": name,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "prompts": prompts,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
