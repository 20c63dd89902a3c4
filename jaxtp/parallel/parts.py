"""Parts of an attention over cp, the order in which they lie on the ranks, and how they are put together.

B batch, t = 2C tokens of a rank, K KV heads, G query heads per KV head, H head_dim; see `context` for chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtp.ops import flash
from jaxtp.ops.attention import Block, Scoring, attend_blocks, block_size, causal_blocks, gradients_of_blocks

Result = tuple[jax.Array, jax.Array]  # of an attention: [B, T, K, G, H], and log_z [B, K, G, T, 1] float32


def in_order(chunks: jax.Array) -> jax.Array:
    """All chunks [2c, ...] as they lie on the ranks, in the order of the row (a copy)."""
    ranks = chunks.reshape(-1, 2, *chunks.shape[1:])
    return jnp.concatenate([ranks[:, 0], ranks[::-1, 1]])


def zigzag(chunks: jax.Array) -> jax.Array:
    """The other way round."""
    c = len(chunks) // 2
    return jnp.stack([chunks[:c], chunks[: c - 1 : -1]], axis=1).reshape(chunks.shape)


def chunked(x: jax.Array, n: int, dim: int = 1) -> jax.Array:
    """A dim of tokens in n chunks, which come first: [n, ..., C, ...]."""
    return jnp.moveaxis(x.reshape(*x.shape[:dim], n, -1, *x.shape[dim + 1 :]), dim, 0)


def row_of(chunks: jax.Array, dim: int = 1) -> jax.Array:
    """The other way round."""
    x = jnp.moveaxis(chunks, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def flat(x: jax.Array) -> jax.Array:
    """[2, B, ...] -> [2B, ...]."""
    return x.reshape(-1, *x.shape[2:])


def pair(x: jax.Array) -> jax.Array:
    """The other way round."""
    return x.reshape(2, -1, *x.shape[1:])


class Whole(NamedTuple):
    """Queries, what their whole attention came to, and the gradient of it."""

    q: jax.Array
    out: jax.Array
    log_z: jax.Array
    grad: jax.Array


class Plain(NamedTuple):
    """Parts by plain products."""

    scoring: Scoring
    window: int | None

    def causal(self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> Result:
        """Among tokens that follow one another."""
        return attend_blocks(q, k.swapaxes(1, 2), v.swapaxes(1, 2), self._causal(q, segments), self.scoring)

    def causal_gradients(self, whole: Whole, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, ...]:
        """Of q, k and v."""
        return self._gradients(whole, k, v, self._causal(whole.q, segments))

    def full(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None = None) -> Result:
        """To keys that all stand before: to all of them, or as `seen` [B or 1, T, S] says."""
        blocks = self._all(q, k, seen)
        return attend_blocks(q, k.swapaxes(1, 2), v.swapaxes(1, 2), blocks, self.scoring, some=seen is None)

    def full_gradients(self, whole: Whole, k: jax.Array, v: jax.Array, seen: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """Of q, k and v."""
        return self._gradients(whole, k, v, self._all(whole.q, k, seen))

    def _causal(self, q: jax.Array, segments: jax.Array | None) -> Iterator[Block]:
        return causal_blocks(q.shape[1], block_size(q.shape[1]), self.window, segments)

    def _all(self, q: jax.Array, k: jax.Array, seen: jax.Array | None) -> Iterator[Block]:
        T, size = q.shape[1], block_size(q.shape[1])
        for start in range(0, T, size):
            queries = slice(start, min(start + size, T))
            yield queries, slice(0, k.shape[1]), None if seen is None else seen[:, queries]

    def _gradients(self, whole: Whole, k: jax.Array, v: jax.Array, blocks: Iterator[Block]) -> tuple[jax.Array, ...]:
        keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
        to_q, *to_kv = gradients_of_blocks(whole.q, keys, values, whole.out, whole.log_z, whole.grad, blocks, self.scoring)
        return to_q, *(a.swapaxes(1, 2) for a in to_kv)


class Flash(NamedTuple):
    """Parts by cuDNN, which takes lengths, and masks from memory only."""

    scoring: Scoring
    window: int | None

    def causal(self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> Result:
        """Among tokens that follow one another."""
        return flash.attend_part(q, k, v, **self._causal(segments))

    def causal_gradients(self, whole: Whole, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, ...]:
        """Of q, k and v."""
        q, *rest = whole
        return flash.gradients_of_part(q, k, v, *rest, **self._causal(segments))

    def full(self, q: jax.Array, k: jax.Array, v: jax.Array, **limits: Any) -> Result:
        """To keys that all stand before: limits as of `flash.attend_part`."""
        return flash.attend_part(q, k, v, scale=self.scoring.scale, **limits)

    def full_gradients(self, whole: Whole, k: jax.Array, v: jax.Array, **limits: Any) -> tuple[jax.Array, ...]:
        """Of q, k and v."""
        q, *rest = whole
        return flash.gradients_of_part(q, k, v, *rest, scale=self.scoring.scale, **limits)

    def _causal(self, segments: jax.Array | None) -> dict[str, Any]:
        seen = None if segments is None else segments[:, :, None] == segments[:, None]
        return {"scale": self.scoring.scale, "causal": True, "window": self.window, "seen": seen}


Parts = Plain | Flash


def merged(one: Result, other: Result) -> Result:
    """What attention to two sets of keys comes to, together: in float32."""
    (out, log_z), (others, log_o) = one, other
    total = jnp.logaddexp(log_z, log_o)

    def share(out: jax.Array, log: jax.Array) -> jax.Array:
        return jnp.exp(jnp.einsum("BKGTI->BTKGI", log - total)) * out.astype(jnp.float32)

    return share(out, log_z) + share(others, log_o), total
