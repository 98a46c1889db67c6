"""How much GPU and host memory this process takes, in bytes."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import torch


def forget_peaks(device: str) -> None:
    """Free what building the model has left, and let peaks count from here on.

    Writing 5 to ``clear_refs`` resets VmHWM (Linux, proc(5)); where that is refused the peak
    includes the building.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_peaks(device: str) -> dict[str, int | None]:
    """Peaks since :func:`forget_peaks`; None for what this machine cannot tell.

    ``gpu_peak_bytes`` is what PyTorch's allocator handed out at most; ``gpu_used_bytes`` is all
    that is taken on the card at this moment, contexts and other processes included (NVML).
    ``host_peak_bytes`` is VmHWM, ``host_end_bytes`` VmRSS now. ``host_pinned_bytes`` is what
    PyTorch's pinned allocator owned at most; memory pinned in another way is not in it.
    """
    on_gpu = device == "cuda"
    return {
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "gpu_used_bytes": _card_used_bytes() if on_gpu else None,
        "host_peak_bytes": _status_bytes("VmHWM"),
        "host_end_bytes": _status_bytes("VmRSS"),
        "host_pinned_bytes": _pinned_bytes() if on_gpu else None,
    }


def _status_bytes(key: str) -> int | None:
    """A field of ``/proc/self/status``, None on a system without."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None


def _pinned_bytes() -> int | None:
    """The most that PyTorch's pinned allocator has owned (torch 2.7 and later)."""
    statistics: dict[str, Any] = getattr(torch.cuda, "host_memory_stats", dict)()
    peak = statistics.get("allocated_bytes.peak")
    return None if peak is None else int(peak)


def _nvml() -> Any:
    """NVML initialised, or None: the package nvidia-ml-py or the library is not there."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml


def _card_used_bytes() -> int | None:
    """Memory in use on the card this process computes on."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        name = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(name)).used)
    except Exception:
        return None


def machine_facts(device: str) -> dict[str, Any]:
    """The card, its memory in bytes, its driver and CUDA version; nothing more for a CPU."""
    if device != "cuda":
        return {"device": "CPU"}
    card = torch.cuda.get_device_properties(0)
    nvml = _nvml()
    return {
        "device": card.name,
        "device_bytes": card.total_memory,
        "driver": None if nvml is None else nvml.nvmlSystemGetDriverVersion(),
        "cuda": torch.version.cuda,
    }
