"""Import numpy archives: ``experts`` [token, layers, k] with sequence offsets."""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import InputError, first_line
from traces.importers.base import Imported, checked, readable
from traces.importers.spec import Found, SpecOptions, resolve
from traces.trace import TokenSequence

Arrays = dict[str, npt.NDArray[Any]]

#: Field -> what it must be. ``experts`` is required.
FIELDS = {
    "experts": "iu",
    "weights": "f",
    "seq_offsets": "iu",
    "first_pos": "iu",
    "prefill": "iu",
    "tokens": "iu",
    "dataset": "U",
}


def import_npz(path: Path, options: SpecOptions) -> Imported:
    """Read a numpy archive of routed experts.

    ``experts`` is [token, layers, k]. Optional: ``weights`` of the same shape;
    ``seq_offsets`` [sequences + 1], without it all tokens are one sequence; per sequence
    ``first_pos`` (else 0), ``prefill`` (prompt tokens, else 0) and ``dataset`` (a name, kept
    as the sequence's domain); ``tokens`` [token] ids.
    """
    arrays = _load(readable(path))
    experts = arrays["experts"]
    _, layers, top_k = experts.shape
    recognised = _is_gpt_oss(arrays)
    found = Found(path, layers, top_k, published="gpt-oss-20b" if recognised else None)
    model = resolve(options, found)
    offsets = arrays["seq_offsets"]
    domains = [str(name) for name in arrays.get("dataset", ())]
    return Imported(
        model,
        checked(path, model, _sequences(arrays)),
        source=f"{path.name}: routed experts of {model.name}",
        extra={"domains": domains} if domains else {},
        count=len(offsets) - 1,
    )


def _sequences(arrays: Arrays) -> Iterator[TokenSequence]:
    offsets = arrays["seq_offsets"].astype(np.int64).tolist()
    first = arrays.get("first_pos", np.zeros(len(offsets), np.int64))
    prefill = arrays.get("prefill", np.zeros(len(offsets), np.int64))
    tokens, weights = arrays.get("tokens"), arrays.get("weights")
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        part = slice(start, stop)
        yield TokenSequence(
            id=i,
            experts=arrays["experts"][part].astype(np.int64),
            positions=int(first[i]) + np.arange(stop - start),
            prefill=int(prefill[i]),
            tokens=None if tokens is None else tokens[part].astype(np.int64),
            weights=None if weights is None else weights[part],
        )


def _load(path: Path) -> Arrays:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise InputError(f"{path}: holds a single array, expected an npz archive")
            names = archive.files
            arrays = {name: archive[name] for name in FIELDS if name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable npz archive: {first_line(error)}") from None
    if "experts" not in arrays:
        raise InputError(f"{path}: array 'experts' is missing, found {', '.join(names) or 'none'}")
    for name, array in arrays.items():
        if array.dtype.kind not in FIELDS[name]:
            raise InputError(f"{path}: array {name!r} is {array.dtype}, expected {_kind(name)}")
    experts = arrays["experts"]
    if experts.ndim != 3 or not experts.size:
        raise InputError(
            f"{path}: array 'experts' has shape {experts.shape}, expected [tokens, layers, k]"
        )
    _check_shapes(path, arrays)
    return arrays


def _check_shapes(path: Path, arrays: Arrays) -> None:
    """Complete the offsets and compare the other arrays with them."""
    experts = arrays["experts"]
    count = len(experts)
    offsets = arrays.setdefault("seq_offsets", np.array([0, count]))
    good = offsets.ndim == 1 and len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == count
    if not good or (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise InputError(
            f"{path}: array 'seq_offsets' must rise from 0 to {count}, the number of tokens"
        )
    per_sequence = (len(offsets) - 1,)
    shapes = {
        "weights": experts.shape,
        "tokens": (count,),
        "first_pos": per_sequence,
        "prefill": per_sequence,
        "dataset": per_sequence,
    }
    for name, expected in shapes.items():
        if name in arrays and arrays[name].shape != expected:
            raise InputError(
                f"{path}: array {name!r} has shape {arrays[name].shape}, expected {expected}"
            )


def _kind(name: str) -> str:
    return {"iu": "integers", "f": "floats", "U": "names"}[FIELDS[name]]


def _is_gpt_oss(arrays: Arrays) -> bool:
    """Whether shape, ids and fields are those of the published gpt-oss-20b recording."""
    published = {"experts", "weights", "seq_offsets", "first_pos", "dataset"} <= set(arrays)
    experts = arrays["experts"]
    same_shape = experts.shape[1:] == (24, 4) and int(experts.max()) < 32
    return published and same_shape
