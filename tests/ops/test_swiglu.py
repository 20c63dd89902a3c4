"""The gate of SwiGLU and its gradient are the formula's, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtp.ops.swiglu import gated


def formula(y, g):
    """silu(gate) · up, and the gradient by y, for y [..., 2] and the result's gradient g."""
    gate, up = y[..., 0], y[..., 1]
    s = 1 / (1 + np.exp(-gate))
    return gate * s * up, np.stack([g * up * s * (1 + gate * (1 - s)), g * gate * s], axis=-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_the_formula(dtype, tolerance):
    rng = np.random.default_rng(0)
    y, g = (jnp.asarray(4 * rng.standard_normal(shape), dtype) for shape in ((3, 5, 7, 2), (3, 5, 7)))
    out, back = jax.vjp(gated, y)
    grads = back(g)[0]
    assert out.dtype == grads.dtype == dtype
    for found, expected in zip((out, grads), formula(np.asarray(y, np.float64), np.asarray(g, np.float64)), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)


def test_far_from_zero_it_stays_finite():
    y = jnp.array([[-1e4, 2.0], [1e4, 2.0], [-60.0, 1e3], [0.0, 0.0]], jnp.float32)
    grads = jax.grad(lambda y: gated(y).sum())(y)
    assert bool(jnp.isfinite(grads).all())
    np.testing.assert_allclose(grads[1], [2.0, 1e4], rtol=1e-6)
