"""What a decode step costs as one captured graph with a handshake at every gate."""

from __future__ import annotations

from policies.graph_costs import GraphCosts, of_family
from policies.hardware import HardwareProfile, Whole
from traces.model import ModelSpec


class WholeCosts(GraphCosts):
    """Seconds of the parts of such a step; what is not said here is as in a chain of graphs.

    *answer_s*, *publish_s*, *follow_s* and *launch_s*, once a step, are host time, the others
    the GPU's.
    """

    def __init__(
        self,
        profile: HardwareProfile,
        whole: Whole,
        model: ModelSpec,
        cache_tokens: int = 0,
        low_bits: int = 4,
    ) -> None:
        super().__init__(profile, model, cache_tokens, low_bits)
        self.launch_s = whole.launch_s or self.launch_s
        self.handshake_s = whole.handshake_s
        self.answer_s = whole.answer_s
        self.notice_s = whole.notice_s
        self.publish_s = whole.publish_s
        self.follow_s = whole.follow_s
        family = self.facts.family
        software = profile.software
        self.floor_s = of_family(whole.layer_floor_s, family, self.floor_s)
        several_s = of_family(software.several_floor_s, family, self.floor_s)
        self.several_floor_s = of_family(whole.several_floor_s, family, several_s)
