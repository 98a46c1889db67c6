"""What it costs that keys and values follow their sequences: seconds in the simulated world.

A sequence that holds ``n`` tokens has ``n * kv_bytes_per_token`` bytes of keys and values; ``r``
is the rate of the GPU's memory.

- ``merge``: each group has a KV cache of its own, and a sequence that changes its group is
  copied there. Rows trade places, so that all go through a buffer: each byte is read and
  written twice, ``4 * n * kv_bytes_per_token / r`` seconds summed over the sequences, by two
  kernels for each.
- ``reindex``: a sequence stays in its row of the unit's one cache, and every attention first
  gathers its group's rows: each byte is read and written once, in each layer ``2 * n *
  kv_bytes_per_token / (layers * r)`` seconds summed over the step's sequences, by two kernels
  (keys, values). A cache of fixed size is gathered whole: n is then its length.

No kernel takes less than the least that one takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.batching import SeatedStep
from policies.costs import Costs
from policies.routing import Step
from policies.schedule import RowMove, Seating

#: Kernels that copy one sequence to another row, or gather one layer's rows.
KERNELS = 2

_MERGE_PASSES, _GATHER_PASSES = 4, 2


def seating_of(step: Step) -> Seating | None:
    """How *step* lies in the KV cache, if a token scheduler made it."""
    return step.seating if isinstance(step, SeatedStep) else None


@dataclass
class SchedulingTimes:
    """What a token scheduler cost a run, in seconds of a world.

    *kv_s* is the device's time for moving or gathering keys and values, *host_s* what dividing
    took on the host, *waited_s* the part of it that no step hid.
    """

    kv_s: float = 0.0
    host_s: float = 0.0
    waited_s: float = 0.0


def waited_s(seating: Seating, host_s: float, step_before_s: float) -> float:
    """Seconds for which a step waits for its division, which took *host_s* on the host."""
    return max(0.0, host_s - step_before_s) if seating.beside else host_s


class KvCosts:
    """Seconds of moving and gathering keys and values under *costs*.

    *cache_tokens* is the length of a cache of fixed size, 0 where it grows.
    """

    def __init__(self, costs: Costs, cache_tokens: int = 0) -> None:
        self._model, self._cache_tokens = costs.model, cache_tokens
        self._launch_s = costs.profile.host.kernel_launch_s
        self._least_s = costs.profile.gpu.kernel_min_s
        self._rate = costs.profile.gpu.memory_bytes_per_s
        #: Host seconds to launch one layer's gather, where layers are launched kernel by kernel.
        self.issue_gather_s = KERNELS * self._launch_s

    def issue_s(self, moves: Sequence[RowMove]) -> float:
        """Host seconds to launch *moves*."""
        return KERNELS * len(moves) * self._launch_s

    def move_s(self, moves: Sequence[RowMove]) -> float:
        """GPU seconds of *moves*."""
        per_token_s = _MERGE_PASSES * self._model.kv_bytes_per_token / self._rate
        least = KERNELS * self._least_s
        return sum(max(least, move.kv_tokens * per_token_s) for move in moves)

    def gather_s(self, step: Step, seating: Seating) -> float:
        """GPU seconds for which every layer's attention first gathers its rows."""
        if seating.kv != "reindex":
            return 0.0
        tokens = step.size * self._cache_tokens or step.kv_tokens
        layer_bytes = tokens * self._model.kv_bytes_per_token / self._model.layers
        return max(KERNELS * self._least_s, _GATHER_PASSES * layer_bytes / self._rate)
