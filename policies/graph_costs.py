"""What a decode step costs as captured graphs, cut at every gate: seconds on one machine.

One graph holds the experts of a layer, read in place, and everything of the next layer up to
its gate. Its kernels run one after the other, so the time that small kernels need whatever
they read (the floor) and the time of reading weights and key-value cache add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from policies.base import Service
from policies.hardware import ANY_FAMILY, HardwareProfile
from policies.moves import Move
from policies.planner import Plan
from traces.model import ModelSpec
from traces.sizes import Dimensions, dimensions, size_names

#: A part of a model's name -> its family, the most special first.
_FAMILY_BY_NAME = (
    ("mixtral", "mixtral"),
    ("qwen1.5-moe", "qwen2_moe"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
    ("olmoe", "olmoe"),
    ("deepseek-v2", "deepseek_v2"),
    ("deepseek-v3", "deepseek_v3"),
    ("gpt-oss", "gpt_oss"),
    ("granite", "granitemoe"),
    ("phi", "phimoe"),
    ("glm", "glm4_moe"),
)


class Cold(NamedTuple):
    """How a wait slows the host down: its caches go to others.

    The first *most_s* of what it does then take longer by *share* of themselves for each
    e-fold of the wait beyond *after_s*.
    """

    share: float = 0.0
    after_s: float = 1e-4
    most_s: float = 1.0

    def weight(self, waited_s: float) -> float:
        """How much longer, as a share, the host takes at first after *waited_s* without work."""
        if waited_s <= 0.0 or not self.share:
            return 0.0
        return self.share * math.log1p(waited_s / self.after_s)

    def longer(self, seconds: float, weight: float) -> float:
        """What takes *seconds* in warm caches, after a wait of that :meth:`weight`."""
        return seconds + weight * min(seconds, self.most_s)


@dataclass(frozen=True)
class Facts:
    """What a model's name tells: its *family*, and how its dense weights are spread.

    *head_params* are read once a step; *idle_params*, an embedding that is no head as well,
    are looked up by row and hardly read. The rest belongs to the layers.
    """

    family: str = ANY_FAMILY
    head_params: int = 0
    idle_params: int = 0


def sizes_name(model: ModelSpec) -> str:
    """The name of the model whose sizes *model* has: its own, or what ``--sizes`` gave."""
    name = model.name.removesuffix(" sizes")
    return name.rpartition(" routing with ")[2]


def facts_of(model: ModelSpec) -> Facts:
    """What the name of *model* tells; a name that is not known tells nothing."""
    name = sizes_name(model).lower().replace("_", "-")
    family = next((family for part, family in _FAMILY_BY_NAME if part in name), ANY_FAMILY)
    if name not in size_names():
        return Facts(family)
    dims = dimensions(name)
    head = _vocabulary_params(dims, model)
    return Facts(family, head, 0 if dims.tied else head)


def _vocabulary_params(dims: Dimensions, model: ModelSpec) -> int:
    """Weights of the head, shared out over the layers as :func:`traces.sizes.resize` does."""
    return round(dims.vocabulary * dims.hidden * model.layers / dims.layers)


def of_family(figures: Mapping[str, float], family: str, otherwise: float) -> float:
    """The figure of *family*, of any family, or *otherwise*."""
    return figures.get(family, figures.get(ANY_FAMILY, otherwise))


def table_changes(moves: Iterable[Move], total: int) -> int:
    """Entries of a device's table of experts that *moves* change; *total* experts have one.

    An expert that loses its slot and one that gets it; low-precision copies have no entry.
    """
    return sum((0 <= move.victim < total) + (move.copy < total) for move in moves)


class UntoldChanges:
    """Counts the entries of a device's table that have changed since it was told.

    *count* is what the next graph has to be told of, beside what its own event changes.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self.count = 0

    def kept(self, moves: Iterable[Move]) -> None:
        """*moves* are made while nobody reads this table; it has an entry for each expert."""
        self.count = min(self.count + table_changes(moves, self._total), self._total)

    def fetched(self, moves: Iterable[Move]) -> None:
        """*moves* are made ahead of time, before a step's first layer or behind an event."""
        self.count += table_changes(moves, self._total)

    def told(self, plan: Plan, experts: int) -> int:
        """Entries that are told with the graph of an event of *experts* under *plan*.

        What is computed before the graph is hidden from it, and put right later.
        """
        demanded = (move for wave in plan.waves for move in wave)
        # For this event alone they are read from elsewhere; what is left out has no entry anyway.
        served = (plan.served or {}).values()
        borrowed = sum(s is not Service.CPU and s is not Service.SKIP for s in served)
        changes = self.count + table_changes(demanded, self._total) + borrowed
        self.count = borrowed
        if plan.whole:
            return changes
        self.count += experts
        return experts


