"""Checkpoints that are quantized already, of every format: logits and greedy tokens of those who wrote them, on every mesh."""

import dataclasses
import itertools
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from conftest import shared
from safetensors.torch import load_file, save_file

from jaxtp import LLM, Llama, ModelConfig, SamplingParams, make_mesh, plan
from jaxtp.checkpoint import hf
from jaxtp.model.stacked import Stacked
from jaxtp.train import evaluate, export, train
from jaxtp.train.config import parse

NAMES = [
    *(
        "awq-g32",
        "gptq-4bit-g32-sym",
        "gptq-4bit-g32-asym-v1",
        "gptq-4bit-g32-asym-v2",
        "gptq-4bit-g32-descact",
        "gptq-8bit-g64",
    ),
    *(
        "ct-w4a16-channel",
        "ct-w4a16-g32",
        "ct-w4a16-g32-asym",
        "ct-w8a8-int8",
        "ct-fp8-static",
        "ct-fp8-dynamic",
        "ct-fp8-block",
    ),
    *("fp8-block-deepseek", "fp8-fbgemm", "fp8-static-autofp8", "bnb-nf4", "bnb-int8"),
]
# the tp that groups and blocks leave: of 320 inputs of the MLP, groups of 32 are ten; of 64 and 128 (of which one is half) five
LEGAL = {
    **dict.fromkeys(NAMES, (1, 2)),
    **dict.fromkeys(("gptq-8bit-g64", "ct-fp8-block", "fp8-block-deepseek", "bnb-nf4"), (1,)),
    **dict.fromkeys(
        ("ct-w4a16-channel", "ct-w8a8-int8", "ct-fp8-static", "ct-fp8-dynamic", "fp8-fbgemm", "fp8-static-autofp8", "bnb-int8"),
        (1, 2, 4),
    ),
}


def folder(name):
    return shared("quantised") / name


def expected(name):
    return np.load(folder(name) / "expected.npz")


@pytest.mark.parametrize(("name", "tp"), [(name, tp) for name in NAMES for tp in LEGAL[name]])
def test_logits(name, tp):
    theirs = expected(name)
    model = Llama.from_pretrained(folder(name), mesh=make_mesh(tp=tp), dtype="float32", progress=False)
    mine = np.asarray(model(theirs["tokens"].astype(np.int32)))
    assert np.abs(mine - theirs["logits"]).max() < 1e-4
    assert model.quantization == json.loads((folder(name) / "config.json").read_text())["quantization_config"]["quant_method"]


MESHES = [{}, {"tensor_parallel_size": 2}, {"data_parallel_size": 2, "tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]
ON_ALL = ("awq-g32", "gptq-4bit-g32-descact", "fp8-fbgemm", "ct-w4a16-g32-asym", "fp8-static-autofp8")


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *itertools.product(ON_ALL, MESHES),
        *((name, MESHES[3 if LEGAL[name] == (1,) else 1 + i % 3]) for i, name in enumerate(NAMES) if name not in ON_ALL),
    ],
    ids=str,
)
def test_greedy_tokens(name, mesh):
    theirs = expected(name)
    llm = LLM(folder(name), dtype="float32", progress=False, **mesh)
    prompts = theirs["tokens"][:, :8].tolist()  # which the texts begin with
    made = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    assert [request.outputs[0].token_ids for request in made] == theirs["greedy"][:, 8:].tolist()


@pytest.mark.parametrize(("name", "tp"), [(name, tp) for name in NAMES for tp in (2, 4) if tp not in LEGAL[name]])
def test_no_group_and_no_block_is_cut(name, tp):
    said = rf"tp={tp} does not divide the .* of .*'s \d+ inputs.*; legal tp for this model: {', '.join(map(str, LEGAL[name]))}$"
    with pytest.raises(ValueError, match=said):
        Llama.from_pretrained(folder(name), mesh=make_mesh(tp=tp), progress=False)


