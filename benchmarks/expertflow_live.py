"""Live cells for ``expertflow_gpu``: what a predictor beside a generating model costs.

Every cell goes through :mod:`reports.validation.live`: the model generates, and what it routed is
simulated. Models are checkpoints, and one with random weights in real dimensions, whose text is
none: of it only the times count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.expertflow_replays import TRACES, Machine, figures
from benchmarks.expertflow_rows import Clock, Row, attempt, ratio
from policies.budget import Budget
from policies.session import Setup
from reports.validation.cut import Cut
from reports.validation.live import live
from reports.validation.request import Done, Request
from runtime.dimensions import config_of, fill_dense
from runtime.families import find_gates, model_spec
from runtime.generate import Offloaded, open_offloaded
from runtime.layout import ExpertLayout
from runtime.live import LiveSettings, run_opened
from runtime.load import pick_device
from runtime.offloading import offload
from runtime.predictor.files import load_predictor
from runtime.predictor.spec import PredictorSpec
from runtime.replay_model import random_experts
from runtime.skeleton import build_skeleton
from runtime.store import KeptStore
from traces.errors import InputError
from traces.sizes import Dimensions, dimensions
from traces.store import open_trace

#: The published model whose dimensions one layer of the random model has, and its predictor's.
REAL, REAL_PREDICTOR = "qwen3-30b", "granular-64x8"

#: The share of a decode step that a predictor may take.
TARGET = 0.05

BATCHES = (1, 4)
NEW_TOKENS, TINY_NEW_TOKENS = 64, 4


class RandomCheckpoint:
    """A Qwen3-MoE model of *dims* with random weights, opened as a checkpoint is."""

    def __init__(self, dims: Dimensions, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = build_skeleton(config_of("qwen3_moe", dims), dtype)
        self._dims, self._device = dims, device
        fill_dense(self.model, device, seed=0)

    def experts(self) -> Iterator[Any]:
        """Every expert's weights."""
        layout = ExpertLayout.of(find_gates(self.model)[0].experts)
        yield from random_experts(layout, self._dims.layers, self._dims.experts, self._device, 0)


@dataclass
class Generating:
    """A model that generates under many policies; its experts are read once.

    *folder* is a checkpoint's; without one the model is random, of the shape that *predictor*
    was trained for. Stands where :func:`runtime.live.run_live` does, but prompts are token ids.
    """

    name: str
    predictor: Path
    machine: Machine
    folder: Path | None = None
    kept: KeptStore = field(default_factory=KeptStore)
    tokens: Sequence[Sequence[int]] = ()
    costs: dict[str, Any] | None = None

    @property
    def spec(self) -> PredictorSpec:
        """The predictor's."""
        return load_predictor(self.predictor).spec

    def __call__(self, model: Any, *, policy: str, budget: Budget, out: Path, **more: Any) -> Any:
        """One run; arguments as those of :func:`runtime.live.run_live`."""
        log, spans, progress, _ = (more.pop(n) for n in ("log", "spans", "progress", "prompts"))
        settings = LiveSettings(**more)
        longest = max(map(len, self.tokens)) + settings.max_new_tokens
        options = settings.options(budget, longest)
        if self.kept.store is not None:
            options["store"] = self.kept.store
        with self._open(policy, options) as opened:
            self.kept.take(opened.runner.engine.store)
            opened.runner.engine.planner.log = log
            result, recording, measured = run_opened(
                opened, settings, self.tokens, policy=policy, out=out, spans=spans,
                progress=progress,
            )  # fmt: skip
        self.costs = measured.predictor
        return out, result, recording, measured

    def _open(self, policy: str, options: dict[str, Any]) -> Offloaded:
        if self.folder is not None:
            return open_offloaded(self.folder, policy, record=True, **options)
        checkpoint = RandomCheckpoint(self._dims(), pick_device(self.machine.device))
        spec = model_spec(checkpoint.model, self.name)
        options = {**options, "record": True, "name": spec.name}
        opened = Offloaded(Path(), offload(checkpoint, policy, **options), spec, None)
        opened.keep_routing()
        return opened

    def _dims(self) -> Dimensions:
        """Layers, experts and vocabulary as the predictor knows them, the rest as published."""
        spec = self.spec
        dims = dataclasses.replace(
            dimensions(REAL), layers=spec.layers, experts=spec.experts, top_k=spec.top_k,
            vocabulary=spec.vocabulary,
        )  # fmt: skip
        if self.machine.tiny:
            small = {"hidden": 64, "intermediate": 32, "heads": 2, "kv_heads": 1, "head_dim": 32}
            dims = dataclasses.replace(dims, **small)
        return dims


