"""The steps of a live model: their token ids come to the host only for who reads them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.base import Forecaster  # noqa: E402
from policies.builtin.lru import LRU  # noqa: E402
from policies.registry import FORECASTERS  # noqa: E402
from policies.routing import Routing  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.families import model_spec  # noqa: E402
from runtime.generate import KeptSteps  # noqa: E402
from runtime.steps import Answer, LiveSteps  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402
from traces.store import write_trace  # noqa: E402

TOKENS = np.array([[0, 0, 5, 9], [40, 3, 7, 11]])
REAL = np.array([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=bool)
IDS = torch.tensor([[5, 9, 33, 12, 7], [3, 8, 2, 40, 11]])


class OnDevice:
    """Token ids that can be read by waiting for their device alone; counts how often."""

    def __init__(self, values):
        self._values = torch.tensor(values)
        self.shape = self._values.shape
        self.reads = 0

    def __len__(self):
        return len(self._values)

    def cpu(self):
        self.reads += 1
        return self._values.clone()


@pytest.fixture(scope="module")
def spec():
    return model_spec(tiny_model("mixtral"), "tiny")


def test_nobody_asks(spec):
    steps, tokens = LiveSteps(spec), OnDevice(TOKENS)
    step = steps.begin(tokens, REAL, True)
    steps.end(step)
    following = steps.begin(OnDevice(TOKENS[:, :1]), None, False)
    assert tokens.reads == 0
    assert (step.size, step.phase, step.kv_tokens) == (6, "prefill", 1 + 2 + 1 + 2 + 3 + 4)
    assert step.positions.tolist() == [0, 1, 0, 1, 2, 3]
    assert step.sequence_ids.tolist() == [0, 0, 1, 1, 1, 1]
    assert (following.size, following.phase) == (2, "decode")
    assert following.positions.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("real", "expected"),
    [(REAL, [5, 9, 40, 3, 7, 11]), (None, [0, 0, 5, 9, 40, 3, 7, 11])],
)
def test_who_asks_is_answered_after_one_wait(spec, real, expected):
    tokens = OnDevice(TOKENS)
    step = LiveSteps(spec).begin(tokens, real, True)
    assert step.token_ids.tolist() == step.token_ids.tolist() == expected
    assert tokens.reads == 1


def test_arrays_do_as_well(spec):
    assert LiveSteps(spec).begin(TOKENS, REAL, True).token_ids.tolist() == [5, 9, 40, 3, 7, 11]


@pytest.mark.parametrize(
    "make",
    [
        lambda s: LiveSteps(s, keep=True),
        lambda s: LiveSteps(s, read_ids=True),
        lambda s: KeptSteps(s, ahead=0),
        lambda s: KeptSteps(s, ahead=0, keep=False, read_ids=True),
    ],
)
def test_what_is_kept_is_read_at_once(spec, make):
    tokens = torch.tensor(TOKENS)
    step = make(spec).begin(tokens, REAL, True)
    tokens.zero_()
    assert step.token_ids.tolist() == [5, 9, 40, 3, 7, 11]


class Watching(LRU):
    """Keeps the steps it has seen."""

    name = "watching"
    forecasts = True

    def reset(self, context):
        super().reset(context)
        self.steps = []

    def plan_step(self, step, forecast):
        self.steps.append(step)
        return ()


class ReadsTokens(Forecaster):
    """Reads token ids without having said that it would."""

    name = "reads-tokens"

    def reset(self, context):
        self.read = []

    def on_step(self, step):
        self.read.append(step.token_ids.tolist())
        return ()

    def on_route(self, routing):
        return ()


def unread(model):
    return [
        step._tokens is not None for step in model.expert_cache.runner.engine.planner.policy.steps
    ]


def run(model):
    return model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)


def test_a_model_under_a_policy_that_does_not_ask():
    model = offload(tiny_model("mixtral"), Watching(), slots=7, device="cpu")
    run(model)
    assert unread(model) == [True] * 4


def test_a_model_whose_routing_is_kept():
    model = offload(tiny_model("mixtral"), Watching(), slots=7, device="cpu", record=True)
    out = run(model)
    assert unread(model) == [False] * 4
    kept = model.expert_cache.trace()
    assert [s.tokens.tolist() for s in kept] == out[:, :-1].tolist()


def test_a_forecaster_that_asks_is_answered(monkeypatch, tmp_path):
    forecaster = ReadsTokens()
    monkeypatch.setattr(type(FORECASTERS), "build", lambda self, text: forecaster)
    model = offload(tiny_model("mixtral"), Watching(), slots=7, device="cpu")
    out = run(model)
    assert forecaster.read == [IDS.reshape(-1).tolist(), *out[:, 5:-1].T.tolist()]
    assert unread(model) == [False] * 4


def test_the_token_table_asks(tmp_path):
    source = offload(tiny_model("mixtral"), slots=7, device="cpu", record=True)
    run(source)
    train = tmp_path / "train.parquet"
    spec = model_spec(tiny_model("mixtral"), "tiny")
    write_trace(train, spec, source.expert_cache.trace(), source="here", license="none")
    model = offload(
        tiny_model("mixtral"), Watching(), slots=7, device="cpu", forecaster="token",
        train=str(train),
    )  # fmt: skip
    run(model)
    assert unread(model) == [False] * 4


def test_an_only_token_is_read_without_arrays_and_says_the_same(spec):
    """Ids as numbers or as an array: the demand, and what policies see of it."""
    found = []
    for one in (None, [3, 1]):
        steps = LiveSteps(spec, ahead=1)
        steps.begin(np.zeros((1, 2), np.int64), None, True)
        step = steps.begin(np.zeros((1, 1), np.int64), None, False)
        guess = np.array([[2, 0]])
        for layer in range(spec.layers):
            routing = steps.route(
                step, layer, Answer(np.array([[3, 1]]), None, [guess], one), layer
            )
            found.append((routing.experts, routing.counts, routing.token_experts.tolist()))
        assert [a.tolist() for a in Routing(step, 0, [], 0).ahead] == [[[2, 0]]]
    assert found[: spec.layers] == found[spec.layers :]


def test_an_answer_for_one_token_is_none_for_two(spec):
    steps = LiveSteps(spec)
    step = steps.begin(np.zeros((2, 1), np.int64), None, True)
    with pytest.raises(OffloadError, match="answered for 1 tokens, expected 2"):
        steps.route(step, 0, Answer(np.array([[0, 1]]), one=[0, 1]), 0)
