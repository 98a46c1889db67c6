"""The page: every table between its marks, every figure beside the rows it is drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import expertflow_gaps
from benchmarks.expertflow import (
    gpu,
    hits,
    parts,
    recall_rows,
    scheduling,
    slowest,
    speeds,
    tables,
    verdicts,
)
from policies.result import read_json
from traces.errors import InputError
from traces.writing import replacing

NOT_RUN = "Not run."


def sections(folder: Path) -> dict[str, str]:
    """The text of every marked place of the page, by its mark's name, from what *folder* holds."""

    def rows(part: str, kind: type[Any]) -> list[Any]:
        return parts.read_rows(folder, part, kind)

    found = {
        "verdicts": verdicts.table(folder),
        "recall": tables.recall_table(rows("recall", recall_rows.Row)),
        "layers": tables.layer_table(rows("recall", recall_rows.Row)),
        "hits": tables.hit_ratios(rows("hits", hits.Row)),
        "speeds": tables.speed_table(rows("speeds", speeds.Row)),
        "memory": tables.memory_table(rows("speeds", speeds.Row)),
        "gpu": gpu.table(folder),
        "scheduling": tables.scheduler_table(rows("scheduling", scheduling.Row)),
        "slowest": [slowest.sentence(slowest.pairs(folder)) + "."],
        "about": _about(folder),
    }
    for part in ("gaps-coarse", "gaps-granular", "gaps-gpt-oss"):
        known = rows(part, expertflow_gaps.Row)
        found[part] = tables.gaps(known) if known else [NOT_RUN]
    return {name: "\n".join(lines) for name, lines in found.items()}


def _about(folder: Path) -> list[str]:
    """When and where each part was run."""
    path = folder / "about.json"
    if not path.is_file():
        return [NOT_RUN]
    lines = []
    for part, note in read_json(path, "notes of runs").items():
        versions = " ".join(f"{name} {version}" for name, version in note["versions"].items())
        lines.append([part, f"{note['seconds']:,}", note["date"], note["machine"], versions])
    return tables.markdown(("part", "seconds", "date", "machine", "versions"), lines)


def filled(text: str, found: dict[str, str], where: str) -> str:
    """*text* with every section of *found* between its marks; each must be there once."""
    for name, section in found.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise InputError(f"{where}: expected one line {begin} and one {end}")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{section}\n{end}{rest.partition(end)[2]}"
    return text


def put_into(page: Path, found: dict[str, str]) -> None:
    """Fill *page* in."""
    try:
        old = page.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{page}: {error.strerror}, expected the page to fill in") from None
    text = filled(old, found, str(page))
    with replacing(page) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def draw(folder: Path) -> None:
    """Every figure for which there are rows, as PNG in *folder*."""
    from benchmarks.expertflow import figures
    from reports.figures.style import to_bytes

    for name, figure in figures.drawn(folder):
        with replacing(folder / f"{name}.png") as unfinished:
            unfinished.write_bytes(to_bytes(figure, "png"))
