"""The model that every system is given."""

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
        model: Any = library.AutoModelForCausalLM.from_config(config(task.shape), dtype=drawn)
    model.eval().requires_grad_(False)
    generator = torch.Generator(task.device).manual_seed(task.seed)
    for name, values in model.named_parameters():
        if values.dim() > 1:
            draw(name, values, task.shape, generator)
    return model.to(dtype)


def draw(name: str, values: Tensor, shape: Shape, generator: torch.Generator) -> None:
    """Fill the matrix *values* in place, so that routing is varied (docs/side_by_side.md).

    Embeddings are large beside what the layers add: the gates see which token it is. Each
    expert's row of a gate has a length of its own: the long ones are chosen more often.
    """
    if name.endswith("embed_tokens.weight"):
        values.normal_(0.0, shape.embed_std, generator=generator)
    elif name.endswith("mlp.gate.weight"):
        values.normal_(0.0, shape.gate_std, generator=generator)
        lengths = torch.empty_like(values[:, :1]).normal_(generator=generator)
        values.mul_((shape.gate_spread * lengths).exp_())
    else:
        values.normal_(0.0, shape.weight_std, generator=generator)


def config(shape: Shape) -> Any:
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
        tie_word_embeddings=False,
    )


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
