"""The ledger: which copy holds which slot. It refuses what no policy may do."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from policies.base import Context
from policies.orders import Pools
from traces.errors import InputError


class LedgerError(InputError):
    """A policy asked for something impossible; names policy, event and expert."""


class ExpertCache:
    """Slots and who holds them: never over budget, never evicting what is pinned.

    A copy is an expert's number, or its low-precision handle (:meth:`Context.low`). The
    budget of *slots* full-precision experts may be divided: *low_slots* for low-precision
    copies take the place of some. With ``pool="layer"`` each kind is split evenly over the
    layers, the remainder to the first ones.
    """

    def __init__(
        self,
        context: Context,
        *,
        full_slots: int | None = None,
        low_slots: int = 0,
        policy: str = "?",
    ) -> None:
        self.context = context
        self.policy = policy
        #: Events seen so far: kept by the planner, so that a refusal can name it.
        self.event = 0
        self.pinned: Collection[int] = ()
        self.slot_of: dict[int, int] = {}
        self.full_slots = context.slots if full_slots is None else full_slots
        self.low_slots = low_slots
        pools = Pools(context)
        self._by_layer = pools.by_layer
        #: The pool whose slots a copy can take.
        self.pool_of = pools.of
        self._free = self._divide(self.full_slots, 0)
        if low_slots:
            self._free += self._divide(low_slots, self.full_slots)
        self._split = len(self._free) > 1
        self._copies = context.total * (2 if low_slots else 1)
        #: Candidates a policy may name before the ledger stops listening.
        self._patience = 4 * context.total + 64

    def _divide(self, slots: int, first: int) -> list[list[int]]:
        """Free slots of each pool, the lowest on top."""
        if not self._by_layer:
            return [list(range(first + slots - 1, first - 1, -1))]
        share, rest = divmod(slots, self.context.layers)
        pools = []
        for layer in range(self.context.layers):
            size = share + (layer < rest)
            pools.append(list(range(first + size - 1, first - 1, -1)))
            first += size
        return pools

    def __contains__(self, copy: int) -> bool:
        return copy in self.slot_of

    def __len__(self) -> int:
        return len(self.slot_of)

    def capacity(self, copy: int) -> int:
        """Slots of the pool that *copy* belongs to."""
        pool = self.pool_of(copy)
        taken = sum(1 for held in self.slot_of if self.pool_of(held) == pool)
        return len(self._free[pool]) + taken

    def place(self, copy: int, victims: Iterable[int]) -> tuple[int, int] | None:
        """Give *copy* a slot: a free one, else that of the first victim that may go.

        Returns (slot, victim), the victim -1 where a slot was free, or None when there is
        neither. Raises :class:`LedgerError` when *copy* is held already or is no expert.
        """
        slot_of = self.slot_of
        if copy in slot_of or not 0 <= copy < self._copies:
            raise self._refusal(copy, "was to be placed, expected an expert that is not held")
        pool = self.pool_of(copy) if self._split else 0
        free = self._free[pool]
        if free:
            slot = slot_of[copy] = free.pop()
            return slot, -1
        pinned = self.pinned
        patience = self._patience
        for victim in victims:
            fits = victim in slot_of and victim not in pinned
            if fits and (not self._split or self.pool_of(victim) == pool):
                slot = slot_of[copy] = slot_of.pop(victim)
                return slot, victim
            patience -= 1
            if patience < 0:
                raise self._refusal(victim, "is one of endless victims that cannot go")
        return None

    def evict(self, copy: int) -> int:
        """Free the slot of *copy*; raises :class:`LedgerError` if it is pinned or not held."""
        if copy in self.pinned:
            raise self._refusal(copy, "was to be evicted while pinned by the event under way")
        if copy not in self.slot_of:
            raise self._refusal(copy, "was to be evicted, expected a held one")
        slot = self.slot_of.pop(copy)
        self._free[self.pool_of(copy)].append(slot)
        return slot

    def require(self, copy: int) -> int:
        """The slot to compute *copy* from; raises :class:`LedgerError` if there is none."""
        slot = self.slot_of.get(copy)
        if slot is None:
            raise self._refusal(copy, "was to be computed, expected it to hold a slot")
        return slot

    def _refusal(self, copy: object, what: str) -> LedgerError:
        known = isinstance(copy, int) and 0 <= copy < self._copies
        name = self.context.name(copy) if known else repr(copy)  # type: ignore[arg-type]
        return LedgerError(f"policy {self.policy!r}, event {self.event}: {name} {what}")
