"""The decode step of a model as ``torch.compile`` makes it, to be captured in place of its own.

transformers' forward is many small kernels; compiled, norms, casts and rotations become part of
their neighbours. Experts stay one call each (:mod:`runtime.expert_op`).
"""

from __future__ import annotations

import os
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.cache_twin import add_to_lengths, counting_layers, signature, twin_of, undone
from runtime.errors import warn_uncompiled
from runtime.hook import Hook
from runtime.masks import full_windows, masks_are_given
from runtime.shortcuts import Shortcuts
from runtime.topk import QuickTopK
from runtime.window import COUNTER, count_step, make_capturable

#: Shapes that are compiled; those beyond run as they are, for each takes about a minute.
MOST_COMPILED = 8

#: The stance in which torch refuses to compile anew, and says so.
NO_MORE = "fail_on_recompile"

#: What the compiler is told: graphs are ours to capture, and bfloat16 is rounded where
#: transformers' own kernels round it. Options that this torch does not know are left out.
_OPTIONS = {"triton.cudagraphs": False, "emulate_precision_casts": True}


def compiled_forward(
    model: Any, hook: Hook, plain: Callable[..., Any], backend: str = "inductor"
) -> CompiledForward:
    """A forward for the decode steps of *model*, whose experts *hook* computes.

    It takes and returns what *plain*, the model's own forward, does. *backend* is that of
    ``torch.compile``.
    """
    return CompiledForward(model, hook, plain, backend)


class CompiledForward:
    """Compiles a decode step when its shapes are first met, and runs it compiled from then on.

    Not while a CUDA graph is captured: nothing may be compiled there, so that
    :meth:`prepare` or a call comes first. The code holds for every cache of the same shapes.
    What cannot be compiled runs as the model's own forward does, and is warned of once.
    """

    def __init__(
        self, model: Any, hook: Hook, plain: Callable[..., Any], backend: str = "inductor"
    ) -> None:
        # A model holds its forward, not the other way round.
        self._model = weakref.ref(model)
        self._hook, self._plain, self._backend = hook, plain, backend
        self._shortcuts = Shortcuts(model)
        self._ready: dict[Any, Callable[..., Any]] = {}
        self._broken = False

    def __call__(self, **kwargs: Any) -> Any:
        """One forward pass of the model's keyword arguments."""
        if not self._can(kwargs):
            return self._plain(**kwargs)
        key, cache = self._key(kwargs), kwargs["past_key_values"]
        if key not in self._ready and not self._make(key, kwargs):
            return self._plain(**kwargs)
        try:
            with torch.compiler.set_stance(NO_MORE):
                return self._run(self._ready[key], cache, kwargs)
        except RuntimeError as error:
            if not _is_outdated(error):
                raise
        # Nothing has run yet: guards are looked at first.
        del self._ready[key]
        if _is_capturing():
            self._give_up("what it was compiled for has changed")
        return self(**kwargs)

    def prepare(self, kwargs: dict[str, Any]) -> bool:
        """Compile for a decode step of *kwargs* unless that is done and holds; whether it is.

        The step runs with its experts left out: once to see that it need not be compiled, or once
        to compile and once more to see that it need not be compiled again. The cache is as
        before then.
        """
        if not self._can(kwargs):
            return False
        key = self._key(kwargs)
        if key in self._ready:
            try:
                self._try(self._ready[key], kwargs, (NO_MORE,))
                return True
            except RuntimeError as error:
                if not _is_outdated(error):
                    raise
            del self._ready[key]
        return self._make(key, kwargs)

    def _can(self, kwargs: dict[str, Any]) -> bool:
        """Whether *kwargs* are of a step that is compiled; its cache can be captured then."""
        if self._broken or torch.is_grad_enabled() or not _suits(kwargs):
            return False
        make_capturable(kwargs["past_key_values"])
        return True

    def _make(self, key: Any, kwargs: dict[str, Any]) -> bool:
        """Compile for the step of *kwargs*, which has that *key*; whether it could be done."""
        if len(self._ready) >= MOST_COMPILED or _is_capturing():
            return False
        _use_own_folder()
        self._say(kwargs)
        step = _own_code(_step)
        compiled: Callable[..., Any] = torch.compile(
            step, fullgraph=True, dynamic=False, backend=self._backend, options=self._options()
        )
        try:
            self._try(compiled, kwargs, ("default", NO_MORE))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._give_up(" ".join(str(error).split())[:160])
            return False
        self._ready[key] = compiled
        return True

    def _give_up(self, why: str) -> None:
        self._broken = True
        warn_uncompiled(why)

    def _options(self) -> dict[str, Any] | None:
        if self._backend != "inductor":
            return None
        known = set(torch._inductor.list_options())
        return {name: value for name, value in _OPTIONS.items() if name in known}

    def _try(
        self, compiled: Callable[..., Any], kwargs: dict[str, Any], stances: Sequence[Any]
    ) -> None:
        """Run the step once in each of *stances*, its experts left out, and undo it."""
        cache = kwargs["past_key_values"]
        for stance in stances:
            with (
                undone(cache),
                self._hook.without_experts() as asked,
                torch.compiler.set_stance(stance),
            ):
                self._compute(compiled, cache, kwargs)
            if asked != list(range(len(self._hook.gates))):
                raise RuntimeError(f"experts of layers {asked} were asked, expected all in order")

    def _run(self, compiled: Callable[..., Any], cache: Any, kwargs: dict[str, Any]) -> Any:
        output = self._compute(compiled, cache, kwargs)
        count_step(cache, kwargs["input_ids"].shape[1])
        output["past_key_values"] = cache
        return output

    def _compute(self, compiled: Callable[..., Any], cache: Any, kwargs: dict[str, Any]) -> Any:
        """The pass over a twin of *cache*, with tensors laid out as in every other pass."""
        inputs = {name: _dense(value) for name, value in kwargs.items()}
        inputs["past_key_values"] = twin = twin_of(cache)
        counting = counting_layers(twin)
        with self._shortcuts.taken(), QuickTopK():
            output = compiled(self._model(), inputs, counting)
        add_to_lengths(counting, kwargs["input_ids"].shape[1])
        return output

    def _key(self, kwargs: dict[str, Any]) -> Any:
        """What the code of a step depends on."""
        hooks = tuple(tuple(gate.router._forward_hooks) for gate in self._hook.gates)
        parts: list[Any] = [signature(kwargs["past_key_values"]), hooks]
        for name, value in sorted(kwargs.items()):
            if name != "past_key_values":
                parts.append((name, _kind(value)))
        return tuple(parts)

    def _say(self, kwargs: dict[str, Any]) -> None:
        """A line on a terminal: nothing else will move for a while."""
        if self._ready or not sys.stderr.isatty():
            return
        model: Any = self._model()
        print(
            f"compiling the decode step of {model.config.model_type} for batch "
            f"{len(kwargs['input_ids'])}: a minute or more the first time, less from then on",
            file=sys.stderr,
        )


