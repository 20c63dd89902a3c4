"""What only a real GPU can tell; a CPU of the same machine is the reference.

JAXTP_TESTS=gpu pytest tests/gpu
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtp import LLM, Llama, SamplingParams, make_mesh
from jaxtp.config import Experts
from jaxtp.config.quantization import Scheme
from jaxtp.engine.read import cudnn_reads
from jaxtp.ops import experts, grouped
from jaxtp.ops.attention import attend_seen_part
from jaxtp.ops.quantized import multiplies_fp8, product, quantize
from jaxtp.xla_flags import QUANTIZED, options

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU is at hand, or JAXTP_TESTS=gpu is not said")
PROMPTS = ["The king", "ROMEO:", "First Citizen:\nWe are accounted poor citizens, the patricians good.\nWhat authority", "O"]
EXPERTS = {"model_type": "mixtral", "experts": Experts(8, 2, 32, renormalize=True)}


def on(platform: str):
    return make_mesh(devices=jax.devices(platform)[:1])


@functools.cache
def demo(platform: str, dtype: str = "float32", quantization: str | None = None) -> LLM:
    model = Llama.from_pretrained("demo", mesh=on(platform), dtype=dtype, quantization=quantization, progress=False)
    return LLM(model, max_num_seqs=8, kv_cache_memory_bytes=1 << 28, enable_prefix_caching=False, progress=False)


def reading(llm: LLM, read: str) -> LLM:
    """The same model, whose cache is read so."""
    other = LLM(llm.model, max_num_seqs=8, kv_cache_memory_bytes=1 << 28, enable_prefix_caching=False, progress=False)
    other._engine = functools.partial(other._engine, read=read)
    return other


@pytest.mark.parametrize("layout", [("bfloat16", 8, 4, 128), ("float16", 2, 1, 64), ("bfloat16", 1, 8, 128)], ids=str)
def test_cudnn_reads_pages(layout):
    assert cudnn_reads(jax.devices()[0], layout)
    assert cudnn_reads(jax.devices()[0], layout, ranks=2)  # and tells the softmax's denominator of a share of the slots


def test_a_mask_of_a_share_of_the_slots():
    """Chunks over cp: queries that see some of the keys, or none, and the logarithms of their denominators."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 128, 2, 4, 64), *[(2, 2, 192, 64)] * 2))
    seen = jnp.asarray(np.arange(192)[None, None] * 4 + 1 <= np.array([[0], [300]])[:, :, None] + np.arange(128)[None, :, None])
    found, expected = (
        jax.jit(functools.partial(attend_seen_part, kernel=kernel, scale=0.125))(q, k, v, seen) for kernel in ("cudnn", "xla")
    )
    for mine, its in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(its, np.float32), atol=0.02, rtol=0.01)


def test_float32_is_not_rounded():
    """Logits as a CPU's, which TF32 would be 1e-3 off. The CPU's own are 5e-6 off those in float64."""
    tokens = np.random.default_rng(0).integers(0, 256, (2, 300))
    found, expected = (np.asarray(demo(platform).model(tokens)) for platform in ("gpu", "cpu"))
    assert np.linalg.norm(found - expected) < 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 3}], ids=str)
def test_float32_gives_a_cpus_tokens(sampling):
    params = SamplingParams(max_tokens=48, **sampling)
    texts = [[r.outputs[0].text for r in demo(platform).generate(PROMPTS, params)] for platform in ("gpu", "cpu")]
    assert texts[0] == texts[1]


def test_somebody_who_reads_along_has_the_same():
    """Steps are single ones then, each a program without a loop."""
    params = SamplingParams(temperature=0, max_tokens=48)
    expected = [request.outputs[0].text for request in demo("cpu").generate(PROMPTS, params)]
    last = {request.request_id: request.outputs[0].text for request in demo("gpu").stream(PROMPTS, params)}
    assert [text for _, text in sorted(last.items())] == expected


SCHEMES = [
    Scheme("int8"),
    Scheme("fp8"),
    Scheme("int4", group=128),
    Scheme("int4", group=128, zeros=True),
    Scheme("fp8", group=128),
    Scheme("fp8", activations="dynamic"),
    Scheme("nf4", group=64),
]


