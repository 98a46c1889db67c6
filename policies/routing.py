"""What a policy is told: the step under way and what one layer's gate has chosen.

An expert is one whole number, ``layer * experts + id``: hashable, sortable, and the index
of an array over all experts. Layers count the MoE layers from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from traces.trace import FloatArray, IntArray

PREFILL = "prefill"
DECODE = "decode"


class Step:
    """One forward pass of one batch: a whole prompt of every sequence, or one token of each.

    *number* counts the steps of a run from 0. *token_ids*, *positions* and *sequence_ids*
    are arrays [T] over the step's tokens (*token_ids* may be absent). What the gates will
    choose is private to the world that runs the step: a policy learns it event by event.
    """

    __slots__ = (
        "_ahead",
        "_counts",
        "_experts",
        "_next_use",
        "_weights",
        "demand",
        "kv_tokens",
        "number",
        "phase",
        "positions",
        "sequence_ids",
        "size",
        "token_ids",
    )

    def __init__(self, number: int, phase: str, size: int) -> None:
        self.number = number
        self.phase = phase
        self.size = size
        self.kv_tokens = size
        self.token_ids: IntArray | None = None
        self.positions: IntArray | None = None
        self.sequence_ids: IntArray | None = None
        #: Distinct experts of each layer in ascending order: for worlds, not for policies.
        self.demand: list[list[int]] = []
        self._experts: IntArray | None = None
        self._weights: FloatArray | None = None
        self._ahead: tuple[IntArray, ...] = ()
        self._counts: list[list[int]] | None = None
        self._next_use: list[list[int]] | None = None


class Routing:
    """One event: what one layer's gate chose for the tokens of one step.

    *experts* are the distinct experts in ascending order (the demand), *event* counts the
    events of a run from 0.
    """

    __slots__ = ("event", "experts", "layer", "step")

    def __init__(self, step: Step, layer: int, experts: Sequence[int], event: int) -> None:
        self.step = step
        self.layer = layer
        self.experts = experts
        self.event = event

    @property
    def token_experts(self) -> IntArray:
        """Expert ids within the layer, [T, k], by falling gate weight."""
        if self.step._experts is None:
            raise LookupError("this run does not carry the experts of each token")
        chosen: IntArray = self.step._experts[:, self.layer]
        return chosen

    @property
    def token_weights(self) -> FloatArray | None:
        """Gate weights as the model applies them, [T, k]; None where the trace has none."""
        if self.step._weights is None:
            return None
        weights: FloatArray = self.step._weights[:, self.layer]
        return weights

    @property
    def counts(self) -> list[int]:
        """Tokens that chose each expert of the demand."""
        if self.step._counts is None:
            return [1] * len(self.experts)
        return self.step._counts[self.layer]

    @property
    def ahead(self) -> tuple[IntArray, ...]:
        """Guesses of the next layers' gates, each [T, m] ids within its layer, best first.

        Empty where none was recorded; shorter near the last layer.
        """
        last = self.step._experts.shape[1] - 1 if self.step._experts is not None else -1
        depth = min(len(self.step._ahead), last - self.layer)
        return tuple(guess[:, self.layer] for guess in self.step._ahead[:depth])

    @property
    def next_use(self) -> list[int]:
        """Event of each expert's next use: only for policies that declare ``offline``."""
        if self.step._next_use is None:
            raise LookupError("the future is known to offline policies only")
        return self.step._next_use[self.layer]

    def weights_of(self, expert_ids: Sequence[int]) -> list[float]:
        """:meth:`weight_of` of several experts, all of which tokens have chosen."""
        weights = self.token_weights
        if weights is None:
            return [self.weight_of(id) for id in expert_ids]
        sums = np.bincount(self.token_experts.reshape(-1), weights.reshape(-1))
        found: list[float] = sums[expert_ids].tolist()
        return found

    def weight_of(self, expert_id: int) -> float:
        """Gate weight that falls on one expert of the layer, summed over the tokens."""
        weights = self.token_weights
        chosen = self.token_experts == expert_id
        if weights is None:
            return float(np.count_nonzero(chosen) / chosen.shape[1])
        return float(np.asarray(weights, dtype=np.float64)[chosen].sum())
