"""The grouped products of Hopper GPUs, interpreted on a CPU: the formula, whatever the sizes of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtp.ops import experts
from jaxtp.ops.grouped import grouped

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="Pallas' interpreter of GPU kernels knows them since 0.12"
)
R, C, E = 128, 128, 3


@pytest.fixture
def interpreted():
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

    with force_gpu_interpret_mode():
        yield


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16) for shape in shapes]  # products of which are exact


@pytest.mark.parametrize("sizes", [[40, 0, 70], [128, 0, 0], [1, 64, 63]])
def test_products(sizes, interpreted):
    rows, kernel = arrays((R, C), (E, C, C))
    kernel = kernel / 16
    found = np.asarray(grouped(rows, kernel, jnp.array(sizes, jnp.int32)), np.float32)
    bounds = np.cumsum([0, *sizes])
    for expert in range(E):
        mine = slice(bounds[expert], bounds[expert + 1])
        expected = np.asarray(rows, np.float32)[mine] @ np.asarray(kernel, np.float32)[expert].T
        np.testing.assert_allclose(found[mine], expected, atol=2**-4, rtol=2**-8)


def test_whole_experts_and_their_gradients(interpreted):
    """As the reference does it, with pairs that are on other devices."""
    x, gate_up, down = arrays((32, C), (E, C, 2, C), (E, C, C))
    gate_up, down = gate_up / 32, down / 32
    rng = np.random.default_rng(1)
    chosen = jnp.asarray(rng.integers(-1, E + 1, (32, 2)), jnp.int32)
    weights = jnp.asarray(rng.random((32, 2)), jnp.float32)

    def value(form):
        def total(x, gate_up, down):
            y = experts.mix(x, chosen, weights, gate_up, down, products=form)
            return (y.astype(jnp.float32) ** 2).sum(), y

        (_, y), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(x, gate_up, down)
        return y, *grads

    for mine, theirs in zip(value("grouped"), value("reference"), strict=True):
        mine, theirs = (np.asarray(a, np.float32) for a in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, atol=0.03 * np.abs(theirs).max())