def generating(folders: Sequence[Path], machine: Machine) -> Iterator[Generating]:
    """The models: those in *folders*, with the predictors of their names, and a random one.

    A folder ``FOLDER=PREDICTOR`` names its predictor.
    """
    for text in map(str, folders):
        folder, _, predictor = text.partition("=")
        name = Path(folder).name
        file = Path(predictor) if predictor else TRACES / "predictors" / f"{name}.safetensors"
        yield Generating(name, file, machine, Path(folder))
    file = TRACES / "predictors" / f"{REAL_PREDICTOR}.safetensors"
    yield Generating(f"{REAL} layers, random", file, machine)


def prompts(spec: PredictorSpec, count: int) -> list[list[int]]:
    """Prompts of the sample of *spec*'s model, random ids where there is none."""
    sample = TRACES / "samples" / f"{spec.model}.parquet"
    if sample.is_file():
        sequences = open_trace(sample).sequences(("token",))
        found = [s.tokens[: s.prefill].tolist() for s, _ in zip(sequences, range(count))]  # noqa: B905
        return [ids[:40] for ids in found]
    drawn = np.random.default_rng(0).integers(2, spec.vocabulary, (count, 8))
    return [list(map(int, row)) for row in drawn]


def predicting(model: Generating, clock: Clock) -> Iterator[Row]:
    """Without a predictor and with it, one sequence at a time and several."""
    with model.kept:
        for batch in BATCHES:
            cells = (
                ("lru", None), ("predictive", "ahead"),
                ("predictive", f"routing-path:{model.predictor}"),
            )  # fmt: skip
            base: Row = {}
            for policy, forecaster in cells:
                told = (forecaster or "").partition(":")[0]
                words = {"model": model.name, "batch": batch, "policy": policy, "told": told}

                def work(p: str = policy, f: str | None = forecaster, b: int = batch) -> Row:
                    return _cell(model, p, f, b)

                row = attempt(words, work, clock)
                base = base or row
                yield row | ratio(row, base, "over_lru")


def _cell(model: Generating, policy: str, forecaster: str | None, batch: int) -> Row:
    """One cell at half of the experts."""
    machine = model.machine
    if not model.predictor.is_file():
        raise InputError(f"{model.predictor}: no such file, expected a predictor")
    model.tokens = prompts(model.spec, max(BATCHES))
    model.costs = None
    setup = Setup("", hardware=machine.hardware, forecaster=forecaster)
    request = Request(
        setup, [policy], [Budget(cache="50%")], [batch], device=machine.device,
        compute=machine.compute, cut=Cut(None, TINY_NEW_TOKENS if machine.tiny else NEW_TOKENS),
        model=model.folder or Path(), prompts=[f"prompt {n}" for n in range(len(model.tokens))],
    )  # fmt: skip
    (done,) = live(request, lambda session, label: iter, model)
    return figures(done) | (_spent(model.costs, done) if model.costs else {})


def _spent(costs: dict[str, Any], done: Done) -> Row:
    """The predictor's share of decoding, and what a step of it takes."""
    spent, share = costs["decode"], _share(costs["decode"])
    taken, passes = spent["host_s"] + spent["wait_s"], max(spent["passes"], 1)
    return {
        "predictor_share": share,
        "predictor_share_of_time": taken / done.results[1].time["decode_s"],
        "within_target": share is not None and share <= TARGET,
        "host_us": 1e6 * spent["host_s"] / passes,
        "wait_us": 1e6 * spent["wait_s"] / passes,
        "stream_us": 1e6 * spent["stream_s"] / passes,
        "pass_us": 1e6 * spent["pass_s"] / passes,
        "prompt_share": _share(costs["prefill"]),
        "guessed": costs["guessed"],
        "guessed_right": costs["guessed_right"],
        "predictor_bytes": costs["device_bytes"],
    }


def _share(spent: dict[str, Any]) -> float | None:
    """The predictor's share of the passes of one phase; None if there were none."""
    taken = spent["host_s"] + spent["wait_s"]
    return taken / spent["pass_s"] if spent["pass_s"] else None
