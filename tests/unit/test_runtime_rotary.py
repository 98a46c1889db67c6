"""Rotary embeddings are made ready for capture without a change in what they give."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import runtime.runner  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.families import FAMILIES  # noqa: E402
from runtime.rotary import follows_length, keep_frequencies  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 33, 12, 7], [3, 8, 2, 40, 11]])
SCALES = {"short_mscale": 1.1, "long_mscale": 1.3}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    **SCALES,
    "original_max_position_embeddings": 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def functions(model):
    """What the modules of *model* call for their frequencies in every pass."""
    return [m.rope_init_fn for m in model.modules() if hasattr(m, "rope_init_fn")]


def test_kept_frequencies_change_no_bit():
    model = tiny_model("phimoe")
    with torch.no_grad():
        expected = model(IDS).logits
        asked = functions(model)
        keep_frequencies(model, CPU)
        assert torch.equal(model(IDS).logits, expected)
    kept = functions(model)
    assert len(kept) == len(asked) == 1
    config = model.config
    assert asked[0](config)[0] is not asked[0](config)[0]
    assert kept[0](config)[0] is kept[0](config)[0]
    assert kept[0](config)[1] == asked[0](config)[1]


def test_kept_frequencies_lie_on_the_device():
    model = tiny_model("phimoe")
    keep_frequencies(model, torch.device("meta"))
    assert functions(model)[0](model.config)[0].device.type == "meta"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "phimoe"])
def test_other_families_need_nothing(family):
    model = tiny_model(family)
    keep_frequencies(model, CPU)
    assert functions(model) == []
    assert follows_length(model) == ""


@pytest.mark.parametrize(
    ("family", "rope", "kind"),
    [
        ("phimoe", LONG, "longrope"),
        ("mixtral", DYNAMIC, "dynamic"),
        ("phimoe", {**YARN, **SCALES}, "yarn"),
    ],
)
def test_what_depends_on_the_length_is_named(family, rope, kind):
    model = tiny_model(family, rope_parameters=rope, head_dim=8)
    assert follows_length(model) == (
        f"model.rotary_emb is of type {kind}, which depends on the length of the sequence"
    )
    before = functions(model)
    keep_frequencies(model, CPU)
    assert functions(model) == before


def test_what_is_stretched_once_and_for_all_can_be_captured():
    assert follows_length(tiny_model("mixtral", rope_parameters=YARN, head_dim=8)) == ""
    assert follows_length(tiny_model("phimoe")) == ""


def test_the_length_does_matter_to_longrope():
    """Why it is refused: a captured pass would keep the factor of the length it was made at."""
    model = tiny_model("phimoe", rope_parameters=LONG)
    rotary, x = model.model.rotary_emb, torch.zeros(1, 1, 32)
    with torch.no_grad():
        short, long = (rotary(x, position_ids=torch.tensor([[at]]))[0] for at in (0, 4))
    assert float(short.max()) == pytest.approx(1.1)
    assert float(long.abs().max()) > 1.1


def test_an_offloaded_model_is_made_ready_or_says_why_not(monkeypatch):
    room = object()
    monkeypatch.setattr(runtime.runner, "decode_graphs", lambda hook, forward, whole: room)
    ready = offload(tiny_model("phimoe"), slots=5, device="cpu")
    assert ready.expert_cache.runner.graphs is room
    config = ready.config
    assert functions(ready)[0](config)[0] is functions(ready)[0](config)[0]
    with pytest.warns(RuntimeWarning, match=r"cannot be captured as CUDA graphs \(.* longrope,"):
        refused = offload(tiny_model("phimoe", rope_parameters=LONG), slots=5, device="cpu")
    assert refused.expert_cache.runner.graphs is None
    assert refused.generation_config.cache_implementation is None