@pytest.mark.parametrize("rows", [1, 8, 64, 512])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_with_kernels_in_few_bits(scheme, rows):
    """As the weights say in float32, but for what bfloat16 leaves; of fp8 times fp8, what three bits behind the first do."""
    outputs, inputs = 1024, 2048
    with jax.default_device(jax.devices("cpu")[0]):
        kernel = quantize(jax.random.normal(jax.random.key(0), (outputs, inputs), jnp.bfloat16), scheme)
        if scheme.zeros:
            kernel = dataclasses.replace(kernel, shift=(0.5 * kernel.scale).astype(kernel.scale.dtype))
        x = jax.random.normal(jax.random.key(1), (rows, inputs), jnp.bfloat16)
        expected = np.asarray(x, np.float64) @ np.asarray(kernel.plain(jnp.dtype("float32")), np.float64).T
    mesh = on("gpu")
    place = NamedSharding(mesh, P())
    kernel, x = jax.device_put((kernel, x), place)
    run = jax.jit(functools.partial(product, fp8=multiplies_fp8(mesh)), compiler_options=options(mesh, QUANTIZED))
    off = np.linalg.norm(np.asarray(run(x, kernel)) - expected) / np.linalg.norm(expected)
    assert off < (0.05 if scheme.activations and rows >= 256 else 0.01)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_cache_of_8_bits(kind):
    """Texts of float32 weights, read from a slab; a CPU reads row by row."""
    params, texts = SamplingParams(temperature=0, max_tokens=32), []
    for platform in ("gpu", "cpu"):
        model = Llama.from_pretrained("demo", mesh=on(platform), dtype="float32", progress=False)
        model.kv_cache_dtype = kind
        llm = LLM(model, max_num_seqs=8, kv_cache_memory_bytes=1 << 28, progress=False)
        texts.append([request.outputs[0].text for request in llm.generate(PROMPTS, params)])
    assert sum(a == b for a, b in zip(*texts, strict=True)) >= len(PROMPTS) - 1  # a value may be rounded the other way


def test_a_warm_up_runs_what_it_compiles():
    llm = reading(demo("gpu", "bfloat16"), "cudnn")
    llm.engine.asked.levels = True
    llm.engine.warm_up()
    before = llm.programs.compile_seconds
    llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24))
    assert llm.programs.compile_seconds == before


@pytest.mark.parametrize("read", ["cudnn", "slab", "gather"])
def test_every_read_gives_the_same_in_16_bits(read):
    """Log probabilities of what the CPU's float32 would say, as far as 16 bits go."""
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=1)
    expected = demo("cpu").generate(PROMPTS, params)
    for mine, theirs in zip(reading(demo("gpu", "bfloat16"), read).generate(PROMPTS, params), expected, strict=True):
        mine, theirs = mine.outputs[0], theirs.outputs[0]
        same = next((i for i, (a, b) in enumerate(zip(mine.token_ids, theirs.token_ids, strict=True)) if a != b), 24)
        assert same > 0
        for i in range(same):
            a, b = (found.logprobs[i][found.token_ids[i]].logprob for found in (mine, theirs))
            assert abs(a - b) < 0.1


def test_8_bits():
    params = SamplingParams(temperature=0, max_tokens=24)
    texts = [[r.outputs[0].text for r in demo(p, "float32", "int8").generate(PROMPTS, params)] for p in ("gpu", "cpu")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("form", ["chosen", "every", "blocks", "grouped"])
@pytest.mark.parametrize("tokens", [8, 512])
def test_products_of_experts(form, tokens):
    """Values and gradients, beside the formula in float32."""
    E, k, D, F = 8, 2, 256, 384
    if form == "grouped" and not grouped.fits(on("gpu"), "bfloat16", D, F):
        pytest.skip("not a Hopper GPU")
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    x, gate_up, down = draw(tokens, D), draw(E, F, 2, D) / 16, draw(E, D, F) / 20
    chosen = jnp.asarray(np.stack([rng.permutation(E - 1)[:k] for _ in range(tokens)]), jnp.int32)  # one is never chosen
    weights = jnp.asarray(rng.random((tokens, k)), jnp.float32)

    def value(form):
        def total(x, gate_up, down):
            y = experts.mix(x, chosen, weights, gate_up, down, products=form)
            return (y.astype(jnp.float32) ** 2).sum(), y

        (_, y), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(x, gate_up, down)
        return y, *grads

    for mine, theirs in zip(value(form), value("reference"), strict=True):
        mine, theirs = (np.asarray(a, np.float32) for a in (mine, theirs))
        assert np.linalg.norm(mine - theirs) < 0.02 * np.linalg.norm(theirs)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_training_gives_a_cpus_curve(kind):
    changes = {} if kind == "dense" else EXPERTS
    curves = []
    for platform in ("gpu", "cpu"):
        run = runs.run(tiny.config(**changes), mesh={"devices": jax.devices(platform)[:1]}, steps=5)
        curves.append([float(run.step(runs.rows(i)).loss) for i in range(5)])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_a_mixture_of_experts_generates(tmp_path):
    tiny.checkpoint(tmp_path, **EXPERTS)
    texts = []
    for platform in ("gpu", "cpu"):
        model = Llama.from_pretrained(tmp_path, mesh=on(platform), dtype="float32", progress=False)
        llm = LLM(model, kv_cache_memory_bytes=1 << 26, max_num_seqs=8, progress=False)
        found = llm.generate(tiny.prompts(6, longest=200), SamplingParams(temperature=0))
        texts.append([request.outputs[0].token_ids for request in found])
    assert texts[0] == texts[1]
