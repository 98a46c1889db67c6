"""A checkpoint whose dense part is loaded and whose experts are read one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from runtime.families import Gate, find_gates
from runtime.fourbit import unpack_mxfp4
from runtime.layout import ExpertLayout
from runtime.load import check_dtype, find_folder, quantisation, read_config
from runtime.skeleton import build_skeleton, expert_names, fill_buffers, put_tensor
from runtime.tensorfiles import TensorFiles, checkpoint_files
from traces.errors import InputError

#: How transformers builds the stacked experts; what it lists otherwise is refused.
_KNOWN_OPERATIONS = (["MergeModulelist", "Concatenate"], ["MergeModulelist"])
_EXPERT_ID = re.compile(r"\.experts\.(\d+)\.")
#: Keys of 4-bit experts: packed pairs of values, and a scale for every 32 of them.
_BLOCKS, _SCALES = "_blocks", "_scales"

#: (MoE layer, name of the part): which expert weight a key belongs to.
Target = tuple[int, str]


@dataclass(frozen=True)
class Piece:
    """One key of the files that makes up (part of) an expert weight.

    *expert* is None where the key holds all experts of a layer; pieces of lower *order* come
    first in the first dimension.
    """

    key: str
    expert: int | None
    order: int


class Names:
    """Which weight of the model each key of the files belongs to.

    The rules are those of transformers' own loader.
    """

    def __init__(self, model: Any, gates: list[Gate]) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = model.state_dict()
        self._experts = expert_names(model, gates)

    def full(self, key: str) -> tuple[str, int | None]:
        """The model's name for *key*, and its place among the keys that are concatenated."""
        name, pattern = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._known
        )
        if name not in self._known and key in self._known:
            return key, None
        return name, None if pattern is None else self._order(key, pattern)

    def _order(self, key: str, pattern: str) -> int:
        rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
        operations = [type(operation).__name__ for operation in rule.operations]
        if operations not in _KNOWN_OPERATIONS:
            raise InputError(
                f"key {key} is converted by {', '.join(operations)}, expected only stacking"
            )
        return rule.source_patterns.index(pattern)

    def expert(self, name: str) -> Target | None:
        """The expert weight called *name*; None for a dense one."""
        return self._experts.get(name)

    def packed(self, key: str) -> Target | None:
        """The expert weight whose 4-bit blocks *key* holds."""
        return self._experts.get(key.removesuffix(_BLOCKS)) if key.endswith(_BLOCKS) else None

    def is_known(self, name: str) -> bool:
        """Whether the model has a tensor called *name*."""
        return name in self._known


