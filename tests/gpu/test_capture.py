"""Capture on a GPU: the hooks wait for nothing, and the file is like the CPU's."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.capture import CaptureSettings, Origin, TokenPrompt, capture, make_recorder  # noqa: E402
from runtime.families import find_gates  # noqa: E402
from runtime.sampling import Sampler, Sampling  # noqa: E402
from traces.store import open_trace  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def tiny_model():
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=40, moe_intermediate_size=24,
        num_hidden_layers=4, first_k_dense_replace=1, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
        kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.DeepseekV3ForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_recording_and_drawing_wait_for_nothing():
    model = tiny_model().cuda()
    hidden = torch.randn(3, 32, device="cuda")
    logits = torch.randn(3, 64, device="cuda")
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9)
    sampler = Sampler(sampling, range(3), 2, model.device)
    with torch.inference_mode(), make_recorder(model, CaptureSettings()) as recorder:
        try:
            torch.cuda.set_sync_debug_mode("error")
            for gate in find_gates(model):
                gate.router(hidden)
            tokens = sampler(logits, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        rows, sampled = recorder.take(tokens)
    assert rows.shape[:2] == (3, 3)
    assert sampled.tolist() == tokens.tolist()


def test_the_gpu_records_what_the_cpu_records(tmp_path):
    prompts = [TokenPrompt((5, 9, 33, 12)), TokenPrompt((40, 3)), TokenPrompt((11, 60, 22))]
    settings = CaptureSettings(max_new_tokens=0, batch=2)
    model = tiny_model()
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.parquet"
        capture(model.to(device), prompts, out, settings, Origin("tiny"))
        trace = open_trace(out)
        assert trace.extra["capture"]["device"] == device
        found.append(list(trace.sequences()))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours.experts, theirs.experts)
        np.testing.assert_allclose(ours.weights, theirs.weights, rtol=2e-3)
