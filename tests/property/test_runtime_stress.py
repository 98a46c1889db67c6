"""No expert is computed before its copy has landed, whatever is asked and however late it is."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from runtime.lanes import HostLanes, random_lag  # noqa: E402
from tests.helpers_stress import Case, Driver, RacingLanes, cases, spoil  # noqa: E402

SETTINGS = settings(
    max_examples=150,
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
    assert sum(driver.engine.copier.cancelled for driver in drivers) > 10
    services = set().union(*(driver.served for driver in drivers))
    assert services == {"low", "skip", "cpu", "substitute"}
