"""The products with kernels in few bits as GPUs do them, run here: each form is the formula, on any mesh."""

import dataclasses
import itertools

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
from jaxtp.ops.quantized import abstract, product, quantize, split

OUTPUTS, INPUTS = (3, 2, 4), 64
SCHEMES = {
    "channel": Scheme("int8"),
    "channel, zeros": Scheme("int4", zeros=True),
    "fp8": Scheme("fp8"),
    "groups": Scheme("int4", group=8),
    "groups, zeros": Scheme("int4", group=8, zeros=True),
    "large groups": Scheme("fp8", group=32),
    "many groups": Scheme("int8", group=1, zeros=True),
    "nf4": Scheme("nf4", group=16),
}


def kernel(scheme):
    """A kernel in few bits, with shifts that are not 0, and itself in float64."""
    made = quantize(jax.random.normal(jax.random.key(0), (*OUTPUTS, INPUTS)), scheme)
    if scheme.zeros:
        made = dataclasses.replace(made, shift=jax.random.normal(jax.random.key(1), made.scale.shape))
    n = made.scale.shape[-1]
    levels = np.asarray(made.values, np.float64)
    if scheme.values == "nf4":
        levels = np.asarray(nf4.LEVELS)[levels.astype(int) + 8]
    shift = 0 if made.shift is None else np.asarray(made.shift, np.float64)[..., None]
    plain = levels.reshape(*OUTPUTS, n, -1) * np.asarray(made.scale, np.float64)[..., None] - shift
    return made, plain.reshape(*OUTPUTS, INPUTS)


@pytest.mark.parametrize("rows", [1, 5, quantized.FEW_ROWS])
@pytest.mark.parametrize("name", SCHEMES)
def test_each_form_is_the_formula(name, rows):
    made, plain = kernel(SCHEMES[name])
    x = jax.random.normal(jax.random.key(2), (rows, INPUTS))
    expected = np.asarray(x, np.float64) @ plain.reshape(-1, INPUTS).T
    np.testing.assert_allclose(jax.jit(product)(x, made), expected, atol=3e-5)
    np.testing.assert_allclose(np.asarray(made.plain(jnp.float32)), plain, atol=3e-6)


def shared(name, cut, axes):
    """Whether devices can share the groups of inputs that are cut."""
    groups = SCHEMES[name].groups(INPUTS)
    return cut == "outputs" or groups == 1 or groups % axes.get("tp", 1) == 0


CUTS = itertools.product(SCHEMES, ["outputs", "inputs"], [{"tp": 2}, {"dp": 2, "tp": 4}, {"tp": 8}, {"dp": 2}])


@pytest.mark.parametrize(("name", "cut", "axes"), [case for case in CUTS if shared(*case)], ids=str)
def test_it_is_the_same_on_every_mesh(monkeypatch, name, cut, axes):
    scheme = SCHEMES[name]
    monkeypatch.setattr("jaxtp.ops.linear.platform", lambda mesh: "gpu")
    mesh, (made, plain) = make_mesh(**axes), kernel(scheme)
    plain = plain.reshape(8, 3, INPUTS)
    made = made.part(lambda a: a.reshape(8, 3, a.shape[-1]))
    spec = P("tp", None, None) if cut == "outputs" else P(None, None, "tp")
    held = abstract(jax.ShapeDtypeStruct(plain.shape, jnp.float32, sharding=NamedSharding(mesh, spec)), scheme)
    made = jax.tree.map(lambda a, like: jax.device_put(a.astype(like.dtype), like.sharding), made, held)
    x = jax.random.normal(jax.random.key(2), (4, 3, INPUTS))
    out = NamedSharding(mesh, P("dp", None, "tp" if cut == "outputs" else None, None))
    place = NamedSharding(mesh, P("dp", None, None if cut == "outputs" else "tp"))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x, w: linear(x, w, out=out)).lower(jax.device_put(x, place), made).compile()
        found = program(jax.device_put(x, place), made)
    np.testing.assert_allclose(found, np.einsum("bti,koi->btko", np.asarray(x, np.float64), plain), atol=3e-5)
    reduces = program.as_text().count(" all-reduce(")
    assert reduces == (1 if cut == "inputs" and axes.get("tp", 1) > 1 else 0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("tp", [1, 4])
def test_fp8_times_fp8(static, tp):
    """Within what three bits behind the first leave of an input; what a device has of a row is scaled by itself."""
    scheme = Scheme("fp8", activations="static" if static else "dynamic")
    made, plain = kernel(scheme)
    rows = quantized.FEW_ROWS
    x = jax.random.normal(jax.random.key(2), (rows, INPUTS)) * jnp.exp(jnp.arange(rows) / 100)[:, None]
    made = dataclasses.replace(made, input_scale=jnp.abs(x).max() / 448 if static else None)
    mesh = make_mesh(tp=tp)
    flat = made.part(lambda a: a.reshape(-1, a.shape[-1]))
    where = {"values": P(None, "tp"), "scale": P(None, None), "input_scale": P()}
    arrays = {name: getattr(flat, name) for name in where}
    placed = {name: None if a is None else jax.device_put(a, NamedSharding(mesh, where[name])) for name, a in arrays.items()}
    flat = dataclasses.replace(flat, **placed)
    shares = {"tp"} if tp > 1 else set()

    def run(x, flat):
        y = product(x, flat, P(None, None, unreduced=shares), fp8=True)
        return jax.sharding.reshard(y, NamedSharding(mesh, P(None, None)))

    with jax.set_mesh(mesh):
        if tp == 1:
            flat = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*[None] * a.ndim))), flat)
        found = jax.jit(run)(jax.device_put(x, NamedSharding(mesh, P(None, "tp" if tp > 1 else None))), flat)
    expected = np.asarray(x, np.float64) @ plain.reshape(-1, INPUTS).T
    most = np.abs(x) @ np.abs(plain.reshape(-1, INPUTS)).T / 16
    smallest = np.abs(x).max() if static else np.abs(x).max(axis=1, keepdims=True)
    most += smallest / 448 * 2**-10 * np.abs(plain).sum(axis=-1).reshape(1, -1)  # of inputs below fp8's normal numbers
    assert (np.abs(found - expected) <= most).all()
    assert np.abs(found - expected).max() > 1e-3 * np.abs(expected).max()


def test_parts_fill_the_gpu_and_share_the_groups():
    assert split(32, 6144) == 4  # 8B's q, k and v
    assert split(32, 28672) == 2  # gate and up: two parts all the same
    assert split(4, 4096) == 2  # o at tp 8: parts of one group would not be fused
    assert split(2, 4096) == 2
    assert split(7, 1000) == 7  # a prime
    for groups in range(2, 200):
        assert groups % split(groups, 4096) == 0


def test_groups_are_not_cut():
    like = jax.ShapeDtypeStruct((8, 96), jnp.float32, sharding=NamedSharding(make_mesh(tp=2), P(None, "tp")))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down: 2 devices cannot share its 3 groups of 32 inputs"):
        abstract(like, Scheme("int4", group=32), path="layers.0.mlp.down")
