"""Every forecaster that ships keeps the public contract."""

from __future__ import annotations

import pytest

from policies.registry import FORECASTERS
from policies.testing import ForecasterContract

#: Those that build without a file: routing-path has its contract test beside its file's.
NAMES = [name for name, cls in FORECASTERS.classes().items() if not getattr(cls, "leading", "")]


@pytest.mark.parametrize("name", NAMES)
class TestForecasters(ForecasterContract):
    @pytest.fixture(autouse=True)
    def choose(self, name: str) -> None:
        self.forecaster = name


class TestNoisyOracle(ForecasterContract):
    forecaster = "oracle:accuracy=0.6,horizon=7"
