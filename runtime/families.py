"""What each supported model family looks like inside: its gates and its dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.rank import best_experts
from traces.errors import InputError
from traces.model import ModelSpec

#: (router, logits [T, E]) -> the scores [T, E] by which that router ranks its experts.
Scores = Callable[[Any, Tensor], Tensor]

#: Experts that phimoe's sparse mixer chooses for a token, whatever its configuration says.
PHIMOE_TOP_K = 2


def _by_logit(router: Any, logits: Tensor) -> Tensor:
    """Softmax keeps the order, so the logits rank as well as the probabilities."""
    return logits


def _mixed_by_logit(router: Any, logits: Tensor) -> Tensor:
    """As logits rank, too, but a choice's second weight can be larger than its first."""
    return logits


def _best_groups_first(scores: Tensor, router: Any, per_group: int) -> Tensor:
    """Put every expert outside the gate's best groups below all experts inside them.

    A group counts by the sum of its *per_group* best scores.
    """
    size = router.num_experts // router.num_group
    groups = scores.view(-1, router.num_group, size).topk(per_group, dim=-1).values.sum(dim=-1)
    kept = groups.topk(router.topk_group, dim=-1).indices
    inside = torch.zeros_like(groups).scatter_(1, kept, 1).bool().repeat_interleave(size, dim=1)
    span = scores.amax(dim=-1, keepdim=True) - scores.amin(dim=-1, keepdim=True)
    return torch.where(inside, scores, scores - span - 1)


def _deepseek_v2(router: Any, logits: Tensor) -> Tensor:
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    if router.topk_method != "group_limited_greedy":
        return scores
    return _best_groups_first(scores, router, per_group=1)


def _deepseek_v3(router: Any, logits: Tensor) -> Tensor:
    """The correction bias decides who is chosen, though not with which weight."""
    scores = logits.sigmoid() + router.e_score_correction_bias
    return _best_groups_first(scores, router, per_group=2)


@dataclass(frozen=True)
class Family:
    """Where a decoder layer keeps its MoE *block* and that its *router*; how the router ranks."""

    block: str
    router: str
    scores: Scores


FAMILIES = {
    "mixtral": Family("mlp", "gate", _by_logit),
    "qwen2_moe": Family("mlp", "gate", _by_logit),
    "qwen3_moe": Family("mlp", "gate", _by_logit),
    "olmoe": Family("mlp", "gate", _by_logit),
    "deepseek_v2": Family("mlp", "gate", _deepseek_v2),
    "deepseek_v3": Family("mlp", "gate", _deepseek_v3),
    "gpt_oss": Family("mlp", "router", _by_logit),
    "granitemoe": Family("block_sparse_moe", "router", _by_logit),
    # Its sparse mixer takes the best logit twice, so that its two choices are the best two.
    "phimoe": Family("mlp", "router", _mixed_by_logit),
    "glm4_moe": Family("mlp", "gate", _deepseek_v3),
}

#: What a router returns: logits [T, E], weights [T, k], experts int64 [T, k].
Routed = tuple[Tensor, Tensor, Tensor]


def _index_first(output: Routed) -> bool:
    """Whether *output* is (experts, weights, logits): transformers 5.17 had granite's so."""
    return not output[0].is_floating_point()


@dataclass(frozen=True)
class Gate:
    """One MoE layer: its modules, its shape, and how it ranks experts.

    The *decoder* layer contains the MoE *block*, the block the *router* and the *experts*
    module that it feeds. *top_k* of *num_experts* experts serve a token of *hidden* values.
    """

    decoder: Any
    block: Any
    router: Any
    experts: Any
    scores: Scores
    top_k: int
    num_experts: int
    hidden: int

    def parts(self, output: Routed) -> Routed:
        """Logits [T, E], weights [T, k] and experts [T, k] of a router's *output*."""
        return (output[2], output[1], output[0]) if _index_first(output) else output

    def replaced(self, output: Routed, weights: Tensor, experts: Tensor) -> Routed:
        """A router's *output* with other *weights* [T, k] and *experts* [T, k]."""
        if _index_first(output):
            return experts, weights, output[2]
        return output[0], weights, experts

    def falling(self, output: Routed) -> tuple[Tensor, Tensor]:
        """Experts int64 [T, k] and weights [T, k] of a router's *output*, by falling weight.

        Some families return their choice unsorted.
        """
        _, weights, experts = self.parts(output)
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        return experts.gather(1, order), weights

    @torch.no_grad()
    def weights_dtype(self) -> torch.dtype:
        """The dtype in which the router returns weights, found by asking it."""
        own = self.router.weight
        # Not router(...): no hook of others is to see this.
        asked = torch.zeros(1, self.hidden, dtype=own.dtype, device=own.device)
        output = self.router.forward(asked)
        return self.parts(output)[1].dtype

    def rank(self, hidden: Tensor, width: int) -> Tensor:
        """The best *width* experts int64 [T, width] this gate finds for *hidden* [T, H].

        What the gate would choose comes first, by falling weight, then the rest by score.
        """
        if self.scores is _by_logit:
            # What is chosen comes first in any case: the order of logits is that of weights.
            bias = getattr(self.router, "bias", None)
            return best_experts(hidden, self.router.weight, bias, width)
        # Not router(hidden): that would run the recording hooks once more.
        output = self.router.forward(hidden)
        chosen, _ = self.falling(output)
        more = width - chosen.shape[1]
        if more <= 0:
            return chosen[:, :width]
        logits = self.parts(output)[0]
        rest = self.scores(self.router, logits).scatter(1, chosen, float("-inf"))
        return torch.cat([chosen, rest.topk(more, dim=-1).indices], dim=1)


