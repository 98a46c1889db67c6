"""The perplexity benchmark: the exact rows are the plain model's, the others say what they did."""

from __future__ import annotations

import json
import math

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from benchmarks import perplexity  # noqa: E402
from tests.helpers_checkpoint import tiny_checkpoint  # noqa: E402

TEXTS = ["w5 w9 w33 w12 w8 w40", "w40 w3 w7", "w11 w60 w22 w7 w8 w9 w10"]


def plain_perplexity(folder):
    """Of all texts together, by the model without offloading in one pass for each."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    losses = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            chances = model(ids).logits[0].log_softmax(-1)
        losses += [-float(chances[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1)]
    return math.exp(sum(losses) / len(losses)), len(losses)


def test_rows(tmp_path, capsys):
    folder = tiny_checkpoint(tmp_path / "models/tiny", "qwen3_moe", layers=4)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    words = ["--models", tmp_path / "models", "--prompts", prompts, "--json", tmp_path / "o.json"]
    words += ["--policy", "lru", "--policy", "mixed:t1=0,t2=0", "--cache", "50%"]
    assert perplexity.main([str(word) for word in words]) == 0
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    expected, tokens = plain_perplexity(folder)
    assert [(row["mode"], row["exact"]) for row in rows] == [
        ("prefill", True), ("prefill", False), ("decode", True), ("decode", False),
    ]  # fmt: skip
    for row in rows:
        assert row["predicted_tokens"] == tokens
        if row["exact"]:
            assert row["perplexity"] == pytest.approx(expected, rel=1e-4)
            assert (row["over_exact"], row["standard_error_nats"]) == (0, 0)
            assert row["low_accesses"] == row["skip_accesses"] == 0
        else:
            # Every second choice of a token that is missed is skipped.
            assert row["skip_accesses"] > 0.05
            assert row["perplexity"] != pytest.approx(expected, rel=1e-4)
            assert row["over_exact"] == pytest.approx(row["perplexity"] / expected - 1, abs=1e-4)
    printed = capsys.readouterr().out
    assert "| `mixed:t1=0,t2=0` | " in printed
