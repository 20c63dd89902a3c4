"""RMS normalisation (https://arxiv.org/abs/1910.07467, equation 4), as in Llama."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxtp.sharding import beside


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """x / rms(x) · weight over the last dim; x [..., D], weight [D] or broadcastable; float32 inside, x's dtype out."""
    return beside(weight, x) * _normed(x, eps)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=1)  # the backward pass keeps x, and nothing in float32
def _normed(x: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)