def check_family(model_type: str, where: str) -> Family:
    """The family of *model_type*; one that was never tested is an :class:`InputError`."""
    if model_type not in FAMILIES:
        raise InputError(
            f"{where}: model type {model_type!r} is not supported, "
            f"expected one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _gate(decoder: Any, family: Family, config: Any, where: str) -> Gate | None:
    """The gate of one *decoder* layer, None for a dense one."""
    block = getattr(decoder, family.block, None)
    router = getattr(block, family.router, None)
    experts = getattr(block, "experts", None)
    if block is None or router is None or experts is None:
        return None
    # Set by the decorator that lets transformers choose how experts are computed.
    if not hasattr(experts, "is_transposed"):
        raise InputError(
            f"{where}: {type(experts).__name__} has no exchangeable forward, "
            "expected transformers' experts interface"
        )
    return Gate(
        decoder=decoder,
        block=block,
        router=router,
        experts=experts,
        scores=family.scores,
        top_k=int(router.top_k),
        num_experts=int(experts.num_experts),
        hidden=int(config.hidden_size),
    )


def find_gates(model: Any) -> list[Gate]:
    """The gates of *model* in MoE-layer order; dense layers between them do not count."""
    where = type(model).__name__
    family = check_family(model.config.model_type, where)
    found = (_gate(layer, family, model.config, where) for layer in model.base_model.layers)
    gates = [gate for gate in found if gate is not None]
    if not gates:
        raise InputError(f"{where}: no MoE layer found, expected at least one")
    shapes = {(gate.num_experts, gate.top_k) for gate in gates}
    if len(shapes) > 1:
        raise InputError(
            f"{where}: layers differ in (experts, top_k): {sorted(shapes)}, expected one shape"
        )
    if model.config.model_type == "phimoe" and gates[0].top_k != PHIMOE_TOP_K:
        raise InputError(
            f"{where}: {gates[0].top_k} experts per token, expected {PHIMOE_TOP_K}: "
            "its sparse mixer chooses no other number"
        )
    return gates


def kv_bytes_per_token(config: Any, param_bytes: int) -> int:
    """Bytes that one token takes in the key-value cache, over all layers, dense ones too.

    Latent attention caches the compressed key-value vector and the shared rotary key once
    per layer; other attention caches a key and a value per key-value head. Sliding windows
    are not counted as a saving.
    """
    if getattr(config, "kv_lora_rank", None):
        per_layer = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        head = getattr(config, "head_dim", None)
        head = head or config.hidden_size // config.num_attention_heads
        per_layer = 2 * config.num_key_value_heads * head
    return int(config.num_hidden_layers * per_layer * param_bytes)


def model_spec(model: Any, name: str) -> ModelSpec:
    """Dimensions of *model*, read from its modules.

    Expert weights include biases. Dense weights are all other parameters, tied ones counted
    once, shared experts and gates among them.
    """
    gates = find_gates(model)
    experts, count, hidden = gates[0].experts, gates[0].num_experts, gates[0].hidden
    routed = [sum(p.numel() for p in gate.experts.parameters()) for gate in gates]
    dtype = experts.down_proj.dtype
    return ModelSpec(
        name=name,
        layers=len(gates),
        experts=count,
        top_k=gates[0].top_k,
        hidden=hidden,
        intermediate=experts.down_proj.numel() // (count * hidden),
        expert_params=routed[0] // count,
        dense_params=sum(p.numel() for p in model.parameters()) - sum(routed),
        kv_bytes_per_token=kv_bytes_per_token(model.config, dtype.itemsize),
        dtype=str(dtype).removeprefix("torch."),
    )
