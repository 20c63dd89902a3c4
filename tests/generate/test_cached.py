"""LLM over cp: a row's cache lies on several devices, and every row gets the tokens that one device gives it."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxtp import LLM, Llama, Rules, SamplingParams, make_mesh
from jaxtp.config import Experts
from jaxtp.ops.coded import encode
from jaxtp.ops.pages import Share, attend_pages, attend_share, write_pages
from jaxtp.parallel.context import Context

PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=1, max_tokens=9),
]
LENGTHS = (1, 2, 3, 63, 64, 65, 129, 257, 500)  # of prompts in one batch: around pages, and many chunks


def tokens(requests):
    return [[output.token_ids for output in request.outputs] for request in requests]


def batch(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 98, n).tolist() for n in lengths], [PARAMS[i % 2] for i in range(len(lengths))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two KV heads, and a window smaller than a page in one layer of two."""
    return tiny.checkpoint(
        tmp_path_factory.mktemp("model"), num_layers=4, num_kv_heads=2, model_type="qwen3", qk_norm=True, windows=(40, None) * 2
    )


@pytest.fixture(scope="module")
def plain(folder):
    return tiny.coarse(LLM(folder, progress=False))


@pytest.mark.parametrize(
    "mesh",
    [
        {"context_parallel_size": 2},
        {"context_parallel_size": 4, "kv_cache_memory_bytes": 3 << 15},  # three pages
        {"context_parallel_size": 2, "tensor_parallel_size": 2, "sequence_parallel": True},
        {"context_parallel_size": 2, "tensor_parallel_size": 4},
        {"context_parallel_size": 2, "pipeline_parallel_size": 2},
        {"context_parallel_size": 2, "data_parallel_size": 2, "tensor_parallel_size": 2},
    ],
    ids=str,
)
def test_the_tokens_of_one_device(folder, plain, mesh):
    llm = tiny.coarse(LLM(folder, progress=False, **mesh))
    assert tokens(llm.generate(*batch())) == tokens(plain.generate(*batch()))
    cache = llm.engine.runner.state.cache.layers[0][0]
    held = [shard.index for shard in cache.addressable_shards]
    assert len({str(index) for index in held}) == len(held), "something is stored twice"
    if "kv_cache_memory_bytes" in mesh:
        long = [[5 + i] * 250 for i in range(2)], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        assert tokens(llm.generate(*long)) == tokens(plain.generate(*long))
        assert llm.engine.stats().preemptions, "the two rows have room for their second pages"


@pytest.fixture(scope="module")
def llm(folder):
    return tiny.coarse(LLM(folder, progress=False, context_parallel_size=2, tensor_parallel_size=2))


def test_everything_that_requests_can_ask_for(llm, plain):
    params = [
        SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3, logprobs=3),
        SamplingParams(temperature=0.7, seed=5, max_tokens=20, presence_penalty=0.5, min_tokens=10, n=2),
        SamplingParams(temperature=0, max_tokens=20, stop=["e"], logit_bias={10: 4.0}),
    ]
    prompts, _ = batch((3, 40, 130), seed=5)
    tiny.same_answers(llm.generate(prompts, params), plain.generate(prompts, params))


def test_prompts_that_begin_alike_share_pages(llm, plain):
    size = llm.engine.stats().page_size
    assert size == 2 * plain.engine.stats().page_size
    (first, second), params = batch((2 * size + 5, 9), seed=6)
    before = llm.engine.stats().prefix_hits
    for prompt in (first, first[: 2 * size] + second):
        assert tokens(llm.generate([prompt], params[0])) == tokens(plain.generate([prompt], params[0]))
    assert llm.engine.stats().prefix_hits == before + 2 * size


def test_nothing_compiles_twice(llm):
    llm.generate(*batch((7, 30), seed=8))
    before = llm.programs.compile_seconds
    llm.generate(*batch((9, 20), seed=9))
    assert llm.programs.compile_seconds == before


def test_a_request_may_be_longer_than_the_cache_of_a_device(folder, caplog):
    """What three devices of four lack, the fourth need not have: 128 tokens on each."""
    asked = {"progress": False, "dtype": "float32", "kv_cache_memory_bytes": 128 * 4 * 2 * 2 * 8 * 4}
    with pytest.raises(ValueError, match=r"max_model_len=512 must be in \[2, 128\], the tokens that the KV cache holds"):
        LLM(folder, max_model_len=512, **asked)
    with caplog.at_level(logging.INFO, "jaxtp"):
        llm = LLM(folder, max_model_len=512, context_parallel_size=4, **asked)
    assert llm.cache_tokens == 512
    assert "KV cache: 512 tokens" in caplog.text
    assert "over cp=4" in caplog.text


