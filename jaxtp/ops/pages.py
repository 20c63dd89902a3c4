"""Attention over a pool of pages: keys and values of all rows lie in pages of S slots, and a table says which are a row's.

P pages of the pool, S slots of a page, N pages of a row's table; B rows, T query tokens of each, K KV heads, G query heads per
KV head, H head_dim. A layer's pool is [P, K, S, H], of keys and of values; queries are [B, T, K, G, H].

No function here communicates: pages split by data-parallel group (dp) and by KV heads (tp), and where a page's slots are shared
out among devices (cp), each attends to its own: such results are merged by `parallel.cached`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxtp.ops import flash
from jaxtp.ops.attention import NOTHING, Kernel, attend_seen, attend_seen_part, cudnn_fits, visible
from jaxtp.ops.coded import CacheDtype, Coded, Held, each, encode
from jaxtp.ops.rows import attend_rows, gathered

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
    scale, (ranks, rank) = q.shape[-1] ** -0.5 if scale is None else scale, share or (1, 0)
    lengths = lengths if share is None else share.lengths(lengths)
    if read == "rows":
        out, *log_z = attend_rows(
            q, keys, values, table, positions, lengths, ranks=ranks, rank=rank, stats=share is not None, window=window,
            scale=scale, softcap=softcap,
        )  # fmt: skip
        return out.astype(q.dtype), *log_z
    if read == "cudnn" and q.shape[1] == 1 and window is None:
        assert softcap is None
        assert not isinstance(keys, Coded)
        assert not isinstance(values, Coded)
        out, *log_z = flash.attend_paged(q, keys, values, table, lengths, scale=scale, stats=share is not None)
        return out, *(jnp.where((lengths > 0)[:, None, None, None, None], a, NOTHING) for a in log_z)
    reach = reach if share is None else -(-reach // (2 * ranks)) * 2  # (cuDNN takes masks of an even width)
    k, v = (_copied(pool, q, table, reach, read) for pool in (keys, values))
    place = jnp.arange(k.shape[2]) if share is None else jnp.arange(k.shape[2]) * ranks + rank
    seen = visible(positions[:, :, None], place[None, None, :], window)
    if share is None:
        return (attend_seen(q, k, v, seen, kernel=kernel, scale=scale, softcap=softcap),)
    return attend_seen_part(q, k, v, seen, kernel=kernel, scale=scale, softcap=softcap)


def _copied(pool: Held, q: jax.Array, table: jax.Array, reach: int, read: Read) -> Held:
    """The slots of each row side by side, [B, K, ≥ reach, H]; in place, where rows have a token each and a page for all."""
    if read != "slab":
        return each(lambda pool: gathered(pool, table[:, : -(-reach // pool.shape[2])]), pool)
    if q.shape[1] == 1:
        return each(lambda pool: pool[: len(q), :, :reach], pool)
    return each(lambda pool: pool[table[:, 0], :, :reach], pool)
