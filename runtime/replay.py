"""One forward pass per step of a trace, with the routing that the trace recorded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.kv_moves import seating_of, waited_s
from policies.routing import DECODE, Step
from policies.schedule import Seating
from policies.session import TraceSession
from runtime.compiled import compiled_forward
from runtime.forcing import ForcedRouting
from runtime.graphs import MOST_SHAPES, decode_graphs
from runtime.hook import Hook
from runtime.lanes import Mark
from runtime.maths import Reference
from runtime.measuring import RealWorld
from runtime.offloading import Options
from runtime.replay_caches import ReplayCaches
from runtime.steps import ReplayedSteps


class Replay:
    """Drives a model through the steps of a trace and times each.

    A prefill step runs the prompts of its batch as one row of tokens; a decode step runs one
    token of each live sequence over a static cache as long as the trace's last position.
    Tokens are drawn at random (the trace decides where they go). What is set up lazily, and
    the capture of graphs, is done before the clock starts.

    Under a token scheduler keys and values follow their sequences before a step. Who decodes
    with whom has been decided before the run; the time that took on this host is waited for
    where no step hides it.
    """

    def __init__(self, model: Any, hook: Hook, session: TraceSession, options: Options) -> None:
        self._model, self._hook = model, hook
        hook.steps = ReplayedSteps(session.model)
        self._forced = ForcedRouting(hook.gates, hook.engine.lanes.device)
        self._forced.__enter__()
        self._device = hook.engine.lanes.device
        whole = options.whole_steps(self._device)
        forward = model.forward
        if options.compiled:
            forward = compiled_forward(model, hook, forward)
        self._graphs = decode_graphs(hook, forward, whole=whole) if options.graphs else None
        self._keys = session.batches().decode_shapes()
        self._most = session.shape.prompt_tokens
        longest, self._schedule = session.shape.cache_tokens, session.schedule
        self._caches = ReplayCaches(model, self._device, longest, self._schedule)
        self._divisions_s = iter(session.division_s(hook.engine.lanes.now))
        #: Marks around what moved keys and values, not read yet.
        self._following: list[tuple[Mark, Mark]] = []
        self._random = np.random.default_rng(0)

    def run(self, steps: Iterable[Step], world: RealWorld) -> None:
        """Run *steps* and add each to *world*."""
        self._warm_up()
        sequences: frozenset[int] = frozenset()
        for step in steps:
            ids, seating = frozenset(step.sequence_ids.tolist()), seating_of(step)  # type: ignore[union-attr]
            if seating.first if seating is not None else not ids <= sequences:
                self._caches.rewind()
            sequences = ids
            self._run_step(step, seating, world)
        world.finish()
        if self._schedule is not None:
            self._hook.engine.lanes.finish()
            self._read_following(world)

    def close(self) -> None:
        """Take the hooks off the model and forget its caches."""
        self._forced.__exit__(None, None, None)
        self._graphs = None
        self._caches.clear()

    def _run_step(self, step: Step, seating: Seating | None, world: RealWorld) -> None:
        """One step, from its tokens on the host to the next ones on the host."""
        hook, engine = self._hook, self._hook.engine
        chosen = torch.from_numpy(np.ascontiguousarray(step._experts.swapaxes(0, 1)))  # type: ignore[union-attr]
        self._forced.set(chosen.to(torch.int64).to(self._device))
        tokens = torch.from_numpy(self._random.integers(0, self._vocabulary, step.size))
        decoding = step.phase == DECODE
        if isinstance(hook.maths, Reference):
            hook.maths.decoding = decoding
        engine.lanes.finish()
        self._read_following(world)
        world.begin(decoding)
        begun = engine.lanes.now()
        if seating is not None:
            self._await_division(seating, world)
        hook.step = step
        engine.start()
        engine.begin(step)
        if seating is not None:
            self._follow(step, seating)
        logits = self._decode(tokens, seating) if decoding else self._prefill(tokens)
        engine.watch.split("attention")
        # The next token, on the host: a step lasts until it is there.
        logits.argmax(dim=-1).cpu()
        world.add(step, engine.lanes.now() - begun)
        engine.end()
        hook.step = None

    def _await_division(self, seating: Seating, world: RealWorld) -> None:
        """Wait for as long as no step hides that the sequences are divided into groups."""
        step_before_s = world.decode_step_s[-1] if world.decode_step_s else 0.0
        divided_s = next(self._divisions_s)
        seconds = waited_s(seating, divided_s, step_before_s)
        world.scheduling.host_s += divided_s
        world.scheduling.waited_s += seconds
        now = self._hook.engine.lanes.now
        end = now() + seconds
        while now() < end:
            pass

    def _follow(self, step: Step, seating: Seating) -> None:
        """Keys and values go where *step* needs them, on the computing lane."""
        if not seating.moves and seating.kv == "merge":
            return
        lanes = self._hook.engine.lanes
        before = lanes.mark()
        assert step.positions is not None
        self._caches.follow(seating, step.positions)
        self._following.append((before, lanes.mark()))

    def _read_following(self, world: RealWorld) -> None:
        """Add up what moving keys and values took; the device has done all of it."""
        lanes = self._hook.engine.lanes
        for before, after in self._following:
            world.scheduling.kv_s += lanes.read(after) - lanes.read(before)
            lanes.recycle([before, after])
        self._following.clear()

    @property
    def _vocabulary(self) -> int:
        return int(self._model.config.vocab_size)

    def _prefill(self, tokens: Tensor) -> Tensor:
        ids = tokens.unsqueeze(0).to(self._device, non_blocking=True)
        logits: Tensor = self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    def _decode(self, tokens: Tensor, seating: Seating | None) -> Tensor:
        inputs = self._caches.inputs(len(tokens), seating)
        inputs["input_ids"].copy_(tokens.unsqueeze(1), non_blocking=True)
        if self._graphs is not None and self._graphs.suits(inputs):
            logits: Tensor = self._graphs.run(inputs).logits
        else:
            logits = self._model(**inputs).logits
        return logits

    def _warm_up(self) -> None:
        """Caches, graphs and everything that is set up when it is first used."""
        if self._graphs is not None:
            # All are known: none is to be captured in the middle of what is timed.
            self._graphs.expect(len(self._keys))
        # The largest first: the others use its memory.
        keys = sorted(self._keys, key=lambda key: (-key[1], key[0]))
        for number, key in enumerate(keys):
            inputs = self._caches.make(key)
            self._force_anything(key[1])
            with self._hook.without_experts():
                self._model(**inputs)
            self._caches.settle(key)
            if self._graphs is not None and number < MOST_SHAPES:
                self._graphs.warm(inputs)
        if self._most:
            self._force_anything(self._most)
            with self._hook.without_experts():
                self._prefill(torch.zeros(self._most, dtype=torch.int64))
        self._caches.rewind()

    def _force_anything(self, tokens: int) -> None:
        gates = self._hook.gates
        chosen = torch.arange(gates[0].top_k).expand(len(gates), tokens, -1)
        self._forced.set(chosen.to(self._device))
