"""A streamed checkpoint is, bit by bit, what transformers' own loader makes of the files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import huggingface_hub.constants  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from runtime.families import FAMILIES, find_gates  # noqa: E402
from runtime.fourbit import unpack_mxfp4  # noqa: E402
from runtime.layout import ExpertLayout  # noqa: E402
from runtime.load import find_folder, load_model  # noqa: E402
from runtime.skeleton import dense_tensors, expert_names, move_dense  # noqa: E402
from runtime.streaming import open_checkpoint  # noqa: E402
from runtime.tensorfiles import TensorFiles, read_entries  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402
from traces.errors import InputError  # noqa: E402

IDS = torch.tensor([[5, 9, 33, 12, 7]])


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def same_bits(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    whole = torch.uint8 if left.ndim else left.dtype
    return torch.equal(left.contiguous().view(whole), right.contiguous().view(whole))


def assert_same(found, expected):
    """*found* is the checkpoint of the loaded model *expected*: experts, dense part, buffers."""
    gates = find_gates(expected)
    assert len(found.gates) == len(gates)
    assert found.layout == ExpertLayout.of(gates[0].experts)
    seen = []
    for layer, expert, parts in found.experts():
        seen.append((layer, expert))
        for part in found.layout.parts:
            assert parts[part.name].shape == part.shape
            assert same_bits(parts[part.name], getattr(gates[layer].experts, part.name)[expert])
        assert len(parts) == len(found.layout.parts)
    assert seen == [(layer, expert) for layer in range(len(gates)) for expert in range(8)]
    assert found.total_experts == len(seen)
    names = expert_names(expected, gates)
    dense, want = dict(dense_tensors(found.model, found.gates)), dict(expected.named_parameters())
    want.update(expected.named_buffers())
    assert set(dense) == set(want) - set(names)
    assert all(same_bits(value, want[name]) for name, value in dense.items())
    assert {n for n, p in found.model.named_parameters() if p.is_meta} == set(names)
    assert {n: p.requires_grad for n, p in found.model.named_parameters()} == {
        n: p.requires_grad for n, p in expected.named_parameters()
    }
    assert not found.model.training


def with_experts(found):
    """The streamed model made whole, to be run."""
    for gate in found.gates:
        for part in found.layout.parts:
            empty = getattr(gate.experts, part.name)
            whole = torch.nn.Parameter(torch.empty_like(empty, device="cpu"))
            setattr(gate.experts, part.name, whole)
    for layer, expert, parts in found.experts():
        for name, value in parts.items():
            getattr(found.gates[layer].experts, name).data[expert] = value
    return found.model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_what_from_pretrained_gives(family, tmp_path):
    save(tiny_model(family), tmp_path)
    expected = load_model(tmp_path, device="cpu")
    assert_same(open_checkpoint(tmp_path), expected)
    model = with_experts(open_checkpoint(str(tmp_path)))
    for value in expected.parameters():
        # Mapped files are not aligned, for which the CPU has kernels that round otherwise.
        value.data = value.data.clone()
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize(
    ("stored", "wanted"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float16")]
)
def test_converted_to_another_dtype(family, stored, wanted, tmp_path):
    save(tiny_model(family, dtype=stored), tmp_path)
    found = open_checkpoint(tmp_path, wanted)
    assert found.layout.dtype == getattr(torch, wanted)
    assert_same(found, load_model(tmp_path, wanted, device="cpu"))


def test_without_a_dtype_in_the_configuration_the_weights_decide(tmp_path):
    save(tiny_model("olmoe", dtype=torch.bfloat16), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(tmp_path)
    assert found.layout.dtype == torch.bfloat16
    assert_same(found, load_model(tmp_path, device="cpu"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "phimoe"])
def test_several_files_with_an_index(family, tmp_path):
    save(tiny_model(family), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(open_checkpoint(tmp_path), load_model(tmp_path, device="cpu"))


def test_stacked_experts_as_the_model_itself_names_them(tmp_path):
    """Every family's experts may also be stored as the model keeps them."""
    for family in ("mixtral", "qwen3_moe", "phimoe"):
        folder = tmp_path / family
        save(tiny_model(family), folder, save_original_format=False)
        assert "model.layers.0.mlp.experts.down_proj" in load_file(folder / "model.safetensors")
        assert_same(open_checkpoint(folder), load_model(folder, device="cpu"))


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_embeddings(kept, tmp_path):
    save(tiny_model("granitemoe", tie_word_embeddings=True), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    embedding = weights.pop("model.embed_tokens.weight", None)
    names = ["model.embed_tokens.weight", "lm_head.weight"] if kept == "both" else [kept]
    save_file(weights | {name: embedding.clone() for name in names}, file, {"format": "pt"})
    found = open_checkpoint(tmp_path)
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    assert_same(found, load_model(tmp_path, device="cpu"))
    moved = move_dense(found.model, found.gates, torch.device("cpu"))
    assert moved.lm_head.weight is moved.model.embed_tokens.weight


def test_scaled_rotary_frequencies(tmp_path):
    """Frequencies that depend on the configuration are computed, not left empty."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0,
            "mscale_all_dim": 0.7, "original_max_position_embeddings": 16}  # fmt: skip
    save(tiny_model("deepseek_v2", rope_parameters=rope), tmp_path)
    found = open_checkpoint(tmp_path)
    assert_same(found, load_model(tmp_path, device="cpu"))
    assert all(value.isfinite().all() for value in found.model.buffers())


@pytest.mark.parametrize("wanted", ["auto", "float32"])
def test_four_bit_experts_are_unpacked(wanted, tmp_path):
    model = tiny_model("gpt_oss", hidden_size=64, intermediate_size=32, dtype=torch.bfloat16)
    save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    pick = torch.Generator().manual_seed(5)
    for name in [name for name in weights if name.endswith("_proj")]:
        experts, inner, outer = weights.pop(name).shape
        shape = (experts, outer, inner // 32)
        weights[name + "_blocks"] = torch.randint(
            0, 256, (*shape, 16), dtype=torch.uint8, generator=pick
        )
        weights[name + "_scales"] = torch.randint(
            118, 128, shape, dtype=torch.uint8, generator=pick
        )
    save_file(weights, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(tmp_path, wanted)
    expected = load_model(tmp_path, wanted, device="cpu")
    for gate in find_gates(expected):
        # transformers 5.17 leaves what it unpacks in bfloat16, whatever is asked for.
        gate.experts.to(found.layout.dtype)
    assert_same(found, expected)
    assert not hasattr(found.model.config, "quantization_config")
    rewrite(file, lambda w: w.pop("model.layers.1.mlp.experts.down_proj_scales"))
    with pytest.raises(InputError, match=r"1\.mlp\.experts\.down_proj_scales is missing"):
        open_checkpoint(tmp_path)


def test_every_byte_and_scale_is_unpacked_as_transformers_does():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    every = torch.arange(256, dtype=torch.uint8)
    blocks = every.view(1, 16, 16).expand(256, 16, 16).contiguous()
    scales = every[:, None].expand(256, 16).contiguous()
    expected = convert_moe_packed_tensors(blocks[None], scales[None])[0]
    found = unpack_mxfp4(blocks, scales)
    assert found.shape == expected.shape == (512, 256)
    # The format's last scale means "not a number".
    assert same_bits(found[:, :255], expected[:, :255])
    assert not found[:, 255].isfinite().any()


def test_end_tokens_are_those_of_the_checkpoint(tmp_path):
    model = tiny_model("mixtral")
    model.generation_config.eos_token_id = [7, 9]
    save(model, tmp_path)
    assert open_checkpoint(tmp_path).model.generation_config.eos_token_id == [7, 9]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_only_one_expert_is_in_memory_at_a_time(tmp_path):
    """What streaming 25 MB of experts adds to the process, files that are mapped included."""
    model = tiny_model("mixtral", layers=1, num_local_experts=32, intermediate_size=2048)
    experts_bytes = sum(p.nbytes for g in find_gates(model) for p in g.experts.parameters())
    save(model, tmp_path)
    found, before, read, most = open_checkpoint(tmp_path), resident_bytes(), 0, 0
    for _, _, parts in found.experts():
        read += sum(value.nbytes for value in parts.values())
        most = max(most, resident_bytes())
    assert read == experts_bytes > 25e6
    assert most - before < 0.25 * experts_bytes


def rewrite(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save(tiny_model("mixtral"), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def copy(mixtral, tmp_path):
    return shutil.copytree(mixtral, tmp_path / "model")


W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


def test_a_missing_expert_is_named(copy):
    rewrite(copy / "model.safetensors", lambda w: w.pop(W1))
    with pytest.raises(InputError, match="layer 1, expert 3: 1 of 2 weights of gate_up_proj found"):
        open_checkpoint(copy)


def test_a_missing_dense_weight_is_named(copy):
    rewrite(copy / "model.safetensors", lambda w: w.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(InputError, match=r"1 weights are missing.*layers\.1\.self_attn\.q_proj"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        (W1, (24, 31), r"experts\.3\.w1\.weight has shape \[24, 31\], expected \[24, 32\]"),
        (W1, (20, 32), r"experts\.3\.w1\.weight has shape \[20, 32\], expected \[24, 32\]"),
        ("model.norm.weight", (16,), r"model\.norm\.weight has shape \[16\], expected \[32\]"),
    ],
)
def test_another_shape_is_named(key, shape, said, copy):
    rewrite(copy / "model.safetensors", lambda w: w.update({key: torch.zeros(shape)}))
    with pytest.raises(InputError, match=said):
        open_checkpoint(copy)


def test_one_expert_too_many_is_noticed(copy):
    extra = W1.replace("experts.3", "experts.8")
    rewrite(copy / "model.safetensors", lambda w: w.update({extra: w[W1].clone()}))
    with pytest.raises(InputError, match=r"experts\.8\.w1\.weight found, expected 8 experts"):
        open_checkpoint(copy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_name_their_expert(bad, copy):
    rewrite(copy / "model.safetensors", lambda w: w[W1][5].fill_(bad))
    with (
        open_checkpoint(copy) as found,
        pytest.raises(InputError, match="layer 1, expert 3: gate_up_proj has NaN or infinite"),
    ):
        list(found.experts())


def test_a_dense_weight_that_is_not_finite_is_named(copy):
    rewrite(copy / "model.safetensors", lambda w: w["lm_head.weight"][3, 4].fill_(float("nan")))
    with pytest.raises(InputError, match=r"lm_head\.weight has NaN or infinite values"):
        open_checkpoint(copy)


@pytest.mark.parametrize("left", [4, 200, -1, -5000])
def test_a_truncated_file_is_named(left, copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(InputError, match=r"model\.safetensors: .*expected a complete safetensors"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "header",
    [
        b"no table",
        b"[1, 2]",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": 3}',
    ],
)
def test_a_header_that_makes_no_sense(header, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InputError, match=r"model\.safetensors: .*expected a complete safetensors"):
        read_entries(file)


def test_files_that_shrink_while_they_are_read(copy):
    file = copy / "model.safetensors"
    files = TensorFiles([file])
    last = max(files.entries, key=lambda key: files.entries[key].first_byte)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match="an end within tensor"):
        files.read(last)
    files.close()


def test_a_file_of_the_index_is_absent(tmp_path):
    save(tiny_model("mixtral"), tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=f"{gone.name}: not found, expected because"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match=r"index\.json: not understood"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors and no model\.safetensors\.index"):
        open_checkpoint(copy)


def test_another_quantisation_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantised with 'gptq'"):
        open_checkpoint(copy)


def test_another_family_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(InputError, match="model type 'llama' is not supported"):
        open_checkpoint(copy)


def test_an_unknown_dtype_is_refused(copy):
    with pytest.raises(InputError, match="--dtype int3: expected auto or one of"):
        open_checkpoint(copy, "int3")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="absent: not found, expected a model folder or a name"):
        open_checkpoint(tmp_path / "absent")


def test_a_name_on_the_hub_comes_from_its_cache(mixtral, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"some/model: no such folder, and not to be had") as said:
        open_checkpoint("some/model")
    assert "\n" not in str(said.value)
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    shutil.copytree(mixtral, snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("a" * 40)
    assert find_folder("some/model") == snapshot
    assert open_checkpoint("some/model").folder == snapshot
