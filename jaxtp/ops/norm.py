"""RMS normalisation (https://arxiv.org/abs/1910.07467, equation 4)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxtp.config import NormForm
from jaxtp.sharding import beside


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, form: NormForm = "rounded") -> jax.Array:
    """x / rms(x) · weight over the dims of `weight`, which are the last of x; float32 inside, x's dtype out. Where these dims
    are sharded, the sums of squares cross devices, and nothing else.

    form: where the normalised x meets the weight. rounded to its dtype (Llama); in float32 (OLMo 2); unit_offset: in float32
    with a factor of 1 + weight (Gemma).
    """
    dims = tuple(range(-weight.ndim, 0))
    if form == "rounded":
        return _times(_normed(x, eps, dims), weight)
    return _in_float32(x, weight, eps, dims, float(form == "unit_offset"))


# the backward pass keeps x, and nothing in float32
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(1, 2))
def _normed(x: jax.Array, eps: float, dims: tuple[int, ...]) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=dims, keepdims=True) + eps)).astype(x.dtype)


# nor the weight as it is spread over tokens
@functools.partial(jax.checkpoint, prevent_cse=False)
def _times(x: jax.Array, weight: jax.Array) -> jax.Array:
    return beside(weight, x) * x


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3, 4))
def _in_float32(x: jax.Array, weight: jax.Array, eps: float, dims: tuple[int, ...], offset: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=dims, keepdims=True) + eps)
    return (y * (offset + beside(weight.astype(jnp.float32), x))).astype(x.dtype)
