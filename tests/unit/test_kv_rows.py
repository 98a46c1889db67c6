"""Keys and values that move from row to row, or are gathered: a model answers as if alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from transformers import StaticCache  # noqa: E402

from policies.batching import Batches, SeatedStep  # noqa: E402
from policies.schedule import RowMove, Schedule, make_schedule  # noqa: E402
from policies.token_paths import PreviousPaths  # noqa: E402
from runtime.kv_rows import KvRows, make_gathered  # noqa: E402
from tests.helpers import random_trace  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402
from tests.unit.test_token_scheduler import Turning  # noqa: E402
from traces.trace import MemoryTrace  # noqa: E402

LENGTH, BATCH, PROMPT, SEQUENCES = 16, 2, 4, 4


def used_cache(model: Any, size: int) -> StaticCache:
    """A static cache of *size* sequences that one pass has given its shapes."""
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    with torch.no_grad():
        model(
            input_ids=torch.zeros(size, 1, dtype=torch.long, device=model.device),
            past_key_values=cache,
        )
    cache.reset()
    return cache


def fill(rows: KvRows) -> None:
    """Every row holds its own number."""
    for view in rows.views(0, rows.rows):
        view.copy_(torch.arange(rows.rows).view(-1, 1, 1, 1).expand_as(view))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v2"])
def test_rows_trade_places_all_at_once(family: str) -> None:
    """In every layer, keys and values, of whatever shape; and no more than the tokens there are."""
    cache = used_cache(tiny_model(family), 2)
    rows = KvRows(cache, 5)
    fill(rows)
    rows.move([RowMove(0, 3, 6), RowMove(3, 0, 4), RowMove(4, 1, 99), RowMove(1, 4, 0)])
    views = rows.views(0, 5)
    assert len(views) == 2 * len(cache.layers)
    for view in views:
        found = view[:, 0, :, 0].tolist()
        length = view.shape[2]
        assert found[3] == [0.0] * min(6, length) + [3.0] * max(length - 6, 0)
        assert found[0] == [3.0] * min(4, length) + [0.0] * max(length - 4, 0)
        assert found[1] == [4.0] * length
        assert found[4] == [4.0] * length
        assert found[2] == [2.0] * length


def test_caches_share_the_rows_they_are_seated_in() -> None:
    model = tiny_model("mixtral")
    rows = KvRows(used_cache(model, 2), 4)
    fill(rows)
    small = used_cache(model, 1)
    rows.seat(small, 2, 1)
    for layer in small.layers:
        assert (layer.keys == 2).all()
        layer.values.fill_(9)
    assert (rows.views(2, 1)[1] == 9).all()
    assert (rows.views(1, 1)[1] == 1).all()


class Grouped:
    """A model that decodes as a schedule says, its keys and values in the rows of one cache."""

    def __init__(self, model: Any, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        self.rows = KvRows(used_cache(model, 1), schedule.rows)
        self.caches = {key: self.cache(key) for key in schedule.decode_shapes()}

    def cache(self, key: tuple[int, int]) -> StaticCache:
        first, size = key
        cache = used_cache(self.model, size)
        if self.schedule.kv == "merge":
            self.rows.seat(cache, first, size)
        else:
            self.rows.seat(cache, 0, self.rows.rows)
            make_gathered(cache, torch.zeros(size, dtype=torch.long), torch.zeros(size).long())
        return cache

    def prefill(self, tokens: Any) -> None:
        """Prompts [n, T], each into its first row."""
        cache = used_cache(self.model, len(tokens))
        self.model(input_ids=tokens, past_key_values=cache)
        whole = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        for view, values in zip(self.rows.views(0, len(tokens)), whole, strict=True):
            view.copy_(values)

    def decode(self, step: SeatedStep, tokens: Any) -> Any:
        """Logits [B, V] of one token [B, 1] of each sequence of *step*."""
        seating, position = step.seating, int(step.positions[0])
        self.rows.move(seating.moves)
        cache = self.caches[seating.key]
        for layer in cache.layers:
            layer.cumulative_length.fill_(position)
            if seating.kv == "reindex":
                layer.step_rows.copy_(torch.from_numpy(seating.rows))
                layer.step_positions.fill_(position)
        seen = torch.arange(LENGTH) <= position
        output = self.model(
            input_ids=tokens,
            position_ids=torch.full_like(tokens, position),
            attention_mask=seen.expand(len(tokens), 1, 1, LENGTH),
            past_key_values=cache,
        )
        return output.logits[:, -1]


def decode_steps(trace: MemoryTrace, kv: str) -> tuple[Schedule, Iterator[SeatedStep]]:
    scheduler = Turning(kv=kv)
    units = Batches(trace, BATCH, scheduler).units()
    paths = PreviousPaths(trace.model.experts)
    schedule = make_schedule(units, scheduler, paths, trace.model, BATCH)
    steps = Batches(trace, BATCH, scheduler, schedule=schedule).steps()
    return schedule, (step for step in steps if isinstance(step, SeatedStep))


@pytest.mark.parametrize("kv", ["merge", "reindex"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
@torch.no_grad()
def test_a_sequence_says_the_same_whoever_decodes_with_it(family: str, kv: str) -> None:
    """Greedy text, token by token, of every sequence alone and in groups that change."""
    model = tiny_model(family)
    lengths = (13, 10, 13, 12)
    trace = random_trace(3, lengths=lengths, prefill=PROMPT)
    prompts = torch.randint(1, 64, (SEQUENCES, PROMPT), generator=torch.Generator().manual_seed(1))
    alone = []
    for prompt, length in zip(prompts, lengths, strict=True):
        text = prompt.tolist()
        while len(text) < length + 1:
            logits = model(input_ids=torch.tensor([text])).logits[0, -1]
            text.append(int(logits.argmax()))
        alone.append(text)

    schedule, steps = decode_steps(trace, kv)
    grouped = Grouped(model, schedule)
    grouped.prefill(prompts)
    first = model(input_ids=prompts).logits[:, -1].argmax(dim=-1)
    texts = [[*prompt.tolist(), int(token)] for prompt, token in zip(prompts, first, strict=True)]
    for step in steps:
        ids = step.sequence_ids.tolist()
        logits = grouped.decode(step, torch.tensor([[texts[i][-1]] for i in ids]))
        for i, token in zip(ids, logits.argmax(dim=-1).tolist(), strict=True):
            assert len(texts[i]) == int(step.positions[0]) + 1
            texts[i].append(token)
    assert texts == alone
    assert (schedule.tally.moved > 0) == (kv == "merge")
