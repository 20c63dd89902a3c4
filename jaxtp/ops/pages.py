"""Attention over a pool of pages: keys and values of all rows lie in pages of S slots, and a table says which are a row's.

P pages of the pool, S slots of a page, N pages of a row's table; B rows, T query tokens of each, K KV heads, G query heads per
KV head, H head_dim. A layer's pool is [P, K, S, H], of keys and of values; queries are [B, T, K, G, H].

No function here communicates: pages split by data-parallel group (dp) and by KV heads (tp), and where a page's slots are shared
out among devices (cp), each attends to its own: such results are merged by `parallel.cached`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxtp.ops import flash
from jaxtp.ops.attention import NOTHING, Kernel, attend_seen, attend_seen_part, capped, cudnn_fits, visible
from jaxtp.ops.coded import CacheDtype, Coded, Held, apart, each, encode
from jaxtp.sharding import varying_as

TOGETHER = 4  # rows that are taken together on CPUs
SIDE_BY_SIDE, FEWEST = 8, 3  # chunks of a prompt that are taken together on CPUs: at most, and at least

# How keys and values are read. gather: the pages of a row are copied out side by side (the reference). rows: a few rows and
# pages at a time, as far as each row reaches (CPUs). slab: a page holds a whole row, and rows lie in the pool in order, so
# that a slice of it is read in place. cudnn: NVIDIA's attention over pages, for rows with one new token; chunks are gathered.
Read = Literal["gather", "rows", "slab", "cudnn"]


def choose_read(
    *,
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    windows: bool,
    stages: bool,
    softcap: float | None = None,
    bits: CacheDtype = "auto",
) -> Read:
    """How the cache is read on such devices. windows: whether any layer has one; stages: whether layers stand in several;
    softcap: of scores, which cuDNN has not; nor has it keys and values in 8 bits.
    """
    if platform == "cpu":
        return "rows"
    if cudnn_fits(dtype, head_dim, softcap) and not windows and bits == "auto":
        return "cudnn"
    return "gather" if stages else "slab"


class Share(NamedTuple):
    """Which slots of every row pools hold, where a device has not all of them: rank, rank + ranks, rank + 2 · ranks, … A page
    of S slots here then stands for S · ranks tokens; slots, positions, lengths and reach that are given count tokens.
    """

    ranks: int
    rank: jax.Array

    def slots(self, slots: jax.Array, nowhere: int) -> jax.Array:
        """Those of tokens, among the slots that are here."""
        return jnp.where(slots % self.ranks == self.rank, slots // self.ranks, nowhere)

    def lengths(self, tokens: jax.Array) -> jax.Array:
        """Of the first so many tokens, how many are here."""
        return (tokens - self.rank + self.ranks - 1) // self.ranks


def write_pages(
    pool: Held, new: jax.Array, slots: jax.Array, *, share: Share | None = None, scale: jax.Array | None = None
) -> Held:
    """The pool [P, K, S, H] with new [N, K, H] at slots [N] (page · S + place in it), in place if donated. What goes to a slot
    of P · S or above is written nowhere. scale: of a pool in 8 bits, [] of all that is written (default: of each head's own).
    """
    S = pool.shape[2]
    slots = slots if share is None else share.slots(slots, pool.shape[0] * S)
    fresh = encode(new, pool.dtype, pool.scale.dtype, scale) if isinstance(pool, Coded) else new.astype(pool.dtype)
    return each(lambda pool, new: pool.at[slots // S, :, slots % S].set(new, mode="drop"), pool, fresh)


def attend_pages(
    q: jax.Array,
    keys: Held,
    values: Held,
    table: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    *,
    read: Read,
    reach: int,
    kernel: Kernel,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """q [B, T, K, G, H] over the pools [P, K, S, H], whose table [B, N] says where a row's pages are -> [B, T, K, G, H].

    The query at position p of `positions` [B, T] sees its row's slots 0…p (the last `window` of them). lengths [B]: how many
    slots of the row any of its queries sees; a row of length 0 is idle, and its result means nothing. reach: a bound on all
    lengths; forms that read all slots alike read so many. scale, softcap: as of `attend_fresh`.
    """
    how: Any = {"read": read, "reach": reach, "kernel": kernel, "window": window, "scale": scale, "softcap": softcap}
    return attend_share(q, keys, values, table, positions, lengths, None, **how)[0]


def attend_share(
    q: jax.Array,
    keys: Held,
    values: Held,
    table: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    share: Share | None,
    *,
    read: Read,
    reach: int,
    kernel: Kernel,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, ...]:
    """The same to the slots that are here: [B, T, K, G, H] in q's dtype, and of a share the logarithm of the softmax's
    denominator, [B, K, G, T, 1] float32, `NOTHING` where a query sees none of them.
    """
    scale, ranks = q.shape[-1] ** -0.5 if scale is None else scale, 1 if share is None else share.ranks
    lengths = lengths if share is None else share.lengths(lengths)
    if read == "rows":
        out, *log_z = _row_by_row(q, keys, values, table, positions, lengths, share, window, scale, softcap)
        return out.astype(q.dtype), *log_z
    if read == "cudnn" and q.shape[1] == 1 and window is None:
        assert softcap is None
        assert not isinstance(keys, Coded)
        assert not isinstance(values, Coded)
        out, *log_z = flash.attend_paged(q, keys, values, table, lengths, scale=scale, stats=share is not None)
        return out, *(jnp.where((lengths > 0)[:, None, None, None, None], a, NOTHING) for a in log_z)
    reach = reach if share is None else -(-reach // (2 * ranks)) * 2  # (cuDNN takes masks of an even width)
    k, v = (_copied(pool, q, table, reach, read) for pool in (keys, values))
    place = jnp.arange(k.shape[2]) if share is None else jnp.arange(k.shape[2]) * ranks + share.rank
    seen = visible(positions[:, :, None], place[None, None, :], window)
    if share is None:
        return (attend_seen(q, k, v, seen, kernel=kernel, scale=scale, softcap=softcap),)
    return attend_seen_part(q, k, v, seen, kernel=kernel, scale=scale, softcap=softcap)


def _copied(pool: Held, q: jax.Array, table: jax.Array, reach: int, read: Read) -> Held:
    """The slots of each row side by side, [B, K, ≥ reach, H]; in place, where rows have a token each and a page for all."""
    if read != "slab":
        return each(lambda pool: _gathered(pool, table[:, : -(-reach // pool.shape[2])]), pool)
    if q.shape[1] == 1:
        return each(lambda pool: pool[: len(q), :, :reach], pool)
    return each(lambda pool: pool[table[:, 0], :, :reach], pool)


def _gathered(pool: jax.Array, table: jax.Array) -> jax.Array:
    """The pages of each row side by side: [B, K, N·S, H]; of scales [B, K, N·S]."""
    _, K, _, *H = pool.shape
    return pool[table].swapaxes(1, 2).reshape(table.shape[0], K, -1, *H)


def _row_by_row(
    q: jax.Array,
    keys: Held,
    values: Held,
    table: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    share: Share | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, ...]:
    """As flash attention (arXiv:2205.14135) goes through blocks of keys: what a row gives does not depend on the others. What
    it gives, and of a share also the logarithm of its softmax's denominator: [B, T, K, G, H] and [B, K, G, T, 1], in float32.

    To make products that are large enough for XLA:CPU, rows of one token go a few together, of about the same length, and so do
    chunks of one prompt that stand side by side, which see nearly the same keys.
    """
    (B, T, K, G, H), S, (ranks, rank) = q.shape, keys.shape[2], share or (1, 0)
    if T == 1:  # at most so many rows at a time, and so many pages of each
        most, many = (TOGETHER, 1) if B >= TOGETHER else (1, 2)
    else:
        most, many = min(SIDE_BY_SIDE, B) if B >= FEWEST else 1, 4
    span = many * S
    # for one token alone, to convert keys and values would take longer than its products in float32
    q = (jnp.einsum("BTKGH->BKGTH", q) * scale).astype(jnp.float32 if T == 1 else q.dtype)
    idle = -B % most if T == 1 else most - 1
    q, positions, lengths, table = (jnp.pad(a, [(0, idle)] + [(0, 0)] * (a.ndim - 1)) for a in (q, positions, lengths, table))
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % many)))

    def attend(q: jax.Array, at: jax.Array, pages: jax.Array, reach: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries [R, K, Q, H] at positions [R, Q] over pages [R, N] of R rows, as far as slot `reach`: what they get, and the
        logarithm [R, K, Q, 1].
        """

        def block(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            top, total, acc = carry
            here = jax.lax.dynamic_slice_in_dim(pages, j * many, many, 1)
            k, v = (each(lambda a: _gathered(a, here), a) for a in (keys, values))
            (k, of_scores), (v, of_weights) = apart(k, q.dtype), apart(v, q.dtype)
            place = (j * span + jnp.arange(span)) * ranks + rank
            seen = visible(at[:, None, :, None], place, window)
            scores = _product("RKQH,RKSH->RKQS", q, k.astype(q.dtype))
            scores = scores if of_scores is None else scores * of_scores[:, :, None]
            scores = jnp.where(seen, capped(scores, softcap), -jnp.inf)
            new = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights, kept = jnp.exp(scores - new), jnp.exp(top - new)
            total = total * kept + weights.sum(axis=-1, keepdims=True)
            weights = weights if of_weights is None else weights * of_weights[:, :, None]
            return new, total, acc * kept + _product("RKQS,RKSH->RKQH", weights.astype(q.dtype), v.astype(q.dtype))

        first = 0 if window is None else jnp.maximum(at[:, 0].min() - window + 1, 0) // (span * ranks)
        none = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        start = varying_as((none + NOTHING, none, jnp.zeros(q.shape, jnp.float32)), q, keys)
        top, total, acc = jax.lax.fori_loop(first, -(-reach // span), block, start)
        total = jnp.maximum(total, 1e-30)
        return acc / total, jnp.where(top == NOTHING, NOTHING, top + jnp.log(total))

    def rows(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The next `most` rows by length, a token of each."""
        who = jax.lax.dynamic_slice_in_dim(order, i * most, most)
        at = jnp.where(lengths[who] > 0, positions[who, 0], positions[who[-1], 0])  # (idle ones widen no window)
        at = jnp.broadcast_to(at[:, None], (most, G))
        news = attend(q[who, :, :, 0], at, table[who], lengths[who[-1]])
        return tuple(into.at[who, :, :, 0].set(new) for into, new in zip(found, news, strict=False))

    def chunks(i: jax.Array, found: tuple[jax.Array, ...], some: int, reach: jax.Array) -> tuple[jax.Array, ...]:
        """So many of them from i on, by the table of i, as far as slot `reach`."""
        mine, at = (jax.lax.dynamic_slice_in_dim(a, i, some) for a in (q, positions))
        mine = mine.swapaxes(0, 1).reshape(1, K, -1, H)
        at = jnp.broadcast_to(at[:, None], (some, G, T)).reshape(1, -1)
        news = attend(mine, at, table[i][None], reach)

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(into, new.reshape(K, some, G, T, -1).swapaxes(0, 1), i, 0)

        return tuple(put(into, new) for into, new in zip(found, news, strict=False))

    def next_chunks(carry: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        i, found = carry
        near = i + jnp.arange(most)
        follow = (positions[near, 0] - positions[i, 0] == T * jnp.arange(most)) & (lengths[near] > 0)
        alike = jnp.cumprod(follow & (table[near] == table[i]).all(axis=1)).sum(dtype=jnp.int32)
        step = jnp.where(alike < FEWEST, 1, alike)
        reach = lengths[i + step - 1]
        # what others among them get is wrong: it is written again, by their own step
        return i + step, jax.lax.cond(step > 1, lambda: chunks(i, found, most, reach), lambda: chunks(i, found, 1, reach))

    wanted = (H,) if share is None else (H, 1)
    found = varying_as(tuple(jnp.zeros((*q.shape[:-1], n), jnp.float32) for n in wanted), q, keys, table)
    if most == 1:
        found = jax.lax.fori_loop(0, B, lambda i, found: chunks(i, found, 1, lengths[i]), found)
    elif T == 1:
        order = jnp.argsort(lengths)
        found = jax.lax.fori_loop(0, len(order) // most, rows, found)
    else:
        start = varying_as(jnp.int32(0), q, keys, table)
        _, found = jax.lax.while_loop(lambda carry: carry[0] < B, next_chunks, (start, found))
    out, *log_z = (a[:B] for a in found)
    return jnp.einsum("BKGTH->BTKGH", out), *log_z


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
