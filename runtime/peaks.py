"""The most memory that a run has needed, on the device and on the host."""

from __future__ import annotations

import resource

import torch


def forget_peaks(device: torch.device) -> None:
    """Give back what the device's allocator keeps, and start its peak anew."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most device memory in use since :func:`forget_peaks`; 0 on the CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def host_peak_bytes() -> int:
    """Most host memory that this process has held."""
    try:
        # ru_maxrss begins with the peak of the process that started this one.
        with open("/proc/self/status", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
