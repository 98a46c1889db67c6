"""Our side: the checkpoint offloaded anew for each cell, its experts read once for all."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.freetoken.plan import Cell, Task, parse_policy
from benchmarks.freetoken.tokens import counted_from, texts, times_ms
from runtime.fullspeed import at_full_speed
from runtime.offloading import offload
from runtime.store import KeptStore
from runtime.streaming import open_checkpoint


def results(task: Task) -> Iterator[dict[str, Any]]:
    """What each cell of *task* came to, in their order."""
    with KeptStore() as kept:
        for cell in task.cells:
            with (
                offloaded(task, cell, kept) as model,
                torch.no_grad(),
                at_full_speed(torch.device(task.device)) as cores,
            ):
                # Looking for a core that nobody slows down is part of the steps that do.
                model.expert_cache.runner.cores = cores
                yield measured(model, task, cell)


@contextmanager
def offloaded(task: Task, cell: Cell, kept: KeptStore) -> Iterator[Any]:
    """The model under the policy of *cell*; its experts stay in host memory afterwards."""
    policy, forecaster = parse_policy(cell.policy)
    model = offload(
        open_checkpoint(task.folder),
        policy,
        store=kept.store,
        slots=cell.slots,
        batch=cell.batch,
        max_tokens=task.prompt + cell.steps + 1,
        device=task.device,
        # Whole steps, compiled: what can be had at most, where there is a GPU.
        compute="graph" if task.device == "cuda" else "auto",
        compiled=task.device == "cuda",
        forecaster=forecaster,
        hardware=task.hardware,
    )
    if kept.store is None:
        kept.take(model.expert_cache.runner.engine.store)
    try:
        yield model
    finally:
        model.expert_cache.close()
        del model
        gc.collect()
        if task.device == "cuda":
            torch.cuda.empty_cache()


class Forced:
    """The tokens of *cell*, decoded by force over a static cache, as ``generate`` would."""

    def __init__(self, model: Any, task: Task, cell: Cell) -> None:
        device = model.expert_cache.runner.engine.lanes.device
        self._model, self._prompt = model, task.prompt
        self._ids = ids = texts(task, cell).to(device)
        places = torch.arange(ids.shape[1], device=device)
        self._places = places.expand(cell.batch, -1).contiguous()
        self._cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])

    def pass_over(self, first: int, last: int) -> Tensor:
        """One forward pass of the tokens from *first* up to *last*; the likeliest next, [B]."""
        output = self._model(
            input_ids=self._ids[:, first:last],
            position_ids=self._places[:, first:last],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen: Tensor = output.logits[:, -1].argmax(dim=-1)
        return chosen.cpu()

    def decode(self, number: int) -> Tensor:
        """The decode step of that *number*, the prompt and those before it having run."""
        return self.pass_over(self._prompt + number, self._prompt + number + 1)


def measured(model: Any, task: Task, cell: Cell) -> dict[str, Any]:
    """Decode *cell*'s tokens over a static cache, as ``generate`` would, and time each step.

    A step lasts from its tokens until the next ones, the likeliest, are on the host.
    """
    runner, forced = model.expert_cache.runner, Forced(model, task, cell)
    forced.pass_over(0, task.prompt)
    steps_s: list[float] = []
    before: dict[str, int] = {}
    for number in range(cell.steps):
        if number == counted_from(cell.steps):
            before = counts(runner)
        begun = time.perf_counter()
        forced.decode(number)
        steps_s.append(time.perf_counter() - begun)
    made = cell.batch * (cell.steps - counted_from(cell.steps))
    after = counts(runner)
    return {
        **times_ms(steps_s),
        "missed_per_token": (after["missed"] - before["missed"]) / made,
        "prefetched_per_token": (after["prefetched"] - before["prefetched"]) / made,
        "captured": getattr(runner.graphs, "captured", None),
    }


def counts(runner: Any) -> dict[str, int]:
    """Experts missed at the gates since the start, and prefetched, but for those cancelled."""
    planned, copier = runner.engine.planner.counts, runner.engine.copier
    return {
        "missed": planned["missed"],
        "prefetched": planned["prefetch"] - copier.cancelled,
    }