def test_kv_heads_are_not_held_twice(folder, caplog):
    with caplog.at_level(logging.INFO, "jaxtp"):
        llm = LLM(folder, progress=False, context_parallel_size=2, tensor_parallel_size=4)
    assert {axis: n for axis, n in llm.model.layout.mesh.shape.items() if n > 1} == {"tp": 2, "cp": 4}
    assert "the 2 KV heads are not held 2 times for tp=4: laid out as tp=2 × cp=4" in caplog.text


def test_weights_lie_over_tp_and_cp(llm):
    block = llm.model.layers[0]
    assert block.mlp.down[...].sharding.spec == P(None, ("tp", "cp"))
    assert block.attention.o[...].sharding.spec == P(None, ("tp", "cp"))
    assert block.attention.qkv[...].sharding.spec == P("tp", None, None, None)


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"intermediate_size": 128}, {"quantization": "int4"}),
        ({}, {"kv_cache_dtype": "int8"}),
        ({}, {"compress_all_reduce": "int8"}),
    ],
    ids=str,
)
def test_what_else_a_model_may_have(tmp_path, changes, more):
    folder = tiny.checkpoint(tmp_path, **changes)
    one = tiny.coarse(LLM(folder, progress=False, **{k: v for k, v in more.items() if k != "compress_all_reduce"}))
    llm = tiny.coarse(LLM(folder, progress=False, context_parallel_size=2, tensor_parallel_size=2, **more))
    assert tokens(llm.generate(*batch((5, 70)))) == tokens(one.generate(*batch((5, 70))))


MIXTRAL = {"model_type": "mixtral", "experts": Experts(8, 2, 24, renormalize=True)}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("experts"), **MIXTRAL)
    return folder, tokens(tiny.coarse(LLM(folder, progress=False)).generate(*batch((5, 70))))


@pytest.mark.parametrize(
    "more",
    [
        {"tensor_parallel_size": 2, "expert_layout": "whole"},
        {"tensor_parallel_size": 2, "expert_layout": "width"},
        {"expert_parallel_size": 2, "expert_dispatch": "ragged"},
    ],
    ids=str,
)
def test_experts(experts, more):
    folder, expected = experts
    llm = tiny.coarse(LLM(folder, progress=False, context_parallel_size=2, **more))
    assert tokens(llm.generate(*batch((5, 70)))) == expected


@pytest.mark.parametrize(("read", "most"), [("slab", 101), ("gather", None)])
def test_as_gpus_read_it(folder, plain, read, most):
    """A slab of an odd length, cut between ranks; pages side by side."""
    llm = LLM(folder, progress=False, context_parallel_size=4, max_num_seqs=4, max_model_len=most)
    llm._engine = functools.partial(llm._engine, read=read)
    asked = batch((1, 2, 40, 80), seed=3)
    assert tokens(tiny.coarse(llm).generate(*asked)) == tokens(plain.generate(*asked))


