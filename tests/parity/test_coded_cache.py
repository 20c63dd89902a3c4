"""Keys and values in 8 bits: the same texts on every mesh, the capacity that is planned, and how far logits are off."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtp import LLM, Llama, SamplingParams, make_mesh
from jaxtp.ops.attention import attend_seen
from jaxtp.ops.coded import Coded, encode
from jaxtp.ops.pages import attend_pages, choose_read, write_pages
from jaxtp.planner import Generation, Split, memory

PROMPTS = ["", "Once upon a time, there was a cat", "Lily", "The big dog and the little bird were friends. " * 5]
MESHES = [
    {},
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 4},
    {"data_parallel_size": 2, "tensor_parallel_size": 2},
    {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
]


@functools.cache
def texts(stories, kind, mesh):
    llm = tiny.coarse(LLM(stories, kv_cache_dtype=kind, max_num_seqs=4, progress=False, **dict(mesh)))
    requests = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24))
    return [request.outputs[0].token_ids for request in requests]


@pytest.mark.parametrize(("kind", "mesh"), [*(("int8", mesh) for mesh in MESHES[1:]), ("fp8", MESHES[3])], ids=str)
def test_texts_are_those_of_one_device(stories, kind, mesh):
    assert texts(stories, kind, tuple(mesh.items())) == texts(stories, kind, ())


def test_most_texts_are_those_of_a_whole_cache(stories):
    plain, coded = texts(stories, "auto", ()), texts(stories, "int8", ())
    assert sum(a == b for a, b in zip(plain, coded, strict=True)) >= len(PROMPTS) - 1


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("fp8", 0.04)])
def test_logits(stories, kind, most):
    """Through the cache, against the whole forward pass."""
    model = Llama.from_pretrained(stories, mesh=make_mesh(), progress=False)
    tokens = np.random.default_rng(0).integers(3, 500, (2, 64)).astype(np.int32)
    whole = np.asarray(model(tokens))
    model.kv_cache_dtype = kind
    cache = jax.jit(lambda: model.empty_cache(2, 64).zeros())()
    assert cache.layers[0][0].values.dtype == ("int8" if kind == "int8" else "float8_e4m3fn")
    _, cache = model(tokens[:, :40], np.arange(40, dtype=np.int32)[None].repeat(2, 0), cache=cache)
    found, _ = model(tokens[:, 40:], np.arange(40, 64, dtype=np.int32)[None].repeat(2, 0), cache=cache)
    off = np.abs(np.asarray(found) - whole[:, 40:]).mean() / np.abs(whole).mean()
    assert 1e-4 < off < most


@pytest.mark.parametrize("read", ["gather", "rows", "slab"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", [jnp.int8, jnp.float8_e4m3fn])
def test_every_read_gives_what_the_plain_cache_would(read, tokens, kind):
    """That of the values which the 8 bits stand for."""
    (B, K, G, H, S), rng = (3, 2, 2, 8, 16), np.random.default_rng(0)
    N = 1 if read == "slab" else 3
    slots = S * 3 // N
    like = Coded(jnp.zeros((B * N, K, slots, H), kind), jnp.zeros((B * N, K, slots)))
    keys, values = (encode(jnp.asarray(rng.standard_normal(like.shape), jnp.float32), kind, jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((B, tokens, K, G, H)), jnp.float32)
    table = (
        jnp.arange(B * N, dtype=jnp.int32).reshape(B, N)
        if read == "slab"
        else jnp.asarray(rng.permutation(B * N).reshape(B, N), jnp.int32)
    )
    lengths = jnp.asarray([tokens, 20, 3 * S], jnp.int32)
    positions = lengths[:, None] - tokens + jnp.arange(tokens)[None]
    run = functools.partial(
        attend_pages, table=table, positions=positions, lengths=lengths, read=read, reach=3 * S, kernel="xla"
    )
    found = run(q, keys, values)
    plain = run(q, keys.plain(jnp.float32), values.plain(jnp.float32))
    np.testing.assert_allclose(found, plain, atol=2e-6)


def test_chunks_that_cudnn_takes_are_made_plain(monkeypatch):
    taken = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: taken.append((k.dtype, k.shape)) or q)
    like = Coded(jnp.zeros((1, 2, 6, 8), jnp.int8), jnp.ones((1, 2, 6)))
    attend_seen(jnp.zeros((1, 3, 2, 2, 8), jnp.bfloat16), like, like, jnp.ones((1, 3, 6), bool), kernel="cudnn")
    assert taken == [(jnp.bfloat16, (1, 6, 2, 8))]


def test_what_is_written_is_within_half_a_step():
    x = np.random.default_rng(0).standard_normal((5, 2, 16)).astype(np.float32)
    x[1, 1] = 0
    for kind, step in ((jnp.int8, 1 / 127), (jnp.float8_e4m3fn, 1 / 8)):
        pool = Coded(jnp.zeros((3, 2, 4, 16), kind), jnp.zeros((3, 2, 4)))
        slots = jnp.asarray([0, 5, 6, 11, 12])  # the last nowhere
        pool = write_pages(pool, jnp.asarray(x), slots)
        made = np.asarray(pool.plain(jnp.float32))
        for i, slot in enumerate([0, 5, 6, 11]):
            off = np.abs(made[slot // 4, :, slot % 4] - x[i])
            assert (off <= step / 2 * np.abs(x[i]).max(axis=-1, keepdims=True) * 1.001).all()
        assert np.count_nonzero(np.abs(made).sum(axis=(1, 3))) == 4


@pytest.mark.parametrize(("kind", "axes"), [("auto", {}), ("int8", {"tp": 4}), ("fp8", {"pp": 2, "tp": 2})], ids=str)
def test_the_capacity_is_what_the_planner_says(tmp_path, kind, axes):
    folder = tiny.checkpoint(tmp_path / "model", head_dim=64, num_layers=4)
    sizes = {"tensor_parallel_size": axes.get("tp", 1), "pipeline_parallel_size": axes.get("pp", 1)}
    llm = LLM(folder, kv_cache_dtype=kind, kv_cache_memory_bytes=1 << 20, progress=False, **sizes)
    task = Generation(dtype="float32", kv_cache_dtype=kind)
    slot = memory.slot(llm.model.config, Split(**axes), task)
    assert llm.budget.slot_bytes == slot
    assert llm.cache_tokens == (1 << 20) // slot
    half = dataclasses.replace(task, dtype="bfloat16")
    whole = memory.slot(llm.model.config, Split(**axes), dataclasses.replace(half, kv_cache_dtype="auto"))
    assert whole / memory.slot(llm.model.config, Split(**axes), half) == pytest.approx(1 if kind == "auto" else 128 / 66)


def test_cudnn_reads_no_8_bits():
    common = {"platform": "gpu", "dtype": jnp.bfloat16, "head_dim": 128, "windows": False}
    assert choose_read(**common, stages=False) == "cudnn"
    assert choose_read(**common, stages=False, bits="int8") == "slab"
    assert choose_read(**common, stages=True, bits="fp8") == "gather"


def test_bad_input(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="kv_cache_dtype='int4' is none of auto, int8, fp8"):
        LLM(folder, kv_cache_dtype="int4", progress=False)
    with pytest.raises(ValueError, match="kv_cache_dtype='int8' is said when a model is made"):
        LLM(Llama.from_pretrained(folder, progress=False), kv_cache_dtype="int8", progress=False)
