"""Whole captures: the file, resuming, and the command line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import runtime.capture  # noqa: E402
import runtime.cli  # noqa: E402
import runtime.load  # noqa: E402
from runtime.capture import CaptureSettings, Origin, TokenPrompt, capture  # noqa: E402
from runtime.sampling import Sampling  # noqa: E402
from traces.errors import InputError  # noqa: E402
from traces.store import open_trace  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
SAMPLES = ROOT / "traces" / "samples"

PROMPTS = [
    TokenPrompt((5, 9, 33, 12), "code"),
    TokenPrompt((40, 3)),
    TokenPrompt((11, 60, 22), "prose"),
    TokenPrompt((7, 7, 7, 1, 2), "code"),
    TokenPrompt((13,), "prose"),
]
SETTINGS = CaptureSettings(max_new_tokens=5, sampling=Sampling(1.0, seed=4), batch=2)
ORIGIN = Origin("tiny", "a random model", "CC0-1.0", {"prompts": "none"})


def tiny_model(seed=1):
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.MixtralForCausalLM(config)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def stop_after(count):
    """A progress function that interrupts the capture once *count* sequences are done."""
    done = 0

    def progress(sequences):
        nonlocal done
        done += sequences
        if done >= count:
            raise KeyboardInterrupt

    return progress


def test_the_file_holds_what_was_asked_for(model, tmp_path):
    out = tmp_path / "x.parquet"
    capture(model, PROMPTS, out, SETTINGS, ORIGIN)
    trace = open_trace(out)
    sequences = list(trace.sequences())
    assert [s.prefill for s in sequences] == [4, 2, 3, 5, 1]
    assert [len(s) for s in sequences] == [s.prefill + 4 for s in sequences]
    assert [tuple(s.tokens[: s.prefill]) for s in sequences] == [p.tokens for p in PROMPTS]
    assert sequences[0].weights.dtype == np.float16
    np.testing.assert_allclose(sequences[0].weights.astype(float).sum(axis=2), 1, atol=1e-3)
    # Three layers have two further gates at most.
    assert [a.shape[2] for a in sequences[0].ahead] == [4, 4]
    assert (trace.source, trace.license, trace.model.name) == (
        "a random model", "CC0-1.0", "tiny",
    )  # fmt: skip
    assert trace.extra["domains"] == ["code", "unknown", "prose", "code", "prose"]
    assert trace.extra["prompts"] == "none"
    assert trace.extra["capture"]["seed"] == 4
    assert trace.extra["capture"]["vocabulary"] == model.config.vocab_size
    assert trace.extra["capture"]["torch"] == torch.__version__


def test_nothing_is_left_beside_the_file(model, tmp_path):
    capture(model, PROMPTS, tmp_path / "x.parquet", SETTINGS, ORIGIN)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_an_interrupted_capture_continues_to_the_same_bytes(model, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.parquet", tmp_path / "broken.parquet"
    capture(model, PROMPTS, whole, SETTINGS, ORIGIN)
    with pytest.raises(KeyboardInterrupt):
        capture(model, PROMPTS, broken, SETTINGS, ORIGIN, stop_after(2))
    assert not broken.exists()

    ran = []
    run_batch = runtime.capture.run_batch
    monkeypatch.setattr(
        runtime.capture, "run_batch", lambda *args: ran.append(args[3]) or run_batch(*args)
    )
    capture(model, PROMPTS, broken, SETTINGS, ORIGIN)
    assert ran == [2, 4]
    assert broken.read_bytes() == whole.read_bytes()


def test_an_error_leaves_the_model_as_it_was(model, tmp_path):
    model.train()
    with pytest.raises(KeyboardInterrupt):
        capture(model, PROMPTS, tmp_path / "x.parquet", SETTINGS, ORIGIN, stop_after(1))
    assert model.training
    model.eval()
    assert not any(layer.mlp.gate._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize("change", ["model", "prompts", "settings"])
def test_pieces_of_another_capture_are_refused(model, tmp_path, change):
    out = tmp_path / "x.parquet"
    with pytest.raises(KeyboardInterrupt):
        capture(model, PROMPTS, out, SETTINGS, ORIGIN, stop_after(2))
    model = tiny_model(seed=2) if change == "model" else model
    prompts = PROMPTS[:4] if change == "prompts" else PROMPTS
    settings = CaptureSettings(max_new_tokens=3) if change == "settings" else SETTINGS
    with pytest.raises(InputError, match=r"x\.parquet\.part: left by .* --restart"):
        capture(model, prompts, out, settings, ORIGIN)


def test_pieces_that_cannot_be_read_are_refused(model, tmp_path):
    folder = tmp_path / "x.parquet.part"
    folder.mkdir()
    (folder / "capture.json").write_text("[]")
    with pytest.raises(InputError, match="--restart"):
        capture(model, PROMPTS, tmp_path / "x.parquet", SETTINGS, ORIGIN)


def test_a_file_that_exists_is_not_overwritten(model, tmp_path):
    out = tmp_path / "x.parquet"
    out.write_text("precious")
    with pytest.raises(InputError, match=r"x\.parquet: exists"):
        capture(model, PROMPTS, out, SETTINGS, ORIGIN)
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        ([], "no prompts"),
        ([TokenPrompt(())], "prompt 0: no token"),
        ([TokenPrompt((1,) * 60)], "need 65 positions, the model has 64"),
    ],
)
def test_prompts_that_cannot_run_are_refused(model, tmp_path, prompts, problem):
    with pytest.raises(InputError, match=problem):
        capture(model, prompts, tmp_path / "x.parquet", SETTINGS, ORIGIN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"max_new_tokens": -1}, {"ahead": 4}, {"batch": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong)).replace("_", "-")):
        CaptureSettings(**wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """A model folder with a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    model.save_pretrained(path)
    words = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz?")}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(
        path
    )
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [("code", "abc"), ("code", "defghi"), ("prose", "jk"), ("prose", "lmnop")]
    path.write_text("".join(json.dumps({"domain": d, "text": t}) + "\n" for d, t in rows))
    return path


