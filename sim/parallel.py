"""Work on more than one core: runs of a comparison, and Belady's replay beside a long run.

Workers are fresh processes that open the trace again; a run gives the same bytes there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import get_context

from policies.budget import Budget
from policies.recording import Recording
from policies.result import Result
from policies.session import Setup
from sim.session import Session

#: Events from which a worker's start (about a second) is worth it.
LONG_EVENTS = 400_000


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs(session: Session) -> int:
    """All cores for a long trace, one process for a short one."""
    return cores() if session.stored.tokens * session.model.layers >= LONG_EVENTS // 4 else 1


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """*count* worker processes, gone when the block ends; Ctrl-C is left to this process."""
    pool = ProcessPoolExecutor(count, get_context("spawn"), _leave_interrupts_to_the_parent)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@lru_cache(maxsize=1)
def _session(setup: Setup) -> Session:
    return Session(setup)


def _run(setup: Setup, policy: str, budget: Budget, record: bool) -> _Run:
    return _session(setup).run(policy, budget, record=record)


def _belady(setup: Setup, slots: int) -> int:
    return _session(setup).belady_missed(slots)


_Run = tuple[Result, Recording | None]


def run_cells(
    session: Session, cells: Sequence[tuple[str, Budget]], *, record: bool, jobs: int
) -> Iterator[_Run]:
    """Run every (policy, budget) and yield the results in order, *jobs* at a time."""
    if jobs <= 1 or len(cells) <= 1:
        for policy, budget in cells:
            yield session.run(policy, budget, record=record)
        return
    with workers(min(jobs, len(cells))) as pool:
        yield from pool.map(
            _run,
            [session.setup] * len(cells),
            [policy for policy, _ in cells],
            [budget for _, budget in cells],
            [record] * len(cells),
        )


@contextmanager
def belady_beside(session: Session, budget: Budget) -> Iterator[None]:
    """Work out the bound of a long run in a worker while the block runs.

    On one core, or for a short trace, nothing happens: the session does it itself.
    """
    if session.stored.tokens * session.model.layers < LONG_EVENTS or cores() < 2:
        yield
        return
    slots = session.slots(budget)
    with workers(1) as pool:
        session.expect_belady(slots, pool.submit(_belady, session.setup, slots).result)
        yield