def _step(model: Any, inputs: dict[str, Any], counting: list[Any]) -> Any:
    """What is compiled: the forward of the class, for the instance's has been taken over.

    Layers that are *counting* add to copies of their lengths, which are dropped: what nobody
    reads takes no kernel, where adding to the lengths themselves takes one for each layer.
    """
    lengths = [layer.cumulative_length for layer in counting]
    for layer in counting:
        layer.cumulative_length = layer.cumulative_length.clone()
    output = type(model).forward(model, **inputs)
    for layer, length in zip(counting, lengths, strict=True):
        layer.cumulative_length = length
    return output


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of *function* for which nothing has been compiled.

    The compiler keeps its results by code object, looks through all of them at each call, and
    gives up when there are many: models and shapes are kept apart here.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__)


def _suits(kwargs: dict[str, Any]) -> bool:
    """Whether *kwargs* are a decode step over a static cache that has been used once.

    Without positions or masks a model asks its cache for them, and a window counts in Python.
    """
    cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape[1] != 1:
        return False
    layers = getattr(cache, "layers", ())
    if not layers or not getattr(cache, "is_compileable", False):
        return False
    if kwargs.get("position_ids") is None and hasattr(layers[0], COUNTER):
        return False
    if full_windows(cache) and not masks_are_given(kwargs):
        return False
    return all(layer.is_initialized for layer in layers)


def _is_outdated(error: RuntimeError) -> bool:
    """Whether torch says by *error* that code would have to be compiled anew."""
    return NO_MORE in str(error)


def _is_capturing() -> bool:
    cuda: Any = torch.cuda
    return cuda.is_available() and bool(cuda.is_current_stream_capturing())


def _dense(value: Any) -> Any:
    """*value* with the strides that a tensor of its shape has by default; a dict's alike."""
    if isinstance(value, dict):
        return {name: _dense(inner) for name, inner in value.items()}
    return value.contiguous().flatten().view(value.shape) if isinstance(value, Tensor) else value


def _kind(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _kind(inner)) for name, inner in sorted(value.items()))
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    return repr(value)


def _use_own_folder() -> None:
    """Keep compiled code where it outlives a restart, unless the user has named a folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "expertflow" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
