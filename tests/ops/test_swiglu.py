"""The gates of SwiGLU and GEGLU and their gradients are the formulas', in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtp.ops.swiglu import gated


def silu(x):
    """And its slope."""
    s = 1 / (1 + np.exp(-x))
    return x * s, s * (1 + x * (1 - s))


def gelu_tanh(x):
    inner, slope = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3), np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return x / 2 * (1 + np.tanh(inner)), (1 + np.tanh(inner)) / 2 + x / 2 * slope / np.cosh(inner) ** 2


def formula(activation, y, g):
    """activation(gate) · up, and the gradient by y, for y [..., 2] and the result's gradient g."""
    up, (acted, slope) = y[..., 1], activation(y[..., 0])
    return acted * up, np.stack([g * up * slope, g * acted], axis=-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("activation", [silu, gelu_tanh])
def test_the_formula(activation, dtype, tolerance):
    rng = np.random.default_rng(0)
    y, g = (jnp.asarray(4 * rng.standard_normal(shape), dtype) for shape in ((3, 5, 7, 2), (3, 5, 7)))
    out, back = jax.vjp(lambda y: gated(y, activation.__name__), y)
    grads = back(g)[0]
    assert out.dtype == grads.dtype == dtype
    for found, expected in zip((out, grads), formula(activation, *(np.asarray(a, np.float64) for a in (y, g))), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_far_from_zero_it_stays_finite(activation):
    y = jnp.array([[-1e4, 2.0], [1e4, 2.0], [-60.0, 1e3], [0.0, 0.0]], jnp.float32)
    grads = jax.grad(lambda y: gated(y, activation).sum())(y)
    assert bool(jnp.isfinite(grads).all())
    np.testing.assert_allclose(grads[1], [2.0, 1e4], rtol=1e-6)
