"""Attention over cp with keys and values that go around.

B batch, t = 2C tokens of a rank, K KV heads, G query heads per KV head, H head_dim; see `context` for chunks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtp.parallel.parts import Parts, Result, Whole, chunked, merged, pair, row_of


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(how: Ring, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """c - 1 permutes; to go backward as many more, and c of gradients, which come home in the end."""
    return _ring_forward(how, q, k, v)[0]


def _ring_forward(how: Ring, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    queries, coming = chunked(q, 2), how.turned(jnp.stack([k, v]))
    out, log_z = how.parts.causal(q, k, v, None)  # a rank's two chunks follow one another
    so_far = chunked(out.astype(jnp.float32), 2), chunked(log_z, 2, dim=3)
    for hop in range(1, how.size):
        # a permute begins once the hop before it is reckoned, so that XLA sends it beside this one
        here, so_far = lax.optimization_barrier((coming, so_far))
        coming = how.turned(here) if hop + 1 < how.size else here
        so_far = how.met(hop, queries, here, so_far)
    out, log_z = row_of(so_far[0]).astype(q.dtype), row_of(so_far[1], dim=3)
    out, log_z = checkpoint_name(out, "attention"), checkpoint_name(log_z, "attention")
    return out, (q, k, v, out, log_z)


def _ring_backward(how: Ring, kept: Any, grad: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, out, log_z = kept
    coming = how.turned(jnp.stack([k, v]))
    to_q, *to_kv = how.parts.causal_gradients(Whole(q, out, log_z, grad), k, v, None)
    whole = Whole(chunked(q, 2), chunked(out, 2), chunked(log_z, 2, dim=3), chunked(grad, 2))
    so_far = chunked(to_q.astype(jnp.float32), 2), jnp.stack(to_kv).astype(jnp.float32)
    for hop in range(1, how.size):
        here, so_far = lax.optimization_barrier((coming, so_far))
        coming = how.turned(here) if hop + 1 < how.size else here
        so_far = how.met_gradients(hop, whole, here, (so_far[0], how.turned(so_far[1])))
    to_k, to_v = how.turned(so_far[1]).astype(k.dtype)
    return row_of(so_far[0]).astype(q.dtype), to_k, to_v


ring.defvjp(_ring_forward, _ring_backward)


@dataclass(frozen=True)
class Ring:
    """A rank among `size` on an axis. What came by the hop j is of the rank j before it: one that is before it in the ring's
    order has its first chunk before both of this rank's, another both of its own before this rank's second. Two pairs each.
    """

    size: int
    axis: str
    parts: Parts

    def turned(self, x: jax.Array) -> jax.Array:
        """To the next rank."""
        return lax.ppermute(x, self.axis, [(rank, (rank + 1) % self.size) for rank in range(self.size)])

    def met(self, hop: int, queries: jax.Array, here: jax.Array, so_far: Result) -> Result:
        """And what came."""
        earlier, (keys, values) = self._earlier(hop), self._keys(hop, here)
        out, log_z = (pair(a) for a in self.parts.full(self._asking(hop, queries), keys, values))

        def either(one: Result, other: Result) -> Result:
            return jnp.where(earlier, one[0], other[0]), jnp.where(earlier, one[1], other[1])

        first, second = (so_far[0][0], so_far[1][0]), merged((so_far[0][1], so_far[1][1]), (out[0], log_z[0]))
        last = merged(either(first, second), (out[1], log_z[1]))
        both = either(last, first), either(second, last)
        return jnp.stack([out for out, _ in both]), jnp.stack([log_z for _, log_z in both])

    def met_gradients(
        self, hop: int, whole: Whole, here: jax.Array, so_far: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """And those of what came, and by it: of queries [2, ...], and of keys and values [2, B, t, K, H]."""
        earlier, (keys, values) = self._earlier(hop), self._keys(hop, here)
        new = self.parts.full_gradients(Whole(*(self._asking(hop, a) for a in whole)), keys, values)
        to_q, to_k, to_v = (pair(a.astype(jnp.float32)) for a in new)
        none = jnp.zeros((), jnp.float32)
        first, second = jnp.where(earlier, to_q[1], none), to_q[0] + jnp.where(earlier, none, to_q[1])
        to_kv = jnp.stack([to_k, to_v])  # [2, pairs, ...]
        both = [to_kv[:, 0] + jnp.where(earlier, to_kv[:, 1], none), jnp.where(earlier, none, to_kv[:, 1])]
        return so_far[0] + jnp.stack([first, second]), so_far[1] + jnp.concatenate(both, axis=2)

    def _earlier(self, hop: int) -> jax.Array:
        rank = lax.axis_index(self.axis)
        return (rank - hop) % self.size < rank

    def _asking(self, hop: int, halves: jax.Array) -> jax.Array:
        """[2, B, ...] of this rank's chunks -> [2B, ...] of the two pairs."""
        return jnp.concatenate([halves[1], jnp.where(self._earlier(hop), halves[0], halves[1])])

    def _keys(self, hop: int, here: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the two pairs, [2B, ...] each."""
        first, second = chunked(here, 2, dim=2)
        keys, values = jnp.concatenate([first, jnp.where(self._earlier(hop), first, second)], axis=1)
        return keys, values
