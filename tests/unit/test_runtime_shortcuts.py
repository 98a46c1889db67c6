"""Shorter ways through attention: fewer products of matrices, the same sums, nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from transformers import StaticCache  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from runtime.shortcuts import SDPA, Shortcuts  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402

IDS = torch.tensor([[5, 9, 33, 12], [7, 1, 2, 3]])


class Calls(TorchFunctionMode):
    """Counts calls, and notes the heads of keys that attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.heads = 0, set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.linear += function is F.linear
        if function is F.scaled_dot_product_attention:
            self.heads.add(args[1].shape[1])
        return function(*args, **(kwargs or {}))


def decoded(model: Any, shortcuts: Shortcuts | None) -> tuple[Any, Calls]:
    """Logits of a token behind :data:`IDS`, which were computed in the usual way."""
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
        with Calls() as calls:
            if shortcuts is None:
                logits = model(input_ids=IDS[:, :1], past_key_values=cache).logits
            else:
                with shortcuts.taken():
                    logits = model(input_ids=IDS[:, :1], past_key_values=cache).logits
    return logits, calls


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_one_product_where_there_were_three(family):
    model = tiny_model(family)
    plain, before = decoded(model, None)
    short, after = decoded(model, Shortcuts(model))
    torch.testing.assert_close(short, plain, rtol=1e-5, atol=1e-5)
    assert before.linear - after.linear == 2 * model.config.num_hidden_layers


def test_other_projections_stay_as_they_are():
    model = tiny_model("deepseek_v2")
    plain, before = decoded(model, None)
    short, after = decoded(model, Shortcuts(model))
    assert torch.equal(short, plain)
    assert before.linear == after.linear


def test_heads_of_keys_are_not_copied():
    model = tiny_model("mixtral")
    shared = model.config.num_key_value_heads
    assert shared < model.config.num_attention_heads
    assert decoded(model, Shortcuts(model))[1].heads == {shared}


def test_prompts_inside_are_attended_to_as_ever():
    model = tiny_model("mixtral")
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with Shortcuts(model).taken():
            short = model(input_ids=IDS).logits
    torch.testing.assert_close(short, plain, rtol=1e-5, atol=1e-5)


def test_nothing_stays_behind():
    model = tiny_model("qwen3_moe")
    own, plain = ALL_ATTENTION_FUNCTIONS[SDPA], decoded(model, None)[0]
    shortcuts = Shortcuts(model)
    attention = model.model.layers[0].self_attn
    with pytest.raises(RuntimeError, match="shape"), shortcuts.taken():
        attention.q_proj(torch.zeros(1, model.config.hidden_size + 1))
    assert ALL_ATTENTION_FUNCTIONS[SDPA] is own
    assert "forward" not in vars(attention.q_proj)
    assert torch.equal(decoded(model, None)[0], plain)
    decoded(model, shortcuts)
    # Views of one matrix: no weight is there twice.
    weights = [getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj")]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1


def test_a_users_own_attention_is_left_in_place(monkeypatch):
    model = tiny_model("mixtral")
    seen = []
    own = ALL_ATTENTION_FUNCTIONS[SDPA]

    def theirs(*args, **kwargs):
        seen.append(args[2].shape[1])
        return own(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, SDPA, theirs)
    decoded(model, Shortcuts(model))
    assert seen
    assert ALL_ATTENTION_FUNCTIONS[SDPA] is theirs


def test_projections_that_differ_stay_apart():
    model = tiny_model("mixtral")
    attention = model.model.layers[0].self_attn
    attention.k_proj = nn.Linear(
        attention.k_proj.in_features, attention.k_proj.out_features, bias=True
    )
    plain, before = decoded(model, None)
    short, after = decoded(model, Shortcuts(model))
    torch.testing.assert_close(short, plain, rtol=1e-5, atol=1e-5)
    assert before.linear - after.linear == 2 * (model.config.num_hidden_layers - 1)
