"""Cuts of the decode kernels tried one by one: ``expert_kernels.py --tune``.

For one token every pair has its own programs, for more an expert's tokens are grouped. Of each
way the first projection's cuts are tried beside the default second, and the other way about;
then the best of both together (`best` for one number of tokens, `common` for all). `overlap` is
the default with its overlap of launches changed, `larger` the best with larger groups; for one
token, `in order` has matrix instructions sum up all inputs one after the other, as transformers'
kernels do. A cut that cannot be compiled or launched is told and passed by.
With a low-precision bank all experts are read from that, and cuts differ in how it is read; `full`
is the time of the default and the best cut with all experts in full precision, beside that bank.
Every line is printed as it is found; the file of ``--json`` is written anew after each model:

``{"device", "bytes_per_s", "rows": [{"model", "tokens", "way", "trial", "cut", "us", "share",
"error", "same", "failed"}]}``

*us* is one layer's time in a CUDA graph; *share* is the time that reading every demanded expert
once takes at the device's copy rate, over that; *error* is the root mean square distance from
float32 in transformers' own (``batched_mm``); *same* the share of outputs with its very bits.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers.integrations import moe

from benchmarks.expert_candidates import (
    group_candidates,
    low_candidates,
    ordered_cuts,
    pair_candidates,
)
from benchmarks.expert_kernels import Bench, event_us
from runtime.kernels.cpu import run_plain
from runtime.kernels.cuts import Cut, Tiles, group_cut, pair_cut
from runtime.kernels.decode import DecodeKernels
from runtime.kernels.fused import DECODE_TOKENS
from runtime.kernels.prefill import run_prefill
from runtime.kernels.routes import Call

#: Threads that compile at a time, at most.
COMPILERS = 16

#: Most tokens for which pairs by themselves are tried beside groups.
PAIRS_TRIED = 4


@dataclass
class Row:
    """One measurement; *cut* is None for the sorted path, *failed* empty if it ran."""

    model: str
    tokens: int
    way: str
    trial: str
    cut: Cut | None
    us: float | None = None
    share: float | None = None
    error: float | None = None
    same: float | None = None
    failed: str = ""

    def __str__(self) -> str:
        if self.us is None or self.share is None:
            found = f"failed: {self.failed}"
        else:
            found = f"{self.us:8.1f} us {self.share:5.1%}"
        if self.error is not None:
            found += f"  error {self.error:.3f} same {self.same:.1%}"
        cut = "" if self.cut is None else f" {_short(self.cut)}"
        return f"{self.model:13} T={self.tokens:<2} {self.way:6} {self.trial:8} {found}{cut}"


class Tuner:
    """Tries cuts for *tokens* per call until *limit_s* is over; *path* takes the results."""

    def __init__(
        self, rate: float, tokens: Sequence[int], limit_s: float, path: Path | None
    ) -> None:
        self._rate = rate
        self._tokens = [count for count in tokens if count <= DECODE_TOKENS]
        self._end_s = time.monotonic() + limit_s
        self._path = path
        self.rows: list[Row] = []
        # Every capture collects garbage: what all the modules made need not be looked at again.
        gc.collect()
        gc.freeze()

    def tune(self, name: str, bench: Bench, left: Sequence[str]) -> None:
        """Try all for one model, within its share of the time: it and others are *left*."""
        begin_s = time.monotonic()
        model_end_s = begin_s + (self._end_s - begin_s) / len(left)
        banks, gating, top_k = bench.fused.banks, bench.gating, bench.shape.top_k
        ways = (
            ("pairs", pair_cut(banks, gating, top_k, True), pair_candidates, [1]),
            ("groups", group_cut(banks, gating), group_candidates, self._tokens),
        )
        for way, base, make, tokens in ways:
            shape = bench.shape
            candidates = make(shape) if bench.low is None else low_candidates(shape, base)
            some = [
                count for count in tokens if count in self._tokens and (way, count) != ("groups", 1)
            ]
            if some:
                _Search(self, name, bench, way, model_end_s).run(base, candidates, some)
        for count in self._tokens if bench.low is None else ():
            self._others(name, bench, count)
        self._save()
        torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - begin_s:.0f} s\n", flush=True)

    def add(self, row: Row) -> None:
        """Keep and print *row*."""
        self.rows.append(row)
        print(row, flush=True)

    def timed(
        self, bench: Bench, row: Row, call: Callable[[int], object], full: bool = False
    ) -> Row:
        """*row* with the time of *call*, of *full* precision or not, or why there is none."""
        needed_s = bench.demand_bytes(bench.routes(row.tokens)[1], full) / self._rate
        try:
            row.us = graph_us(call, bench.layers)
            row.share = needed_s * 1e6 / row.us
        except Exception as error:
            row.failed = f"{type(error).__name__}: {str(error).strip()[-160:]}"
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                self.add(row)
                self._save()
                raise
        return row

    def _others(self, name: str, bench: Bench, tokens: int) -> None:
        """The sorted path; groups and sums in order for one token, pairs for a few."""
        hidden, index, weights = bench.routes(tokens)
        out = torch.empty_like(hidden)
        banks, fused = bench.fused.banks, bench.fused

        def by_sorting(layer: int) -> None:
            call = Call(hidden, index, weights, bench.tables[layer], out)
            run_prefill(banks, bench.gating, call, fused._grouped, fused.rounds)

        self.add(self.timed(bench, Row(name, tokens, "sorted", "default", None), by_sorting))
        grouped = group_cut(banks, bench.gating)
        trials: list[tuple[str, str, Cut]] = []
        if tokens == 1:
            trials.append(("groups", "default", grouped))
            trials += [("pairs", "in order", cut) for cut in ordered_cuts(bench.shape, grouped)]
        elif tokens <= PAIRS_TRIED:
            pairs = pair_cut(banks, bench.gating, bench.shape.top_k, True)
            trials.append(("pairs", "default", pairs))
        for way, trial, cut in trials:
            kernels = DecodeKernels(
                banks, bench.gating, bench.shape.top_k, tokens, cut, rounds=True
            )
            row = self.timed(
                bench, Row(name, tokens, way, trial, cut), _caller(bench, kernels, tokens)
            )
            if row.us is not None:
                row.error, row.same = _judge(bench, kernels, tokens)
            self.add(row)

    def _save(self) -> None:
        if self._path is not None:
            found = {
                "device": torch.cuda.get_device_name(),
                "bytes_per_s": self._rate,
                "rows": [asdict(row) for row in self.rows],
            }
            self._path.write_text(json.dumps(found, indent=1) + "\n")


class _Search:
    """The cuts of one *way* for one model."""

    def __init__(self, tuner: Tuner, name: str, bench: Bench, way: str, end_s: float) -> None:
        self._tuner, self._name, self._bench = tuner, name, bench
        self._way, self._end_s = way, end_s
        self._us: dict[tuple[Cut, int], float] = {}

    def run(self, base: Cut, candidates: dict[str, list[Tiles]], tokens: list[int]) -> None:
        """Try *candidates* of each projection in *base*, and the best together."""
        default, other = base, replace(base, overlap=not base.overlap)
        self._compile([base, other], tokens)
        for count in tokens:
            self._try(base, count, "default", judged=True)
            self._try(other, count, "overlap")
        base = min(base, other, key=lambda cut: sum(self._us.get((cut, n), 1e9) for n in tokens))
        firsts = [replace(base, first=tiles) for tiles in candidates["first"]]
        seconds = [replace(base, second=tiles) for tiles in candidates["second"]]
        # How many tokens there are matters only to the kernel that groups them.
        self._compile([*firsts, *seconds], tokens[:1])
        for trial, cuts in (("first", firsts), ("second", seconds)):
            for cut in cuts:
                for count in tokens:
                    self._try(cut, count, trial)
        bests = [self._best(base, firsts, seconds, [count]) for count in tokens]
        common = self._best(base, firsts, seconds, tokens)
        self._compile([common, *bests], tokens[:1])
        for count, best in zip(tokens, bests, strict=True):
            self._try(best, count, "best", judged=True)
            if common != best:
                self._try(common, count, "common")
            for cut in dict.fromkeys((default, best)) if self._bench.low is not None else ():
                self._try_full(cut, count)
            if 0 < best.group < count:
                self._try(replace(best, group=2 * best.group), count, "larger")

    def _best(self, base: Cut, firsts: list[Cut], seconds: list[Cut], tokens: list[int]) -> Cut:
        """The best first and second projection together, over all of *tokens*."""

        first = min([base, *firsts], key=lambda cut: self._cost(cut, base, tokens)).first
        second = min([base, *seconds], key=lambda cut: self._cost(cut, base, tokens)).second
        return replace(base, first=first, second=second)

    def _cost(self, cut: Cut, base: Cut, tokens: list[int]) -> float:
        """The time of *cut* in that of *base*, summed over *tokens*; infinite where it failed."""
        return sum(
            self._us.get((cut, count), float("inf")) / self._us.get((base, count), 1.0)
            for count in tokens
        )

    def _kernels(self, cut: Cut, tokens: int, rounds: bool = True) -> DecodeKernels:
        bench = self._bench
        return DecodeKernels(
            bench.fused.banks, bench.gating, bench.shape.top_k, tokens, cut, rounds=rounds
        )

    def _compile(self, cuts: list[Cut], tokens: list[int]) -> None:
        """Compile what *cuts* need, side by side; failures are told when they are tried."""
        begin_s = time.monotonic()
        with side_by_side():
            for cut in dict.fromkeys(cuts):
                for count in tokens:
                    hidden, index, weights = self._bench.routes(count)
                    table, out = self._bench.tables[0], torch.empty_like(hidden)
                    try:
                        self._kernels(cut, count).compile((hidden, index, weights, table, out))
                    except Exception as error:
                        print(f"  not compiled ahead: {_short(cut)}: {type(error).__name__}")
        took_s = time.monotonic() - begin_s
        print(f"{self._name} {self._way}: {len(cuts)} cuts compiled in {took_s:.1f} s", flush=True)

    def _try_full(self, cut: Cut, tokens: int) -> None:
        """Time *cut* with all experts in full precision."""
        bench, row = self._bench, Row(self._name, tokens, self._way, "full", cut)
        if (cut, tokens) in self._us:
            call = _caller(bench, self._kernels(cut, tokens), tokens, full=True)
            self._tuner.add(self._tuner.timed(bench, row, call, full=True))

    def _try(self, cut: Cut, tokens: int, trial: str, judged: bool = False) -> None:
        """Time *cut* unless the time is over or it is known; with *judged* its error too."""
        if time.monotonic() > self._end_s and trial not in ("default", "best"):
            return
        row = Row(self._name, tokens, self._way, trial, cut)
        try:
            kernels = self._kernels(cut, tokens)
        except Exception as error:
            row.failed = f"{type(error).__name__}: {error}"
        else:
            self._tuner.timed(self._bench, row, _caller(self._bench, kernels, tokens))
            if row.us is not None:
                self._us[cut, tokens] = row.us
                if judged:
                    row.error, row.same = _judge(self._bench, kernels, tokens)
        self._tuner.add(row)


def _caller(
    bench: Bench, kernels: DecodeKernels, tokens: int, full: bool = False
) -> Callable[[int], None]:
    """A call of *kernels* for a layer; for its *full* precision also where there is a low one."""
    hidden, index, weights = bench.routes(tokens)
    out = torch.empty_like(hidden)
    tables = bench.full_tables if full else bench.tables

    def call(layer: int) -> None:
        kernels.run(hidden, index, weights, tables[layer], out, -1, False)

    return call


def _judge(bench: Bench, kernels: DecodeKernels, tokens: int) -> tuple[float, float]:
    """Error in that of transformers, and the share of equal outputs, in the first layer."""
    hidden, index, weights = bench.routes(tokens)
    ours, exact = torch.empty_like(hidden), torch.empty_like(hidden, dtype=torch.float32)
    table = bench.tables[0]
    kernels.run(hidden, index, weights, table, ours, -1, False)
    run_plain(bench.fused.banks, bench.gating, Call(hidden, index, weights, table, exact))
    if bench.low is not None:
        return _rms(ours - exact) / _rms(exact), float("nan")
    theirs = moe.batched_mm_experts_forward(bench.stacked(0), hidden, index, weights)
    same = float((ours == theirs).float().mean())
    return _rms(ours - exact) / _rms(theirs - exact), same


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def graph_us(call: Callable[[int], object], layers: int) -> float:
    """Microseconds per layer of *call* in a CUDA graph of all *layers*."""
    for layer in range(2):
        call(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            call(layer)
    graph.replay()
    return event_us(graph.replay, rounds=5) / layers


@contextmanager
def side_by_side() -> Iterator[None]:
    """Kernels asked for within compile on several threads, where triton can do so."""
    try:
        from triton import AsyncCompileMode  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        yield
        return
    with (
        ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as threads,
        AsyncCompileMode(threads, ignore_errors=True),
    ):
        yield


def _short(cut: Cut) -> str:
    """*cut* in few characters."""

    def tiles(cut: Tiles) -> str:
        how = "dot" if cut.dot else "sum"
        low = f" low k{cut.low_k} s{cut.low_stages}" if cut.low_k or cut.low_stages else ""
        return f"{how} {cut.block_n}x{cut.block_k} w{cut.warps} /{cut.splits} s{cut.stages}{low}"

    group = f" by {cut.group}" if cut.group else ""
    return f"[{tiles(cut.first)}] [{tiles(cut.second)}]{group}{' overlap' if cut.overlap else ''}"
