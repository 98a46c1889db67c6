# mypy: ignore-errors
# ruff: noqa: PLR0913
"""The kernel behind each gate of a decode step that is one CUDA graph.

It posts the gate's answer to the host, lets the host catch up, and finds the experts: in the
table that the host keeps in its own memory, and by the copies that have landed. What it waits
for comes from the host and the copy engine alone, never from another kernel, and not for longer
than *limit_ns*.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, globaltimer

from runtime.kernels import gate
from runtime.kernels.triton_tiles import COMING

POSTED, GUESSED, FAILED, PLANNED, SETTLED, NEVER, RELEASED = (
    tl.constexpr(number)
    for number in (
        gate.POSTED, gate.GUESSED, gate.FAILED, gate.PLANNED, gate.SETTLED, gate.NEVER,
        gate.RELEASED,
    )
)  # fmt: skip


@triton.jit
def _give_up(words, count, number):
    """Tell the host that event *number* was given up, and the events behind it not to wait."""
    tl.store(words + FAILED, number)
    tl.store(count + 1, 1)


@triton.jit
def _tell(word, value):
    """*value* to the host's *word*, behind all that this program has written before.

    A store, for an exchange would need a link that carries atomic operations.
    """
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        "st.release.sys.global.b32 [$1], $2; mov.b32 $0, $2;", "=r,l,r",
        [word.to(tl.int64), value], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _reached(words, count, WORD: tl.constexpr, target, number, limit_ns):
    """The host's word, once it is *target* or more; RELEASED if that took too long."""
    begun = globaltimer()
    value = tl.load(words + WORD, volatile=True)
    while value < target:
        value = tl.load(words + WORD, volatile=True)
        if value < target and globaltimer() - begun > limit_ns:
            _give_up(words, count, number)
            value = RELEASED
    return value


@triton.jit
def _landed(landed, words, count, target, number, limit_ns):
    """The number of the last copy that has landed, once that is *target* or more."""
    begun = globaltimer()
    value = tl.load(landed, volatile=True)
    while value < target:
        value = tl.load(landed, volatile=True)
        if value < target and globaltimer() - begun > limit_ns:
            _give_up(words, count, number)
            value = RELEASED
    return value


@triton.jit
def _entries(table, expert, mask):
    """Slots and tickets that *table* has for *expert*; what is masked is in slot 0, and there."""
    entry = tl.load(table + expert, mask=mask, other=0, volatile=True)
    return entry.to(tl.int32), (entry >> 32).to(tl.int32)


@triton.jit
def _send(rows, ring, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """*rows* [ROWS] to the host's *ring*."""
    r = tl.arange(0, PADDED)
    tl.store(ring + r, tl.load(rows + r, mask=r < ROWS), mask=r < ROWS)


@triton.jit(do_not_specialize_on_alignment=["words", "guessed", "rows", "ring"])
def guess_kernel(words, guessed, rows, ring, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Post guesses *rows* int64 [ROWS], of which *guessed* int32 [1] were posted before."""
    number = tl.load(guessed) + 1
    _send(rows, ring, ROWS, PADDED)
    tl.store(guessed, number)
    _tell(words + GUESSED, number)


@triton.jit
def _post(
    words, number, rows, ring, weights, ring_weights, ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr, PAIRS: tl.constexpr, PAIRS_PADDED: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The answer of gate *number* to the host, and then that it is there."""
    _send(rows, ring, ROWS, ROWS_PADDED)
    if WEIGHTS:
        p = tl.arange(0, PAIRS_PADDED)
        tl.store(ring_weights + p, tl.load(weights + p, mask=p < PAIRS), mask=p < PAIRS)
    _tell(words + POSTED, number + 1)


#: Layers' rows of a table need not begin at like addresses.
_POINTERS = [
    "words", "count", "landed", "stamps", "rows", "ring", "weights", "ring_weights", "index",
    "table", "served", "slots",
]  # fmt: skip


@triton.jit(do_not_specialize=["limit_ns"], do_not_specialize_on_alignment=_POINTERS)
def gate_kernel(
    words, count, landed, stamps, rows, ring, weights, ring_weights, index, table, served, slots,
    limit_ns,
    ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr, EXPERTS: tl.constexpr, WEIGHTS: tl.constexpr,
    SERVED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Post the answer of one gate, and write *slots* int32 [EXPERTS] of the experts in *index*.

    *rows* int64 [ROWS] and, if WEIGHTS, *weights* [PAIRS] go to *ring* and *ring_weights*;
    *count* int32 [2] is the number of events before this one, and whether one was given up.
    *table* int64 [EXPERTS] has a slot in its lower half, -1 for none, and the number of the copy
    that fills it in the upper; *landed* int32 [1] is the last of those. If SERVED the host
    decides for every event where its experts are read: *served* int64 [2, EXPERTS], by turns.
    *stamps* int64 [4] takes the device's time at the answer, when the host had settled the event
    before, when all copies were known, and when they had landed. If EARLY the next kernel may
    begin once all is known of the experts that are there; others are :data:`COMING` until they
    have landed, all at once. One program of one warp.
    """
    number = tl.load(count)
    if tl.load(count + 1) > 0:
        limit_ns = limit_ns * 0
    tl.store(stamps, globaltimer())
    _post(words, number, rows, ring, weights, ring_weights, ROWS, ROWS_PADDED, PAIRS, PAIRS_PADDED,
          WEIGHTS)  # fmt: skip
    tl.store(count, number + 1)
    p = tl.arange(0, PAIRS_PADDED)
    mask = p < PAIRS
    expert = tl.load(index + p, mask=mask, other=0)
    if SERVED:
        told = _reached(words, count, PLANNED, number + 1, number + 1, limit_ns)
        source = served + (number % 2) * EXPERTS
    else:
        told = _reached(words, count, SETTLED, number, number + 1, limit_ns)
        source = table
    tl.store(stamps + 1, globaltimer())
    slot, ticket = _entries(source, expert, mask)
    absent = (slot < 0) | (ticket > tl.load(landed, volatile=True))
    if EARLY:
        tl.store(slots + expert, tl.where(absent, COMING, slot), mask=mask)
        # What follows sees all that was stored so far.
        tl.debug_barrier()
        tl.atomic_add(count, 0, sem="release", scope="gpu")
        gdc_launch_dependents()
    if tl.sum(absent.to(tl.int32), axis=0) > 0:
        unknown = (slot < 0) | (ticket == NEVER)
        if tl.sum(unknown.to(tl.int32), axis=0) > 0:
            told = _reached(words, count, PLANNED, number + 1, number + 1, limit_ns)
            slot, ticket = _entries(source, expert, mask)
        tl.store(stamps + 2, globaltimer())
        wanted = tl.max(tl.where((slot >= 0) & (told != RELEASED), ticket, 0), axis=0)
        last = _landed(landed, words, count, wanted, number + 1, limit_ns)
        slot = tl.where(ticket <= last, slot, -1)
        tl.debug_barrier()
        tl.atomic_xchg(slots + expert, slot, mask=mask, sem="release", scope="gpu")
    else:
        tl.store(stamps + 2, globaltimer())
        if not EARLY:
            tl.store(slots + expert, slot, mask=mask)
    tl.store(stamps + 3, globaltimer())


@triton.jit
def stamp_kernel(stamp):
    """The device's time to *stamp* int64 [1]."""
    tl.store(stamp, globaltimer())
