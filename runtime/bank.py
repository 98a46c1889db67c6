"""The slot bank: a fixed number of expert slots on the device, and the table that finds them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from policies.planner import Planner
from runtime.errors import OffloadError
from runtime.lanes import Lanes
from runtime.layout import ExpertLayout, LowLayout

#: Table entry of an expert that this event does not compute on the device.
ABSENT = -1


class SlotBank:
    """Slots for *full* experts at full precision and *low* ones at low precision.

    Slot numbers are the ledger's: full ones first. Allocated once, so that no run can exceed
    its budget.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        full: int,
        device: torch.device,
        *,
        low_layout: LowLayout | None = None,
        low: int = 0,
    ) -> None:
        self.layout, self.low_layout = layout, low_layout
        self.full_slots, self.low_slots = full, low
        self.full = _allocate(full, layout.stride_bytes, device)
        self.low: Tensor | None = None
        if low and low_layout is not None:
            self.low = _allocate(low, low_layout.stride_bytes, device)
        size = layout.size_bytes
        self._targets = [row[:size] for row in self.full.unbind(0)]
        if self.low is not None and low_layout is not None:
            self._targets += [row[: low_layout.size_bytes] for row in self.low.unbind(0)]

    @classmethod
    def of(cls, planner: Planner, layout: ExpertLayout, device: torch.device) -> SlotBank:
        """The slots that the ledger of *planner* counts on, for experts of *layout*."""
        cache = planner.cache
        low = LowLayout(layout, planner.policy.low_bits) if cache.low_slots else None
        return cls(layout, cache.full_slots, device, low_layout=low, low=cache.low_slots)

    @property
    def size_bytes(self) -> int:
        """Device memory taken."""
        return self.full.numel() + (0 if self.low is None else self.low.numel())

    def target(self, slot: int) -> Tensor:
        """Where the bytes of the copy in *slot* go, uint8 [size_bytes]."""
        return self._targets[slot]

    def free(self) -> None:
        """Give the memory back; nothing can be copied or computed any more."""
        empty = torch.empty(0, dtype=torch.uint8)
        self.full, self.low, self._targets = empty, None, []

    def views(self) -> Mapping[str, Tensor]:
        """Parts of the full-precision slots, each [full_slots, *shape]."""
        return self.layout.views(self.full)


def _allocate(count: int, stride_bytes: int, device: torch.device) -> Tensor:
    try:
        return torch.zeros(count, stride_bytes, dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if device.type != "cuda" and "alloc" not in str(error):
            raise
        free = ""
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free = f" ({torch.cuda.mem_get_info(device)[0] / 2**30:.2f} GiB are free)"
        raise OffloadError(
            f"{count} slots of {stride_bytes / 2**20:.1f} MiB need "
            f"{count * stride_bytes / 2**30:.2f} GiB on {device}{free}: out of memory, expected "
            "room for them; give fewer slots"
        ) from None


class ExpertTable:
    """For every expert the slot that an event reads it from, int32 [layers, experts].

    The table lies on the device. :meth:`set` notes a change, :meth:`flush` hands all of them
    to the computing lane as writes of its own, which do not queue behind the copies of experts
    as a small copy would.
    """

    def __init__(self, layers: int, experts: int, lanes: Lanes) -> None:
        self._lanes = lanes
        self.slots = torch.full((layers, experts), ABSENT, dtype=torch.int32, device=lanes.device)
        self._now = [ABSENT] * (layers * experts)
        self._changed: dict[int, int] = {}

    def set(self, expert: int, slot: int) -> None:
        """*expert* is to be read from *slot* from the next flush on."""
        self._changed[expert] = slot

    def slot(self, expert: int) -> int:
        """What the table says of *expert*, changes not yet flushed included."""
        return self._changed.get(expert, self._now[expert])

    def flush(self) -> None:
        """Apply the noted changes in the computing lane."""
        if not self._changed:
            return
        now = self._now
        changed = [(e, s) for e, s in self._changed.items() if now[e] != s]
        self._changed.clear()
        for expert, slot in changed:
            now[expert] = slot
        if changed:
            self._lanes.write(self.slots, changed)

    def free(self) -> None:
        """Give the memory back."""
        self.slots = torch.empty(0, dtype=torch.int32)
