"""What each supported model family looks like inside: its gates and its dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from traces.errors import InputError
from traces.model import ModelSpec

#: (router, logits [T, E]) -> the scores [T, E] by which that router ranks its experts.
Scores = Callable[[Any, Tensor], Tensor]


def _by_logit(router: Any, logits: Tensor) -> Tensor:
    """Softmax keeps the order, so the logits rank as well as the probabilities."""
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
    """Where a decoder block keeps its *router*, and how that router ranks experts."""

    router: str
    scores: Scores


FAMILIES = {
    "mixtral": Family("gate", _by_logit),
    "qwen3_moe": Family("gate", _by_logit),
    "olmoe": Family("gate", _by_logit),
    "deepseek_v2": Family("gate", _deepseek_v2),
    "deepseek_v3": Family("gate", _deepseek_v3),
    "gpt_oss": Family("router", _by_logit),
}


@dataclass(frozen=True)
class Gate:
    """One MoE layer: the *router* module, the *experts* module it feeds, and its ranking."""

    router: Any
    experts: Any
    scores: Scores

    def falling(self, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Experts int64 [T, k] and weights [T, k] of a router's *output*, by falling weight.

        Some families return their choice unsorted.
        """
        _, weights, experts = output
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        return experts.gather(1, order), weights

    def rank(self, hidden: Tensor, width: int) -> Tensor:
        """The best *width* experts int64 [T, width] this gate finds for *hidden* [T, H].

        What the gate would choose comes first, by falling weight, then the rest by score.
        """
        # Not router(hidden): that would run the recording hooks once more.
        output = self.router.forward(hidden)
        chosen, _ = self.falling(output)
        more = width - chosen.shape[1]
        if more <= 0:
            return chosen[:, :width]
        rest = self.scores(self.router, output[0]).scatter(1, chosen, float("-inf"))
        return torch.cat([chosen, rest.topk(more, dim=-1).indices], dim=1)


def check_family(model_type: str, where: str) -> Family:
    """The family of *model_type*; one that was never tested is an :class:`InputError`."""
    if model_type not in FAMILIES:
        raise InputError(
            f"{where}: model type {model_type!r} is not supported, "
            f"expected one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def find_gates(model: Any) -> list[Gate]:
    """The gates of *model* in MoE-layer order; dense layers between them do not count."""
    where = type(model).__name__
    family = check_family(model.config.model_type, where)
    gates = []
    for layer in model.base_model.layers:
        router = getattr(layer.mlp, family.router, None)
        experts = getattr(layer.mlp, "experts", None)
        if router is not None and experts is not None:
            gates.append(Gate(router, experts, family.scores))
    if not gates:
        raise InputError(f"{where}: no MoE layer found, expected at least one")
    shapes = {(gate.experts.num_experts, gate.router.top_k) for gate in gates}
    if len(shapes) > 1:
        raise InputError(
            f"{where}: layers differ in (experts, top_k): {sorted(shapes)}, expected one shape"
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
    experts, router = gates[0].experts, gates[0].router
    count, hidden = int(experts.num_experts), int(router.hidden_dim)
    routed = [sum(p.numel() for p in gate.experts.parameters()) for gate in gates]
    dtype = experts.down_proj.dtype
    return ModelSpec(
        name=name,
        layers=len(gates),
        experts=count,
        top_k=int(router.top_k),
        hidden=hidden,
        intermediate=experts.down_proj.numel() // (count * hidden),
        expert_params=routed[0] // count,
        dense_params=sum(p.numel() for p in model.parameters()) - sum(routed),
        kv_bytes_per_token=kv_bytes_per_token(model.config, dtype.itemsize),
        dtype=str(dtype).removeprefix("torch."),
    )
