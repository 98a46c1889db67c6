"""A decode step that has been captured: its inputs, its output, what else a replay has to move."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from runtime.hook import Hook, HostAnswer
from runtime.maths import Inputs
from runtime.window import COUNTER, count_step, windows

#: Computes the experts of a layer [T, H] from hidden states [T, H], experts and weights [T, k].
Experts = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Counters:
    """Python numbers that a cache keeps beside its tensors: a replay does not move them."""

    def __init__(self, cache: Any) -> None:
        self._kept = [(layer, getattr(layer, COUNTER)) for layer in windows(cache)]

    def restore(self) -> None:
        """Set them to what they were."""
        for layer, count in self._kept:
            setattr(layer, COUNTER, count)


class GateAnswer:
    """Where a captured gate leaves its answer, and what its experts read."""

    def __init__(self, host: HostAnswer, inputs: Inputs) -> None:
        self.host, self.inputs = host, inputs


@contextmanager
def capturing(hook: Hook, experts: Experts, stream: Any) -> Iterator[None]:
    """What runs inside is captured on *stream*: *experts* takes the calls for experts."""
    cuda: Any = torch.cuda
    hook.capturing = experts
    cuda.synchronize()
    stream.wait_stream(cuda.current_stream())
    try:
        with cuda.stream(stream):
            yield
    finally:
        hook.capturing = None
    cuda.current_stream().wait_stream(stream)


class Captured:
    """Inputs and output of one captured decode step.

    It lives as long as its cache, not the other way round: :meth:`let_go` once captured.
    """

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.inputs = {name: _cloned(value) for name, value in kwargs.items()}
        self._moving = [name for name, value in kwargs.items() if tensors(value)]
        self.output: Any = None

    def let_go(self) -> None:
        """Forget the cache of which the captured tensors are."""
        self.inputs["past_key_values"] = self.output["past_key_values"] = None

    def refresh(self, kwargs: dict[str, Any]) -> None:
        """Take the values of *kwargs* for the next replay."""
        for name in self._moving:
            _refresh(self.inputs[name], kwargs[name])

    def result(self, cache: Any, *, counted: bool) -> Any:
        """The output over *cache* with logits of its own: the next replay overwrites them.

        *counted* if the cache's Python counters have moved already.
        """
        if not counted:
            count_step(cache, 1)
        output = _twin(self.output)
        output["logits"] = self.output.logits.clone()
        output["past_key_values"] = cache
        return output


def tensors(value: Any) -> list[Tensor]:
    """The tensors in *value*: itself, or those of a dict of masks."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in tensors(inner)]
    return []


def _twin(output: Any) -> Any:
    """A second output with the entries of *output*, without what making one of its class checks."""
    kind: Any = type(output)
    twin = kind.__new__(kind)
    OrderedDict.update(twin, output)
    vars(twin).update(vars(output))
    return twin


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _cloned(inner) for name, inner in value.items()}
    return value


def _refresh(mine: Any, value: Any) -> None:
    """Copy the tensors of *value* over those captured."""
    for target, source in zip(tensors(mine), tensors(value), strict=True):
        if target.data_ptr() != source.data_ptr():
            target.copy_(source, non_blocking=True)
