"""Attention over a pool of pages on CPUs: a few rows and pages at a time, as far as each row reaches.

As flash attention (arXiv:2205.14135) goes through blocks of keys, so that what a row gets does not depend on the others. To
make products that are large enough for XLA:CPU, rows of one token go a few together, of about the same length, and so do chunks
of one prompt that stand side by side, which see nearly the same keys.

Letters as in `ops.pages`; R rows that are taken together, Q queries of each.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtp.ops.attention import NOTHING, capped, visible
from jaxtp.ops.coded import Held, apart, each
from jaxtp.sharding import varying_as

TOGETHER = 4  # rows of one token
SIDE_BY_SIDE, FEWEST = 8, 3  # chunks of a prompt: at most, and at least

Found = tuple[jax.Array, ...]
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def gathered(pool: jax.Array, table: jax.Array) -> jax.Array:
    """The pages of each row side by side: [B, K, N·S, H]; of scales [B, K, N·S]."""
    _, K, _, *H = pool.shape
    return pool[table].swapaxes(1, 2).reshape(table.shape[0], K, -1, *H)


def attend_rows(
    q: jax.Array,
    keys: Held,
    values: Held,
    table: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    *,
    ranks: int,
    rank: jax.Array | int,
    stats: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Found:
    """As `pages.attend_share`, in float32: [B, T, K, G, H]; with `stats` also the logarithm of the softmax's denominator,
    [B, K, G, T, 1]. ranks, rank: those of the share that is here, whose slots `lengths` count; positions count tokens.
    """
    B, T, *_, H = q.shape
    if T == 1:  # at most so many rows at a time, and so many pages of each
        most, many = (TOGETHER, 1) if B >= TOGETHER else (1, 2)
    else:
        most, many = min(SIDE_BY_SIDE, B) if B >= FEWEST else 1, 4
    # for one token alone, to convert keys and values would take longer than its products in float32
    q = (jnp.einsum("BTKGH->BKGTH", q) * scale).astype(jnp.float32 if T == 1 else q.dtype)
    idle = -B % most if T == 1 else most - 1
    q, positions, lengths, table = (jnp.pad(a, [(0, idle)] + [(0, 0)] * (a.ndim - 1)) for a in (q, positions, lengths, table))
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % many)))
    rows = _Rows(q, table, positions, lengths, _Pools(keys, values, many, ranks, rank, window, softcap))
    found: Found = tuple(jnp.zeros((*q.shape[:-1], n), jnp.float32) for n in ((H, 1) if stats else (H,)))
    found = varying_as(found, q, keys, table)
    if most == 1:
        found = jax.lax.fori_loop(0, B, lambda i, found: rows.chunks(found, i, 1, lengths[i]), found)
    elif T == 1:
        order = jnp.argsort(lengths)

        def tokens(i: jax.Array, found: Found) -> Found:
            return rows.tokens(found, jax.lax.dynamic_slice_in_dim(order, i * most, most))

        found = jax.lax.fori_loop(0, len(order) // most, tokens, found)
    else:
        start = varying_as(jnp.int32(0), q, keys, table)
        _, found = jax.lax.while_loop(lambda carry: carry[0] < B, lambda carry: rows.next_chunks(*carry, most), (start, found))
    out, *log_z = (a[:B] for a in found)
    return jnp.einsum("BKGTH->BTKGH", out), *log_z


class _Pools(NamedTuple):
    """A layer's keys and values, of which `many` pages are read at a time, and what queries see of them."""

    keys: Held
    values: Held
    many: int
    ranks: int
    rank: jax.Array | int
    window: int | None
    softcap: float | None

    def attend(self, q: jax.Array, at: jax.Array, pages: jax.Array, reach: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries [R, K, Q, H] at positions [R, Q] over pages [R, N] of R rows, as far as slot `reach`: what they get, and the
        logarithm [R, K, Q, 1].
        """
        span = self.many * self.keys.shape[2]

        def block(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            top, total, acc = carry
            here = jax.lax.dynamic_slice_in_dim(pages, j * self.many, self.many, 1)
            k, v = (each(lambda a: gathered(a, here), a) for a in (self.keys, self.values))
            (k, of_scores), (v, of_weights) = apart(k, q.dtype), apart(v, q.dtype)
            place = (j * span + jnp.arange(span)) * self.ranks + self.rank
            seen = visible(at[:, None, :, None], place, self.window)
            scores = _product("RKQH,RKSH->RKQS", q, k.astype(q.dtype))
            scores = scores if of_scores is None else scores * of_scores[:, :, None]
            scores = jnp.where(seen, capped(scores, self.softcap), -jnp.inf)
            new = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights, kept = jnp.exp(scores - new), jnp.exp(top - new)
            total = total * kept + weights.sum(axis=-1, keepdims=True)
            weights = weights if of_weights is None else weights * of_weights[:, :, None]
            return new, total, acc * kept + _product("RKQS,RKSH->RKQH", weights.astype(q.dtype), v.astype(q.dtype))

        first = 0 if self.window is None else jnp.maximum(at[:, 0].min() - self.window + 1, 0) // (span * self.ranks)
        none = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        start = varying_as((none + NOTHING, none, jnp.zeros(q.shape, jnp.float32)), q, self.keys)
        top, total, acc = jax.lax.fori_loop(first, -(-reach // span), block, start)
        total = jnp.maximum(total, 1e-30)
        return acc / total, jnp.where(top == NOTHING, NOTHING, top + jnp.log(total))


class _Rows(NamedTuple):
    """Queries [B, K, G, T, H] at positions [B, T] of rows, whose table [B, N] and lengths [B] say where the pages are that they
    see. Each method writes into `found`, for all rows, what those that it takes get.
    """

    q: jax.Array
    table: jax.Array
    positions: jax.Array
    lengths: jax.Array
    pools: _Pools

    def tokens(self, found: Found, who: jax.Array) -> Found:
        """These rows [R] of one token each, the longest last."""
        lengths = self.lengths[who]
        at = jnp.where(lengths > 0, self.positions[who, 0], self.positions[who[-1], 0])  # (idle ones widen no window)
        at = jnp.broadcast_to(at[:, None], (len(who), self.q.shape[2]))
        news = self.pools.attend(self.q[who, :, :, 0], at, self.table[who], lengths[-1])
        return tuple(into.at[who, :, :, 0].set(new) for into, new in zip(found, news, strict=False))

    def chunks(self, found: Found, i: jax.Array, some: int, reach: jax.Array) -> Found:
        """So many chunks from i on, by the table of i, as far as slot `reach`."""
        _, K, G, T, H = self.q.shape
        q, at = (jax.lax.dynamic_slice_in_dim(a, i, some) for a in (self.q, self.positions))
        q = q.swapaxes(0, 1).reshape(1, K, -1, H)
        at = jnp.broadcast_to(at[:, None], (some, G, T)).reshape(1, -1)
        news = self.pools.attend(q, at, self.table[i][None], reach)

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(into, new.reshape(K, some, G, T, -1).swapaxes(0, 1), i, 0)

        return tuple(put(into, new) for into, new in zip(found, news, strict=False))

    def next_chunks(self, i: jax.Array, found: Found, most: int) -> tuple[jax.Array, Found]:
        """The chunk i, and those behind it that follow in the same prompt, if there are enough; and which is then the next."""
        near, T = i + jnp.arange(most), self.q.shape[3]
        follow = (self.positions[near, 0] - self.positions[i, 0] == T * jnp.arange(most)) & (self.lengths[near] > 0)
        alike = jnp.cumprod(follow & (self.table[near] == self.table[i]).all(axis=1)).sum(dtype=jnp.int32)
        step = jnp.where(alike < FEWEST, 1, alike)
        reach = self.lengths[i + step - 1]
        # what others among them get is wrong: it is written again, by their own step
        return i + step, jax.lax.cond(
            step > 1, lambda: self.chunks(found, i, most, reach), lambda: self.chunks(found, i, 1, reach)
        )
