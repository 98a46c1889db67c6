"""What this machine can do, found out without loading more than is there."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REQUIRED = ("simpy", "numpy", "pandas", "pyarrow", "matplotlib", "click", "jinja2")
EXTRAS = {
    "gpu": ("torch", "transformers", "safetensors", "nvidia-ml-py"),
    "tune": ("optuna",),
}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_traces() -> dict[str, Any]:
    """Whether ``import traces`` finds this project's package or PyPI's namesake."""
    spec = importlib.util.find_spec("traces")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    own = Path(__file__).resolve().parents[1] / "traces"
    return {"found": str(found) if found else None, "ours": found == own}


def _limit_bytes(which: int) -> int | None:
    """A resource limit of this process, None if there is none."""
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _memory() -> dict[str, Any]:
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "total_bytes": page * os.sysconf("SC_PHYS_PAGES"),
        "available_bytes": page * os.sysconf("SC_AVPHYS_PAGES"),
        "locked_limit_bytes": _limit_bytes(resource.RLIMIT_MEMLOCK),
    }


def _cores() -> int:
    """Cores this process may use, which a container often limits."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _link(handle: Any, nvml: Any) -> dict[str, Any]:
    """PCIe generation and width: as now (an idle link clocks down) and at best."""
    asked = {
        "generation": nvml.nvmlDeviceGetCurrPcieLinkGeneration,
        "width": nvml.nvmlDeviceGetCurrPcieLinkWidth,
        "max_generation": nvml.nvmlDeviceGetMaxPcieLinkGeneration,
        "max_width": nvml.nvmlDeviceGetMaxPcieLinkWidth,
    }
    found: dict[str, Any] = {}
    for name, ask in asked.items():
        try:
            found[name] = int(ask(handle))
        except nvml.NVMLError:
            found[name] = None
    return found


def _gpus() -> tuple[str | None, list[dict[str, Any]]]:
    """The driver's version and every GPU it knows, where nvidia-ml-py is installed."""
    if importlib.util.find_spec("pynvml") is None:
        return None, []
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None, []
    try:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        gpus = [
            {
                "name": str(nvml.nvmlDeviceGetName(handle)),
                "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
                "pcie": _link(handle, nvml),
            }
            for handle in handles
        ]
        return str(nvml.nvmlSystemGetDriverVersion()), gpus
    finally:
        nvml.nvmlShutdown()


def _torch_gpus(torch: Any) -> list[dict[str, Any]]:
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": d.name, "memory_bytes": int(d.total_memory), "pcie": None} for d in devices]


def _cuda() -> dict[str, Any]:
    driver, gpus = _gpus()
    facts: dict[str, Any] = {"available": False, "cuda": None, "driver": driver, "gpus": gpus}
    if importlib.util.find_spec("torch") is None:
        return facts
    torch = importlib.import_module("torch")
    facts["cuda"] = torch.version.cuda
    facts["available"] = bool(torch.cuda.is_available())
    if facts["available"] and not gpus:
        facts["gpus"] = _torch_gpus(torch)
    return facts


def examine() -> dict[str, Any]:
    """Python, packages, extras, cores, memory and GPUs, as plain values for JSON."""
    names = [*REQUIRED, *(name for group in EXTRAS.values() for name in group)]
    packages = {name: _version(name) for name in names}
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "extras_absent": {
            extra: missing
            for extra, group in EXTRAS.items()
            if (missing := [name for name in group if packages[name] is None])
        },
        "traces": _own_traces(),
        "cores": _cores(),
        "memory": _memory(),
        "gpu": _cuda(),
    }


def _gib(size: int | None) -> str:
    return "unlimited" if size is None else f"{size / 2**30:.1f} GiB"


def _link_text(link: dict[str, Any] | None) -> str:
    if link is None:
        return ""
    known = {name: "?" if value is None else value for name, value in link.items()}
    text = ", PCIe {generation} x{width} now, {max_generation} x{max_width} at best"
    return text.format(**known)


def _gpu_lines(gpu: dict[str, Any], torch: str | None) -> Iterator[str]:
    for found in gpu["gpus"]:
        size = _gib(found["memory_bytes"])
        yield f"gpu        {found['name']}, {size}{_link_text(found['pcie'])}"
    if not gpu["gpus"]:
        yield "gpu        none found: simulation and capture on the CPU work, GPU runs do not"
    if torch is None:
        yield "cuda       unknown: torch is not installed"
    elif gpu["available"]:
        yield f"cuda       {gpu['cuda']}, driver {gpu['driver'] or 'unknown'}"
    else:
        yield f"cuda       not usable: torch {torch} is built for {gpu['cuda'] or 'the CPU alone'}"


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The *facts* of :func:`examine` for people."""
    packages, memory = facts["packages"], facts["memory"]
    yield f"python     {facts['python']} on {facts['system']}"
    yield "packages   " + ", ".join(f"{n} {packages[n] or 'ABSENT'}" for n in REQUIRED)
    for extra, group in EXTRAS.items():
        yield f"{extra:<10} " + ", ".join(f"{n} {packages[n] or 'absent'}" for n in group)
    for extra, missing in facts["extras_absent"].items():
        yield f"           for {', '.join(missing)}: pip install -e '.[{extra}]'"
    traces = facts["traces"]
    if traces["ours"]:
        yield "traces     this project's package"
    else:
        yield (
            f"traces     found at {traces['found'] or 'nowhere'}, not this project's: "
            "pip uninstall traces"
        )
    yield f"cores      {facts['cores']}"
    yield (
        f"memory     {_gib(memory['total_bytes'])}, {_gib(memory['available_bytes'])} free, "
        f"may lock {_gib(memory['locked_limit_bytes'])}"
    )
    yield from _gpu_lines(facts["gpu"], packages["torch"])
