"""Experts in slots for the kernel tests, and what they compute, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from runtime.kernels import gating_of
from runtime.layout import ExpertLayout, LowLayout
from runtime.quantise import dequantise, quantise

EXPERTS = 8
TOP_K = 3
LAYOUTS = ("concatenated", "gpt-oss", "ungated")


def experts_module(kind, dtype, hidden=32, intermediate=24, experts=EXPERTS, device="cpu"):
    """A transformers experts module of one of LAYOUTS with random weights."""
    torch.manual_seed(len(kind) + hidden)
    if kind == "gpt-oss":
        config = transformers.GptOssConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts
        )
        module = GptOssExperts(config)
    elif kind == "ungated":
        config = transformers.NemotronHConfig(
            hidden_size=hidden, n_routed_experts=experts, moe_intermediate_size=intermediate
        )
        module = NemotronHExperts(config)
    else:
        config = transformers.MixtralConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts
        )
        module = MixtralExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=2 / hidden**0.5)
    return module.to(dtype).to(device).requires_grad_(False)


@dataclass
class Placed:
    """Experts of *module* in a bank with free slots between, some of them in low precision."""

    module: object
    spare: int = 4
    bits: int = 0
    low_experts: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    layout: ExpertLayout = field(init=False)
    low_layout: LowLayout | None = field(init=False, default=None)

    def __post_init__(self):
        self.layout = ExpertLayout.of(self.module)
        count = self.module.num_experts
        device = self.module.down_proj.device
        slots = torch.randperm(count + self.spare, generator=torch.Generator().manual_seed(3))
        # Whatever a free slot holds must not matter: here bytes that are NaN in every dtype.
        shape = (len(slots), self.layout.stride_bytes)
        self.full = torch.full(shape, 255, dtype=torch.uint8, device=device)
        self.table = slots[:count].to(torch.int32).to(device)
        views = self.layout.views(self.full)
        for name, view in views.items():
            view[self.table.long()] = getattr(self.module, name).detach()
        self.weights = {
            name: view[self.table.long()].double().clone() for name, view in views.items()
        }
        self.low = None
        if self.bits:
            self._lower()
        for expert in self.absent:
            self.table[expert] = -1

    def _lower(self):
        self.low_layout = LowLayout(self.layout, self.bits)
        shape = (len(self.low_experts) + 2, self.low_layout.stride_bytes)
        self.low = torch.full(shape, 255, dtype=torch.uint8, device=self.full.device)
        for row, expert in enumerate(self.low_experts):
            flat = self.full[self.table[expert]].view(self.layout.dtype)[: self.layout.params]
            self.low[row, : self.low_layout.size_bytes] = quantise(flat, self.low_layout)
            (exact,) = dequantise(self.low[row : row + 1], self.low_layout, torch.float64)
            for part in self.layout.parts:
                values = self.weights[part.name][expert]
                values.copy_(exact[part.first :][: values.numel()].view(part.shape))
            self.table[expert] = len(self.full) + row

    def exact(self, hidden, index, weights, only=-1):
        """The sum [T, H] in float64, pair by pair, with nothing of the code under test."""
        out = torch.zeros_like(hidden, dtype=torch.float64)
        for token in range(len(hidden)):
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                slot = int(self.table[expert])
                if slot >= 0 and only in (-1, slot):
                    out[token] += weight.double() * self._expert(expert, hidden[token].double())
        return out

    def _expert(self, expert, row):
        first = "gate_up_proj" if self.module.has_gate else "up_proj"
        x = self._linear(first, expert, row)
        if not self.module.has_gate:
            x = x.clamp(min=0) ** 2
        elif self.layout.interleaved:
            gate, up = x[::2].clamp(max=7.0), x[1::2].clamp(-7.0, 7.0)
            x = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        else:
            gate, up = x.chunk(2)
            x = gate / (1 + torch.exp(-gate)) * up
        return self._linear("down_proj", expert, x)

    def _linear(self, name, expert, row):
        matrix = self.weights[name][expert]
        out = row @ matrix if self.layout.transposed else matrix @ row
        bias = self.weights.get(f"{name}_bias")
        return out if bias is None else out + bias[expert]

    @property
    def gating(self):
        return gating_of(self.module)


def routes(tokens, dtype, weights_dtype=torch.float32, hidden=32, experts=EXPERTS, top_k=TOP_K,
           device="cpu"):  # fmt: skip
    """Random hidden states, distinct experts of each token, and their weights."""
    draw = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, hidden, generator=draw).to(dtype)
    index = torch.rand(tokens, experts, generator=draw).argsort(dim=1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=draw).to(weights_dtype)
    return states.to(device), index.to(device), weights.to(device)
