"""Every forecaster that ships keeps the public contract."""

from __future__ import annotations

import pytest

from policies.registry import FORECASTERS
from policies.testing import ForecasterContract


@pytest.mark.parametrize("name", sorted(FORECASTERS.classes()))
class TestForecasters(ForecasterContract):
    @pytest.fixture(autouse=True)
    def choose(self, name: str) -> None:
        self.forecaster = name


class TestNoisyOracle(ForecasterContract):
    forecaster = "oracle:accuracy=0.6,horizon=7"
