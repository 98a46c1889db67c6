"""Two calls of the CUDA driver that torch does not offer, or offers at several times the cost."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from runtime.errors import OffloadError


@cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuMemcpyHtoDAsync_v2.argtypes = [
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    library.cuStreamWriteValue32_v2.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_uint32,
        ctypes.c_uint,
    ]
    return library


def copy_to_device(target: int, source: int, size_bytes: int, stream: int) -> None:
    """Append a copy from host address *source* to device address *target* to *stream*."""
    code = _library().cuMemcpyHtoDAsync_v2(target, source, size_bytes, stream)
    if code:
        raise OffloadError(f"a copy of {size_bytes} bytes to the GPU failed: CUDA error {code}")


def write_value(target: int, value: int, stream: int) -> None:
    """Let *stream* write the 32 bits of *value* to device address *target*, without a kernel."""
    code = _library().cuStreamWriteValue32_v2(stream, target, value & 0xFFFFFFFF, 0)
    if code:
        raise OffloadError(f"writing to the expert table failed: CUDA error {code}")
