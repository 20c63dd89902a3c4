"""RMS normalisation (https://arxiv.org/abs/1910.07467, equation 4)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxtp.sharding import beside


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, unit_offset: bool = False) -> jax.Array:
    """x / rms(x) · weight over the dims of `weight`, which are the last of x; float32 inside, x's dtype out. Where these dims
    are sharded, the sums of squares cross devices, and nothing else.

    As in Llama the normalised x is rounded to its dtype before the product; with unit_offset, as in Gemma, the factor is
    1 + weight, and all of it is float32.
    """
    weight, dims = beside(weight, x), tuple(range(-weight.ndim, 0))
    return _offset(x, weight, eps, dims) if unit_offset else weight * _normed(x, eps, dims)


# the backward pass keeps x, and nothing in float32
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(1, 2))
def _normed(x: jax.Array, eps: float, dims: tuple[int, ...]) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=dims, keepdims=True) + eps)).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _offset(x: jax.Array, weight: jax.Array, eps: float, dims: tuple[int, ...]) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=dims, keepdims=True) + eps)
    return (y * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
