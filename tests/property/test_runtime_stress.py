"""No expert is computed before its copy has landed, whatever is asked and however late it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from runtime.lanes import HostLanes, random_lag  # noqa: E402
from tests.helpers_stress import FAULTS, Case, Driver, RacingLanes, broken, cases, spoil  # noqa: E402  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices of 32 by 32 gain nothing by more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SETTINGS = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(2, 7))
    top_k = draw(st.integers(1, min(3, experts)))
    pool = draw(st.sampled_from(("global", "layer")))
    least = top_k * (layers if pool == "layer" else 1)
    return Case(
        seed=draw(st.integers(0, 2**20)),
        layers=layers,
        experts=experts,
        top_k=top_k,
        slots=draw(st.integers(least, layers * experts)),
        pool=pool,
        bits=draw(st.sampled_from((0, 4, 8))),
        low_share=draw(st.sampled_from((0.2, 0.5))),
        serves=draw(st.booleans()),
        depth=draw(st.integers(1, 4)),
        steps=draw(st.integers(1, 6)),
        together=draw(st.integers(1, 4)),
    )


def racing(case: Case) -> Driver:
    lanes = RacingLanes(case.seed)
    return Driver(case, lanes, lanes.do)


@SETTINGS
@given(drawn(), st.integers(0, 30))
def test_copies_that_land_late(case: Case, most: int) -> None:
    lag = random_lag(case.seed, most)
    lanes = HostLanes(lag=lag, spoil=spoil)
    Driver(case, lanes).run()


@SETTINGS
@given(drawn())
def test_two_lanes_that_run_when_they_like(case: Case) -> None:
    racing(case).run()


def test_the_cases_meet_everything() -> None:
    """Waves, late copies and every service do come up, or the tests above say nothing."""
    drivers = [racing(case) for case in cases(80, seed=1)]
    for driver in drivers:
        driver.run()
    assert sum(driver.events for driver in drivers) > 500
    assert sum(driver.waves for driver in drivers) > 50
    assert sum(driver.late for driver in drivers) > 50
    assert sum(driver.shared for driver in drivers) > 50
    assert sum(driver.grouped for driver in drivers) > 50
    assert sum(driver.overlapping for driver in drivers) > 5
    assert sum(driver.engine.copier.cancelled for driver in drivers) > 10
    services = set().union(*(driver.served for driver in drivers))
    assert services == {"low", "skip", "cpu", "substitute"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_runtime_is_found_out(fault: str) -> None:
    def run() -> None:
        for case in cases(80, seed=1):
            racing(case).run()

    with broken(fault, RacingLanes), pytest.raises(AssertionError, match=r"off by|computed from"):
        run()
