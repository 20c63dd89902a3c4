"""What `jaxtp quantize` writes: transformers, with compressed-tensors, loads the same weights and logits, and so do we."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from jaxtp import Llama, make_mesh
from jaxtp.checkpoint.compress import quantize
from jaxtp.cli import main
from jaxtp.config import Experts
from jaxtp.files import read_object
from jaxtp.model.llama import KERNELS
from jaxtp.weights import variables

IDS = np.random.default_rng(0).integers(3, 98, (2, 24))


def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("w4a16", {"hidden_size": 128, "intermediate_size": 256}),
        (
            "w4a16",
            {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16, "num_heads": 6, "num_kv_heads": 3},
        ),  # groups of 32
        ("w4a16", {"intermediate_size": 80}),  # which no group divides: a scale for each output
        ("w8a16", {"tie_word_embeddings": True}),
        ("fp8", {"qk_norm": True, "model_type": "qwen3"}),
    ],
    ids=str,
)
def test_transformers_loads_the_same(tmp_path, scheme, changes):
    plain = tiny.checkpoint(tmp_path / "plain", **changes)
    quantize(plain, tmp_path / "made", scheme=scheme)
    peer = theirs(tmp_path / "made")
    its = logits(peer)  # which unpacks its weights
    model = Llama.from_pretrained(tmp_path / "made", dtype="float32", progress=False)
    mine = np.asarray(model(IDS.astype(np.int32)))
    for number, block in enumerate(model.layers):
        found = np.asarray(block.mlp.down.get_value().plain(np.dtype(np.float32)))
        np.testing.assert_array_equal(found, peer.model.layers[number].mlp.down_proj.weight.detach().numpy())
    if scheme == "fp8":  # it rounds activations, too, as GPUs do here: the same weights in a model that does not
        weights, peer = dict(peer.named_parameters()), theirs(plain)
        with torch.no_grad():
            for name, parameter in peer.named_parameters():
                parameter.copy_(weights[name])
        its = logits(peer)
    assert np.abs(mine - its).max() < 1e-5 * max(1, np.abs(mine).max())
    off = np.abs(mine - logits(theirs(plain))).max() / np.abs(mine).max()
    assert 1e-4 < off < 1  # it is rounded
    tp = Llama.from_pretrained(
        tmp_path / "made", mesh=make_mesh(tp=model.config.legal_tp()[-1]), dtype="float32", progress=False
    )
    assert np.abs(np.asarray(tp(IDS.astype(np.int32))) - mine).max() < 1e-5 * max(1, np.abs(mine).max())


@pytest.mark.parametrize("axes", [{}, {"ep": 2, "tp": 2}, {"tp": 4}], ids=str)
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_experts(tmp_path, scheme, axes):
    """The model of 32 bits, with weights of what the quantized one's stand for, says what it gives; the router stays."""
    experts = Experts(count=8, per_token=3, width=64, renormalize=True)
    plain = tiny.checkpoint(tmp_path / "plain", model_type="qwen3_moe", qk_norm=True, experts=experts, intermediate_size=64)
    quantize(plain, tmp_path / "made", scheme=scheme)
    alone, reference = (Llama.from_pretrained(tmp_path / name, dtype="float32", progress=False) for name in ("made", "plain"))
    for (path, weight), (_, held) in zip(variables(reference), variables(alone), strict=True):
        kernel = held.get_value()
        if path.rpartition(".")[2] in KERNELS:
            assert kernel.scheme.values == ("int4" if scheme == "w4a16" else "int8")
            weight.set_value(kernel.plain(jnp.dtype("float32")))
    model = Llama.from_pretrained(tmp_path / "made", mesh=make_mesh(**axes), dtype="float32", progress=False)
    found, expected = (np.asarray(m(IDS.astype(np.int32))) for m in (model, reference))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_command(tmp_path, monkeypatch):
    plain = tiny.checkpoint(tmp_path / "plain")
    monkeypatch.setattr("sys.argv", ["jaxtp", "quantize", str(plain), str(tmp_path / "made"), "--scheme", "w8a16"])
    main()
    said = read_object(tmp_path / "made" / "config.json")
    assert said["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    assert {**said, "quantization_config": None} == {**read_object(plain / "config.json"), "quantization_config": None}
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) >= [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_bad_input(tmp_path):
    plain = tiny.checkpoint(tmp_path / "plain")
    with pytest.raises(ValueError, match="scheme='w2a16' is none of w4a16, w8a16, fp8"):
        quantize(plain, tmp_path / "made", scheme="w2a16")
    quantize(plain, tmp_path / "made")
    with pytest.raises(ValueError, match="holds a checkpoint already; name another folder"):
        quantize(plain, tmp_path / "made")
    with pytest.raises(ValueError, match="is quantized already, as compressed-tensors; take the checkpoint of 16 bits"):
        quantize(tmp_path / "made", tmp_path / "again")
    assert json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
