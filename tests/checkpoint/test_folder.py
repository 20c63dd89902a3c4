"""Checkpoint folders as people have them: indices, links, permissions, marks, and what is broken is named in one line."""

import json
import os
import stat

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxtp import LLM, Llama
from jaxtp.checkpoint import hf
from jaxtp.checkpoint.tensors import INDEX, Tensors, weight_files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("saved") / "model", num_layers=1)


@pytest.fixture
def sharded(saved, tmp_path):
    """The same in several files, copied byte by byte."""
    tensors = load_file(saved / "model.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    names = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name, where in names.items() if where == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def load(folder, **changes):
    return Llama.from_pretrained(folder, progress=False, **changes)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        *((text, "holds no JSON object") for text in ("[]", "5", '"x"', "null")),
        *((text, "is not valid JSON") for text in ("{", "", "\x00")),
        *((f'{{"weight_map": {text}}}', "is not a safetensors index") for text in ("null", "[]", "{}", '{"a": 5}', '"x"')),
        ("{}", "is not a safetensors index"),
        *(
            (json.dumps({"weight_map": {"a": name}}), "which is none in its folder")
            for name in ("", ".", "..", "../x", "/etc/passwd", "a/../../x", "x\0y")
        ),
        ('{"weight_map": {"a": "\\ud800"}}', "surrogate"),
    ],
)
def test_an_index_that_is_none(sharded, index, said):
    (sharded / INDEX).write_text(index)
    with pytest.raises(ValueError, match=said) as error:
        load(sharded)
    assert str(error.value).startswith(str(sharded / INDEX))
    assert "\n" not in str(error.value)


def test_an_index_is_read_with_a_byte_order_mark_and_with_files_in_folders_below(sharded):
    (sharded / "below").mkdir()
    found = json.loads((sharded / INDEX).read_text())["weight_map"]
    for file in set(found.values()):
        (sharded / file).rename(sharded / "below" / file)
    below = {name: f"below/{file}" for name, file in found.items()}
    (sharded / INDEX).write_bytes(b"\xef\xbb\xbf" + json.dumps({"weight_map": below}).encode())
    with Tensors(sharded) as tensors:
        assert set(tensors) == set(found)


def test_the_hub_s_cache_is_links_out_of_the_folder(sharded, tmp_path):
    """snapshots/commit/file -> ../../blobs/hash: the name as written counts, not where it leads."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "commit"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    model = load(snapshot)
    model.save_pretrained(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    (blobs / "0").unlink()  # config.json
    (blobs / "1").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(json.dumps(model.config.to_hf()))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00003\.safetensors is missing, but \S+ names it"):
        load(snapshot)


def test_a_single_file_counts_before_an_index_as_in_transformers(saved, sharded):
    import transformers

    (sharded / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    for path in sharded.glob("model-*"):
        save_file({name: -tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert weight_files(sharded) == [sharded / "model.safetensors"]
    wanted = load_file(saved / "model.safetensors")["model.embed_tokens.weight"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(sharded).model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(theirs, wanted)
    np.testing.assert_array_equal(load(sharded).embed.get_value(), wanted)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a pointer of Git LFS"),
        (b"<html>not found</html>", "is truncated or corrupt"),
        (b"", "is truncated or corrupt"),
    ],
)
def test_files_that_hold_no_weights(sharded, content, said):
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} .*{said}|^{path} {said}") as error:
        load(sharded)
    assert "\n" not in str(error.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=f"^{path} "):
        load(sharded)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_saved_files_follow_the_umask(saved, tmp_path, mask):
    """Also those copied from a source that may only be read; and what is saved may be saved over."""
    source = tmp_path / "source"
    source.mkdir()
    for path in saved.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
        (source / path.name).chmod(0o444)
    before = os.umask(mask)
    try:
        model = load(source)
        for times in range(2):
            model.save_pretrained(tmp_path / "out", max_shard_bytes=(10_000, 10**9)[times])
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~mask}


def test_a_generation_config_is_read_with_a_mark_and_named_where_it_is_none(saved, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "generation_config.json"
    path.write_bytes(b'\xef\xbb\xbf{"eos_token_id": [5, 6]}')
    assert LLM(folder, progress=False, max_model_len=64).eos == (5, 6)
    for content, said in (
        ("[]", "holds no JSON object"),
        ("{", "is not valid JSON"),
        ('{"eos_token_id": "2"}', ": eos_token_id='2' must be an int, a list of them, or null"),
        ('{"eos_token_id": [1.5]}', ": eos_token_id="),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"^{path}.*{said}|^{path} {said}|^{path}{said}"):
            LLM(folder, progress=False, max_model_len=64)


def test_addresses_elsewhere_and_files_are_refused_by_name(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load(saved)
    for address in ("gs://bucket/model", "s3://bucket/model", "hf://org/model"):
        with pytest.raises(ValueError, match="remote address"):
            hf.resolve(address)
        with pytest.raises(ValueError, match="remote address"):
            model.save_pretrained(address)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"config\.json is a file; a checkpoint is the folder"):
        load(saved / "config.json")