def invoke(*words):
    return CliRunner().invoke(runtime.cli.capture, [str(word) for word in words])


def refusal(*words):
    """The one line with which the command refuses *words*."""
    result = invoke(*words)
    assert isinstance(result.exception, InputError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_the_command_writes_a_trace(folder, prompts, tmp_path):
    out = tmp_path / "x.parquet"
    result = invoke(
        "--model", folder, "--prompts", prompts, "--out", out, "--per-domain", "balanced",
        "--sequences", 3, "--max-prompt-tokens", 4, "--max-new-tokens", 3, "--temperature", 0.8,
        "--top-k", 5, "--top-p", 0.9, "--license", "MIT", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "3 sequences, 15 tokens (9 prefill, 6 decode)" in result.stdout
    assert result.stderr == ""
    trace = open_trace(out)
    assert trace.extra["domains"] == ["code", "prose", "code"]
    assert trace.source == (
        "routing of tiny-mixtral (mixtral) on 3 prompts of prompts.jsonl, balanced over 2 domains: "
        "the first 4 tokens of each, then up to 3 sampled at temperature 0.8, top-k 5, top-p 0.9, "
        "seed 0"
    )
    assert trace.license == "MIT"
    assert str(tmp_path) not in out.read_bytes().decode("latin-1")


def test_the_command_restarts_only_when_told(folder, prompts, tmp_path):
    out = tmp_path / "x.parquet"
    words = ["--model", folder, "--prompts", prompts, "--out", out, "--max-new-tokens", 2]
    assert invoke(*words).exit_code == 0
    first = out.read_bytes()
    assert "exists" in refusal(*words)
    (tmp_path / "x.parquet.part").mkdir()
    assert invoke(*words, "--restart").exit_code == 0
    assert out.read_bytes() == first
    assert not (tmp_path / "x.parquet.part").exists()


def test_the_command_refuses_in_one_line(folder, prompts, tmp_path):
    words = ["--prompts", prompts, "--out", tmp_path / "x.parquet"]
    assert "no config.json" in refusal("--model", tmp_path / "absent", *words)
    words += ["--model", folder]
    assert "--sequences 9:" in refusal(*words, "--sequences", 9)
    assert "top-p is 2.0" in refusal(*words, "--top-p", 2)
    if not torch.cuda.is_available():
        assert "no CUDA device" in refusal(*words, "--device", "cuda")


def test_a_family_is_refused_before_its_weights_are_read(prompts, tmp_path):
    transformers.LlamaConfig().save_pretrained(tmp_path / "llama")
    text = refusal(
        "--model", tmp_path / "llama", "--prompts", prompts, "--out", tmp_path / "x.parquet"
    )
    assert "model type 'llama' is not supported" in text


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "unheard_of"}'])
def test_a_damaged_model_folder_is_refused(prompts, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    words = ["--model", tmp_path, "--prompts", prompts, "--out", tmp_path / "x.parquet"]
    assert refusal(*words).startswith(str(tmp_path))


def test_a_folder_without_weights_or_tokenizer_is_refused(folder, prompts, tmp_path):
    config = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    words = ["--prompts", prompts, "--out", tmp_path / "x.parquet", "--model", tmp_path]
    assert "weights not loaded" in refusal(*words)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "tokenizer not loaded" in refusal(*words)


def test_damaged_weights_are_refused(folder, prompts, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00nonsense")
    words = ["--prompts", prompts, "--out", tmp_path / "x.parquet", "--model", tmp_path]
    assert "weights not loaded" in refusal(*words)


def test_weights_that_are_missing_are_not_made_up(folder, prompts, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    words = ["--prompts", prompts, "--out", tmp_path / "x.parquet", "--model", tmp_path]
    assert "1 weights are missing, expected all; first model.norm.weight" in refusal(*words)


def test_a_full_device_is_said_in_one_line():
    with (
        pytest.raises(InputError, match=r"--device cuda: out of memory.*--batch"),
        runtime.load.fitting(torch.device("cuda")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def test_quantised_checkpoints_are_unpacked_or_refused():
    config = transformers.MixtralConfig()
    assert runtime.load.quantisation(config, "x") == {}
    config.quantization_config = {"quant_method": "mxfp4"}
    assert runtime.load.quantisation(config, "x")["quantization_config"].dequantize
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(InputError, match="x: weights are quantised with 'fp8'"):
        runtime.load.quantisation(config, "x")


def test_without_torch_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    with pytest.raises(InputError, match=r"torch not installed.*pip install -e '\.\[gpu\]'"):
        runtime.cli.require_torch()


def test_importing_the_commands_does_not_import_torch():
    code = "import sys, runtime.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("name", "experts", "top_k", "width"), [("coarse-8x2", 8, 2, 4), ("granular-64x8", 64, 8, 12)]
)
def test_the_samples_are_whole(name, experts, top_k, width):
    path = SAMPLES / f"{name}.parquet"
    assert path.stat().st_size <= 2_000_000
    trace = open_trace(path)
    assert (trace.model.experts, trace.model.top_k, trace.model.layers) == (experts, top_k, 8)
    assert trace.license == "Apache-2.0"
    sequences = list(trace.sequences())
    assert len(sequences) == len(trace.extra["domains"]) == 66
    assert len(set(trace.extra["domains"])) == 6
    for sequence in sequences:
        assert 0 < sequence.prefill <= len(sequence)
        assert sequence.tokens is not None
        assert sequence.weights is not None
        assert (sequence.weights[..., :-1] >= sequence.weights[..., 1:]).all()
        assert [a.shape[2] for a in sequence.ahead] == [width] * 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the trained models beside the checkout")
@pytest.mark.parametrize(("name", "prompt", "new"), [("coarse-8x2", 128, 128)])
def test_a_sample_can_be_captured_again(name, prompt, new, tmp_path):
    out = tmp_path / "x.parquet"
    result = invoke(
        "--model", SHARED / "models" / name, "--prompts", SHARED / "prompts" / "val.jsonl",
        "--out", out, "--sequences", 2, "--per-domain", "balanced", "--temperature", 0.8,
        "--max-prompt-tokens", prompt, "--max-new-tokens", new, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    sample = open_trace(SAMPLES / f"{name}.parquet").sequences()
    for again, kept in zip(open_trace(out).sequences(), sample, strict=False):
        # Another processor rounds differently, and one changed draw changes what follows.
        np.testing.assert_array_equal(again.tokens[: kept.prefill], kept.tokens[: kept.prefill])
        same = again.experts[: kept.prefill] == kept.experts[: kept.prefill]
        assert same.mean() > 0.9
