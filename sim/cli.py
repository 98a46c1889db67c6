"""Commands of the simulated world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from policies.hardware import FIGURES, HardwareProfile, load_profile, profile_names
from policies.tables import leaves
from traces.model import ModelSpec
from traces.sizes import dimensions, model_sizes, size_names

GIB = 2**30


@click.command()
@click.argument("profile", required=False)
@click.option(
    "--json",
    "json_to",
    metavar="[FILE|-]",
    is_flag=False,
    flag_value="-",
    type=click.File("w", encoding="utf-8", lazy=True),
    help="Write everything as JSON.",
)
def hardware(profile: str | None, json_to: Any) -> None:
    """List hardware profiles and model sizes, or one PROFILE with the source of every figure."""
    profiles = [load_profile(name) for name in ([profile] if profile else profile_names())]
    if json_to is not None:
        json.dump(_as_json(profiles), json_to, indent=2, ensure_ascii=False)
        json_to.write("\n")
    elif profile:
        click.echo(_one_profile(profiles[0]))
    else:
        click.echo(_profile_table(profiles))
        click.echo(_size_table())


def _as_json(profiles: Sequence[HardwareProfile]) -> dict[str, Any]:
    sizes = {}
    for name in size_names():
        sizes[name] = {**model_sizes(name).to_dict(), "source": dimensions(name).source}
    return {"profiles": {p.name: p.to_dict() for p in profiles}, "sizes": sizes}


def _profile_table(profiles: Sequence[HardwareProfile]) -> str:
    head = ["profile (--hardware)", "kind", "GPU", "memory GiB", "TB/s", "Tflop/s", "link GB/s"]
    head += ["from", "taken"]
    rows = [head, *(_profile_row(profile) for profile in profiles)]
    note = (
        "TB/s and Tflop/s (dense bf16) as reached, not as advertised; link: host to GPU, copies "
        "of 1 GiB.\n`simctl hardware PROFILE` shows every figure with its source."
    )
    return f"{_table(rows, left=(0, 1, 2, 7, 8))}\n{note}\n"


def _profile_row(profile: HardwareProfile) -> list[str]:
    gpu, taken = profile.gpu, profile.measurement
    return [
        profile.name,
        profile.kind,
        gpu.name,
        f"{gpu.memory_bytes / GIB:.0f}",
        f"{gpu.memory_bytes_per_s / 1e12:.2f}",
        f"{gpu.bf16_flops_per_s / 1e12:.0f}",
        f"{GIB / profile.link.h2d.copy_s(GIB, queued=True) / 1e9:.1f}",
        profile.source_of("link.h2d").partition(":")[0],
        taken.date if taken else "",
    ]


def _size_table() -> str:
    head = ["sizes (--sizes)", "layers", "experts", "top-k", "expert MB", "dense GB", "total B"]
    rows = [[*head, "KV kB/token", "from"]]
    rows += [_size_row(model_sizes(name)) for name in size_names()]
    note = (
        "Bytes in bfloat16; total: weights in billions; layers: those with routed experts;\n"
        "KV of DeepSeek is the compressed latent, of Switch the decoder's self-attention."
    )
    return f"{_table(rows, left=(0, 8))}\n{note}"


def _size_row(model: ModelSpec) -> list[str]:
    total = model.dense_params + model.total_experts * model.expert_params
    return [
        model.name,
        str(model.layers),
        str(model.experts),
        str(model.top_k),
        f"{model.expert_bytes / 1e6:.1f}",
        f"{model.dense_bytes / 1e9:.2f}",
        f"{total / 1e9:.1f}",
        f"{model.kv_bytes_per_token / 1e3:.0f}",
        dimensions(model.name).source,
    ]


def _one_profile(profile: HardwareProfile) -> str:
    taken = profile.measurement
    lines = [f"{profile.name}: {profile.title} ({profile.kind})"]
    if taken:
        lines += [f"{taken.machine}; {taken.driver}; {taken.software}; {taken.date}"]
    rows = [["figure", "value", "source"]]
    for path in leaves(profile, FIGURES):
        rows.append([path, _shown(_at(profile, path)), profile.source_of(path)])
    return "\n".join([*lines, "", _table(rows, left=(0, 1, 2))])


def _at(thing: Any, path: str) -> Any:
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{_shown(value[0])} .. {_shown(value[-1])} ({len(value)} values)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Rows under a ruled head, columns aligned; those in *left* to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
