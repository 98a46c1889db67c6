"""Every forecaster that ships keeps the public contract."""

from __future__ import annotations

import pytest

from policies.testing import ForecasterContract
from tests.helpers import BUILT_ALONE


@pytest.mark.parametrize("name", BUILT_ALONE)
class TestForecasters(ForecasterContract):
    @pytest.fixture(autouse=True)
    def choose(self, name: str) -> None:
        self.forecaster = name


class TestNoisyOracle(ForecasterContract):
    forecaster = "oracle:accuracy=0.6,horizon=7"
