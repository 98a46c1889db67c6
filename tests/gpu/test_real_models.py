"""Trained models and real prompts: offloaded, they write what they write without.

The models lie in the folder that ``EXPERTFLOW_MODELS`` names, ``val.jsonl`` beside them, or else
all in ``../shared``. A model that is not there is skipped. On a GPU more prompts are run than on
the CPU, which runs transformers' kernels alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.generate import Offloaded, generation_config, open_offloaded  # noqa: E402
from runtime.load import load_model, load_tokenizer  # noqa: E402
from runtime.sampling import Sampling  # noqa: E402

NAMES = ("coarse-8x2", "granular-64x8")
GIVEN = os.environ.get("EXPERTFLOW_MODELS")
SHARED = Path(__file__).resolve().parents[3] / "shared"
MODELS = Path(GIVEN) if GIVEN else SHARED / "models"
PROMPTS = MODELS / "val.jsonl" if GIVEN else SHARED / "prompts/val.jsonl"
CUDA = torch.cuda.is_available()

PROMPT_TOKENS = 48
#: Texts compared on a GPU and on the CPU, and the tokens made for each.
TEXTS = {"cuda": 12, "cpu": 2}
NEW_TOKENS = {"cuda": 64, "cpu": 12}

#: Two logits that are closer than this share of the largest may change places in bfloat16:
#: it keeps 8 bits, and a sum of roundings over the layers is a few units of the last one.
NEAR_TIE = 4 * 2.0**-8

pytestmark = pytest.mark.skipif(
    not PROMPTS.is_file(), reason=f"{PROMPTS} is not there: set EXPERTFLOW_MODELS to its folder"
)
MODEL = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                not (MODELS / name / "model.safetensors").is_file(),
                reason=f"{MODELS / name} is not there",
            ),
        )
        for name in NAMES
    ],
)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="needs a CUDA device"),
]
DEVICES = [pytest.param("cuda", marks=on_gpu), "cpu"]


class Plain(NamedTuple):
    """What a model without offloading writes after each prompt: tokens, and logits [n, V]."""

    prompts: list[torch.Tensor]
    texts: list[list[int]]
    logits: list[torch.Tensor]


def _prompts(folder: Path, count: int) -> list[torch.Tensor]:
    """The beginnings of *count* prompts, spread over the file and so over its domains."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    tokenizer = load_tokenizer(folder)
    chosen = lines[:: max(1, len(lines) // count)][:count]
    ids = [tokenizer(json.loads(line)["text"])["input_ids"][:PROMPT_TOKENS] for line in chosen]
    return [torch.tensor([each]) for each in ids]


@pytest.fixture(scope="module")
def plain():
    """Makes a :class:`Plain` for a model and device, once."""
    made: dict[tuple[str, str, str, str], Plain] = {}

    def make(name: str, device: str, dtype: str = "auto", kernel: str = "") -> Plain:
        if (name, device, dtype, kernel) not in made:
            model = load_model(MODELS / name, dtype=dtype, device=device)
            if kernel:
                model.set_experts_implementation(kernel)
            prompts = _prompts(MODELS / name, TEXTS[device])
            assert len(prompts) == TEXTS[device]
            found = [_continued(model, ids) for ids in prompts]
            texts, logits = map(list, zip(*found, strict=True))
            made[name, device, dtype, kernel] = Plain(prompts, texts, logits)
        return made[name, device, dtype, kernel]

    return make


def _continued(model, ids) -> tuple[list[int], torch.Tensor]:
    """What *model* writes greedily after *ids* [1, n], with the logits [m, V] of each token."""
    ids = ids.to(model.device)
    config = generation_config(model, Sampling(), NEW_TOKENS[model.device.type])
    config.output_logits = config.return_dict_in_generate = True
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return made.sequences[0, ids.shape[1] :].tolist(), torch.cat(made.logits)


def _slots(name: str) -> list[int]:
    """Budgets of a model: top_k experts, a quarter, half, all."""
    config = json.loads((MODELS / name / "config.json").read_text())
    total = config["num_hidden_layers"] * config["num_local_experts"]
    return [config["num_experts_per_tok"], total // 4, total // 2, total]


def _offloaded(name: str, device: str, **options) -> Offloaded:
    return open_offloaded(MODELS / name, device=device, **options)


def _made(opened: Offloaded, ids) -> list[int]:
    new_tokens = NEW_TOKENS[opened.device.type]
    config = generation_config(opened.model, Sampling(), new_tokens)
    length = PROMPT_TOKENS + new_tokens
    made = opened.generate(ids, torch.ones_like(ids), config, length)
    return made[0, ids.shape[1] :].tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("share", range(4), ids=["top_k", "25%", "50%", "all"])
@pytest.mark.parametrize("policy", ["lru", "predictive"])
@MODEL
def test_our_kernels_write_the_same_text(name, policy, share, plain):
    """In float32 no text parts from the plain model's."""
    expected = plain(name, "cuda", "float32")
    options = {"policy": policy, "slots": _slots(name)[share], "dtype": "float32"}
    with _offloaded(name, "cuda", **options) as opened:
        for ids, text in zip(expected.prompts, expected.texts, strict=True):
            assert _made(opened, ids) == text
    assert len(expected.prompts) >= 12


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("share", range(4), ids=["top_k", "25%", "50%", "all"])
@pytest.mark.parametrize("policy", ["lru", "predictive"])
@MODEL
def test_texts_part_at_near_ties_alone(name, policy, share, plain, record_property):
    """In bfloat16 two kernels round apart: as transformers' own do among themselves."""
    expected = plain(name, "cuda")
    truth = None
    parted = []
    with _offloaded(name, "cuda", policy=policy, slots=_slots(name)[share]) as opened:
        for number, (ids, text) in enumerate(zip(expected.prompts, expected.texts, strict=True)):
            found = _made(opened, ids)
            if found == text:
                continue
            truth = truth or load_model(MODELS / name, dtype="float32", device="cuda")
            parted.append((number, *_parting(truth, ids, found, text)))
    record_property("parted", parted)
    print(f"{name}, {policy}: {len(parted)} of {len(expected.prompts)} texts part: {parted}")
    assert len(expected.prompts) >= 12
    for number, at, gap in parted:
        assert gap <= NEAR_TIE, f"prompt {number} parts at token {at} over a gap of {gap:.2%}"
    others = [plain(name, "cuda", kernel=kernel).texts for kernel in ("batched_mm", "eager")]
    theirs = [sum(a != b for a, b in zip(expected.texts, o, strict=True)) for o in others]
    print(f"{name}: of transformers' own kernels, batched_mm and eager part in {theirs}")
    assert len(parted) <= max(theirs) + 3


def _parting(truth, ids, found, expected) -> tuple[int, float]:
    """Where two texts part, and how far the worse of the two tokens is from the best in float32.

    The gap is that between their logits, as a share of the largest logit: both tokens must have
    come near to the best one, be it one of the two or a third.
    """
    pairs = enumerate(zip(found, expected, strict=False))
    at = next(i for i, (ours, theirs) in pairs if ours != theirs)
    prefix = torch.cat([ids, torch.tensor([expected[:at]], dtype=torch.int64)], dim=1)
    with torch.no_grad():
        logits = truth(input_ids=prefix.to(truth.device), use_cache=False).logits[0, -1]
    worse = torch.minimum(logits[found[at]], logits[expected[at]])
    gap = (logits.max() - worse) / logits.abs().max()
    return at, float(gap)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", range(4), ids=["top_k", "25%", "50%", "all"])
@MODEL
def test_transformers_kernels_on_slots_are_equal_bit_by_bit(name, share, device, plain):
    """The text, and the logits of every token of it, are those of the plain model."""
    expected = plain(name, device)
    slots = _slots(name)[share]
    with _offloaded(name, device, policy="lru", slots=slots, compute="reference") as opened:
        for ids, text, logits in zip(*expected, strict=True):
            found, ours = _continued(opened.model, ids)
            assert found == text
            assert torch.equal(ours, logits)
        stats = opened.model.expert_cache.stats()
    total = _slots(name)[-1]
    assert stats["missed"] > 0
    assert slots < total or stats["missed"] <= total


@pytest.mark.parametrize("device", DEVICES)
@MODEL
def test_a_prefetching_policy_changes_nothing(name, device, plain):
    """Predictive, with live gates ahead, changes no bit with transformers' kernels."""
    expected = plain(name, device)
    slots = _slots(name)[1]
    with _offloaded(name, device, policy="predictive", slots=slots, compute="reference") as opened:
        for ids, text, logits in zip(*expected, strict=True):
            found, ours = _continued(opened.model, ids)
            assert found == text
            assert torch.equal(ours, logits)
        stats = opened.model.expert_cache.stats()
    assert stats["moves"]["prefetch"] > 0
    assert stats["missed"] < stats["accesses"]