def test_in_16_bits_too():
    """Scales are then of the model's dtype, and what is off is what 16 bits leave."""
    for name, dtype in (
        ("awq-g32", "float16"),
        ("gptq-8bit-g64", "bfloat16"),
        ("bnb-int8", "float16"),
        ("bnb-nf4", "bfloat16"),
    ):
        theirs = expected(name)
        mine = np.asarray(Llama.from_pretrained(folder(name), dtype=dtype, progress=False)(theirs["tokens"].astype(np.int32)))
        assert np.abs(mine - theirs["logits"]).max() < (0.1 if dtype == "bfloat16" else 0.02)


def test_what_is_said_is_read_back():
    for name in NAMES:
        config = ModelConfig.from_hf(folder(name))
        assert ModelConfig.from_hf(config.to_hf()) == config


# -- what does not fit -----------------------------------------------------------------------------------------------------


def changed(tmp_path, name, *, tensors=None, **said):
    """A copy of a checkpoint with other tensors, and settings of its quantization_config."""
    made = tmp_path / name
    shutil.copytree(folder(name), made)
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] |= said
    (made / "config.json").write_text(json.dumps(config))
    if tensors:
        own = load_file(made / "model.safetensors")
        tensors(own)
        save_file(own, made / "model.safetensors", metadata={"format": "pt"})
    return made


def test_tensors_that_do_not_fit_are_named(tmp_path):
    def other(tensors):
        layer = "model.layers.1.self_attn"
        tensors[f"{layer}.q_proj.qweight"] = tensors[f"{layer}.q_proj.qweight"][:, :-1].clone()
        tensors[f"{layer}.k_proj.scales"] = tensors[f"{layer}.k_proj.scales"].to(torch.int32)
        del tensors[f"{layer}.o_proj.qzeros"]
        tensors[f"{layer}.o_proj.bias"] = torch.ones(128, dtype=torch.float16)  # zeros would be none
        tensors[f"{layer}.v_proj.bias"] = torch.zeros(64, dtype=torch.float16)

    made = changed(tmp_path, "awq-g32", tensors=other)
    with pytest.raises(ValueError, match=r"do not fit its config\.json") as error:
        Llama.from_pretrained(made, progress=False)
    for part in (
        "missing: model.layers.1.self_attn.o_proj.qzeros",
        "unexpected: model.layers.1.self_attn.o_proj.bias;",
        "model.layers.1.self_attn.q_proj.qweight is (128, 15), expected (128, 16)",
        "model.layers.1.self_attn.k_proj.scales is I32",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (7, r"down_proj\.g_idx names the group 99; there are 10"),
        (1, r"g_idx has groups of 31 to 33 inputs; supported: all of 32"),
    ],
)
def test_an_index_of_groups_that_is_none(tmp_path, where, said):
    def other(tensors):
        index = tensors["model.layers.0.mlp.down_proj.g_idx"]
        index[where] = 99 if where == 7 else (index[where] + 1) % 10

    made = changed(tmp_path, "gptq-4bit-g32-descact", tensors=other)
    with pytest.raises(ValueError, match=said):
        Llama.from_pretrained(made, progress=False)


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("awq-g32", {"bits": 3}, r"quantization_config \(awq\): bits=3 is not supported; supported: 4"),
        ("awq-g32", {"version": "gemv"}, "version='gemv' is not supported; supported: 'gemm'"),
        (
            "awq-g32",
            {"quant_method": "mxfp4"},
            "quant_method='mxfp4' is not supported; XLA multiplies no 4-bit floats; take the",
        ),
        (
            "awq-g32",
            {"quant_method": "gguf"},
            "quant_method='gguf' is not supported; GGUF is read by llama.cpp; take the checkpoint",
        ),
        (
            "awq-g32",
            {"quant_method": "vptq"},
            "quant_method='vptq' is not supported; supported: awq, gptq, compressed-tensors, fp8",
        ),
        ("gptq-8bit-g64", {"bits": 2}, r"quantization_config \(gptq\): bits=2 is not supported; supported: 4, 8"),
        ("gptq-8bit-g64", {"group_size": 0}, "group_size=0 must be a number of inputs, or -1 for all"),
        ("gptq-8bit-g64", {"sym": "yes"}, "sym='yes' must be true or false"),
        ("bnb-nf4", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4' is not supported; supported: 'nf4'"),
        ("ct-fp8-block", {"config_groups": {}}, "lacks config_groups"),
        (
            "ct-fp8-block",
            {"sparsity_config": {"format": "sparse-24"}},
            "sparsity_config is not supported; take the checkpoint of 16",
        ),
        ("fp8-block-deepseek", {"weight_block_size": [128]}, r"a block of \[128\] must be two numbers"),
        ("fp8-fbgemm", {"modules_to_not_convert": 3}, "modules_to_not_convert=3 must be names of modules"),
    ],
)
def test_schemes_that_are_not_known(tmp_path, name, said, message):
    with pytest.raises(ValueError, match=message) as error:
        Llama.from_pretrained(changed(tmp_path, name, **said), progress=False)
    assert "\n" not in str(error.value)


