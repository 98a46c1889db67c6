"""Recordings of other programs, read as token sequences. One module per form of input."""

from __future__ import annotations

import json
from pathlib import Path

from traces.errors import InputError
from traces.importers.arrays import (
    has_routed_experts,
    import_base64,
    import_npy,
    import_responses,
)
from traces.importers.base import Imported, readable
from traces.importers.jsonl import import_jsonl
from traces.importers.npz import import_npz
from traces.importers.spec import SpecOptions, load_spec
from traces.importers.table import import_csv

__all__ = ["FORMATS", "Imported", "SpecOptions", "import_recording", "load_spec"]

#: Name of a form of input -> its importer.
FORMATS = {
    "npz": import_npz,
    "npy": import_npy,
    "base64": import_base64,
    "responses": import_responses,
    "jsonl": import_jsonl,
    "csv": import_csv,
}

SUFFIXES = {".npz": "npz", ".npy": "npy", ".b64": "base64", ".base64": "base64", ".csv": "csv"}


def import_recording(path: Path, options: SpecOptions, form: str | None = None) -> Imported:
    """Read the recording *path*; its *form* is told by its suffix unless it is given.

    JSON is one response per item where the first has a ``routed_experts`` field, else one
    (token, layer) per line. Raises :class:`InputError` for what cannot be read.
    """
    return FORMATS[form or _form(readable(path))](path, options)


def _form(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if suffix == ".json":
        return "responses"
    if suffix == ".jsonl":
        return "responses" if _first_line_is_response(path) else "jsonl"
    raise InputError(
        f"{path}: unknown suffix {suffix!r}, expected .json, .jsonl or one of "
        f"{', '.join(SUFFIXES)}, or --format {'|'.join(FORMATS)}"
    )


def _first_line_is_response(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline()
    try:
        return has_routed_experts(json.loads(line))
    except ValueError:
        return False
