"""Attention over a cache whose slots lie over cp: the token at position p of a row stands on rank p % c, in slot p // c there.

So rows lie on all ranks alike, however long they are, and go on so as they grow. A rank has all queries of the KV heads that tp
leaves it, and attends with them to the slots that it has. One all-to-all then brings it, of every rank's results, its share of
the heads, with the logarithms of their denominators, and these are merged: the weights that follow lie over tp and cp together.

c ranks; T tokens, K KV heads of a device, G query heads of each, H head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtp.model.cache import Lanes, LayerCache, written
from jaxtp.ops.attention import Kernel
from jaxtp.ops.pages import Share, attend_share


@jax.named_scope("context")
def attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    lanes: Lanes,
    cache: LayerCache,
    scales: jax.Array | None,
    *,
    size: int,
    axis: str,
    kernel: Kernel,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[jax.Array, LayerCache]:
    """As `model.cache.attend_cached`, on each of `size` ranks of an axis, in a region: [1, T, K·G·H/c], and the cache with what
    is its own of k and v.
    """
    share, (T, K, G, H) = Share(size, lax.axis_index(axis)), q.shape[1:]
    keys, values = written(cache, k, v, lanes, scales, share)
    how: Any = {"kernel": kernel, "window": window, "scale": scale, "softcap": softcap}
    how |= {"read": lanes.read, "reach": lanes.reach}
    parts = []
    for asked, table, places, lengths in lanes.apart(q, positions):
        out, log_z = attend_share(asked, keys, values, table, places, lengths, share, **how)
        parts.append(_packed(out, jnp.einsum("BKGTI->BTKGI", log_z)).reshape(-1, K * G, H + 4 // q.dtype.itemsize))
    mine = jnp.concatenate(parts).reshape(T, size, K * G // size, -1)
    out, log_z = _unpacked(lax.all_to_all(mine, axis, 1, 0), q.dtype)
    shares = jnp.exp(log_z - log_z.max(axis=0))
    merged = (shares * out).sum(axis=0) / shares.sum(axis=0)
    return merged.astype(q.dtype).reshape(1, T, -1), (keys, values)


def _packed(out: jax.Array, log_z: jax.Array) -> jax.Array:
    """[..., H] and [..., 1] float32, bit by bit in one message: unsigned integers as wide as out's numbers are."""
    bits = jnp.uint16 if out.dtype.itemsize == 2 else jnp.uint32
    words = lax.bitcast_convert_type(log_z[..., 0], bits)
    return jnp.concatenate([lax.bitcast_convert_type(out, bits), words.reshape(*log_z.shape[:-1], -1)], axis=-1)


def _unpacked(sent: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The other way round, from numbers of this dtype; both float32."""
    words = 4 // dtype.itemsize
    out, log_z = sent[..., :-words], sent[..., -words:]
    log_z = lax.bitcast_convert_type(log_z if words > 1 else log_z[..., 0], jnp.float32)
    return lax.bitcast_convert_type(out, dtype).astype(jnp.float32), log_z[..., None]
