"""FreeToken's side: its in-process engine, decoding tokens that are forced on its sampler.

Written for 0.1.2 (``pip install freetoken==0.1.2``, without its extra ``accel``): attention is
its Triton backend, a decode step one CUDA graph, LRU its own kernel over one pool of slots. Each
cell is decoded three times over the same tokens: as its ``generate`` schedules it, step by step,
and with its counters on, which would cost the others a little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.freetoken.plan import FUSED, Cell, Task
from benchmarks.freetoken.tokens import counted_from, texts, times_ms
from traces.errors import InputError

VERSION = "0.1.2"


class ForcedSampler:
    """Stands where FreeToken's sampler was: every step chooses what *tokens* say.

    *tokens* are int32 [length, B] on the device. The own sampler still chooses, and is not
    heeded: its time is part of a step.
    """

    def __init__(self, sampler: Any, tokens: Tensor) -> None:
        self._sampler, self._tokens = sampler, tokens
        #: What is called behind the step that chose the token of a place.
        self.after: Mapping[int, Callable[[], None]] = {}

    def prepare(self, batch: Any) -> Any:
        """Note which place of the texts comes next; all sequences are at the same."""
        places = {req.device_len for req in batch.reqs}
        rows = [req.uid for req in batch.reqs]
        if len(places) != 1 or rows != list(range(self._tokens.shape[1])):
            raise RuntimeError(f"sequences {rows} at {places}, expected all at one place")
        args = self._sampler.prepare(batch)
        args.place = places.pop()
        return args

    def sample(self, logits: Tensor, args: Any) -> Tensor:
        """The forced tokens [B]."""
        self._sampler.sample(logits, args)
        if args.place in self.after:
            self.after[args.place]()
        return self._tokens[args.place]


def timed_class(base: type) -> type:
    """*base* (its LLM), noting when the tokens of each step have come to the host."""

    class Timed(base):  # type: ignore[misc]
        """An engine whose *arrivals* are the times of its tokens."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.arrivals: list[float] = []
            super().__init__(*args, **options)

        def offline_send_result(self, reply: Sequence[Any]) -> None:
            super().offline_send_result(reply)
            if any(hasattr(message, "next_token") for message in reply):
                self.arrivals.append(time.perf_counter())

    return Timed


def options_of(task: Task) -> dict[str, Any]:
    """How its LLM is made: slots for the first cell, graphs for every batch."""
    batches = sorted({cell.batch for cell in task.cells})
    length = task.prompt + max(cell.steps for cell in task.cells) + 8
    options: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "attention_backend": "triton",
        # What one run has left in its prefix cache would shorten the prompts of the next.
        "cache_type": "naive",
        "max_running_req": batches[-1],
        "cuda_graph_bs": batches,
        "max_seq_len_override": length,
        "num_token_override": max(8192, 2 * length * batches[-1]),
    }
    if task.system == FUSED:
        return options | {"moe_backend": "fused"}
    slots = task.cells[0].slots
    return options | {
        "moe_backend": "offload",
        "moe_cache_size": slots,
        # Two layers' worth of slots, which prefill borrows.
        "moe_prefill_overlap": slots >= 2 * task.shape.experts,
        # Its other way goes around the page cache, which holds what was written just now.
        "expert_load": "serial",
    }


def results(task: Task) -> Iterator[dict[str, Any]]:
    """What each cell of *task* came to, in their order; the pool is resized in between."""
    import freetoken

    if freetoken.__version__.partition("+")[0] != VERSION:
        raise InputError(f"freetoken {freetoken.__version__} is installed, expected {VERSION}")
    from freetoken.llm import LLM

    # Nothing may have touched the GPU before.
    llm = timed_class(LLM)(task.folder, **options_of(task))
    slots = task.cells[0].slots
    for cell in task.cells:
        if task.system != FUSED and cell.slots != slots:
            slots = cell.slots
            llm.rebuild_cache(moe_cache_size=slots)
        yield measured(llm, task, cell)


def measured(llm: Any, task: Task, cell: Cell) -> dict[str, Any]:
    """Time *cell* in both ways, the faster of which counts, and count its misses."""
    tokens = texts(task, cell)
    generated = times_ms(generate(llm, task, tokens))
    with steps_timed(llm.engine) as steps_s:
        generate(llm, task, tokens)
    alone = times_ms(steps_s[: cell.steps])
    faster = min(generated, alone, key=lambda found: found["ms"])
    return {
        **faster,
        "generate_ms": generated["ms"],
        "step_ms": alone["ms"],
        "missed_per_token": None if task.system == FUSED else _missed(llm, task, cell, tokens),
    }


def generate(
    llm: Any, task: Task, tokens: Tensor, after: Mapping[int, Callable[[], None]] | None = None
) -> list[float]:
    """Decode *tokens* int64 [B, prompt + steps + 1] by force: seconds from step to step, [steps].

    *after* is what is called when the token of a place in the texts has been chosen.
    """
    from freetoken.core import SamplingParams

    steps = tokens.shape[1] - task.prompt - 1
    own = llm.engine.sampler
    # Its loop runs one step more than it gives back: that step is asked for, and left out.
    longer = torch.cat([tokens, tokens[:, -1:]], dim=1)
    forced = ForcedSampler(own, longer.T.to(torch.int32).contiguous().to(llm.device))
    forced.after = after or {}
    torch.cuda.synchronize()
    llm.engine.sampler = forced
    llm.arrivals.clear()
    try:
        prompts = tokens[:, : task.prompt].tolist()
        # The prompt's own step chooses the first of them.
        llm.generate(prompts, SamplingParams(ignore_eos=True, max_tokens=steps + 2))
    finally:
        llm.engine.sampler = own
    torch.cuda.synchronize()
    arrivals = llm.arrivals[: steps + 1]
    if len(arrivals) != steps + 1:
        raise RuntimeError(f"{len(arrivals)} steps came back, expected {steps + 1}")
    return [last - first for first, last in pairwise(arrivals)]


@contextmanager
def steps_timed(engine: Any) -> Iterator[list[float]]:
    """Within, every decode step of *engine* begins on an idle GPU and is waited for.

    The list takes the seconds from its call until its tokens are on the host: what its
    scheduler does for the step, which comes before, is left out.
    """
    steps_s: list[float] = []
    own = engine.forward_batch

    def timed(batch: Any, args: Any) -> Any:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        output = own(batch, args)
        output.copy_done_event.synchronize()
        if batch.is_decode:
            steps_s.append(time.perf_counter() - begun)
        return output

    engine.forward_batch = timed
    try:
        yield steps_s
    finally:
        del engine.forward_batch


def _missed(llm: Any, task: Task, cell: Cell, tokens: Tensor) -> float:
    """Experts copied per token in the half that counts, by its own counters.

    They are part of the captured graphs: these are captured anew, with them and again without.
    """
    from flashlib.kernels.slot_cache import Stat

    cache = llm.engine.moe_offload_cache
    cache.collect_stats = True
    llm.rebuild_cache(moe_cache_size=cell.slots)
    kept: list[Tensor] = []

    def keep() -> None:
        kept.append(cache.lru_stats[:, int(Stat.MISS)].sum())

    first = counted_from(cell.steps)
    # A step chooses the token of the place behind its own.
    generate(llm, task, tokens, {task.prompt + first: keep, task.prompt + cell.steps: keep})
    before, missed = (int(count) for count in kept)
    cache.collect_stats = False
    llm.rebuild_cache(moe_cache_size=cell.slots)
    return (missed - before) / (cell.batch * (cell.steps - first))
