"""A random checkpoint that both systems read, as files of safetensors with one layer in each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.freetoken.plan import Task
from benchmarks.side_by_side.model import config, draw
from benchmarks.side_by_side.plan import Shape
from runtime.load import pick_device

#: Written last: what the files hold. A folder that says the same is used again.
MADE = "made.json"
INDEX = "model.safetensors.index.json"
DTYPE = torch.bfloat16


def made_of(task: Task) -> dict[str, Any]:
    """What tells one checkpoint from another."""
    told = task.to_dict()
    return {name: told[name] for name in ("routing", "shape", "seed", "device")}


def is_made(task: Task) -> bool:
    """Whether *task*'s folder holds its checkpoint, whole."""
    path = Path(task.folder) / MADE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == made_of(task)


def make(task: Task) -> None:
    """Write the checkpoint of *task* into its folder, unless it is there.

    Numbers are drawn on the task's device from its seed: 7 billion take a second on a GPU.
    """
    folder = Path(task.folder)
    if is_made(task):
        return
    pick_device(task.device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MADE).unlink(missing_ok=True)
    generator = torch.Generator(task.device).manual_seed(task.seed)
    names: dict[str, str] = {}
    pieces = [*_layers(task.shape), _outer(task.shape)]
    size_bytes = 0
    for number, piece in enumerate(pieces, start=1):
        file = f"model-{number:05}-of-{len(pieces):05}.safetensors"
        tensors = _drawn(piece, task.shape, generator)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        size_bytes += sum(value.nbytes for value in tensors.values())
        print(f"{file}: {len(tensors)} tensors", flush=True)
    index = {"metadata": {"total_size": size_bytes}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    _write_config(folder, task.shape)
    _write_tokenizer(folder, task.shape.vocab)
    (folder / MADE).write_text(json.dumps(made_of(task)), encoding="utf-8")


#: Shapes of tensors by their names in the files.
Piece = dict[str, tuple[int, ...]]


def _layers(shape: Shape) -> Iterator[Piece]:
    for layer in range(shape.layers):
        yield {f"model.layers.{layer}.{name}": s for name, s in _layer(shape).items()}


def _layer(shape: Shape) -> Piece:
    """The tensors of one layer, experts one by one: the one form that both systems read."""
    hidden, inner, head = shape.hidden, shape.moe_intermediate, shape.head_dim
    found: Piece = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "self_attn.q_proj.weight": (shape.heads * head, hidden),
        "self_attn.k_proj.weight": (shape.kv_heads * head, hidden),
        "self_attn.v_proj.weight": (shape.kv_heads * head, hidden),
        "self_attn.o_proj.weight": (hidden, shape.heads * head),
        "mlp.gate.weight": (shape.experts, hidden),
    }
    for expert in range(shape.experts):
        found[f"mlp.experts.{expert}.gate_proj.weight"] = (inner, hidden)
        found[f"mlp.experts.{expert}.up_proj.weight"] = (inner, hidden)
        found[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
    return found


def _outer(shape: Shape) -> Piece:
    """What belongs to no layer."""
    return {
        "model.embed_tokens.weight": (shape.vocab, shape.hidden),
        "model.norm.weight": (shape.hidden,),
        "lm_head.weight": (shape.vocab, shape.hidden),
    }


def _drawn(piece: Piece, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Norms are 1; matrices are drawn as for the side by side, with the spreads of *shape*."""
    found = {}
    for name, size in piece.items():
        values = torch.ones(size, dtype=DTYPE, device=generator.device)
        if len(size) > 1:
            draw(name, values, shape, generator)
        found[name] = values.cpu()
    return found


def _write_config(folder: Path, shape: Shape) -> None:
    made = config(shape)
    made.architectures = ["Qwen3MoeForCausalLM"]
    made.dtype = DTYPE
    made.save_pretrained(folder)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One word for each id: FreeToken wants a tokenizer, and turns what it made into text.

    With a chat template, or it would look for one on the hub.
    """
    words = {f"w{number}": number for number in range(vocabulary)}
    level: Any = tokenizers.models.WordLevel(words, unk_token="w0")
    whole: Any = tokenizers.Tokenizer(level)
    whole.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made: Any = transformers.PreTrainedTokenizerFast
    made = made(tokenizer_object=whole, unk_token="w0", eos_token="w0")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    made.save_pretrained(folder)
