"""Import CSV: one row per (token, layer) with the ids of its experts."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from traces.errors import InputError
from traces.importers.base import Imported, readable
from traces.importers.rows import Row, RowCollector
from traces.importers.spec import SpecOptions

#: Our word -> headings for it, in small letters with single spaces.
HEADINGS = {
    "layer": ("layer", "layer id", "layer idx"),
    "experts": ("experts", "expert ids", "activated expert ids", "activated experts"),
    "sequence": ("sequence", "sequence id", "seq id", "request id"),
    "position": ("position", "token pos", "token idx"),
}

_LIST = re.compile(r"[\[(]?\s*\d+(?:[\s,;]+\d+)*\s*[\])]?")


def import_csv(path: Path, options: SpecOptions) -> Imported:
    """Read ``layer, experts`` rows in the order in which they were recorded.

    The header may be absent or use any of :data:`HEADINGS`. Experts are separated by spaces,
    commas or semicolons, with or without brackets. Without a ``position`` column a new token
    begins where the layer does not grow; without ``sequence`` all is one sequence.
    """
    rows = RowCollector(path)
    try:
        with readable(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            columns: dict[str, int] | None = None
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if columns is None:
                    columns = _columns(path, cells)
                    if columns:
                        continue
                    columns = {"layer": 0, "experts": 1}
                rows.add(reader.line_num, _row(rows, reader.line_num, cells, columns))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}") from None
    return rows.finish(options, f"{path.name}: routing log, CSV")


def _columns(path: Path, cells: list[str]) -> dict[str, int]:
    """Where each column lies; empty when *cells* are numbers and no header."""
    if cells[0].strip().isdigit():
        return {}
    heads = [" ".join(cell.lower().replace("_", " ").split()) for cell in cells]
    columns = {
        word: heads.index(name)
        for word, names in HEADINGS.items()
        for name in names
        if name in heads
    }
    for word in ("layer", "experts"):
        if word not in columns:
            raise InputError(
                f"{path}: line 1: column {word!r} is missing, found {', '.join(cells)}"
            )
    return columns


def _row(rows: RowCollector, line: int, cells: list[str], columns: dict[str, int]) -> Row:
    last = max(columns.values())
    if len(cells) <= last:
        raise rows.error(line, f"{len(cells)} cells, expected at least {last + 1}")
    if columns["experts"] == last:  # a list may have been cut at its own commas
        cells = [*cells[:last], ",".join(cells[last:])]
    text = cells[columns["experts"]].strip()
    if not _LIST.fullmatch(text):
        raise rows.error(line, f"experts {text!r:.40}, expected ids such as 3 17 42")
    numbers = {}
    for word in ("layer", "position"):
        if word in columns:
            cell = cells[columns[word]].strip()
            if not cell.isdecimal():
                raise rows.error(line, f"{word} {cell!r}, expected a whole number")
            numbers[word] = int(cell)
    return Row(
        experts=[int(found) for found in re.findall(r"\d+", text)],
        sequence=cells[columns["sequence"]].strip() if "sequence" in columns else None,
        layer=numbers["layer"],
        position=numbers.get("position"),
    )
