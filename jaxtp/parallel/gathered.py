"""Attention over cp with all keys and values on every rank: by steps of chunks, or by cuDNN with lengths or windows.

B batch, t = 2C tokens of a rank, K KV heads, G query heads per KV head, H head_dim; see `context` for chunks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtp.ops.attention import NOTHING, visible
from jaxtp.parallel.parts import Result, Whole, chunked, flat, in_order, merged, pair, row_of, zigzag
from jaxtp.sharding import varying_as

# Chunks come first: queries [2, B, C, K, G, H] of this rank, keys and values [2, 2, B, C, K, H] of it and [2c, 2, ...] of all.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gathered(
    how: Steps | Prefixes | Windows, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> jax.Array:
    """One all-gather; to go backward one more, so that what is kept is a rank's own part, and a reduce-scatter."""
    return _gathered_forward(how, q, k, v, segments)[0]


def _gathered_forward(
    how: Steps | Prefixes | Windows, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, Any]:
    queries, own, documents = chunked(q, 2), chunked(jnp.stack([k, v]), 2, dim=2), how.documents(segments)
    out, log_z = how.attend(queries, own, lax.all_gather(own, how.axis, tiled=True), documents)
    out, log_z = checkpoint_name(row_of(out).astype(q.dtype), "attention"), checkpoint_name(log_z, "attention")
    return out, (q, k, v, segments, out, log_z)


