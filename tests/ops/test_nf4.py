"""The kernel that multiplies with NF4's levels on GPUs, interpreted here: the formula, for any rows and on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtp import make_mesh
from jaxtp.config.quantization import Scheme
from jaxtp.ops import nf4, quantized
from jaxtp.ops.linear import linear
from jaxtp.ops.quantized import Quantized

GROUP, OUTPUTS, INPUTS = 16, 64, 384
CLOSE = 2e-4  # of sums in float32; weights that are not rounded to bfloat16 are 1e-2 off


def kernel(outputs=OUTPUTS, inputs=INPUTS, group=GROUP, layers=()):
    """values [*layers, O, I], scale [*layers, O, n], and what they stand for, rounded to bfloat16, in float64."""
    keys = jax.random.split(jax.random.key(0))
    values = jax.random.randint(keys[0], (*layers, outputs, inputs), -8, 8, jnp.int8)
    scale = jnp.exp(jax.random.normal(keys[1], (*layers, outputs, inputs // group)))
    plain = np.asarray(nf4.LEVELS, np.float32)[np.asarray(values) + 8] * np.repeat(scale, group, axis=-1)
    return values, scale, np.asarray(jnp.asarray(plain, jnp.bfloat16), np.float64)


def inputs(*shape):
    return jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)


@pytest.mark.parametrize(("outputs", "width", "group"), [(64, 384, 16), (48, 2304, 64), (16, 32, 2)])
@pytest.mark.parametrize("rows", [1, 5, 16, 130])
def test_it_is_the_formula(rows, outputs, width, group):
    values, scale, plain = kernel(outputs, width, group)
    x = inputs(rows, width)
    assert nf4.fits(x, values, scale)
    parts = jax.jit(lambda *args: nf4.product_of_one(*args, interpret=True))(x, values, scale)
    assert parts.shape == (3 if width == 2304 else 1, rows, outputs)  # of three products of 128 bytes each
    np.testing.assert_allclose(parts.sum(axis=0), np.asarray(x, np.float64) @ plain.T, atol=CLOSE * plain.max(), rtol=CLOSE)


def test_weights_are_rounded_as_the_checkpoint_says():
    values, scale, _ = kernel()
    exact = np.asarray(nf4.LEVELS)[np.asarray(values) + 8] * np.repeat(np.asarray(scale, np.float64), GROUP, axis=-1)
    x = jnp.eye(INPUTS, dtype=jnp.float16)[:8]
    found = nf4.product_of_one(x, values, scale, rounded="bfloat16", interpret=True).sum(axis=0)
    expected = jnp.asarray(exact[:, :8].T, jnp.float32).astype(jnp.bfloat16).astype(jnp.float16)
    np.testing.assert_array_equal(found, expected.astype(jnp.float32))


@pytest.mark.parametrize(
    ("rows", "dtype", "outputs", "width", "group"),
    [
        (nf4.ROWS + 1, "bfloat16", 64, 384, 16),
        (4, "float32", 64, 384, 16),
        (4, "bfloat16", 56, 384, 16),
        (4, "bfloat16", 64, 48, 16),
        (4, "bfloat16", 64, 384, 48),
        (4, "bfloat16", 64, 33, 1),
    ],
)
def test_other_products_are_left_to_xla(rows, dtype, outputs, width, group):
    values, scale, plain = kernel(outputs, width, group)
    x = inputs(rows, width).astype(dtype)
    assert not nf4.fits(x, values, scale)
    found = quantized.product(x, Quantized(values, scale, Scheme("nf4", group=group, rounded="bfloat16")))
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ plain.T, atol=CLOSE * plain.max(), rtol=CLOSE)


def test_parts_are_of_few_products_each():
    assert nf4._parts(56) == 14  # 8B's down: 14,336 inputs
    assert nf4._parts(112) == 16  # 70B's
    assert nf4._parts(43) == 1  # Llama-2's: a prime
    assert nf4._parts(1) == 1


def placed(mesh, spec, *arrays):
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays]


@pytest.mark.parametrize("cut", ["outputs", "inputs"])
@pytest.mark.parametrize("axes", [{}, {"tp": 2}, {"dp": 2, "tp": 4}, {"tp": 4}, {"dp": 2}, {"ep": 2, "tp": 2}], ids=str)
def test_it_is_the_same_on_every_mesh(monkeypatch, cut, axes):
    monkeypatch.setattr("jaxtp.ops.linear.platform", lambda mesh: "gpu")
    calls, run = [], nf4.product_of_one
    monkeypatch.setattr(nf4, "product_of_one", lambda *args, **kw: calls.append(args[0].shape) or run(*args, **kw))
    mesh, (values, scale, plain) = make_mesh(**axes), kernel()
    tp, batch = axes.get("tp", 1), axes.get("dp", 1) * axes.get("ep", 1)
    values, scale = placed(mesh, P("tp", None) if cut == "outputs" else P(None, "tp"), values, scale)
    weight = Quantized(values, scale, Scheme("nf4", group=GROUP, rounded="bfloat16"))
    (x,) = placed(mesh, P(("dp", "ep"), None, None if cut == "outputs" else "tp"), inputs(4, 3, INPUTS))
    out = NamedSharding(mesh, P(("dp", "ep"), None, "tp" if cut == "outputs" else None))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x, w: linear(x, w, out=out, dtype=jnp.float32)).lower(x, weight).compile()
        found = program(x, weight)
    assert calls == [(12 // batch, INPUTS // (tp if cut == "inputs" else 1))]
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ plain.T, atol=CLOSE * plain.max(), rtol=CLOSE)
    text = program.as_text()
    assert text.count(" all-reduce(") == (cut == "inputs" and tp > 1)
    assert not any(f" {kind}(" in text for kind in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("cut", ["outputs", "inputs"])
def test_stages_of_a_pipeline_keep_their_kernels(monkeypatch, cut):
    """Mapped over stages, each multiplies with its own: nothing is gathered."""
    monkeypatch.setattr("jaxtp.ops.linear.platform", lambda mesh: "gpu")
    mesh, (values, scale, plain) = make_mesh(pp=2, tp=2), kernel(layers=(2,))
    values, scale = placed(mesh, P("pp", "tp", None) if cut == "outputs" else P("pp", None, "tp"), values, scale)
    weight = Quantized(values, scale, Scheme("nf4", group=GROUP, rounded="bfloat16"))
    (x,) = placed(mesh, P("pp", None, None, None if cut == "outputs" else "tp"), inputs(2, 4, 3, INPUTS))
    out = NamedSharding(mesh, P(None, None, "tp" if cut == "outputs" else None))

    def stage(x, weight):
        return linear(x, weight, out=out, dtype=jnp.float32)

    with jax.set_mesh(mesh):
        program = jax.jit(jax.vmap(stage, spmd_axis_name="pp")).lower(x, weight).compile()
        found = program(x, weight)
    expected = np.einsum("sbti,soi->sbto", np.asarray(x, np.float64), plain)
    np.testing.assert_allclose(found, expected, atol=CLOSE * plain.max(), rtol=CLOSE)
    text = program.as_text()
    assert text.count(" all-reduce(") == (cut == "inputs")
    assert " all-gather(" not in text