class GraphCosts:
    """Seconds of a decode step's parts as captured graphs for one model.

    *launch_s* and :meth:`table_s` are host time, everything else the GPU's. Graphs have a
    key-value cache of fixed length: where it is known, *cache_tokens* per sequence are read
    at every step, not only those that are filled.
    """

    def __init__(
        self,
        profile: HardwareProfile,
        model: ModelSpec,
        cache_tokens: int = 0,
        low_bits: int = 4,
    ) -> None:
        self.profile, self.model, self.cache_tokens = profile, model, cache_tokens
        self.launch_s = profile.host.graph_launch_s
        #: Host time from the end of an event's work until it can read the next answer.
        self.return_s = profile.host.return_s
        self._tell_s = profile.host.table_tell_s
        self._change_s = profile.host.table_update_s
        host = profile.host
        #: What a wait adds to issuing and launching; :meth:`planning_cold` to planning.
        self.cold = Cold(host.cold_share, host.cold_after_s, host.cold_most_s)
        software = profile.software
        self.facts = facts = facts_of(model)
        self.floor_s = of_family(software.layer_floor_s, facts.family, 0.0)
        self.several_floor_s = of_family(software.several_floor_s, facts.family, self.floor_s)
        rate = profile.gpu.memory_bytes_per_s
        self._read_rate = software.dense_efficiency * rate
        kept = of_family(software.kv_efficiency, facts.family, software.dense_efficiency)
        self._kv_rate = kept * rate
        self._position_s = of_family(software.kv_token_s, facts.family, 0.0)
        in_layers = max(model.dense_params - facts.head_params - facts.idle_params, 0)
        self._layer_params = in_layers / model.layers
        #: The head, once a step.
        self.head_s = facts.head_params * model.param_bytes / self._read_rate
        self._efficiency = profile.expert.fused_efficiency or profile.expert.memory_efficiency
        self._shared = profile.expert.fused_token_share
        self._low_bytes = model.expert_bytes_at(low_bits)
        self._low_efficiency = profile.expert.low_efficiency.get(str(low_bits), 0.0)
        self._experts: dict[int, float] = {}
        self._lows: dict[int, float] = {}

    def table_s(self, changes: int) -> float:
        """Host time to tell the next graph of *changes* of the table of experts."""
        return self._tell_s + changes * self._change_s if changes else 0.0

    def planning_cold(self, policy: str) -> Cold:
        """What a wait adds to the planning of *policy*."""
        host = self.profile.host
        return Cold(
            host.policy_cold_share.get(policy, host.cold_share),
            host.cold_after_s,
            host.policy_cold_most_s.get(policy, host.cold_most_s),
        )

    def more_s(self, policy: str) -> float:
        """What a layer takes more under *policy*, whose graphs have more kernels."""
        return self.profile.software.policy_layer_s.get(policy, 0.0)

    def attention_s(self, tokens: int, kv_tokens: int) -> float:
        """One layer without its routed experts; *kv_tokens* as in ``Costs.attention_s``."""
        return self._attention_s(tokens, tokens * self.cache_tokens or kv_tokens)

    def layer_s(self, policy: str, experts: int) -> float:
        """A layer of one token with *experts* resident, and its launch; hardly any cache."""
        gate = self._attention_s(1, 1) + self.more_s(policy)
        return gate + self.launch_s + experts * self.expert_s(1)

    def _attention_s(self, tokens: int, kv_tokens: int) -> float:
        model = self.model
        kv_bytes = kv_tokens * model.kv_bytes_per_token / model.layers
        dense_bytes = self._layer_params * model.param_bytes
        read_s = dense_bytes / self._read_rate + kv_bytes / self._kv_rate
        # Sequences are worked on beside each other: a position of all of them counts once.
        read_s += self._position_s * (kv_tokens / tokens)
        flops = 2 * self._layer_params * tokens + 4 * model.hidden * kv_tokens
        floor_s = self.floor_s if tokens == 1 else self.several_floor_s
        return floor_s + max(read_s, flops / self.profile.gpu.bf16_flops_per_s)

    def expert_s(self, tokens: int) -> float:
        """What one expert of *tokens* tokens adds to an event."""
        seconds = self._experts.get(tokens)
        if seconds is None:
            size = self.model.expert_bytes
            seconds = self._read_s(size, tokens, self._efficiency, self._shared)
            self._experts[tokens] = seconds
        return seconds

    def low_expert_s(self, tokens: int) -> float:
        """The same for one that is computed from its low-precision copy."""
        seconds = self._lows.get(tokens)
        if seconds is None:
            if self._low_efficiency:
                share = self.profile.expert.low_token_share
                seconds = self._read_s(self._low_bytes, tokens, self._low_efficiency, share)
            else:
                seconds = self.expert_s(tokens)
            self._lows[tokens] = seconds
        return seconds

    def _read_s(self, size_bytes: int, tokens: int, efficiency: float, share: float) -> float:
        """An expert of *size_bytes*, longer by *share* of reading it for each further token."""
        efficiency /= 1 + share * (tokens - 1)
        flops = 2 * self.model.expert_params
        return self.profile.expert_roofline_s(size_bytes, flops, tokens, efficiency)
