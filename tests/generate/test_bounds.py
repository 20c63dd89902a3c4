"""What cannot be is refused where it is asked for, by its name and its bound."""

import math

import numpy as np
import pytest
import tiny
import torch
import transformers
from jax.sharding import AxisType, Mesh

from jaxtp import LLM, Llama, SamplingParams, make_mesh
from jaxtp.train.config import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("bounds"), tokenizer=False, num_layers=1, vocab_size=20)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, progress=False)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"logprobs": 21}, ValueError, "logprobs=21 must be at most 20, the size of the vocabulary"),
        ({"logprobs": 64}, ValueError, "logprobs=64 must be at most 20, the size of the vocabulary"),
        ({"top_k": 21}, ValueError, "top_k=21 must be at most 20, the size of the vocabulary"),
        ({"top_k": 2**40}, ValueError, "top_k=1099511627776 must be at most 20"),
        ({"min_tokens": 513, "max_tokens": None}, ValueError, "min_tokens=513 must be at most 512, max_model_len"),
        ({"stop_token_ids": [20]}, ValueError, r"stop_token_ids has token ids \[20\], outside the vocabulary of 20"),
        ({"logit_bias": {-1: 1.0}}, ValueError, r"logit_bias has token ids \[-1\]"),
    ],
)
def test_a_request_beyond_the_model_is_refused_before_any_work(llm, asked, error, said):
    compiled = llm.programs.compile_seconds
    with pytest.raises(error, match=said):
        llm.generate([[3, 4]], SamplingParams(**{"max_tokens": 1, **asked}))
    assert llm.programs.compile_seconds == compiled


def test_all_of_the_vocabulary_can_be_asked_for(llm):
    made = llm.generate([[3, 4]], SamplingParams(max_tokens=1, logprobs=20, top_k=20, seed=2**32 - 1))[0].outputs[0]
    assert len(made.logprobs[0]) == 20
    assert sum(math.exp(entry.logprob) for entry in made.logprobs[0].values()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"n": 16385}, ValueError, "n=16385 must be at most 16384"),
        ({"n": True}, TypeError, "n=True must be an int"),
        ({"seed": 2**32}, ValueError, r"seed=4294967296 must be in \[0, 2\^32\)"),
        ({"seed": True}, TypeError, "seed=True must be an int or None"),
        ({"max_tokens": False}, TypeError, "max_tokens=False must be an int or None"),
        ({"logprobs": True}, TypeError, "logprobs=True must be an int or None"),
        ({"top_k": True}, TypeError, "top_k=True must be an int"),
        ({"temperature": True}, TypeError, "temperature=True must be a number"),
        ({"temperature": math.nan}, ValueError, "temperature=nan must be at least 0"),
        ({"ignore_eos": "no"}, TypeError, "ignore_eos='no' must be True or False"),
        ({"skip_special_tokens": 0}, TypeError, "skip_special_tokens=0 must be True or False"),
        ({"logit_bias": [1]}, TypeError, r"logit_bias=\[1\] must map token ids to numbers"),
        ({"logit_bias": {1.5: 1.0}}, TypeError, r"logit_bias=\{1\.5: 1\.0\} must map token ids to numbers"),
        ({"logit_bias": {"a": 1.0}}, TypeError, "logit_bias=.* must map token ids to numbers"),
        ({"logit_bias": {1: math.nan}}, ValueError, r"logit_bias\[1\]=nan must be in \[-100, 100\]"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids=5 must be a list of ints"),
        ({"stop_token_ids": [True]}, TypeError, r"stop_token_ids=\[True\] must be a list of ints"),
    ],
)
def test_parameters_that_no_model_has(asked, error, said):
    with pytest.raises(error, match=said):
        SamplingParams(**asked)


