"""ExpertFlow's token scheduler: tokens with similar paths decode together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.base import Context
from policies.medoids import Search, best_division, file_order, packed
from policies.registry import parameter, register_scheduler
from policies.scheduling import KV_MODES, PATH_SOURCES, Coming, TokenScheduler
from traces.errors import InputError
from traces.trace import IntArray

#: Host seconds of :meth:`ExpertFlow.divide` with its defaults: fixed, per token, and per two
#: tokens and value of a path. Fitted to medians on one core of an AMD EPYC, 16 to 64
#: tokens of 512 to 6144 values; ``benchmarks/token_scheduler.py --host`` measures them again.
HOST_S = (3.0e-4, 9.0e-6, 1.1e-10)


@register_scheduler("expertflow")
@dataclass
class ExpertFlow(TokenScheduler):
    """Groups tokens by the experts they are expected to take (balanced k-medoids, swaps).

    ExpertFlow, arXiv 2410.17954, section 3.2. Differs: every division is one of several
    (*starts* random ones, the present groups, file order), the one whose groups are expected
    to take the fewest experts; tokens are then exchanged while that number falls (*swaps*).
    """

    unit: int = parameter(2, "batches that decode together", low=1, high=8)
    every: int = parameter(1, "rounds of decode steps between divisions", low=1, high=1 << 20)
    in_a_row: bool = parameter(False, "a group takes its steps between divisions in a row")
    rounds: int = parameter(30, "of k-medoids at most; 0: sequences in file order", low=0, high=100)
    starts: int = parameter(4, "random starts of k-medoids", low=1, high=64)
    swaps: int = parameter(64, "exchanges of two tokens at most, after k-medoids", low=0, high=4096)
    kv: str = parameter("merge", f"how KV caches follow: {' or '.join(KV_MODES)}")
    paths: str = parameter("auto", f"whose paths: {', '.join(PATH_SOURCES)}")
    overlap: bool = parameter(False, "divide beside the running step, its tokens unknown")

    def __post_init__(self) -> None:
        for name, known in (("kv", KV_MODES), ("paths", PATH_SOURCES)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}, expected {' or '.join(known)}"
                )

    def reset(self, context: Context) -> None:
        self._random = np.random.default_rng(context.seed)

    def divide(self, coming: Coming) -> IntArray:
        n = len(coming.present)
        if not self.rounds:
            return file_order(n, coming.groups)
        paths = packed(coming.paths.reshape(n, -1))
        search = Search(self.rounds, self.starts, self.swaps)
        return best_division(paths, coming.groups, coming.present, self._random, search)

    def host_s(self, tokens: int, values: int) -> float:
        fixed_s, per_token_s, per_value_s = HOST_S
        return fixed_s + tokens * per_token_s + tokens * tokens * values * per_value_s
