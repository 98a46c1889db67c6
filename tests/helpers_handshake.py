"""A device that does what the kernels of a whole decode step do, a little at a time.

It shares memory with a :class:`runtime.handshake.Handshake` as a GPU would, and goes on whenever
chance says so, between any two things that the host does to that memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.routing import PREFILL, Step
from policies.whole_steps import runs_whole
from runtime.bank import ABSENT
from runtime.handshake import NEVER, PLANNED, POSTED, RELEASED, SETTLED, Handshake
from runtime.lanes import Mark
from runtime.whole_steps import answer, await_gate
from tests.helpers_stress import Case, Driver, RacingLanes

#: Rounds in which nothing happens, after which nothing will.
PATIENCE = 10_000


class CountingLanes(RacingLanes):
    """Lanes that number copies as they land, and a device that goes on beside them."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.landed = torch.zeros(1, dtype=torch.int32)
        self._issued = 0
        #: The step under way on the device.
        self.device_step: Iterator[None] = iter(())

    def count_landings(self) -> Tensor:
        return self.landed

    def copy_all(
        self, pairs: Sequence[tuple[Tensor, Tensor]], begun: tuple[Mark, Mark] | None = None
    ) -> tuple[Mark, Mark]:
        begin, end = super().copy_all(pairs, begun)
        self._issued = end.ticket = self._issued + 1
        self._copying.append((None, lambda ticket=end.ticket: self.landed.fill_(ticket)))
        # They may have landed before the host says so.
        self.go_on()
        return begin, end

    def passed(self, mark: Mark) -> bool:
        self.go_on()
        return super().passed(mark) if not mark.ticket else int(self.landed) >= mark.ticket

    def go_on(self) -> None:
        """A little of everything."""
        for _ in range(self._random.choice((0, 1, 3))):
            next(self.device_step, None)
        for _ in range(self._random.choice((0, 1, 2))):
            if self._copying or self._computing:
                self._go_on()


class PretendedShake(Handshake):
    """A handshake whose host lets the device go on while it waits, and between its own stores."""

    lanes: CountingLanes

    def await_answer(self, poll: Any) -> None:
        for _ in range(PATIENCE):
            if self._words[POSTED] > self.events:
                return
            self.lanes.go_on()
            if poll is not None:
                poll()
        raise AssertionError(f"event {self.events}: device and host wait for each other")

    def planned(self) -> None:
        self.lanes.go_on()
        super().planned()
        self.lanes.go_on()

    def settled(self) -> None:
        self.lanes.go_on()
        super().settled()


class PretendedDriver(Driver):
    """Runs decode steps on a pretended device that is ahead of the host, or behind it."""

    lanes: CountingLanes

    def __init__(self, case: Case) -> None:
        lanes = CountingLanes(case.seed)
        super().__init__(case, lanes, lanes.do)
        cache = self.planner.cache
        slots = cache.full_slots + cache.low_slots
        self.shake = PretendedShake(case.layers, case.experts, slots, lanes, 1.0)
        self.shake.lanes = lanes
        self.shake.follow(self.engine)
        self.rows: list[Tensor] = []
        self.whole = 0

    def layers(self, step: Step, size: int) -> None:
        if step.phase == PREFILL or not runs_whole(self.planner, size):
            super().layers(step, size)
            return
        given = [self.inputs(size) for _ in range(self.case.layers)]
        outs = [torch.zeros_like(hidden) for hidden, _, _ in given]
        self.lanes.finish()
        self.rows = [torch.full_like(index, -1) for _, index, _ in given]
        self.lanes.device_step = self._device(given, outs)
        self.whole += 1
        plans = []
        for layer, inputs in enumerate(given):
            await_gate(self.engine, self.shake)
            assert torch.equal(self.rows[layer], inputs[1])
            routing = self.routed(step, layer, inputs[1])
            plan, late = answer(self.engine, self.shake, routing, serves=self.case.serves)
            self.note(plan, late)
            plans.append((routing, plan))
        for _ in range(PATIENCE):
            if next(self.lanes.device_step, "over") == "over":
                break
            self.lanes.go_on()
        else:
            raise AssertionError("the device waits for the host, which is done")
        for (routing, plan), inputs, out in zip(plans, given, outs, strict=True):
            self.expect(routing, plan, inputs, out)

    def _device(self, given: Any, outs: list[Tensor]) -> Iterator[None]:
        """One step: stops wherever a kernel would look again, and where one ends."""
        shake = self.shake
        words, landed = shake._words, self.lanes.landed
        for layer, (hidden, index, weights) in enumerate(given):
            number = int(shake.count[0])
            self.rows[layer].copy_(index)
            yield
            words[POSTED] = number + 1
            yield
            if self.case.serves:
                yield from _reached(words, PLANNED, number + 1)
                source = shake.served[number % 2]
            else:
                yield from _reached(words, SETTLED, number)
                source = shake.table.entries[layer]
            slot, ticket = _entries(source, index)
            yield
            if bool(((slot < 0) | (ticket > int(landed))).any()):
                if bool(((slot < 0) | (ticket == NEVER)).any()):
                    yield from _reached(words, PLANNED, number + 1)
                    slot, ticket = _entries(source, index)
                wanted = int(torch.where(slot >= 0, ticket, 0).max())
                while int(landed) < wanted:
                    yield
            table = torch.full((shake.experts,), ABSENT, dtype=torch.int32)
            table[index] = slot
            yield
            self.maths.kernels.run(hidden, index, weights, table, outs[layer])
            shake.count[0] = number + 1
            yield


def _reached(words: Any, word: int, target: int) -> Iterator[None]:
    while words[word] < target:
        yield
    assert words[word] != RELEASED


def _entries(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Slots int32 and tickets [T, k] of *index* as the kernel reads them."""
    entries = table[index].numpy()
    slot = torch.from_numpy(entries.astype(np.int32))
    return slot, torch.from_numpy(entries >> 32)
