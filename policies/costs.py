"""What things cost in the simulated world: seconds from a hardware profile and a model."""

from __future__ import annotations

from policies.base import Context
from policies.graph_costs import GraphCosts
from policies.hardware import HardwareProfile
from policies.routing import DECODE, PREFILL
from policies.whole_costs import WholeCosts
from traces.model import ModelSpec


class Costs:
    """Seconds of every kind of work on one machine for one model.

    GPU work follows a roofline with launch costs (Williams et al. 2009): the larger of bytes
    over memory bandwidth and operations over peak rate, never less than its kernels take.
    Host work is serial: a launch per kernel, a wait per gate, an issue per copy. *graph* has
    the costs of decode steps where the profile says that they run as captured graphs; their
    key-value cache has *cache_tokens* tokens per sequence, if given. Where it says that they
    run as one graph each, they do unless *whole* is false.
    """

    def __init__(
        self,
        profile: HardwareProfile,
        model: ModelSpec,
        low_bits: int = 4,
        *,
        cache_tokens: int = 0,
        whole: bool = True,
    ) -> None:
        self.profile = profile
        self.model = model
        host, software = profile.host, profile.software
        self.full_bytes = model.expert_bytes
        self.low_bytes = model.expert_bytes_at(low_bits)
        self.issue_gate_s = software.attention_kernels * host.kernel_launch_s
        #: Least GPU seconds of, and host seconds to launch, a group of so many experts that are
        #: computed together: held ones, or some that landed one after the other. By phase.
        self.group_s = {
            phase: [
                (n * profile.gpu.kernel_min_s, n * host.kernel_launch_s)
                for n in (
                    profile.group_kernels(count, prompt=phase == PREFILL)
                    for count in range(model.experts + 1)
                )
            ]
            for phase in (PREFILL, DECODE)
        }
        self.sync_s = host.gate_sync_s
        #: Policy and planner per event and access: of the policy that needs least, for bounds.
        self.least_event_s = min((host.event_s, *host.policy_event_s.values()))
        self.least_access_s = min((host.access_s, *host.policy_access_s.values()))
        self.copy_issue_s = host.copy_issue_s
        #: Host seconds that an event takes for a prefetch that it has to issue itself.
        self.late_issue_s = host.late_issue_s or host.copy_issue_s
        #: Host seconds to hand over a prefetch, once it is decided on.
        self.prefetch_issue_s = host.prefetch_issue_s or host.copy_issue_s
        #: From a copy's end until a stream that waits for it goes on.
        self.wake_s = profile.link.wake_s
        self.step_s = host.step_s
        self.graph: GraphCosts | None = None
        if host.graph_launch_s:
            self.graph = GraphCosts(profile, model, cache_tokens, low_bits)
        #: The same of those decode steps that run as one graph each, if any do.
        self.whole: WholeCosts | None = None
        if whole and self.graph is not None and profile.whole is not None:
            self.whole = WholeCosts(profile, profile.whole, model, cache_tokens, low_bits)
        self._experts: dict[int, float] = {}
        self._attention: dict[tuple[int, int], float] = {}

    def event_s(self, policy: str = "") -> float:
        """Host seconds that *policy* and the planner take per event; '' for any policy."""
        host = self.profile.host
        return host.policy_event_s.get(policy, host.event_s)

    def access_s(self, policy: str = "") -> float:
        """Host seconds that they take more for each distinct expert of the event."""
        host = self.profile.host
        return host.policy_access_s.get(policy, host.access_s)

    def miss_s(self, policy: str = "") -> float:
        """Host seconds more for an event that misses anything, before its first copy is issued."""
        host = self.profile.host
        return host.policy_miss_s.get(policy, host.miss_s)

    def move_s(self, policy: str = "") -> float:
        """Host seconds that they take more for each demanded move, its issue aside."""
        host = self.profile.host
        return host.policy_move_s.get(policy, host.move_s)

    def prefetch_s(self, policy: str = "") -> float:
        """Host seconds that they take more for each prefetch, its issue aside."""
        host = self.profile.host
        return host.policy_prefetch_s.get(policy, host.prefetch_s)

    def foresee_s(self, policy: str = "") -> tuple[float, float]:
        """Host seconds to look for prefetches: per event, and per distinct expert of it."""
        host = self.profile.host
        event_s = host.policy_foresee_event_s.get(policy, 0.0)
        return event_s, host.policy_foresee_access_s.get(policy, 0.0)

    def idle_copy_s(self, size_bytes: int) -> float:
        """One host-to-device copy into an idle engine."""
        return self.profile.link.h2d.copy_s(size_bytes, queued=False)

    def queued_copy_s(self, size_bytes: int) -> float:
        """One host-to-device copy right behind another."""
        return self.profile.link.h2d.copy_s(size_bytes, queued=True)

    def expert_s(self, tokens: int) -> float:
        """GPU seconds of one resident expert on *tokens* tokens, its launches aside."""
        seconds = self._experts.get(tokens)
        if seconds is None:
            model = self.model
            seconds = self.profile.expert_roofline_s(
                model.expert_bytes, 2 * model.expert_params, tokens
            )
            self._experts[tokens] = seconds
        return seconds

    def cpu_expert_s(self, tokens: int) -> float:
        """CPU seconds of one expert on *tokens* tokens, weights read from host memory."""
        model = self.model
        return self.profile.cpu_expert_s(model.expert_bytes, 2 * model.expert_params, tokens)

    def attention_s(self, tokens: int, kv_tokens: int) -> float:
        """GPU seconds of everything of one layer before its gate has answered.

        *kv_tokens* sums, over the step's tokens, the positions each attends to. The dense
        weights of a layer are read once, the key-value cache once per token.
        """
        key = (tokens, kv_tokens)
        seconds = self._attention.get(key)
        if seconds is None:
            seconds = self._attention_roofline(tokens, kv_tokens)
            if len(self._attention) < 1 << 16:
                self._attention[key] = seconds
        return seconds

    def _attention_roofline(self, tokens: int, kv_tokens: int) -> float:
        gpu, model = self.profile.gpu, self.model
        dense = model.dense_params / model.layers
        kv_bytes = model.kv_bytes_per_token / model.layers
        reads = dense * model.param_bytes + kv_tokens * kv_bytes
        flops = 2 * dense * tokens + 4 * model.hidden * kv_tokens
        least = self.profile.software.attention_kernels * gpu.kernel_min_s
        return max(least, reads / gpu.memory_bytes_per_s, flops / gpu.bf16_flops_per_s)

    def context(self, policy: str, slots: int) -> Context:
        """What *policy* may know of a run with *slots* slots: shape and calibrated constants."""
        model = self.model
        return Context(
            layers=model.layers,
            experts=model.experts,
            top_k=model.top_k,
            slots=slots,
            transfer_s=self.queued_copy_s(self.full_bytes),
            transfer_low_s=self.queued_copy_s(self.low_bytes),
            layer_s=self.layer_s(policy),
            expert_s=self.expert_s(1),
        )

    def layer_s(self, policy: str = "") -> float:
        """One layer of a one-token decode step with everything resident.

        Eager, it is bound by host or GPU; as captured graphs, both take their turns. Policies are
        told this of every run by one profile: what they decide depends neither on how long its
        key-value cache is nor on whether its steps are one graph each.
        """
        count = self.model.top_k
        thinking = self.event_s(policy) + count * self.access_s(policy)
        if self.graph is not None:
            return self.graph.layer_s(policy, count) + self.sync_s + thinking
        gate = max(self.attention_s(1, 1), self.issue_gate_s)
        work = max(count * self.expert_s(1), *self.group_s[DECODE][count])
        return gate + self.sync_s + thinking + work
