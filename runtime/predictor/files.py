"""Predictors and unfinished trainings on disk: safetensors with a JSON table, never half a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from runtime.predictor.model import Predictor
from runtime.predictor.spec import PredictorSpec
from traces.errors import InputError, first_line
from traces.writing import replacing

VERSION = 1

#: The one key of the metadata: several would be written in any order.
KEY = "expertflow"

#: How weights may be stored; they are computed with in float32.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class StoredPredictor:
    """A predictor from a file: its weights in float32, and what is known of its *training*."""

    path: Path
    model: Predictor
    training: Mapping[str, Any]
    size_bytes: int
    fingerprint: str

    @property
    def spec(self) -> PredictorSpec:
        """What it is made for."""
        return self.model.spec

    @property
    def about(self) -> dict[str, Any]:
        """The predictor in a few plain values, without folders."""
        return {"name": self.path.name, "fingerprint": self.fingerprint}


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], facts: Any) -> None:
    """Write *tensors* and *facts* of a *kind* of file; it appears when it is whole."""
    text = json.dumps({"version": VERSION, "kind": kind, **facts}, sort_keys=True)
    with replacing(path) as unfinished:
        # Not save_file: what that writes, nobody but its owner may read.
        whole = save({k: v.contiguous().cpu() for k, v in tensors.items()}, {KEY: text})
        unfinished.write_bytes(whole)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote; anything else is an :class:`InputError`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file: {first_line(error)}, expected a {kind}"
        ) from None
    try:
        facts = json.loads(text)
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.get("kind") != kind:
        found = facts.get("kind") if isinstance(facts, dict) else None
        raise InputError(f"{path}: is of kind {found!r}, expected a {kind}")
    if facts.get("version") != VERSION:
        raise InputError(f"{path}: version {facts.get('version')!r}, expected {VERSION}")
    return tensors, facts


def save_predictor(path: Path, model: Predictor, training: Mapping[str, Any], dtype: str) -> None:
    """Write *model* with its weights as *dtype*; the same weights give the same bytes."""
    weights = {name: w.detach().to(DTYPES[dtype]) for name, w in model.state_dict().items()}
    for name, values in weights.items():
        if not bool(values.isfinite().all()):
            raise InputError(
                f"{path}: {name} has values that {dtype} cannot hold, expected finite ones"
            )
    facts = {"spec": model.spec.to_dict(), "training": dict(training), "dtype": dtype}
    write_tensors(path, "predictor", weights, facts)


def load_predictor(path: str | Path, device: torch.device | str = "cpu") -> StoredPredictor:
    """The predictor *path*, ready to be asked; a broken file is an :class:`InputError`."""
    path = Path(path)
    tensors, facts = read_tensors(path, "predictor")
    spec = PredictorSpec.from_dict(facts.get("spec"), str(path))
    model = Predictor(spec)
    fill(model, tensors, str(path))
    return StoredPredictor(
        path,
        model.to(device).eval(),
        facts.get("training", {}),
        path.stat().st_size,
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def fill(model: Predictor, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put *tensors* into *model*; one that is absent or of another shape is refused."""
    own = model.state_dict()
    for name, values in own.items():
        found = tuple(tensors[name].shape) if name in tensors else "absent"
        if found != tuple(values.shape):
            raise InputError(f"{where}: {name} is {found}, expected {tuple(values.shape)}")
    if len(tensors) != len(own):
        name = next(name for name in tensors if name not in own)
        raise InputError(f"{where}: tensor {name} found, expected none of that name")
    model.load_state_dict({name: values.float() for name, values in tensors.items()})


def stored_bytes(model: Predictor, dtype: str) -> int:
    """What the weights of *model* take as *dtype*."""
    weights: int = sum(w.numel() for w in model.state_dict().values())
    return weights * DTYPES[dtype].itemsize
