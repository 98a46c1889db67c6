"""A tiny random model of every supported family, quick enough for a CPU.

Import it only after ``pytest.importorskip("transformers")``.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from runtime.families import FAMILIES, find_gates

VOCABULARY = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Large enough that the random gates disagree and the outputs vary.
    "initializer_range": 0.3,
}
_GROUPED: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
_LATENT: dict[str, Any] = {
    **_GROUPED,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_LOCAL: dict[str, Any] = {"num_local_experts": 8, "intermediate_size": 24}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 24, "norm_topk_prob": False},
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT,
    "gpt_oss": {**_LOCAL, "head_dim": 16},
    "granitemoe": {**_LOCAL, "residual_multiplier": 0.7, "attention_multiplier": 0.35},
    "phimoe": _LOCAL,
    "glm4_moe": {**_GROUPED, "use_qk_norm": True},
}

#: Dense layers among the layers of a tiny model.
DENSE_LAYERS = {"qwen3_moe": 1, "deepseek_v2": 1, "deepseek_v3": 1, "glm4_moe": 1}

assert list(_OF_FAMILY) == list(FAMILIES), "a supported family has no tiny model"


def tiny_model(
    model_type: str,
    seed: int = 0,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Any:
    """A random model of *model_type* in evaluation mode; the same *seed*, the same weights.

    8 experts of which 2 serve a token, hidden size 32, intermediate size 24; layer 0 or 1
    is dense in the families of :data:`DENSE_LAYERS`. *overrides* go into the configuration.
    """
    options = {**_COMMON, **_OF_FAMILY[model_type], "num_hidden_layers": layers, **overrides}
    config: Any = transformers.AutoConfig.for_model(model_type, **options)
    maker: Any = transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = maker.from_config(config, dtype=dtype).eval()
        for gate in find_gates(model):
            if hasattr(gate.router, "e_score_correction_bias"):
                gate.router.e_score_correction_bias.normal_(std=0.3)
        for name, value in model.named_parameters():
            if name.endswith(("bias", "sinks", "norm.weight")):
                value.data.add_(torch.randn_like(value), alpha=0.1)
    return model
