"""Recordings of other programs, read as token sequences. One module per form of input."""

from traces.importers.base import Imported
from traces.importers.npz import import_npz
from traces.importers.spec import SpecOptions, load_spec

__all__ = ["Imported", "SpecOptions", "import_npz", "load_spec"]
