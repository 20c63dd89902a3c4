"""Rotary position embedding (https://arxiv.org/abs/2104.09864), half-rotation layout, and its scalings.

Frequencies match `transformers.modeling_rope_utils`. B batch, T tokens, H head_dim, R channels of it that turn.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtp.config import Rope


def frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies [R/2] (radians per token, float64) and the factor on cos and sin.

    For `dynamic` these are the frequencies of contexts that fit `max_position_embeddings`, for `longrope` of those that fit the
    context of pre-training; see `rotation`.
    """
    turned = rope.turned(head_dim)
    inv = rope.theta ** -(np.arange(0, turned, 2) / turned)
    if rope.kind == "linear":
        assert rope.factor
        return inv / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inv), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inv, turned)
    if rope.kind == "longrope":
        return inv / np.array(rope.short_factor), rope.attention_scale
    return inv, 1.0


def rotation(
    rope: Rope, positions: jax.Array, lengths: jax.Array, *, head_dim: int, max_position: int, platform: str = "gpu"
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, R/2] float32 for `positions` [B, T] int32.

    `lengths` int32, [B, T] or [B, 1]: tokens in each token's row so far, for two kinds that go by the length of the row (each
    row of a batch by its own). Past `max_position` the base of `dynamic` grows with it (NTK-aware scaling); past the context of
    pre-training `longrope` takes its long factors. platform: of the devices, which nothing but speed depends on.
    """
    inv, scale = frequencies(rope, head_dim)
    turned = rope.turned(head_dim)
    if rope.kind == "dynamic":
        assert rope.factor is not None
        stretch = jnp.maximum(lengths, max_position).astype(jnp.float32) / max_position
        base = rope.theta * (rope.factor * stretch - (rope.factor - 1)) ** (turned / (turned - 2))
        exponent = jnp.asarray(np.arange(0, turned, 2) / turned, jnp.float32)
        angles = positions[..., None].astype(jnp.float32) * (base[:, :, None] ** -exponent)
    elif rope.kind == "longrope":
        assert rope.original_max_position
        long = inv * np.array(rope.short_factor) / np.array(rope.long_factor)
        short, long = (jnp.asarray(a, jnp.float32) for a in (inv, long))
        angles = positions[..., None].astype(jnp.float32)
        angles = angles * jnp.where((lengths > rope.original_max_position)[..., None], long, short)
    else:
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inv, jnp.float32)
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    return (_once(cos), _once(sin)) if platform == "cpu" else (cos, sin)


def _once(x: jax.Array) -> jax.Array:
    """x [B, T, R]. What is elementwise XLA:CPU would compute again for every head of every layer; a product it keeps."""
    return jnp.einsum("BTR,RS->BTS", x, jnp.eye(x.shape[-1], dtype=x.dtype), precision="highest")


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B, T, ..., H], its first R channels turned by the angles of cos and sin [B, T, R/2]; float32 inside, x's dtype out."""
    spread, half = tuple(range(2, x.ndim - 1)), cos.shape[-1]
    cos, sin = jnp.expand_dims(cos, spread), jnp.expand_dims(sin, spread)
    a, b = (x[..., part].astype(jnp.float32) for part in (slice(0, half), slice(half, 2 * half)))
    still = [x[..., 2 * half :].astype(jnp.float32)] if x.shape[-1] > 2 * half else []
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, *still], axis=-1).astype(x.dtype)


def _llama3(rope: Rope, inv: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor, low, high, context = rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
    assert factor
    assert low
    assert high
    assert context
    turns = context * inv / (2 * math.pi)  # full turns within the original context
    smooth = (turns - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * inv / factor + smooth * inv


def _yarn(rope: Rope, inv: np.ndarray, turned: int) -> tuple[np.ndarray, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp between stretched and original frequencies, by dimension."""
    factor, context = rope.factor, rope.original_max_position
    assert factor
    assert context

    def dim_of(turns: float) -> float:
        """The dimension whose frequency makes `turns` full turns within the original context."""
        return turned * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast or 32), dim_of(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    ramp = np.clip((np.arange(turned // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return inv / factor * ramp + inv * (1 - ramp), rope.attention_scale
