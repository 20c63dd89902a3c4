"""Attention over a pool of pages: keys and values of all rows lie in pages of S slots, and a table says which are a row's.

P pages of the pool, S slots of a page, N pages of a row's table; B rows, T query tokens of each, K KV heads, G query heads per
KV head, H head_dim. A layer's pool is [P, K, S, H], of keys and of values; queries are [B, T, K, G, H].

No function here communicates: pages split by data-parallel group (dp) and by KV heads (tp).
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxtp.ops.attention import Kernel, attend_seen, capped, cudnn_fits, visible
from jaxtp.ops.coded import CacheDtype, Coded, Held, apart, each, encode
from jaxtp.sharding import varying_as

SIDE_BY_SIDE = 4  # chunks of a prompt that are taken together on CPUs

# How keys and values are read. gather: the pages of a row are copied out side by side (the reference). rows: row by row and a
# few pages at a time, as far as each row reaches (CPUs). slab: a page holds a whole row, and rows lie in the pool in order, so
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


def write_pages(pool: Held, new: jax.Array, slots: jax.Array) -> Held:
    """The pool [P, K, S, H] with new [N, K, H] at slots [N] (page · S + place in it), in place if donated. What goes to a slot
    of P · S or above is written nowhere.
    """
    S = pool.shape[2]
    fresh = encode(new, pool.dtype, pool.scale.dtype) if isinstance(pool, Coded) else new.astype(pool.dtype)
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
    B, T, _, _, H = q.shape
    S, scale = keys.shape[2], H**-0.5 if scale is None else scale
    if read == "rows":
        return _row_by_row(q, keys, values, table, positions, lengths, window, scale, softcap).astype(q.dtype)
    if read == "cudnn" and T == 1 and window is None:
        assert softcap is None
        assert not isinstance(keys, Coded)
        assert not isinstance(values, Coded)
        return _cudnn(q, keys, values, table, lengths, scale)
    if read == "slab" and T == 1:
        k, v = (each(lambda pool: pool[:B, :, :reach], pool) for pool in (keys, values))
    elif read == "slab":
        k, v = (each(lambda pool: pool[table[:, 0], :, :reach], pool) for pool in (keys, values))
    else:
        k, v = (each(lambda pool: _gathered(pool, table[:, : -(-reach // S)]), pool) for pool in (keys, values))
    seen = visible(positions[:, :, None], jnp.arange(k.shape[2])[None, None, :], window)
    return attend_seen(q, k, v, seen, kernel=kernel, scale=scale, softcap=softcap)


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
    window: int | None,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """As flash attention (arXiv:2205.14135) goes through blocks of keys: what a row gives does not depend on the others.

    Several pages at a time make products that are large enough for XLA:CPU, and so do chunks of one prompt that stand side by
    side, which see nearly the same keys.
    """
    (B, T, K, G, H), S, many = q.shape, keys.shape[2], 2 if q.shape[1] == 1 else 4
    span = many * S
    q = (jnp.einsum("BTKGH->KGBTH", q) * scale).astype(jnp.float32 if isinstance(keys, Coded) else keys.dtype)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % many)))

    def rows(i: jax.Array, out: jax.Array, count: int) -> jax.Array:
        """`count` of them from i on, of one table."""
        mine = jax.lax.dynamic_slice_in_dim(q, i, count, 2).reshape(K, -1, H)
        at, pages = jax.lax.dynamic_slice_in_dim(positions, i, count).reshape(-1), table[i]

        def block(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            top, total, acc = carry
            here = [pages[j * many + n] for n in range(many)]
            k, v = (each(lambda a: jnp.concatenate([a[page] for page in here], axis=1), a) for a in (keys, values))
            (k, of_scores), (v, of_weights) = apart(k, mine.dtype), apart(v, mine.dtype)
            seen = visible(jnp.tile(at, G)[:, None], j * span + jnp.arange(span)[None, :], window)
            scores = _product("KQH,KSH->KQS", mine, k)
            scores = scores if of_scores is None else scores * of_scores[:, None]
            scores = jnp.where(seen, capped(scores, softcap), -jnp.inf)
            new = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights, kept = jnp.exp(scores - new), jnp.exp(top - new)
            total = total * kept + weights.sum(axis=-1, keepdims=True)
            weights = weights if of_weights is None else weights * of_weights[:, None]
            return new, total, acc * kept + _product("KQS,KSH->KQH", weights.astype(v.dtype), v)

        first = 0 if window is None else jnp.maximum(at[0] - window + 1, 0) // span
        none = jnp.zeros((K, mine.shape[1], 1), jnp.float32)
        start = varying_as((none - 1e30, none, jnp.zeros(mine.shape, jnp.float32)), q)
        _, total, acc = jax.lax.fori_loop(first, -(-lengths[i + count - 1] // span), block, start)
        found = (acc / jnp.maximum(total, 1e-30)).reshape(K, G, count, T, H)
        return jax.lax.dynamic_update_slice_in_dim(out, found, i, 2)

    def some(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, out = carry
        first = jnp.minimum(i, B - SIDE_BY_SIDE)
        near = jnp.arange(SIDE_BY_SIDE) + first
        follow = (positions[near, 0] - positions[first, 0] == T * jnp.arange(SIDE_BY_SIDE)) & (lengths[near] > 0)
        alike = (first == i) & follow.all() & (table[near] == table[first]).all()
        count = jnp.where(alike, SIDE_BY_SIDE, 1)
        return i + count, jax.lax.cond(alike, lambda: rows(i, out, SIDE_BY_SIDE), lambda: rows(i, out, 1))

    begin = varying_as((jnp.int32(0), jnp.zeros(q.shape, jnp.float32)), q, table)
    if T == 1 or B < SIDE_BY_SIDE:
        out = jax.lax.fori_loop(0, B, lambda i, out: rows(i, out, 1), begin[1])
    else:
        _, out = jax.lax.while_loop(lambda carry: carry[0] < B, some, begin)
    return jnp.einsum("KGBTH->BTKGH", out)


def _cudnn(q: jax.Array, keys: jax.Array, values: jax.Array, table: jax.Array, lengths: jax.Array, scale: float) -> jax.Array:
    """One query a row, [B, 1, K, G, H]. jax's own front of it wants as many pages as tables have places, which a pool that rows
    share has not.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    B, _, K, G, H = q.shape
    none, one, tables = jnp.zeros(0, q.dtype), jnp.ones(B, jnp.int32), table[:, None, :, None]
    out = cudnn._dot_product_attention(
        q.reshape(B, K * G, 1, H),
        keys,
        values,
        none,
        one,
        jnp.maximum(lengths, 1),
        none,
        none,
        tables,
        tables,
        scale,
        42,
        0.0,
        (False, False),
        cudnn.MaskType.PADDING,
        cudnn.AttentionLayout.BNTH.value,
        None,
        cudnn.check_cudnn_version(),
        False,
    )
    return (out[0] if isinstance(out, tuple | list) else out).reshape(q.shape)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
