"""Cells: one policy at one budget and batch, simulated and measured; and the file they lie in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policies.result import read_json
from reports.files import write_file
from traces.errors import InputError

#: The share of a token's time from which a run counts as waiting for the link, and the share of
#: the profile's rate that the link then has to reach.
STALL, BANDWIDTH = 0.20, 0.95

#: How fast the host has to run, 1 being its fastest.
HOST_SPEED = 0.8

#: Ways to validate: routing forced from a trace, or a checkpoint that generates text.
MODES = ("replay", "live")

#: A world that ran on a CUDA device; any other is a stand-in without a profile of its own.
GPU = "gpu"


@dataclass(frozen=True)
class Cell:
    """One run in both worlds. ``docs/validation/README.md`` defines every field.

    *cache* is the budget as a share of all experts. Seconds end in ``_s`` and bytes in
    ``_bytes``; ``_sim`` is the simulated world, ``_gpu`` the real one, whatever its device
    (*world* says which). ``tpot`` is the mean time per output token. A cell that failed says why in
    *failed*; what was not measured is None.
    """

    model: str
    policy: str
    cache: float
    batch: int
    mode: str
    tpot_sim_s: float | None = None
    tpot_gpu_s: float | None = None
    decisions_equal: bool | None = None
    held_sim: int | None = None
    held_gpu: int | None = None
    demand_bytes_equal: bool | None = None
    link_busy_of_stall: float | None = None
    gpu_peak_bytes: int | None = None
    slots: int = 0
    world: str = GPU
    failed: str = ""
    error: float | None = None
    naive_s: float | None = None
    naive_error: float | None = None
    tpot_sim_p50_s: float | None = None
    tpot_sim_p90_s: float | None = None
    tpot_sim_p99_s: float | None = None
    tpot_gpu_p50_s: float | None = None
    tpot_gpu_p90_s: float | None = None
    tpot_gpu_p99_s: float | None = None
    accesses_sim: int | None = None
    accesses_gpu: int | None = None
    missed_sim: int | None = None
    missed_gpu: int | None = None
    demand_bytes_sim: int | None = None
    demand_bytes_gpu: int | None = None
    prefetch_bytes_sim: int | None = None
    prefetch_bytes_gpu: int | None = None
    stall_share: float | None = None
    link_bytes_per_s: float | None = None
    link_profile_bytes_per_s: float | None = None
    gpu_predicted_bytes: int | None = None
    host_peak_bytes: int | None = None
    parts_sim_s: dict[str, float] = field(default_factory=dict)
    parts_gpu_s: dict[str, float] = field(default_factory=dict)
    step_quantiles_sim_s: list[float] = field(default_factory=list)
    step_quantiles_gpu_s: list[float] = field(default_factory=list)
    decisions_sha256_sim: str = ""
    decisions_sha256_gpu: str = ""
    first_difference: str = ""
    trace: str = ""
    sequences: int = 0
    tokens: int = 0
    steps: int = 0
    host_speed: float | None = None
    attempts: int = 1
    seed: int = 0
    pool: str = "global"
    depth: int = 2
    scheduler: str = "none"
    forecaster: str = ""
    compute: str = ""
    hardware: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    @property
    def key(self) -> tuple[str, str, float, int, str]:
        """What a cell is replaced by: the same run again."""
        return self.model, self.policy, self.cache, self.batch, self.mode

    @property
    def counts_equal(self) -> bool:
        """Whether accesses, held and missed are the same in both worlds."""
        pairs = (
            (self.accesses_sim, self.accesses_gpu),
            (self.held_sim, self.held_gpu),
            (self.missed_sim, self.missed_gpu),
        )
        return all(ours == theirs for ours, theirs in pairs)

    @property
    def prefetch_error(self) -> float:
        """Prefetch bytes simulated over measured, less 1; 0 where neither world prefetched."""
        ours, theirs = self.prefetch_bytes_sim or 0, self.prefetch_bytes_gpu or 0
        if ours == theirs:
            return 0.0
        return (ours - theirs) / theirs if theirs else float("inf")

    @property
    def disturbed(self) -> bool:
        """Whether a GPU waited for a link, or a host, that was slower than the profile knows it."""
        return self.world == GPU and self.calm < 1

    @property
    def calm(self) -> float:
        """How little the machine was disturbed, whatever the times say of the simulator.

        The smaller of the host's speed and, in runs that wait for it, the link's, over what the
        profile expects of either.
        """
        waited = (self.stall_share or 0.0) > STALL
        link = (self.bandwidth_share or 1.0) if waited else 1.0
        return min(link / BANDWIDTH, (self.host_speed or 1.0) / HOST_SPEED)

    @property
    def memory_error(self) -> float | None:
        """Peak GPU memory measured over predicted, less 1."""
        if self.gpu_peak_bytes is None or not self.gpu_predicted_bytes:
            return None
        return (self.gpu_peak_bytes - self.gpu_predicted_bytes) / self.gpu_predicted_bytes

    @property
    def bandwidth_share(self) -> float | None:
        """The link's rate while it was busy, over the profile's for copies of one expert."""
        if self.link_bytes_per_s is None or not self.link_profile_bytes_per_s:
            return None
        return self.link_bytes_per_s / self.link_profile_bytes_per_s

    def percentile_error(self, name: str) -> float | None:
        """Simulated over measured less 1 at *name*: ``p50``, ``p90`` or ``p99`` of TPOT."""
        ours, theirs = getattr(self, f"tpot_sim_{name}_s"), getattr(self, f"tpot_gpu_{name}_s")
        return ours / theirs - 1 if ours is not None and theirs else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the order of the fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: object, where: str) -> Cell:
        """Read what :meth:`to_dict` wrote; what cannot be one raises :class:`InputError`."""
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: is {type(values).__name__}, expected an object")
        fields = {known.name: known for known in dataclasses.fields(cls)}
        for name in FIRST:
            if name not in values:
                raise InputError(f"{where}: field {name!r} is missing, expected {', '.join(FIRST)}")
        for name, value in values.items():
            if name in fields and not _fits(value, str(fields[name].type)):
                raise InputError(f"{where}: {name} is {value!r:.60}, expected {fields[name].type}")
        if values["mode"] not in MODES:
            raise InputError(
                f"{where}: mode is {values['mode']!r:.60}, expected {' or '.join(MODES)}"
            )
        return cls(**{name: value for name, value in values.items() if name in fields})


#: The keys that every cell has, before all others.
FIRST = (
    "model", "policy", "cache", "batch", "mode", "tpot_sim_s", "tpot_gpu_s", "decisions_equal",
    "held_sim", "held_gpu", "demand_bytes_equal", "link_busy_of_stall", "gpu_peak_bytes",
)  # fmt: skip

#: What a value of a field may be, by the first word of the field's type.
_FITS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "dict": (dict,),
    "list": (list,),
}


def _fits(value: object, kind: str) -> bool:
    if value is None:
        return kind.endswith("None")
    first = kind.split("[")[0].split(" ")[0]
    if isinstance(value, bool) and first != "bool":
        return False
    if not isinstance(value, _FITS[first]):
        return False
    inside: Iterable[object] = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, list):
        inside = value
    numbers = "float" in kind
    return all(isinstance(item, (int, float) if numbers else str) for item in inside)


def merge(old: Sequence[Cell], new: Sequence[Cell]) -> list[Cell]:
    """*old* with each cell of *new* in the place of its namesake, or after the others."""
    cells = {cell.key: cell for cell in old}
    cells.update((cell.key, cell) for cell in new)
    return list(cells.values())


def cells_json(cells: Sequence[Cell]) -> str:
    """A JSON list with one cell per line, so that a changed cell is a changed line."""
    lines = [json.dumps(cell.to_dict(), allow_nan=False) for cell in cells]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def read_cells(path: Path) -> list[Cell]:
    """The cells of a file that :func:`merge_into` wrote; anything else is an input error."""
    found = read_json(path, "a list of cells")
    if isinstance(found, dict) and "cells" in found:
        found = found["cells"]
    if not isinstance(found, list):
        raise InputError(f"{path}: is {type(found).__name__}, expected a list of cells")
    return [Cell.from_dict(item, f"{path}: cell {i}") for i, item in enumerate(found)]


def merge_into(path: Path, cells: Sequence[Cell]) -> None:
    """Put *cells* into the file *path*, which may be absent; the other cells in it stay."""
    text = cells_json(merge(read_cells(path) if path.exists() else [], cells))
    write_file(path, lambda file: file.write(text.encode()))


def cache_text(cell: Cell) -> str:
    """The budget as ``25 %``."""
    return f"{100 * cell.cache:.3g} %"


def cell_labels(cells: Sequence[Cell]) -> list[str]:
    """A label per cell: policy and budget, then only what is not the same everywhere."""
    columns: list[list[str]] = [
        [f"batch {cell.batch}" for cell in cells],
        [cell.mode for cell in cells],
        [cell.model for cell in cells],
    ]
    varying = [words for words in columns if len(set(words)) > 1]
    heads = [f"{cell.policy}, {cache_text(cell)}" for cell in cells]
    return [", ".join(words) for words in zip(heads, *varying, strict=True)]


def by_group(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells together that differ in policy and budget alone, as they come."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.mode, cell.batch, cell.world), []).append(cell)
    return list(groups.values())
