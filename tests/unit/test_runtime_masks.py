"""Masks made beforehand change nothing, whatever the state of a sliding window."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from transformers import StaticCache  # noqa: E402

from runtime.masks import full_windows, masks_are_given, with_masks  # noqa: E402
from runtime.window import make_capturable  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402

IDS = torch.tensor([[5, 9, 33, 12, 7], [3, 8, 2, 40, 11]])


def decoded(model, *, prepared: bool) -> tuple[torch.Tensor, list[tuple[bool, ...]]]:
    """Logits of 10 greedy steps over a static cache, and how full its windows were."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids, found, full = IDS, [], []
    with torch.no_grad():
        for _ in range(10):
            kwargs = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
            if prepared and ids.shape[1] == 1:
                make_capturable(cache)
                kwargs = with_masks(model.config, model.dtype, kwargs)
                full.append(full_windows(cache))
            logits = model(**kwargs).logits[:, -1]
            found.append(logits)
            ids = logits.argmax(-1, keepdim=True)
    return torch.stack(found), full


@pytest.mark.parametrize(
    ("family", "window"), [("gpt_oss", 8), ("mixtral", None), ("mixtral", 8), ("qwen3_moe", None)]
)
def test_masks_made_beforehand_change_nothing(family, window):
    model = tiny_model(family, **({"sliding_window": window} if window else {}))
    plain, _ = decoded(model, prepared=False)
    ours, full = decoded(model, prepared=True)
    assert torch.equal(plain, ours)
    if window:
        assert not any(full[0])
        assert all(full[-1])


def test_masks_are_made_where_they_are_needed():
    step = {"input_ids": IDS[:, :1], "use_cache": True}
    window = {"sliding_window": 8}
    for family, options, needed in (
        ("gpt_oss", {}, True), ("mixtral", {}, False), ("mixtral", window, True)
    ):  # fmt: skip
        model = tiny_model(family, **options)
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(input_ids=IDS, past_key_values=cache, use_cache=True)
        kwargs = with_masks(model.config, model.dtype, {**step, "past_key_values": cache})
        assert masks_are_given(kwargs) == needed
        assert with_masks(model.config, model.dtype, kwargs) is kwargs
        if options:
            # A window counts its tokens in Python: a captured pass would not count on.
            assert kwargs["position_ids"].tolist() == [[IDS.shape[1]]] * 2