def test_what_contradicts_the_checkpoint():
    with pytest.raises(ValueError, match="quantization='int8': the weights are quantized already, as awq; leave it out"):
        LLM(folder("awq-g32"), quantization="int8", progress=False)
    assert LLM(folder("awq-g32"), quantization="awq", progress=False).model.quantization == "awq"
    with pytest.raises(
        ValueError, match=r"lora=.* cannot be where these are quantized \(awq\); take the checkpoint of 16 bits"
    ):
        Llama.from_pretrained(folder("awq-g32"), lora="adapter", progress=False)
    with pytest.raises(ValueError, match="a model to train keeps its dtype"):
        Stacked(Llama.from_pretrained(folder("awq-g32"), progress=False))
    with pytest.raises(ValueError, match="quantization='awq' is for task=\"generate\""):
        plan(str(folder("awq-g32")), "8xH100", task="train", seq_len=64)


def test_modules_of_one_weight_are_quantized_alike(tmp_path):
    """q, k and v are one kernel here."""

    def other(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(128, 128, dtype=torch.float16)
        for end in ("qweight", "qzeros", "scales"):
            del tensors[f"model.layers.0.self_attn.q_proj.{end}"]

    made = changed(tmp_path, "awq-g32", tensors=other)
    with pytest.raises(
        ValueError, match=r"q_proj.weight and .*k_proj.weight are parts of one weight here \(layers\.0\.attention"
    ):
        Llama.from_pretrained(made, progress=False)


@pytest.mark.parametrize("sizes", [{}, {"tensor_parallel_size": 2, "context_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_a_cache_in_fp8_has_the_checkpoints_own_scales(tmp_path, caplog, sizes):
    """Each layer's own, of keys and of values: what is kept is what they make of these, cut at 448 times them."""
    given = [(0.004, 0.03), (0.02, 0.01)]

    def other(tensors):
        for i, (keys, values) in enumerate(given):
            tensors[f"model.layers.{i}.self_attn.k_scale"] = torch.tensor([keys])
            tensors[f"model.layers.{i}.self_attn.v_scale"] = torch.tensor(values)

    folder = changed(tmp_path, "fp8-static-autofp8", tensors=other)
    held = {}
    prompts, params = [list(range(3, 40))], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for bits in ("auto", "fp8"):
        with caplog.at_level("INFO", logger="jaxtp"):
            llm = LLM(folder, dtype="float32", kv_cache_dtype=bits, progress=False, **(sizes if bits == "fp8" else {}))
        llm.generate(prompts, params)
        held[bits] = llm.engine.runner.state.cache.layers
    assert "the checkpoint brings scales of keys and values: kv_cache_dtype='fp8' keeps a cache with them" in caplog.text
    assert "keys and values are kept in fp8 with the checkpoint's own scales" in caplog.text
    for layer, scales in enumerate(given):
        for kind, scale in enumerate(scales):
            plain = np.asarray(held["auto"][layer][kind])[0]  # [K, S, H] of the first page
            block = held["fp8"][0 if "pipeline_parallel_size" in sizes else layer][kind]
            values, found = (np.asarray(a, np.float32) for a in (block.values, block.scale))
            if "pipeline_parallel_size" in sizes:
                values, found = values[layer], found[layer]
            values, found = values[0], found[0]
            if "context_parallel_size" in sizes:  # of each rank its slots, one rank behind another
                values, found = (
                    np.moveaxis(a.reshape(len(a), 2, -1, *a.shape[2:]), 1, 2).reshape(a.shape) for a in (values, found)
                )
            tokens = len(prompts[0])
            np.testing.assert_array_equal(found[:, :tokens], np.float32(scale))
            if layer == 0:  # of the first layer nothing before was rounded
                expected = np.clip(plain[:, :tokens] / np.float32(scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
                np.testing.assert_array_equal(values[:, :tokens], expected.astype(np.float32))


def test_layers_of_one_place_of_their_stages_are_quantized_alike(tmp_path):
    """As those of Llama-3.1-405B-FP8 are not."""
    skipped = ["model.layers.0.mlp", "self_attn", "lm_head"]

    def other(tensors):
        for name in [name for name in tensors if "layers.0.mlp" in name]:
            tensor = tensors.pop(name)
            if name.endswith(".weight"):
                tensors[name] = torch.zeros(tensor.shape)

    made = changed(tmp_path, "fp8-fbgemm", tensors=other, modules_to_not_convert=skipped)
    model = LLM(made, dtype="float32", tensor_parallel_size=2, progress=False).model
    assert [type(block.mlp.down.get_value()).__name__ for block in model.layers] == ["ArrayImpl", "Quantized"]
    with pytest.raises(ValueError, match=r"layers\.0.* and .*layers\.1.* are parts of one weight here .* in different ways"):
        LLM(made, pipeline_parallel_size=2, progress=False)


def test_modules_that_files_hold_in_16_bits_stay_so():
    config = hf.config_of(folder("fp8-fbgemm"))
    model = Llama.from_pretrained(folder("fp8-fbgemm"), progress=False)
    block = model.layers[0]
    assert block.attention.qkv.get_value().dtype == "bfloat16"
    assert block.mlp.down.get_value().values.dtype == "float8_e4m3fn"
    assert config.schemes.of("model.layers.0.mlp.down_proj").activations == "dynamic"


@pytest.mark.parametrize("name", NAMES)
def test_they_are_read_as_what_they_stand_for(name):
    """By a model that keeps its dtype, as training does."""
    theirs, config = expected(name), hf.config_of(folder(name))
    model = Llama(dataclasses.replace(config, schemes=None), mesh=make_mesh(tp=4), dtype="float32")
    model.load(folder(name), schemes=config.schemes, progress=False)
    assert np.abs(np.asarray(model(theirs["tokens"].astype(np.int32))) - theirs["logits"]).max() < 1e-4


def test_adapters_are_trained_beside_them(tmp_path):
    """The first loss is that of the quantized model, and what is exported has 16 bits, or more, with the adapters in it."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    start = changed(tmp_path, "awq-g32")
    tiny.byte_tokenizer(start, 256)
    said = {
        "folder": str(tmp_path / "run"),
        "steps": 8,
        "parallel": {"dp": 1},
        "model": {"start": str(start), "dtype": "float32"},
        "data": {"train": [str(tmp_path / "text.txt")], "sequence_length": 32, "batch_size": 4},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
        "log": {"every": 1, "tensorboard": False},
    }
    with pytest.raises(ValueError, match=r"quantized \(awq\), which no optimizer can move; adapters are trained beside them"):
        train(parse(said))
    found = train(parse({**said, "lora": {"rank": 4}})).losses
    assert found[-1][1] < 0.8 * found[0][1]
    before = evaluate(start, str(tmp_path / "text.txt"), sequence_length=32, dtype="float32", progress=False).nats
    export(tmp_path / "run", tmp_path / "merged", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    after = evaluate(tmp_path / "merged", str(tmp_path / "text.txt"), sequence_length=32, dtype="float32", progress=False).nats
    assert after < 0.8 * before
