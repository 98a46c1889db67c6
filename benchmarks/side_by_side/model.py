"""The model and the tokens that every system is given."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.side_by_side.memory import forget_peaks
from benchmarks.side_by_side.plan import Shape, Task

#: Where the parameters of a model lie when a system is given it.
Place = Literal["device", "experts on host", "host"]


def make_model(task: Task, dtype: torch.dtype) -> Any:
    """A Qwen3-MoE model of *task*'s shape on its device, with seeded random weights.

    The weights are drawn in *task*'s own precision and only then become *dtype*, so that models
    of different precision hold the same numbers. Drawing them on the GPU takes a second; the
    7 billion of the full shape would take minutes on the CPU.
    """
    library: Any = importlib.import_module("transformers")
    drawn = getattr(torch, task.dtype)
    with torch.device(task.device):
        model: Any = library.AutoModelForCausalLM.from_config(_config(task.shape), dtype=drawn)
    model.eval().requires_grad_(False)
    generator = torch.Generator(task.device).manual_seed(task.seed)
    for name, values in model.named_parameters():
        if values.dim() > 1:
            is_gate = name.endswith("mlp.gate.weight")
            std = task.shape.gate_std if is_gate else task.shape.weight_std
            values.normal_(0.0, std, generator=generator)
    return model.to(dtype)


def _config(shape: Shape) -> Any:
    """The configuration of Qwen3-30B-A3B in another *shape*."""
    library: Any = importlib.import_module("transformers")
    return library.Qwen3MoeConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=3 * shape.hidden,
        moe_intermediate_size=shape.moe_intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def forced_tokens(task: Task) -> tuple[Tensor, Tensor]:
    """Token ids int64 [1, prompt + warm-up] and [1, prompt + forced] on the task's device.

    Drawn on the CPU, and all *forced_tokens* of them however few are decoded: a system that is
    given fewer steps reads the beginning of the same text.
    """
    generator = torch.Generator().manual_seed(task.seed + 1)
    text = torch.randint(
        task.shape.vocab, (1, task.prompt_tokens + task.forced_tokens), generator=generator
    )
    warm = torch.randint(
        task.shape.vocab, (1, task.prompt_tokens + task.warmup_tokens), generator=generator
    )
    return warm.to(task.device), text.to(task.device)


def placed_model(task: Task, place: Place) -> Any:
    """A model of *task*'s precision, its parameters at *place*; memory peaks count from here."""
    model = make_model(task, getattr(torch, task.dtype))
    if place != "device":
        _to_host(model, only_experts=place == "experts on host")
    forget_peaks(task.device)
    return model


def _to_host(model: Any, only_experts: bool) -> None:
    """Move the parameters of *model* to the CPU, or only those of its experts.

    New memory is zeroed first: all cores fault its pages in, where the copy would do it on one.
    """
    for name, values in model.named_parameters():
        if values.device.type != "cpu" and (not only_experts or ".mlp.experts." in name):
            host = torch.empty(values.shape, dtype=values.dtype).zero_()
            values.data = host.copy_(values.data)
    if not only_experts:
        model.to("cpu")
