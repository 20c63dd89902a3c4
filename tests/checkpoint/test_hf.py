"""Checkpoints: only the slices that a device holds are read, mistakes are collected and named, files are never half read."""

import json
import struct

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxtp import Llama, make_mesh
from jaxtp.checkpoint import hf
from jaxtp.checkpoint.names import parts
from jaxtp.weights import variables


@pytest.fixture
def folder(tmp_path):
    return tiny.checkpoint(tmp_path / "ckpt", tokenizer=False)


def edit(folder, change):
    """Rewrites the weights after `change` has altered the dict."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **mesh):
    return Llama.from_pretrained(folder, mesh=make_mesh(**mesh), progress=False)


def test_every_tensor_comes_back_bit_by_bit(folder, tmp_path):
    for mesh in ({}, {"tp": 8}, {"dp": 2, "tp": 2}):
        load(folder, **mesh).save_pretrained(tmp_path / "again")
        first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def test_bfloat16_is_kept_and_float32_is_rounded_once(folder, tmp_path):
    import ml_dtypes

    half = Llama.from_pretrained(folder, mesh=make_mesh(tp=2), dtype="bfloat16", progress=False)
    half.save_pretrained(tmp_path / "half")
    whole, rounded = load_file(folder / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    for name in whole:
        assert rounded[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(rounded[name], whole[name].astype(ml_dtypes.bfloat16))
    again = Llama.from_pretrained(tmp_path / "half", mesh=make_mesh(), progress=False)
    assert again.layout.dtype == "bfloat16"
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_each_device_reads_only_its_slices(folder, monkeypatch):
    """Counts the values read for tp=4: replicas and padding aside, each is read once, and no read is a whole kernel."""
    read = []
    original = hf.Tensors.read

    def counting(self, name, index):
        values = original(self, name, index)
        read.append((name, values.size, int(np.prod(self.shape(name)))))
        return values

    monkeypatch.setattr(hf.Tensors, "read", counting)
    load(folder, tp=4)
    for name in {name for name, _, _ in read}:
        sizes = [size for other, size, _ in read if other == name]
        whole = next(total for other, _, total in read if other == name)
        assert sizes == ([whole] if "norm" in name else [whole // 4] * 4), name


def test_all_problems_are_said_at_once(folder):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = np.zeros(3, np.float32)
        tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((64, 95), np.float32)

    edit(folder, spoil)
    with pytest.raises(ValueError, match=r"do not fit its config\.json") as error:
        load(folder)
    text = str(error.value)
    assert "missing: model.norm.weight" in text
    assert "unexpected: model.extra.weight" in text
    assert "of another shape: model.layers.1.mlp.down_proj.weight is (64, 95), expected (64, 96)" in text


def test_old_buffers_and_a_second_copy_of_a_tied_table_are_no_mistake(tmp_path):
    folder = tiny.checkpoint(tmp_path / "tied", tokenizer=False, tie_word_embeddings=True)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    edit(folder, add)
    load(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or corrupt"):
        load(folder)


def test_a_corrupt_header_is_named(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[:8] + b"x" * size + data[8 + size :])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or corrupt"):
        load(folder)


def test_a_missing_shard_is_named(folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "many", max_shard_bytes=60_000)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert max(path.stat().st_size for path in shards) < 70_000
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shards[1].name} is missing, but .*index.json names it"):
        load(tmp_path / "many")


def test_pickled_weights_are_never_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights .* never loaded; convert"):
        load(folder)


def test_gguf_is_said_to_be_for_others(folder):
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    with pytest.raises(FileNotFoundError, match=r"holds GGUF alone, which llama\.cpp reads; take the checkpoint of 16 bits"):
        load(folder)


def test_missing_folders_and_hub_ids():
    with pytest.raises(FileNotFoundError, match="there is no checkpoint folder"):
        hf.resolve("./nothing/here")
    with pytest.raises(FileNotFoundError, match="could not be had from the hub"):
        hf.resolve("some-org/some-model")  # offline


def test_a_hub_id_in_the_local_cache_is_found(folder, tmp_path, monkeypatch):
    """What huggingface_hub has downloaded before: its cache's own layout."""
    from huggingface_hub import constants

    commit = "0" * 40
    repository = tmp_path / "hub" / "models--some-org--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load("some-org/some-model").config.hidden_size == 64


def test_save_replaces_what_was_there(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "out", max_shard_bytes=60_000)
    model.save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_tokenizer_files_go_along(tmp_path):
    folder = tiny.checkpoint(tmp_path / "with")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    load(folder, tp=2).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_random_weights_are_the_same_on_every_mesh():
    tokens = np.arange(20).reshape(2, 10)
    changes = {"vocab_size": 130, "num_kv_heads": 2}
    one = Llama.random(tiny.config(**changes), mesh=make_mesh())
    for mesh in ({"tp": 8}, {"dp": 2, "tp": 4}):
        many = Llama.random(tiny.config(**changes), mesh=make_mesh(**mesh))
        np.testing.assert_allclose(many(tokens), one(tokens), atol=1e-5)
    kernel = np.asarray(one.layers[0].mlp.down.get_value())
    assert kernel.std() == pytest.approx(0.02, rel=0.05)


def test_parts_cover_a_weight_exactly_once():
    config = tiny.config(num_kv_heads=2, qkv_bias=True, o_bias=True, mlp_bias=True)
    for path, weight in variables(Llama(config, mesh=make_mesh(tp=4))):
        shape = weight.get_value().shape
        covered = np.zeros(shape, int)
        for part in parts(config, path, shape):
            part.read(
                block := np.zeros(shape, int),
                tuple(slice(0, n) for n in shape),
                shape,
                lambda where: np.ones([s.stop - s.start for s in where], int),
            )
            covered += block
        assert (covered == 1).all(), path


def test_hosts_never_hold_more_than_one_weight(folder):
    """Arrays are on their devices before the next weight is read: no numpy array survives loading."""
    model = load(folder, tp=4)
    for _, weight in variables(model):
        assert isinstance(weight.get_value(), jax.Array)
        assert weight.get_value().committed


def test_saving_leaves_other_files_alone(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_text("another's")
    folder = tiny.checkpoint(tmp_path, tokenizer=False)
    tiny.checkpoint(tmp_path, tokenizer=False)  # and once more over its own
    assert (folder / "adapter_model.safetensors").read_text() == "another's"
    load(folder)


def test_tensors_that_are_no_floats(tmp_path):
    folder = tiny.checkpoint(tmp_path, tokenizer=False)
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.int8)}))
    with pytest.raises(ValueError, match=r"of no dtype that is read: model\.norm\.weight is I8"):
        load(folder)