def _pieces(files: TensorFiles, names: Names) -> tuple[dict[str, str], dict[Target, list[Piece]]]:
    """Key of every dense tensor by its full name, and the pieces of every expert weight."""
    dense: dict[str, str] = {}
    pieces: dict[Target, list[Piece]] = {}
    for key in files.entries:
        packed = names.packed(key)
        if packed is not None:
            pieces.setdefault(packed, []).append(Piece(key, None, 0))
            continue
        name, order = names.full(key)
        target = names.expert(name)
        if target is None:
            if names.is_known(name):
                dense[name] = key
            continue
        found = _EXPERT_ID.search(key) if order is not None else None
        expert = int(found.group(1)) if found else None
        pieces.setdefault(target, []).append(Piece(key, expert, order or 0))
    return dense, pieces


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    *model* is complete but for its experts' stacked weights, which are on ``meta``; *layout*
    says how one expert's parts lie, *gates* where the MoE layers are. Close it, or use it in
    a ``with`` statement.
    """

    folder: Path
    model: Any
    gates: list[Gate]
    layout: ExpertLayout
    files: TensorFiles
    pieces: Mapping[Target, list[Piece]]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    @property
    def total_experts(self) -> int:
        """How many experts :meth:`experts` yields."""
        return len(self.gates) * self.gates[0].num_experts

    @cached_property
    def _of_expert(self) -> dict[tuple[int, str, int | None], list[Piece]]:
        """Pieces by (layer, part, expert), in the order in which they are concatenated."""
        table: dict[tuple[int, str, int | None], list[Piece]] = {}
        for (layer, part), pieces in self.pieces.items():
            for piece in sorted(pieces, key=lambda piece: piece.order):
                table.setdefault((layer, part, piece.expert), []).append(piece)
        return table

    def experts(self) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """(layer, expert, {part name: tensor of the layout's shape and dtype}), in this order.

        The tensors are new memory that the caller copies to its place and drops. Weights
        that are not finite are an :class:`InputError`.
        """
        try:
            for layer in range(len(self.gates)):
                for expert in range(self.gates[0].num_experts):
                    yield layer, expert, self.expert(layer, expert)
        finally:
            self.close()

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The parts of one expert by name, read now."""
        parts = {}
        for part in self.layout.parts:
            value = self._read(layer, part.name, expert).to(self.layout.dtype)
            where = f"{self.folder}: layer {layer}, expert {expert}: {part.name}"
            _check_finite(value, where)
            parts[part.name] = value
        return parts

    def _read(self, layer: int, part: str, expert: int) -> Tensor:
        own = self._of_expert.get((layer, part, expert))
        if own is not None:
            values = [self.files.read(piece.key) for piece in own]
            return values[0] if len(values) == 1 else torch.cat(values)
        piece = self._of_expert[layer, part, None][0]
        value = self.files.read(piece.key, expert)
        if not piece.key.endswith(_BLOCKS):
            return value
        return unpack_mxfp4(value, self.files.read(_scales_of(piece.key), expert))


def _scales_of(key: str) -> str:
    """The key of the scales that belong to the 4-bit blocks *key*."""
    return key.removesuffix(_BLOCKS) + _SCALES


def _check_finite(values: Tensor, where: str) -> None:
    """Refuse NaN and infinite *values*, in one pass and without a mask of their size."""
    if values.is_floating_point() and values.numel():
        least, most = values.aminmax()
        if not (least.isfinite() and most.isfinite()):
            dtype = str(values.dtype).removeprefix("torch.")
            raise InputError(f"{where} has NaN or infinite values as {dtype}, expected finite ones")


def _check_shape(folder: Path, key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise InputError(f"{folder}: {key} has shape {list(found)}, expected {list(expected)}")


def _packed_shapes(shape: tuple[int, ...], experts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the 4-bit blocks and of their scales for experts of *shape* [in, out]."""
    scales = (experts, shape[1], shape[0] // 32)
    return (*scales, 16), scales


class _Check:
    """That the files hold every part of every expert in its shape, before any is read."""

    def __init__(self, found: Checkpoint) -> None:
        self._found = found
        self._experts = found.gates[0].num_experts

    def run(self) -> None:
        """Raise an :class:`InputError` for the first weight that is missing or misshapen."""
        for layer in range(len(self._found.gates)):
            for part in self._found.layout.parts:
                self._weight(layer, part.name, part.shape)

    def _weight(self, layer: int, part: str, shape: tuple[int, ...]) -> None:
        of_expert = self._found._of_expert
        for piece in self._found.pieces.get((layer, part), []):
            if piece.expert is not None and piece.expert >= self._experts:
                raise InputError(
                    f"{self._found.folder}: {piece.key} found, expected {self._experts} experts"
                )
        stacked = of_expert.get((layer, part, None), [])
        if stacked:
            self._stacked(stacked[0].key, shape)
            return
        for expert in range(self._experts):
            pieces = of_expert.get((layer, part, expert), [])
            wanted = 2 if part == "gate_up_proj" else 1
            if len(pieces) != wanted:
                raise InputError(
                    f"{self._found.folder}: layer {layer}, expert {expert}: {len(pieces)} of "
                    f"{wanted} weights of {part} found, expected all"
                    + "".join(f"; there is {piece.key}" for piece in pieces)
                )
            for piece in pieces:
                self._shape(piece.key, (shape[0] // wanted, *shape[1:]))

    def _stacked(self, key: str, shape: tuple[int, ...]) -> None:
        if not key.endswith(_BLOCKS):
            self._shape(key, (self._experts, *shape))
            return
        blocks, scales = _packed_shapes(shape, self._experts)
        self._shape(key, blocks)
        self._shape(_scales_of(key), scales)

    def _shape(self, key: str, expected: tuple[int, ...]) -> None:
        if key not in self._found.files.entries:
            raise InputError(f"{self._found.folder}: {key} is missing, expected it")
        found = self._found.files.entries[key].shape
        _check_shape(self._found.folder, key, found, expected)


def _load_dense(found: Checkpoint, keys: Mapping[str, str]) -> None:
    """Read every tensor but the experts' into the model, tie what is tied, fill buffers."""
    model, folder = found.model, found.folder
    experts = expert_names(model, found.gates)
    expected = {k: v for k, v in model.state_dict().items() if k not in experts}
    for name, empty in expected.items():
        if name not in keys:
            continue
        value = found.files.read(keys[name])
        _check_shape(folder, keys[name], tuple(value.shape), tuple(empty.shape))
        _check_finite(value := value.to(empty.dtype), f"{folder}: {keys[name]}")
        put_tensor(model, name, value)
    missing = set(expected) - set(keys)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} weights are missing, expected all; first {min(missing)}"
        )
    fill_buffers(model, torch.device("cpu"))


def _wanted_dtype(dtype: str, config: Any, files: TensorFiles) -> torch.dtype:
    """The dtype called *dtype*; ``auto`` is the configuration's, else that of the weights."""
    if dtype != "auto":
        found = getattr(torch, dtype)
    else:
        stored = (e.dtype for e in files.entries.values() if e.dtype.is_floating_point)
        found = config.dtype or next(stored, torch.float32)
    return found if isinstance(found, torch.dtype) else getattr(torch, str(found))


def open_checkpoint(folder: Path | str, dtype: str = "auto") -> Checkpoint:
    """Load the dense part of the model in *folder* on the CPU; its experts can be streamed.

    *folder* may also be a name on the hub. *dtype* is ``auto`` or one of the floating types.
    Values are those that an ordinary load gives, bit by bit. What is wrong with the files is
    an :class:`InputError`.
    """
    check_dtype(dtype)
    folder = find_folder(folder)
    config = read_config(folder)
    quantisation(config, str(folder))
    files = TensorFiles(checkpoint_files(folder))
    model = build_skeleton(config, _wanted_dtype(dtype, config, files))
    gates = find_gates(model)
    keys, pieces = _pieces(files, Names(model, gates))
    found = Checkpoint(
        folder=folder,
        model=model,
        gates=gates,
        layout=ExpertLayout.of(gates[0].experts),
        files=files,
        pieces=pieces,
    )
    try:
        _Check(found).run()
        _load_dense(found, keys)
    finally:
        found.close()
    _adopt_generation(model, folder)
    return found


def _adopt_generation(model: Any, folder: Path) -> None:
    """End tokens and sampling defaults as the checkpoint states them."""
    model.config.name_or_path = model.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
