"""What machine this is, in words for a profile."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from runtime.doctor import examine


def device_name(device: torch.device) -> str:
    """The GPU as its driver calls it, or the processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).name)
    return processor()


def device_memory_bytes(device: torch.device) -> int:
    """All memory of the GPU, or of the host."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor() -> str:
    """The host's processor as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measurement(device: torch.device) -> dict[str, str]:
    """Machine, driver, software and day, as a profile's ``[measurement]``."""
    facts: dict[str, Any] = examine()
    memory = facts["memory"]["total_bytes"] / 2**30
    gpu = facts["gpu"]
    driver = "none: the CPU was the device"
    if device.type == "cuda":
        driver = f"{gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}"
    return {
        # Not those that this thread may use now: it keeps to one while it measures.
        "machine": f"{os.cpu_count()} cores of {processor()}, {memory:.0f} GiB of host memory",
        "driver": driver,
        "software": (
            f"Python {facts['python']}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}"
        ),
        "date": datetime.now(UTC).date().isoformat(),
    }
