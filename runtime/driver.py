"""Calls of the CUDA driver that torch does not offer, or offers at several times the cost."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from runtime.errors import OffloadError

#: The most writes that the driver takes in one call: fewer than 256.
MOST_WRITES = 255

#: ``CU_STREAM_MEM_OP_WRITE_VALUE_32``.
_WRITE_VALUE_32 = 2


class _WriteValue(ctypes.Structure):
    """A write of 32 bits as ``CUstreamBatchMemOpParams`` lays it out, 48 bytes."""

    _fields_ = [
        ("operation", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("alias", ctypes.c_uint64),
        ("padding", ctypes.c_uint64),
    ]


class _CopyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes``: when sources are read, hints of where both ends lie, flags."""

    _fields_ = [("order", ctypes.c_int), ("hints", ctypes.c_int * 4), ("flags", ctypes.c_uint)]


#: ``CU_MEMCPY_SRC_ACCESS_ORDER_STREAM``, for all copies from the first on.
_IN_ORDER, _FROM_FIRST = _CopyAttributes(order=1), ctypes.c_size_t(0)


@cache
def _batch() -> Any:
    """The driver's call for many copies at once, or None where it has none."""
    call = getattr(_library(), "cuMemcpyBatchAsync_v2", None)
    if call is not None:
        size, stream, pointer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p
        call.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, stream]
    return call


@cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuMemcpyHtoDAsync_v2.argtypes = [
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    library.cuStreamBatchMemOp_v2.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_uint,
    ]
    return library


def copy_to_device(target: int, source: int, size_bytes: int, stream: int) -> None:
    """Append a copy from host address *source* to device address *target* to *stream*."""
    code = _library().cuMemcpyHtoDAsync_v2(target, source, size_bytes, stream)
    if code:
        raise OffloadError(f"a copy of {size_bytes} bytes to the GPU failed: CUDA error {code}")


def copy_all_to_device(copies: Sequence[tuple[int, int, int]], stream: int) -> None:
    """Append *copies* of (target, source, bytes) to *stream* in one call of the driver.

    They may land in any order. Drivers before CUDA 13 take them one by one.
    """
    batch = _batch()
    if batch is None:
        for target, source, size_bytes in copies:
            copy_to_device(target, source, size_bytes, stream)
        return
    targets, sources, sizes = zip(*copies, strict=True)
    addresses, lengths = ctypes.c_uint64 * len(copies), ctypes.c_size_t * len(copies)
    code = batch(
        addresses(*targets), addresses(*sources), lengths(*sizes), len(copies),
        ctypes.byref(_IN_ORDER), ctypes.byref(_FROM_FIRST), 1, stream,
    )  # fmt: skip
    if code:
        raise OffloadError(f"{len(copies)} copies to the GPU failed: CUDA error {code}")


class Writes:
    """Writes to device memory without a kernel, many in one call of the driver.

    What they are handed over in is kept from call to call, so that every thread needs its own.
    """

    def __init__(self) -> None:
        self._room = (_WriteValue * MOST_WRITES)()
        for write in self._room:
            write.operation = _WRITE_VALUE_32

    def send(self, target: int, values: Sequence[tuple[int, int]], stream: int) -> None:
        """Let *stream* set elements of the int32 array at address *target*.

        *values* are pairs of an element and what it becomes; addresses are of device memory or
        of pinned host memory. What *stream* was given before is visible to all who see them.
        One call of the driver takes :data:`MOST_WRITES`, in little more time than a single write.
        """
        self.put([(target + 4 * at, value) for at, value in values], stream)

    def put(self, values: Sequence[tuple[int, int]], stream: int) -> None:
        """The same for pairs of an address and what 32 bits become there."""
        room = self._room
        for first in range(0, len(values), MOST_WRITES):
            some = values[first : first + MOST_WRITES]
            for write, (address, value) in zip(room, some, strict=False):
                write.address = address
                write.value = value & 0xFFFFFFFF
            code = _library().cuStreamBatchMemOp_v2(stream, len(some), room, 0)
            if code:
                raise OffloadError(f"writing to the expert table failed: CUDA error {code}")
