"""Runs the forward passes of an offloaded model, one step of the contract each."""

from __future__ import annotations

import functools
import inspect
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from policies.hindsight import belady_missed
from policies.routing import DECODE, PREFILL, Step
from runtime.compiled import compiled_forward
from runtime.errors import OffloadError, warn_uncaptured
from runtime.fullspeed import Cores
from runtime.graphs import DecodeGraphs, decode_graphs
from runtime.holdings import Holdings
from runtime.hook import Hook, Steps
from runtime.masks import with_masks
from runtime.maths import Reference
from runtime.predictor.forecaster import LivePath
from runtime.rotary import follows_length, keep_frequencies
from runtime.topk import with_quick_topk


class StepSource(Steps, Protocol):
    """Knows the step that a forward pass is, and what is to be kept of it."""

    def begin(self, tokens: Any, real: Any, fresh: bool) -> Step:
        """The step that runs *tokens* int [B, S], *real* false for padding.

        *tokens* lie on the model's device: to read them is to wait for it.
        """
        ...

    def end(self, step: Step) -> None:
        """*step* has run."""
        ...


class Runner:
    """Takes the place of a model's ``forward``.

    Whatever goes wrong inside a step leaves planner and slots out of step with each other:
    then everything is freed, and the model says so when it is asked again.
    """

    def __init__(
        self,
        model: Any,
        hook: Hook,
        steps: StepSource,
        *,
        graphs: bool,
        whole: bool = False,
        compiled: bool = False,
    ) -> None:
        self.hook, self.engine, self.steps = hook, hook.engine, steps
        self.plain_forward = _without_owner(model.forward)
        self.graphs = self._decode_graphs(model, whole, compiled) if graphs else None
        self._config, self._dtype = model.config, model.dtype
        self._demand: list[list[list[int]]] = []
        #: The cache of the pass before, which is not to be kept alive.
        self._seen: weakref.ref[Any] | None = None
        self._closed = ""
        self.tokens = 0
        #: Seconds of all passes of each phase on the host, until all was launched.
        self._pass_s = {PREFILL: 0.0, DECODE: 0.0}
        #: Whose steps are to leave cores that somebody else slows down, if set.
        self.cores: Cores | None = None
        #: The forecaster, where a predictor runs beside the model.
        self.beside: LivePath | None = None
        forecaster = self.engine.planner.forecaster
        if isinstance(forecaster, LivePath):
            self.beside = forecaster
        # generate reads the signature to learn what it may pass.
        own = model.forward
        self._names = list(inspect.signature(own).parameters)
        model.forward = functools.wraps(own)(partial(Runner.forward, self))
        self._holdings = Holdings(self.engine)
        self._free = weakref.finalize(model, self._holdings.free)

    def _decode_graphs(self, model: Any, whole: bool, compiled: bool) -> DecodeGraphs | None:
        """Room for captured decode steps, after making *model* ready for them; None if it is not.

        *compiled*: what is captured is the forward as ``torch.compile`` makes it.
        What looks at the length of a sequence is refused here: a capture that the device breaks
        off may leave its random generator unusable.
        """
        plain = with_quick_topk(self.plain_forward)
        forward = compiled_forward(model, self.hook, plain) if compiled else plain
        graphs = decode_graphs(self.hook, forward, whole=whole)
        if graphs is None:
            return None
        why = follows_length(model)
        if why:
            warn_uncaptured(why)
            return None
        keep_frequencies(model, self.engine.lanes.device)
        return graphs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass from the slots."""
        if self._closed:
            raise OffloadError(f"the offloaded model {self._closed}, expected an open one")
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if not isinstance(kwargs.get("input_ids"), Tensor):
            raise OffloadError("forward: no input_ids given, expected token ids [B, S]")
        try:
            return self._run(kwargs)
        except torch.OutOfMemoryError as error:
            self.close("ran out of GPU memory and was freed")
            raise OffloadError(
                "out of GPU memory during a forward pass, expected room beside the slots; give "
                f"fewer slots ({' '.join(str(error).split())[:120]})"
            ) from None
        except BaseException as error:
            self.close(f"was freed after {type(error).__name__} in mid-step")
            raise

    def _run(self, kwargs: dict[str, Any]) -> Any:
        if self.cores is not None:
            self.cores.settle_at_times()
        ids = kwargs["input_ids"]
        fresh = self._is_fresh(kwargs.get("past_key_values"), ids.shape[1])
        decoding = ids.shape[1] == 1 and not fresh
        maths = self.hook.maths
        if isinstance(maths, Reference):
            maths.decoding = decoding
        started = time.perf_counter()
        self.engine.start()
        output = self._pass(kwargs, decoding, partial(self._begin, kwargs, fresh))
        self._end(time.perf_counter() - started)
        logits = getattr(output, "logits", None)
        if self.beside is not None and isinstance(logits, Tensor):
            self.beside.foresee(logits[:, -1])
        return output

    def _pass(self, kwargs: dict[str, Any], decoding: bool, begin: Callable[[], None]) -> Any:
        """The model's own pass, replayed where that can be done; *begin* begins its step."""
        if decoding and self.graphs is not None and kwargs.get("past_key_values") is not None:
            kwargs = with_masks(self._config, self._dtype, kwargs)
            if self.graphs.suits(kwargs):
                return self.graphs.run(kwargs, begin)
            begin()
            # What will be captured is loaded when it first runs.
            return with_quick_topk(self.plain_forward)(**kwargs)
        begin()
        return self.plain_forward(**kwargs)

    def _begin(self, kwargs: dict[str, Any], fresh: bool) -> None:
        ids = kwargs["input_ids"]
        step = self.steps.begin(ids, _real_tokens(kwargs, ids, fresh), fresh)
        self.hook.step = step
        self.engine.begin(step)

    def _end(self, seconds: float) -> None:
        """All of the pass, which took the host so many *seconds*, has been launched."""
        step, engine = self.hook.step, self.engine
        assert step is not None
        engine.watch.split("attention")
        engine.end()
        self.steps.end(step)
        self._demand.append(step.demand)
        self.tokens += step.size
        self.hook.step = None
        self._pass_s[step.phase] += seconds

    def _is_fresh(self, cache: Any, tokens: int) -> bool:
        """Whether a pass of *tokens* per sequence begins new ones: its cache is empty.

        A cache of the pass before with one more token goes on: to ask a static cache for its
        length would wait for the device.
        """
        if cache is None:
            self._seen = None
            return True
        if getattr(cache, "begun", False):
            # Rows that hold their prompts already.
            return False
        if self._seen is not None and self._seen() is cache:
            if tokens == 1:
                return False
        else:
            self._seen = weakref.ref(cache)
        return int(cache.get_seq_length()) == 0

    def stats(self) -> dict[str, Any]:
        """Counts and bytes so far; see :meth:`ExpertCacheHandle.stats`."""
        engine, planner = self.engine, self.engine.planner
        missed = planner.counts["missed"]
        held, accesses = engine.accesses - missed, engine.accesses
        copier = engine.copier
        share = accesses or 1
        return {
            "policy": planner.policy.name,
            "slots": planner.context.slots,
            "steps": engine.steps,
            "tokens": self.tokens,
            "accesses": accesses,
            "held": held,
            "missed": missed,
            "hit": held - engine.late,
            "late": engine.late,
            "held_ratio": held / share,
            "hit_ratio": (held - engine.late) / share,
            "belady_missed": belady_missed(planner.context, self._demand),
            "moves": {
                "demand": planner.counts["demand"],
                "prefetch": planner.counts["prefetch"],
                "cancelled": copier.cancelled,
            },
            "bytes": {"demand": copier.demand_bytes, "prefetch": copier.prefetch_bytes},
            "memory": {
                "slots_bytes": engine.bank.size_bytes,
                "host_bytes": engine.store.size_bytes,
            },
            "decisions_sha256": planner.log.sha256(),
            "predictor": self.predictor_costs(),
        }

    def predictor_costs(self) -> dict[str, Any] | None:
        """What a predictor beside the model cost, and what the passes took; None without one."""
        if self.beside is None:
            return None
        found = self.beside.costs()
        for phase, seconds in self._pass_s.items():
            found[phase]["pass_s"] = seconds
        return found

    def sequences(self) -> list[Any]:
        """The routing that was kept."""
        kept = getattr(self.steps, "sequences", None)
        return list(kept()) if kept is not None else []

    def close(self, why: str = "was closed") -> None:
        """Free the slots and the store; :meth:`forward` refuses from now on."""
        if self._closed:
            return
        self._closed = why
        self._holdings.finish()
        if self.beside is not None:
            self.beside.close()
        self.hook.step = None
        self.graphs = None
        # These hold on to the slots.
        self.hook.maths = _Gone()
        self._free()


class _Gone:
    """Stands where the maths was: it held on to the slots."""

    def begin(self, *inputs: Any) -> Any:
        raise OffloadError("the offloaded model was closed, expected an open one")


def _without_owner(method: Callable[..., Any]) -> Callable[..., Any]:
    """*method* bound to its object weakly: what holds it must not keep a model alive."""
    function = getattr(method, "__func__", None)
    if function is None:
        return method
    owner = weakref.ref(method.__self__)  # type: ignore[attr-defined]
    return lambda *args, **kwargs: function(owner(), *args, **kwargs)


def _real_tokens(kwargs: dict[str, Any], ids: Tensor, fresh: bool) -> Any:
    """Which of *ids* [B, S] are not padding on the left, bool; None if none is.

    Masked tokens further on stay: transformers reads the logits of the last one, masked or not.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or not fresh:
        return None
    if mask.dim() == 4:
        # Made by generate for a static cache: padding may not even look at itself.
        own = mask[:, 0].diagonal(dim1=1, dim2=2)
        mask = own if own.dtype == torch.bool else own == 0
    real = np.maximum.accumulate(mask[:, -ids.shape[1] :].bool().cpu().numpy(), axis=1)
    return None if bool(np.all(real)) else real
