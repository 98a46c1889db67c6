"""Every policy that ships, and one that a user wrote, keeps the public contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies.registry import POLICIES
from policies.testing import PolicyContract

MINE = '''
from policies import Policy, parameter, register
from dataclasses import dataclass


@dataclass
class Mine(Policy):
    """Evicts what was loaded last, and fetches the same expert of the next layer."""

    width: int = parameter(1, "experts fetched ahead", low=0, high=3)

    def reset(self, context):
        self.context, self.loaded = context, {}

    def on_load(self, copy):
        self.loaded[copy] = None

    def on_evict(self, copy):
        del self.loaded[copy]

    def prefetch(self, routing, forecast):
        coming = [expert + self.context.experts for expert in routing.experts[: self.width]]
        return [expert for expert in coming if expert < self.context.total]

    def victims(self, incoming):
        return reversed(self.loaded)
'''


@pytest.mark.parametrize("name", sorted(POLICIES.classes()))
class TestPolicies(PolicyContract):
    @pytest.fixture(autouse=True)
    def choose(self, name: str) -> None:
        self.policy = name


class TestMine(PolicyContract):
    @pytest.fixture(autouse=True)
    def write(self, tmp_path: Path) -> None:
        file = tmp_path / "my.py"
        file.write_text(MINE)
        self.policy = f"{file}:Mine"