def test_a_cache_of_ones_own():
    """Logits of a chunk and of single tokens after it are those of all tokens at once."""
    mesh = make_mesh(cp=2, tp=2)
    model = Llama.random(tiny.config(), mesh=mesh, rules=Rules().cache_parallel(), context=Context(2))
    ids = np.random.default_rng(0).integers(3, 98, (2, 9)).astype(np.int32)
    expected = np.asarray(model(ids))
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: model.empty_cache(2, 16).zeros())()
    found, cache = model(ids[:, :7], cache=cache)
    np.testing.assert_allclose(found, expected[:, :7], atol=1e-5)
    for t in (7, 8):
        found, cache = model(ids[:, t : t + 1], positions=np.full((2, 1), t, np.int32), cache=cache)
        np.testing.assert_allclose(found, expected[:, t : t + 1], atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"context_parallel_size": 3}, r"tp·cp=1·3, which does not divide 8 query heads; legal cp with tp=1: 1, 2, 4, 8"),
        (
            {"context_parallel_size": 4, "tensor_parallel_size": 4},
            r"tp·cp=2·8, which does not divide 8 query heads; .*: 1, 2, 4",
        ),
        (
            {"context_parallel_size": 2, "tensor_parallel_size": 3},
            r"tp=3 does not divide 8 query heads .*legal tp for this model",
        ),
        ({"context_parallel_size": 0}, "context_parallel_size=0 must be"),
        ({"context_parallel_size": 2, "tp_plan": {"layers.*.mlp.*": "replicate"}}, 'it goes with tp_plan="auto"'),
        ({"context_parallel_size": 4, "data_parallel_size": 4}, "dp=4 × cp=4 needs 16 devices, 8 are there"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(folder, asked, message):
    with pytest.raises(ValueError, match=message):
        LLM(folder, progress=False, **asked)


def test_a_cache_whose_slots_cannot_be_cut_is_refused():
    model = Llama(tiny.config(), mesh=make_mesh(cp=2), rules=Rules().cache_parallel(), context=Context(2))
    with pytest.raises(ValueError, match="pages of 9 slots cannot be cut into 2 parts, over cp; use a multiple of 2"):
        model.empty_cache(1, 9)
    with pytest.raises(ValueError, match="these rules cut the slots of a cache into 2 parts, and context=None is not"):
        Llama(tiny.config(), mesh=make_mesh(cp=2), rules=Rules().cache_parallel())


# -- attention to a share of the slots ---------------------------------------------------------------------------------


SIZE, ROWS = 64, 3  # slots of a page on a rank; rows


@functools.cache
def pools(ranks, pages, bits):
    """Keys and values of rows that have `pages` pages of SIZE · ranks tokens: whole, and as each rank has them; their table."""
    rng = np.random.default_rng(0)
    order = rng.permutation(ROWS * pages) if pages > 1 else np.arange(ROWS)
    table = order.astype(np.int32).reshape(ROWS, pages)
    slots = (table[:, :, None] * SIZE * ranks + np.arange(SIZE * ranks)).reshape(-1)
    new = [jnp.asarray(rng.standard_normal((len(slots), 2, 8)), jnp.float32) for _ in range(2)]

    def filled(share, size):
        empty = jnp.zeros((ROWS * pages, 2, size, 8), jnp.float32)
        empty = encode(empty, jnp.int8, jnp.float32) if bits else empty
        return [write_pages(empty, a, jnp.asarray(slots), share=share) for a in new]

    shares = [Share(ranks, jnp.int32(rank)) for rank in range(ranks)]
    return filled(None, SIZE * ranks), [(share, *filled(share, SIZE)) for share in shares], jnp.asarray(table)


@pytest.mark.parametrize(("read", "bits"), [("rows", None), ("gather", None), ("slab", None), ("rows", "int8")])
@pytest.mark.parametrize("ranks", [2, 3])
def test_merged_shares_are_the_whole(read, bits, ranks):
    """Of rows with one new token, at the places 0, 1 and the last but one, and of chunks; with windows of all sizes."""
    pages = 1 if read == "slab" else 4
    whole, parts, table = pools(ranks, pages, bits)
    last, rng = pages * SIZE * ranks, np.random.default_rng(1)
    for T, window in itertools.product((1, 32), (None, 3, 150)):
        softcap = 3.0 if window == 3 else None
        q = jnp.asarray(rng.standard_normal((ROWS, T, 2, 3, 8)), jnp.float32)
        positions = jnp.asarray([[0], [1], [last - T]], jnp.int32) + jnp.arange(T)
        where = table, positions, positions[:, -1] + 1
        how = {"read": read, "reach": last, "kernel": "xla", "window": window, "softcap": softcap}
        expected = attend_pages(q, *whole, *where, **how)
        found = [attend_share(q, keys, values, *where, share, **how) for share, keys, values in parts]
        shares = jax.nn.softmax(jnp.stack([jnp.einsum("BKGTI->BTKGI", log_z) for _, log_z in found]), axis=0)
        merged = (shares * jnp.stack([out for out, _ in found])).sum(axis=0)
        np.testing.assert_allclose(merged, expected, atol=1e-5, err_msg=f"{T} queries, window {window}")


def test_who_has_which_token():
    share = Share(3, jnp.int32(1))
    assert share.slots(jnp.arange(8), 99).tolist() == [99, 0, 99, 99, 1, 99, 99, 2]
    assert share.lengths(jnp.arange(6)).tolist() == [0, 0, 1, 1, 1, 2]
