"""Drawing tokens: against transformers' own processors, and by frequency."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.sampling import Sampler, Sampling, distribution  # noqa: E402
from traces.errors import InputError  # noqa: E402

CPU = torch.device("cpu")


def logits(rows=6, words=50):
    return torch.randn(rows, words, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=0.9, top_p=0.6),
        Sampling(temperature=1.1, top_k=12, top_p=0.8),
        Sampling(temperature=1.0, top_k=500, top_p=1e-6),
    ],
)
def test_probabilities_are_those_of_transformers(sampling):
    scores = logits().double() / sampling.temperature
    if sampling.top_k:
        scores = transformers.TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = transformers.TopPLogitsWarper(sampling.top_p)(None, scores)
    torch.testing.assert_close(distribution(logits(), sampling), scores.softmax(dim=-1))


def test_temperature_zero_and_top_k_one_are_greedy():
    best = logits().argmax(dim=1)
    for sampling in (Sampling(), Sampling(temperature=2.0, top_k=1)):
        assert torch.equal(Sampler(sampling, range(6), 1, CPU)(logits(), 0), best)


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    draws = Sampler(Sampling(temperature=1.0, seed=3), [0], 4000, CPU)
    drawn = [int(draws(probabilities.log(), step)) for step in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    assert shares[1] == 0
    torch.testing.assert_close(shares, probabilities[0], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}]
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)
