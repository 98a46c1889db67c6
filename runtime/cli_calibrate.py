"""The command ``simctl calibrate``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from policies.hardware import FIGURES
from runtime.cli import progress_bar, require_torch
from traces.errors import InputError


def check_target(path: Path, force: bool) -> None:
    """Refuse a file that cannot become a profile, before anything is measured."""
    if path.suffix != ".toml":
        raise InputError(f"--out {path}: expected a name that ends in .toml")
    if not path.resolve().parent.is_dir():
        raise InputError(f"--out {path}: no folder {path.parent}, expected one to write to")
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder, expected a file")
    if path.exists() and not force:
        raise InputError(f"--out {path}: exists already, expected a new file; --force replaces it")


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The profile: a .toml file."
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--quick", is_flag=True, help="Fewer and smaller measurements, in seconds.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def calibrate(out: Path, device: str, quick: bool, force: bool) -> None:
    """Measure this machine into a hardware profile for --hardware."""
    check_target(out, force)
    require_torch()

    from runtime.calibration.run import (
        calibrate_device,
        measure,
        profile_values,
        steps_of_progress,
        write_profile,
    )

    start = time.monotonic()
    bench = calibrate_device(device, quick)
    with bench.at_full_speed(), progress_bar("calibrate", steps_of_progress()) as advance:
        found = measure(bench, lambda: advance(1))
        values = profile_values(bench, found)
        advance(steps_of_progress())
    write_profile(out, values)
    click.echo(summary(values))
    click.echo(f"\n{out}: written after {time.monotonic() - start:.0f} s; use --hardware {out}")


def summary(values: Mapping[str, Any]) -> str:
    """The figures of a profile's tables, one a line, in units that people read."""
    lines = [str(values["title"]), ""]
    for section in FIGURES:
        for key, value in _figures(values.get(section, {}), section):
            lines.append(f"{key:<36} {value}")
    return "\n".join(lines)


def _figures(table: Mapping[str, Any], path: str) -> list[tuple[str, str]]:
    """Dotted name and value of every figure; of a list of sizes or seconds the ends."""
    found = []
    for key, value in table.items():
        name = f"{path}.{key}"
        if isinstance(value, Mapping):
            found += _figures(value, name)
        elif isinstance(value, list):
            ends = f"{_shown(key, value[0])} .. {_shown(key, value[-1])}"
            found.append((name, f"{ends} ({len(value)} sizes)"))
        else:
            found.append((name, _shown(name, value)))
    return found


def _shown(name: str, value: Any) -> str:
    """*value* with the unit that *name* ends in."""
    if name.endswith("bytes_per_s"):
        return f"{value / 1e9:,.1f} GB/s"
    if name.endswith("flops_per_s"):
        return f"{value / 1e12:,.1f} Tflop/s"
    if name.endswith("bytes"):
        return f"{value / 2**20:,.3g} MiB" if value < 2**30 else f"{value / 2**30:,.1f} GiB"
    if name.endswith(("_s", "seconds")) or "_s." in name:
        return f"{value * 1e6:,.2f} us"
    return f"{value:g}" if isinstance(value, float) else str(value)
