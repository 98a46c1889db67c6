"""The captured decode steps of a model, by the shapes of their inputs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from policies.whole_steps import runs_whole
from runtime.captured import Counters, tensors
from runtime.chains import Chain
from runtime.compiled import CompiledForward
from runtime.errors import warn_uncaptured
from runtime.handshake import handshake_for
from runtime.hook import Hook
from runtime.masks import full_windows, masks_are_given
from runtime.maths import Fused
from runtime.whole_steps import WholeStep
from runtime.window import make_capturable

#: Chains kept at a time; one is needed for each batch size and cache. The one that has not run
#: for the longest time makes room.
MOST_CHAINS = 16

#: The most that may be expected; those beyond run as they are.
MOST_SHAPES = 64

#: How often a shape is captured. Where more shapes take turns than there are chains, those that
#: have lost theirs so often run as they are: capturing takes as long as some twenty steps.
MOST_CAPTURES = 2


@cache
def _capture_stream(device: torch.device) -> Any:
    """One stream for all captures: cuBLAS keeps 32 MiB for every stream that it has seen."""
    cuda: Any = torch.cuda
    return cuda.Stream(device)


class DecodeGraphs:
    """The captured steps of one model, by the shapes of their inputs.

    With *whole* a step is one graph where that can be, else a chain of them.
    """

    def __init__(self, hook: Hook, forward: Callable[..., Any], *, whole: bool = False) -> None:
        self._hook, self._forward = hook, forward
        #: What steps in one graph and the host tell each other by, where there are such steps.
        self.handshake = handshake_for(hook.engine) if whole else None
        self._chains: dict[Any, Chain | WholeStep] = {}
        self._met: set[Any] = set()
        self._captures: Counter[Any] = Counter()
        self._most = MOST_CHAINS
        self._broken = False
        #: The key of what :meth:`suits` was asked of.
        self._asked: Any = None
        #: Chains captured since the start, those of caches that are gone included.
        self.captured = 0

    def suits(self, kwargs: dict[str, Any]) -> bool:
        """Whether a pass can be replayed: static cache, no gradients, shapes met before.

        The first pass of a shape runs as it is: what is set up lazily must not be captured.
        """
        cache = kwargs.get("past_key_values")
        if self._broken or torch.is_grad_enabled() or not getattr(cache, "is_compileable", False):
            return False
        if any(full_windows(cache)) and not masks_are_given(kwargs):
            return False
        self._asked = key = _key(kwargs)
        if key in self._met:
            return key in self._chains or self._captures[key] < MOST_CAPTURES
        self._met.add(key)
        return False

    def expect(self, shapes: int) -> None:
        """Keep chains for so many *shapes*, which are known to take turns."""
        self._most = min(max(MOST_CHAINS, shapes), MOST_SHAPES)

    @property
    def chains(self) -> Sequence[Chain | WholeStep]:
        """The chains captured so far."""
        return list(self._chains.values())

    def warm(self, kwargs: dict[str, Any]) -> None:
        """Set up, capture and replay a pass once, its experts left out.

        Nothing is planned or counted, but the key-value cache is written to.
        """
        with self._hook.without_experts():
            self._forward(**kwargs)
        key = _key(kwargs)
        self._met.add(key)
        chain = self._capture(key, kwargs)
        if chain is not None:
            chain.replay_blind()

    def run(self, kwargs: dict[str, Any], begin: Callable[[], None] = lambda: None) -> Any:
        """One decode step, captured now or replayed; :meth:`suits` has been asked of *kwargs*.

        *begin* is called once, before the step's first gate is answered.
        """
        key = self._asked
        chain = self._chains.pop(key, None)
        captured = chain is None
        if chain is None:
            if self.handshake is not None:
                # A capture begins the handshake anew, and would forget what was given up.
                self.handshake.check()
            chain = self._capture(key, kwargs)
            if chain is None:
                begin()
                return self._forward(**kwargs)
        # The last is the one that ran last.
        self._chains[key] = chain
        return chain.replay(kwargs, begin, counted=captured)

    def forget(self, cache: int) -> None:
        """A cache is gone: what was captured for it reads freed memory."""
        self._chains = {key: chain for key, chain in self._chains.items() if key[0] != cache}
        self._met = {key for key in self._met if key[0] != cache}
        self._captures = Counter({k: n for k, n in self._captures.items() if k[0] != cache})

    def _capture(self, key: Any, kwargs: dict[str, Any]) -> Chain | WholeStep | None:
        if len(self._chains) >= self._most:
            self._chains.pop(next(iter(self._chains)))
        self._captures[key] += 1
        cache = kwargs["past_key_values"]
        make_capturable(cache)
        if isinstance(self._forward, CompiledForward):
            # Nothing can be compiled while a graph is captured.
            self._forward.prepare(kwargs)
        counters = Counters(cache)
        try:
            stream = _capture_stream(self._hook.engine.lanes.device)
            chain = self._captured(kwargs, stream)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            counters.restore()
            self._broken = True
            warn_uncaptured(" ".join(str(error).split())[:160])
            return None
        self._chains[key] = chain
        self.captured += 1
        weakref.finalize(cache, _forget, weakref.ref(self), key[0])
        return chain

    def _captured(self, kwargs: dict[str, Any], stream: Any) -> Chain | WholeStep:
        shake = self.handshake
        if shake is not None and runs_whole(self._hook.engine.planner, kwargs["input_ids"].numel()):
            return WholeStep(self._hook, shake, self._forward, kwargs, stream)
        return Chain(self._hook, self._forward, kwargs, stream)


def decode_graphs(
    hook: Hook, forward: Callable[..., Any], *, whole: bool = False
) -> DecodeGraphs | None:
    """Room for the captured steps of a model, where they can be captured at all."""
    if hook.engine.lanes.device.type != "cuda" or not isinstance(hook.maths, Fused):
        return None
    return DecodeGraphs(hook, forward, whole=whole)


def _forget(graphs: weakref.ref[DecodeGraphs], cache: int) -> None:
    alive = graphs()
    if alive is not None:
        alive.forget(cache)


def _key(kwargs: dict[str, Any]) -> Any:
    """What a captured pass depends on, other than the values in its input tensors."""
    cache = kwargs["past_key_values"]
    full = full_windows(cache)
    parts: list[Any] = [id(cache), full]
    for name, value in sorted(kwargs.items()):
        found = tensors(value)
        if found:
            parts.append((name, *((tuple(t.shape), t.dtype) for t in found)))
        elif name != "past_key_values":
            parts.append((name, repr(value)))
    return tuple(parts)