def _gathered_backward(how: Steps | Prefixes | Windows, kept: Any, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, segments, out, log_z = kept
    own, documents = chunked(jnp.stack([k, v]), 2, dim=2), how.documents(segments)
    whole = Whole(chunked(q, 2), chunked(out, 2), log_z, chunked(grad, 2))
    to_q, to_own, to_all = how.gradients(whole, own, lax.all_gather(own, how.axis, tiled=True), documents)
    shares = lax.psum_scatter(to_all.astype(k.dtype), how.axis, tiled=True)
    to_k, to_v = row_of(shares.astype(jnp.float32) + to_own, dim=2).astype(k.dtype)
    return row_of(to_q).astype(q.dtype), to_k, to_v, None


gathered.defvjp(_gathered_forward, _gathered_backward)


class _Documents(NamedTuple):
    """The segments of this rank's tokens [2, B, C], and of all [2c, B, C]."""

    own: jax.Array
    all: jax.Array


@dataclass(frozen=True)
class _Gathered:
    """A rank among `size` on an axis, and how it does parts."""

    size: int
    axis: str
    parts: Any

    @property
    def mine(self) -> jax.Array:
        """This rank's two chunks."""
        rank = lax.axis_index(self.axis)
        return jnp.stack([rank, 2 * self.size - 1 - rank])

    def documents(self, segments: jax.Array | None) -> _Documents | None:
        """Of segment ids [B, T], as tokens lie on the ranks."""
        if segments is None:
            return None
        chunks = chunked(segments, 2 * self.size)
        return _Documents(lax.dynamic_slice_in_dim(chunks, 2 * lax.axis_index(self.axis), 2), chunks)

    def own(self, queries: jax.Array, own: jax.Array, documents: _Documents | None) -> Result:
        """Each chunk by itself."""
        segments = None if documents is None else flat(documents.own)
        out, log_z = self.parts.causal(flat(queries), flat(own[:, 0]), flat(own[:, 1]), segments)
        return pair(out).astype(jnp.float32), pair(log_z)

    def own_gradients(self, whole: Whole, own: jax.Array, documents: _Documents | None) -> tuple[jax.Array, jax.Array]:
        """Of queries, and of keys and values: in float32."""
        segments = None if documents is None else flat(documents.own)
        to_q, *to_kv = self.parts.causal_gradients(Whole(*map(flat, whole)), flat(own[:, 0]), flat(own[:, 1]), segments)
        return pair(to_q).astype(jnp.float32), jnp.stack([pair(a) for a in to_kv], axis=1).astype(jnp.float32)


@dataclass(frozen=True)
class Steps(_Gathered):
    """A chunk of queries with one chunk of keys after another: 2c - 1 in all, of which rank r's first chunk sees r."""

    def attend(self, queries: jax.Array, own: jax.Array, everywhere: jax.Array, documents: _Documents | None) -> Result:
        """Of this rank's queries to all that they see."""

        def step(so_far: Result, i: jax.Array) -> tuple[Result, None]:
            half, place, seen = self._asks(i, queries.shape[2], documents)
            keys, values = everywhere[place]
            both = merged((so_far[0][half], so_far[1][half]), self.parts.full(queries[half], keys, values, seen))
            return (so_far[0].at[half].set(both[0]), so_far[1].at[half].set(both[1])), None

        return lax.scan(step, self.own(queries, own, documents), jnp.arange(self._count(queries.shape[2])))[0]

    def gradients(
        self, whole: Whole, own: jax.Array, everywhere: jax.Array, documents: _Documents | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of queries, and of keys and values, of the rank's own and of all."""

        def step(so_far: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            half, place, seen = self._asks(i, whole.q.shape[2], documents)
            keys, values = everywhere[place]
            to_q, *to_kv = self.parts.full_gradients(Whole(*(a[half] for a in whole)), keys, values, seen)
            return (so_far[0].at[half].add(to_q.astype(jnp.float32)), so_far[1].at[place].add(jnp.stack(to_kv))), None

        to_q, to_own = self.own_gradients(whole, own, documents)
        nothing = varying_as(jnp.zeros(everywhere.shape, jnp.float32), to_q)
        to_q, to_all = lax.scan(step, (to_q, nothing), jnp.arange(self._count(whole.q.shape[2])))[0]
        return to_q, to_own, to_all

    def _back(self, C: int) -> int | None:
        """How many chunks before its own a chunk's window reaches; None where it is no less work to take all."""
        if self.parts.window is None:
            return None
        back = -(-(self.parts.window - 1) // C)
        return back if 2 * back < 2 * self.size - 1 else None

    def _count(self, C: int) -> int:
        back = self._back(C)
        return 2 * self.size - 1 if back is None else 2 * back

    def _asks(self, i: jax.Array, C: int, documents: _Documents | None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Of step i: which of this rank's chunks asks, the place of the chunk that it sees, and what of it."""
        back, window, first = self._back(C), self.parts.window, self.mine[0]
        if back is None:
            half = (i >= first).astype(jnp.int32)
            chunk = i - half * first
        else:
            half = i // back
            chunk = self.mine[half] - 1 - i % back
        place = jnp.where(chunk < self.size, 2 * chunk, 2 * (2 * self.size - 1 - chunk) + 1)
        seen = None
        if window is not None:
            at = jnp.arange(C)
            seen = visible((self.mine[half] * C + at)[:, None], (chunk * C + at)[None], window)[None] & (chunk >= 0)
        if documents is not None:
            same = documents.own[half][:, :, None] == documents.all[place][:, None]
            seen = same if seen is None else seen & same
        return half, place, seen


@dataclass(frozen=True)
class Prefixes(_Gathered):
    """Each chunk of queries with all that stands before it, at once: a length, no mask. Of documents only the first of a chunk
    may have begun before it: its keys are rolled to the front.
    """

    def attend(self, queries: jax.Array, own: jax.Array, everywhere: jax.Array, documents: _Documents | None) -> Result:
        """Of this rank's queries to all that they see."""
        keys, values = row_of(in_order(everywhere), dim=2)
        out, log_z = self.own(queries, own, documents)
        found = []
        for half, q in enumerate(queries):
            first, limits, there = self._before(half, q, documents)
            some, its = self.parts.full(q, _rolled(keys, -first), _rolled(values, -first), **limits)
            some = jnp.where(there[:, :, None, None, None], some, jnp.zeros((), some.dtype))
            its = jnp.where(there[:, None, None, :, None], its, NOTHING)
            found.append(merged((out[half], log_z[half]), (some, its)))
        return jnp.stack([out for out, _ in found]), jnp.stack([log_z for _, log_z in found])

    def gradients(
        self, whole: Whole, own: jax.Array, everywhere: jax.Array, documents: _Documents | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of queries, and of keys and values, of the rank's own and of all."""
        keys, values = row_of(in_order(everywhere), dim=2)
        to_q, to_own = self.own_gradients(whole, own, documents)
        to_all = jnp.zeros((), jnp.float32)
        for half in range(2):
            mine = Whole(*(a[half] for a in whole))
            first, limits, there = self._before(half, mine.q, documents)
            more, *to_kv = self.parts.full_gradients(mine, _rolled(keys, -first), _rolled(values, -first), **limits)
            to_q = to_q.at[half].add(jnp.where(there[:, :, None, None, None], more.astype(jnp.float32), 0.0))
            seen = (jnp.arange(keys.shape[1]) < limits["keys"][:, None])[:, :, None, None]
            to_all += jnp.stack([_rolled(jnp.where(seen, a.astype(jnp.float32), 0.0), first) for a in to_kv])
        return to_q, to_own, zigzag(chunked(to_all, 2 * self.size, dim=2))

    def _before(
        self, half: int, q: jax.Array, documents: _Documents | None
    ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
        """(where the keys that it sees begin [B], how many they are and which queries see them, the same as [B, C] bool)."""
        B, C = q.shape[:2]
        begin = self.mine[half] * C
        if documents is None:
            first, queries = jnp.zeros((B,), jnp.int32), jnp.full((B,), C, jnp.int32)
        else:
            mine = documents.own[half]
            first = jnp.argmax(row_of(in_order(documents.all)) == mine[:, :1], axis=1).astype(jnp.int32)
            queries = (mine == mine[:, :1]).sum(axis=1, dtype=jnp.int32)
        keys = (begin - first).astype(jnp.int32)
        first, keys, queries = varying_as((first, keys, queries), q)
        there = (keys > 0)[:, None] & (jnp.arange(C) < queries[:, None])
        limits = {"keys": keys} if documents is None else {"keys": keys, "queries": queries}
        return first, limits, there


@dataclass(frozen=True)
class Windows(_Gathered):
    """Each chunk of queries with its own keys and as many before it as a window reaches, at once: its queries stand as far from
    the first of these keys as they do in the row, behind others that ask in vain.
    """

    def attend(self, queries: jax.Array, own: jax.Array, everywhere: jax.Array, documents: _Documents | None) -> Result:
        """Of this rank's queries to all that they see."""
        found = []
        for half, q in enumerate(queries):
            C = q.shape[1]
            _, off, keys, values, segments = self._reached(half, C, everywhere, documents)
            out, log_z = self.parts.causal(_put(q, off, keys.shape[1]), keys, values, segments)
            found.append((lax.dynamic_slice_in_dim(out, off, C, 1), lax.dynamic_slice_in_dim(log_z, off, C, 3)))
        return jnp.stack([out for out, _ in found]), jnp.stack([log_z for _, log_z in found])

    def gradients(
        self, whole: Whole, own: jax.Array, everywhere: jax.Array, documents: _Documents | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of queries, and of keys and values: of all, the rank's own among them."""
        S, to_all, found = everywhere.shape[0] * everywhere.shape[3], jnp.zeros((), jnp.float32), []
        for half in range(2):
            q, out, log_z, grad = (a[half] for a in whole)
            C = q.shape[1]
            start, off, keys, values, segments = self._reached(half, C, everywhere, documents)
            n = keys.shape[1]
            put = Whole(_put(q, off, n), _put(out, off, n), _put(log_z, off, n, dim=3), _put(grad, off, n))
            to_q, *to_kv = self.parts.causal_gradients(put, keys, values, segments)
            found.append(lax.dynamic_slice_in_dim(to_q, off, C, 1))
            to_all += _put(jnp.stack(to_kv).astype(jnp.float32), start, S, dim=2)
        return jnp.stack(found), jnp.zeros((), jnp.float32), zigzag(chunked(to_all, 2 * self.size, dim=2))

    def _reached(
        self, half: int, C: int, everywhere: jax.Array, documents: _Documents | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """(where in the row the first key is, how far behind it the chunk begins, keys, values, segments of these)."""
        S, begin = everywhere.shape[0] * C, self.mine[half] * C
        before = min(-(-self.parts.window // 64) * 64, S - C)
        start = jnp.maximum(begin - before, 0)

        def part(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, start, before + C, 1)

        segments = None if documents is None else part(row_of(in_order(documents.all)))
        keys, values = (part(a) for a in row_of(in_order(everywhere), dim=2))
        return start, begin - start, keys, values, segments


def _rolled(x: jax.Array, by: jax.Array) -> jax.Array:
    """Each row [B, T, ...] rolled by its own number."""
    return jax.vmap(lambda row, n: jnp.roll(row, n, axis=0))(x, by)


def _put(x: jax.Array, at: jax.Array, n: int, dim: int = 1) -> jax.Array:
    """x among so many zeros."""
    shape = (*x.shape[:dim], n, *x.shape[dim + 1 :])
    return lax.dynamic_update_slice_in_dim(varying_as(jnp.zeros(shape, x.dtype), x), x, at, dim)