def test_json_s_keys_and_numpy_s_numbers_are_taken():
    params = SamplingParams(n=np.int64(2), logit_bias={"7": 1}, temperature=np.float32(0.5), stop_token_ids=np.array([3]))
    assert params.logit_bias == {7: 1.0}
    assert SamplingParams(temperature=1e-9).temperature == 0  # greedy; divided by, logits would overflow


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        *(
            ({name: value}, TypeError, f"{name}={value!r} must be an int of at least 1")
            for name in (
                "max_num_seqs",
                "max_num_batched_tokens",
                "tensor_parallel_size",
                "data_parallel_size",
                "max_model_len",
            )
            for value in (True, 2.0, "2")
        ),
        ({"pipeline_parallel_size": -1}, ValueError, "pipeline_parallel_size=-1 must be at least 1"),
        ({"max_num_seqs": 2**31}, ValueError, "max_num_seqs=2147483648 must be at most 2147483647"),
        ({"layers_per_stage": 3}, TypeError, "layers_per_stage=3 must be a list of ints"),
        ({"layers_per_stage": [1.0]}, TypeError, r"layers_per_stage=1\.0 must be an int"),
        ({"layers_per_stage": [0, 1]}, ValueError, "layers_per_stage=0 must be at least 1"),
        ({"gpu_memory_utilization": "0.9"}, TypeError, "gpu_memory_utilization='0.9' must be a number"),
        ({"gpu_memory_utilization": True}, TypeError, "gpu_memory_utilization=True must be a number"),
        ({"seed": -1}, ValueError, r"seed=-1 must be in \[0, 2\^32\)"),
        ({"seed": 2**32}, ValueError, r"seed=4294967296 must be in"),
        ({"seed": 0.5}, TypeError, r"seed=0\.5 must be an int"),
        ({"sequence_parallel": "yes"}, TypeError, "sequence_parallel='yes' must be True or False"),
        ({"hf_overrides": '{"a": 1}'}, TypeError, "hf_overrides=.* must be a dict"),
        ({"dtype": "int4"}, ValueError, "dtype='int4' is not supported; supported: float32, bfloat16, float16"),
        ({"dtype": 16}, ValueError, "dtype=16 is not supported"),
    ],
)
def test_an_engine_that_cannot_be(folder, asked, error, said):
    with pytest.raises(error, match=said):
        LLM(folder, progress=False, **asked)


def test_what_is_no_model_or_no_mesh(folder):
    with pytest.raises(TypeError, match="model=None must be a checkpoint folder"):
        LLM(None)
    for size in (True, 2.0, "2"):
        with pytest.raises(TypeError, match=f"tp={size!r}: the size of an axis is an int"):
            make_mesh(tp=size)
    with pytest.raises(TypeError, match="mesh='tp=2' must be a mesh of devices"):
        Llama.from_pretrained(folder, mesh="tp=2", progress=False)
    devices = make_mesh(tp=2).devices.reshape(2)
    with pytest.raises(ValueError, match=r"the mesh has the axes \('tp',\); it must have \('dp', 'pp', 'cp', 'ep', 'tp'\)"):
        Llama.from_pretrained(folder, mesh=Mesh(devices, ("tp",), axis_types=(AxisType.Explicit,)), progress=False)
    with pytest.raises(TypeError, match="max_shard_bytes='5GB' must be an int"):
        Llama.from_pretrained(folder, progress=False).save_pretrained(folder / "x", max_shard_bytes="5GB")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_run_s_seed(seed):
    with pytest.raises(ValueError, match=rf"seed={seed} must be in \[0, 2\^32\)"):
        TrainConfig(folder="x", seed=seed)


# -- the context of scaled RoPE ----------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_a_context_that_is_too_short_names_the_way_out(folder):
    short = {"max_position_embeddings": 64}
    with pytest.raises(
        ValueError, match=r"max_model_len=100 exceeds the model's max_position_embeddings=64; for more"
    ) as error:
        LLM(folder, progress=False, hf_overrides=short, max_model_len=100)
    ways = [{"max_position_embeddings": 100}, {"rope_scaling": {**YARN, "factor": 2.0}}]
    for way in ways:
        assert str(way).replace("'", '"') in str(error.value)
        assert LLM(folder, progress=False, hf_overrides={**short, **way}, max_model_len=100).max_model_len == 100
    with pytest.raises(ValueError, match=r"max_position_embeddings=64 \(scaled by yarn RoPE to 256\); for more: hf_over"):
        LLM(folder, progress=False, hf_overrides={**short, "rope_scaling": YARN}, max_model_len=257)
    small = LLM(folder, progress=False, max_model_len=8)
    with pytest.raises(ValueError, match=r"a prompt has 9 tokens, .* 8, .*; LLM\(\.\.\., max_model_len=10\) is possible"):
        small.generate([[3] * 9])


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, YARN], ids=lambda scaling: scaling["rope_type"])
def test_beyond_the_unscaled_length_tokens_are_transformers_(tmp_path, scaling):
    """A prompt of 100 tokens where 64 were trained; the context is four times that without a word, as in vLLM."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None},
        rope_parameters={**scaling, "rope_theta": 10000.0},
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.ones_like(weight) if "norm" in name else 0.3 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    prompt = np.random.default_rng(1).integers(0, 96, 100).tolist()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    llm = LLM(tmp_path, progress=False)
    assert llm.max_model_len == 256
    made = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0]
    assert made.token_ids == expected[0, 100:].tolist()


def test_a_window_wider_than_the_context_is_full_attention(tmp_path):
    folder = tiny.checkpoint(tmp_path, tokenizer=False, num_layers=1)
    tokens = np.arange(3, 40)[None]
    wanted = Llama.from_pretrained(folder, progress=False)(tokens)
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    for window in (4096, 2**31 - 1):
        found = Llama.from_pretrained(folder, progress=False, hf_overrides={**mistral, "sliding_window": window})
        assert found.config.windows == (window,)
        np.testing.assert_array_equal(found(tokens), wanted)
