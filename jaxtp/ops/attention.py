"""Grouped-query attention, on one device or on that device's share of heads and rows.

B batch, T query tokens, S cached tokens, K KV heads, G query heads per KV head, H head_dim.
Queries are [B, T, K, G, H]; fresh keys and values [B, T, K, H]; the cache of a layer [B, K, S, H].

No function here communicates: attention splits by rows (dp) and by KV heads (tp).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

# reference: the formula, all at once. xla: the same in blocks of queries, which leaves out what stands after a block (on a
# CPU 1.5 to 2 times faster than the XLA form of jax.nn.dot_product_attention). cudnn: flash attention on GPUs.
Kernel = Literal["reference", "xla", "cudnn"]
BLOCK, MAX_BLOCKS = 128, 8  # queries of a block at least, and blocks at most


def choose_kernel(*, platform: str, dtype: jnp.dtype, head_dim: int, override: Kernel | None = None) -> Kernel:
    """Which kernel attends among fresh tokens (training and prefill).

    cuDNN's flash attention takes 16-bit types and head_dims that are multiples of 8 up to 128 on every GPU since Ampere;
    everything else is left to XLA.
    """
    if override is not None:
        return override
    fits = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if platform == "gpu" and fits else "xla"


def attend_fresh(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    kernel: Kernel,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Causal attention among the tokens at hand: q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H].

    A query sees itself and what stands before it: within `window` tokens and in its own segment (segment_ids [B, T])
    where these are given.
    """
    B, T, K, G, H = q.shape
    if kernel == "cudnn":
        same = None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        span = None if window is None else (window - 1, 0)
        heads = q.reshape(B, T, K * G, H)
        out = jax.nn.dot_product_attention(
            heads, k, v, mask=same, is_causal=True, local_window_size=span, implementation="cudnn"
        )
        return out.reshape(q.shape)
    k, v, place = k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.arange(T)
    block = T if kernel == "reference" else max(BLOCK, -(-T // MAX_BLOCKS))
    outs = []
    for start in range(0, T, block):
        queries, keys = slice(start, start + block), slice(0 if window is None else max(0, start - window + 1), start + block)
        seen = _visible(place[queries, None], place[None, keys], window)[None]
        if segment_ids is not None:
            seen = seen & (segment_ids[:, queries, None] == segment_ids[:, None, keys])
        outs.append(_attend(q[:, queries], k[:, :, keys], v[:, :, keys], seen))
    return jnp.concatenate(outs, axis=1)


def attend_cached(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, *, kernel: Kernel, window: int | None = None
) -> jax.Array:
    """Attention over the cache: q [B, T, K, G, H], k and v [B, K, S, H], positions [B, T] -> [B, T, K, G, H].

    The query at position p sees the slots 0…p (the last `window` of them). A single token is a matter of reading the
    cache once, which plain products do; a chunk of a prompt goes through `kernel`.
    """
    B, T, K, G, H = q.shape
    seen = _visible(positions[:, :, None], jnp.arange(k.shape[2])[None, None, :], window)
    if T == 1 or kernel != "cudnn":
        return _attend(q, k, v, seen)
    heads, keys, values = q.reshape(B, T, K * G, H), k.swapaxes(1, 2), v.swapaxes(1, 2)
    out = jax.nn.dot_product_attention(heads, keys, values, mask=seen[:, None], implementation="cudnn")
    return out.reshape(q.shape)


def write_cache(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """The cache [B, K, S, H] with new [B, T, K, H] in each row's slots start … start+T-1 (start [B]), in place if donated."""

    def row(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, start, 0))

    cache = jax.vmap(row)(cache, new.swapaxes(1, 2), start)
    # left to itself, XLA:GPU turns a cache of one row around for the next product, and back: two copies a layer
    return with_layout_constraint(cache, Layout(major_to_minor=(0, 1, 2, 3)))


def _visible(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """softmax(q·k / √H)·v in float32 between the two products; k and v [B, K, S, H], seen [B, T, S]."""
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q.astype(k.dtype), k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    # dividing by the sum comes last: T·H values instead of T·S
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("BKGTH->BTKGH", out).astype(q.dtype)
