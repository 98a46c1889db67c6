"""Hooks on every router of a model, there while a context lasts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from runtime.families import Gate


class RouterHooks(ABC):
    """A context in which each router of *gates* runs a hook after its forward pass.

    The hooks are gone when the context ends, however it ends.
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        self.gates = list(gates)
        self._hooks: list[Any] = []

    @abstractmethod
    def _hook(self, layer: int) -> Any:
        """The forward hook for the router of *layer*."""

    def __enter__(self) -> Self:
        for layer, gate in enumerate(self.gates):
            self._hooks.append(gate.router.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
