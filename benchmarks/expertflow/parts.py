"""The parts of the comparison: what each runs on, and how its rows are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import expertflow_gaps
from benchmarks.expertflow import hits, scheduling, speeds
from benchmarks.expertflow.cells import name_of, told
from benchmarks.expertflow_gaps import Source
from benchmarks.token_scheduler import SWITCH_EXPERTS, switch_trace
from policies.result import read_json
from traces.errors import InputError
from traces.writing import replacing

#: The sample traces, and the model that each has the shape of.
SAMPLES = {"coarse-8x2": "mixtral-8x7b", "granular-64x8": "qwen3-30b"}

#: Whose sizes are taken for speeds, and whose routing goes with them.
SPEEDS = (
    ("coarse-8x2", "mixtral-8x7b"),
    ("granular-64x8", "qwen1.5-moe"),
    ("granular-64x8", "switch-base-128"),
)

#: Sequences of the traces that are drawn in Switch's shape, where hits and speeds are looked at.
SWITCH_SEQUENCES = 48

#: And where tokens of several batches are scheduled.
SCHEDULED_SEQUENCES = 96


@dataclass(frozen=True)
class Inputs:
    """Where a run finds what it works on: the repository's files, forecasts, a place for traces.

    *taught* names, for a sample, a trace of other texts for the token table.
    """

    root: Path
    forecasts: Path
    work: Path
    gpt_oss: Path | None = None
    taught: tuple[tuple[str, Path], ...] = ()

    def sample(self, name: str, sizes: str | None = None) -> Source:
        """A sample trace with the forecasts of its predictor."""
        forecasts = self.forecasts / f"{name}.npz"
        if not forecasts.is_file():
            raise InputError(f"{forecasts}: not there, expected what predictor forecast wrote")
        return Source(str(self.trace(name)), sizes or SAMPLES[name], str(forecasts))

    def trace(self, name: str) -> Path:
        """The file of a sample trace."""
        return self.root / "traces/samples" / f"{name}.parquet"

    def switch(self, experts: int, sequences: int) -> Source:
        """A drawn trace in the shape of Switch."""
        folder = self.work / f"switch-{sequences}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"switch-base-{experts}.parquet"
        return Source(str(path if path.is_file() else switch_trace(folder, experts, sequences)))


def gap_rows(source: Source) -> Iterator[expertflow_gaps.Row]:
    """Every cell of one trace, named without folders."""
    for batch in (1, 4, 16):
        for cache in ("25%", "50%"):
            for row in expertflow_gaps.cell(source, cache, batch, "h200-pcie5"):
                yield replace(row, trace=name_of(source), forecaster=told(row.forecaster))


def _gaps_coarse(inputs: Inputs) -> Iterator[Any]:
    yield from gap_rows(inputs.sample("coarse-8x2"))


def _gaps_granular(inputs: Inputs) -> Iterator[Any]:
    yield from gap_rows(inputs.sample("granular-64x8"))


def _gaps_gpt_oss(inputs: Inputs) -> Iterator[Any]:
    if inputs.gpt_oss is None:
        raise InputError("gaps-gpt-oss: no --gpt-oss, expected a trace of its routing")
    yield from gap_rows(Source(str(inputs.gpt_oss)))


def _hits(inputs: Inputs) -> Iterator[Any]:
    yield from hits.rows(inputs.switch(32, SWITCH_SEQUENCES))
    for name in SAMPLES:
        yield from hits.rows(inputs.sample(name))


def _speeds(inputs: Inputs) -> Iterator[Any]:
    for name, sizes in SPEEDS:
        yield from speeds.rows(inputs.sample(name, sizes))
    yield from speeds.rows(inputs.switch(128, SWITCH_SEQUENCES))


def _scheduling(inputs: Inputs) -> Iterator[Any]:
    for experts in SWITCH_EXPERTS:
        yield from scheduling.rows(inputs.switch(experts, SCHEDULED_SEQUENCES))
    for name in SAMPLES:
        yield from scheduling.rows(inputs.sample(name))


def _recall(inputs: Inputs) -> Iterator[Any]:
    from benchmarks.expertflow import recall  # the only part that needs torch

    taught = dict(inputs.taught)
    for name in SAMPLES:
        predictor = inputs.root / "traces/predictors" / f"{name}.safetensors"
        yield from recall.rows(inputs.trace(name), predictor, taught.get(name))


#: Name of a part, which is the name of its file -> how its rows are made.
PARTS: dict[str, Callable[[Inputs], Iterator[Any]]] = {
    "recall": _recall,
    "hits": _hits,
    "scheduling": _scheduling,
    "speeds": _speeds,
    "gaps-coarse": _gaps_coarse,
    "gaps-granular": _gaps_granular,
    "gaps-gpt-oss": _gaps_gpt_oss,
}


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Rows as JSON, whole or not at all; ratios and speeds to six digits."""
    text = json.dumps([_rounded(asdict(row)) for row in rows], indent=1, allow_nan=False)
    with replacing(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """*value* with every number of a fraction to six significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_rows(folder: Path, part: str, kind: type[Any]) -> list[Any]:
    """The rows of *part* as *kind*; none where the part has not been run."""
    path = folder / f"{part}.json"
    if not path.is_file():
        return []
    found = read_json(path, f"rows of {part}")
    try:
        return [kind(**row) for row in found]
    except TypeError as error:
        raise InputError(f"{path}: {error}, expected rows of {part}") from None
