"""Context parallelism: a row of tokens in parts over the mesh axis cp, and attention among all of them, exact.

c ranks; a row of T tokens is 2c chunks of C = T/2c, and rank r has the chunks r and 2c-1-r, one behind the other (zigzag): what
comes late in a row sees much, what comes early little, and each rank has some of both, so that all have the same work.

    gathered   every rank gets all keys and values, at KV-head size, and attends with its own queries. For anything.
    ring       keys and values go around, a hop for each rank, while what came is attended to: no rank ever has all of them.
    heads      all-to-all, from parts of tokens with all heads to all tokens of some heads, and back (Ulysses,
               arXiv:2309.14509): KV heads must be as many as the ranks, or a multiple.

B batch, t = 2C tokens of a rank, K KV heads, G query heads per KV head, H head_dim; queries [B, t, K, G, H], keys and values
[B, t, K, H] of each rank. Chunks as they lie on the ranks: [c, 2, ...], or [2c, ...].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtp.ops import flash
from jaxtp.ops.attention import (
    NOTHING,
    Block,
    Kernel,
    Scoring,
    attend_blocks,
    attend_fresh,
    block_size,
    causal_blocks,
    gradients_of_blocks,
    visible,
)
from jaxtp.sharding import varying_as

Strategy = Literal["gathered", "ring", "heads"]
Result = tuple[jax.Array, jax.Array]  # of an attention: [B, T, K, G, H], and log_z [B, K, G, T, 1] float32


@dataclass(frozen=True)
class Context:
    """How rows lie over cp, and how a model's attention goes over it.

    size: ranks. strategy: default what `choose_strategy` takes, for each layer.
    """

    size: int
    strategy: Strategy | None = None
    axis: str = "cp"

    def __post_init__(self) -> None:
        if self.strategy not in (None, *get_args(Strategy)):
            raise ValueError(f"context_strategy={self.strategy!r} is none of {', '.join(get_args(Strategy))}")

    def padded(self, tokens: int) -> int:
        """So many tokens, and as many more as make chunks of one size."""
        return -(-tokens // (2 * self.size)) * 2 * self.size

    def order(self, tokens: int) -> np.ndarray:
        """Which token of the row stands at each place, rank by rank: [T] int."""
        chunks = np.arange(tokens).reshape(2 * self.size, -1)
        return np.stack([chunks[: self.size], chunks[: self.size - 1 : -1]], axis=1).reshape(-1)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        kernel: Kernel,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """As `ops.attention.attend_fresh`, in a region, where each rank has its part; segment_ids [B, T] of the whole row."""
        t, K, G, H = q.shape[1:]
        window = None if window is None or window >= t * self.size else window
        strategy = choose_strategy(
            cp=self.size, kv_heads=K, group=G, window=window, packed=segment_ids is not None, override=self.strategy
        )
        scoring = Scoring(H**-0.5 if scale is None else scale, softcap)
        if strategy == "heads":
            among = functools.partial(attend_fresh, kernel=kernel, window=window, scale=scoring.scale, softcap=softcap)
            return _by_heads(among, self.size, self.axis, q, k, v, segment_ids)
        parts: _Parts = _Flash(scoring, window) if kernel == "cudnn" else _Plain(scoring, window)
        if strategy == "ring":
            return _ring(_Ring(self.size, self.axis, parts), q, k, v)
        how = _Steps if kernel != "cudnn" else _Prefixes if window is None else _Windows
        return _gathered(how(self.size, self.axis, parts), q, k, v, segment_ids)


def choose_strategy(
    *, cp: int, kv_heads: int, group: int, window: int | None = None, packed: bool = False, override: Strategy | None = None
) -> Strategy:
    """How layers attend whose devices have so many KV heads, and `group` query heads for each: the one that sends the fewest
    bytes. Raises ValueError, with what would work, where `override` cannot.

    To gather keys and values a device receives 2·K·H numbers for each token of other ranks. By heads it sends its own tokens'
    share: (2·G + 2)·K·H for each of T/c tokens, so that it is less where c > G + 1. A ring sends what gathering does, and hides
    more of it behind products, but waits at each hop: it is taken where it is asked for.
    """
    fits = kv_heads % cp == 0
    if override == "heads" and not fits:
        raise ValueError(
            f"context_strategy='heads' gives each of cp={cp} ranks whole KV heads, of which a device has {kv_heads}; use "
            "gathered, or a cp (or a smaller tp) that divides them"
        )
    if override == "ring" and (packed or window is not None):
        what = "rows of several documents" if packed else f"a window of {window} tokens"
        raise ValueError(f"context_strategy='ring' knows nothing of {what}, as they are here; use gathered or heads")
    return override or ("heads" if fits and cp > group + 1 else "gathered")


# -- order -------------------------------------------------------------------------------------------------------------


def _in_order(chunks: jax.Array) -> jax.Array:
    """All chunks [2c, ...] as they lie on the ranks, in the order of the row (a copy)."""
    ranks = chunks.reshape(-1, 2, *chunks.shape[1:])
    return jnp.concatenate([ranks[:, 0], ranks[::-1, 1]])


def _zigzag(chunks: jax.Array) -> jax.Array:
    """The other way round."""
    c = len(chunks) // 2
    return jnp.stack([chunks[:c], chunks[: c - 1 : -1]], axis=1).reshape(chunks.shape)


def _chunks(x: jax.Array, n: int, dim: int = 1) -> jax.Array:
    """A dim of tokens in n chunks, which come first: [n, ..., C, ...]."""
    return jnp.moveaxis(x.reshape(*x.shape[:dim], n, -1, *x.shape[dim + 1 :]), dim, 0)


def _row(chunks: jax.Array, dim: int = 1) -> jax.Array:
    """The other way round."""
    x = jnp.moveaxis(chunks, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def _flat(x: jax.Array) -> jax.Array:
    """[2, B, ...] -> [2B, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _pair(x: jax.Array) -> jax.Array:
    """The other way round."""
    return x.reshape(2, -1, *x.shape[1:])


# -- parts of an attention ---------------------------------------------------------------------------------------------


class _Whole(NamedTuple):
    """Queries, what their whole attention came to, and the gradient of it."""

    q: jax.Array
    out: jax.Array
    log_z: jax.Array
    grad: jax.Array


class _Plain(NamedTuple):
    """Parts by plain products."""

    scoring: Scoring
    window: int | None

    def causal(self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> Result:
        """Among tokens that follow one another."""
        return attend_blocks(q, k.swapaxes(1, 2), v.swapaxes(1, 2), self._causal(q, segments), self.scoring)

    def causal_gradients(self, whole: _Whole, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, ...]:
        """Of q, k and v."""
        return self._gradients(whole, k, v, self._causal(whole.q, segments))

    def full(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None = None) -> Result:
        """To keys that all stand before: to all of them, or as `seen` [B or 1, T, S] says."""
        blocks = self._all(q, k, seen)
        return attend_blocks(q, k.swapaxes(1, 2), v.swapaxes(1, 2), blocks, self.scoring, some=seen is None)

    def full_gradients(self, whole: _Whole, k: jax.Array, v: jax.Array, seen: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """Of q, k and v."""
        return self._gradients(whole, k, v, self._all(whole.q, k, seen))

    def _causal(self, q: jax.Array, segments: jax.Array | None) -> Iterator[Block]:
        return causal_blocks(q.shape[1], block_size(q.shape[1]), self.window, segments)

    def _all(self, q: jax.Array, k: jax.Array, seen: jax.Array | None) -> Iterator[Block]:
        T, size = q.shape[1], block_size(q.shape[1])
        for start in range(0, T, size):
            queries = slice(start, min(start + size, T))
            yield queries, slice(0, k.shape[1]), None if seen is None else seen[:, queries]

    def _gradients(self, whole: _Whole, k: jax.Array, v: jax.Array, blocks: Iterator[Block]) -> tuple[jax.Array, ...]:
        keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
        to_q, *to_kv = gradients_of_blocks(whole.q, keys, values, whole.out, whole.log_z, whole.grad, blocks, self.scoring)
        return to_q, *(a.swapaxes(1, 2) for a in to_kv)


class _Flash(NamedTuple):
    """Parts by cuDNN, which takes lengths, and masks from memory only."""

    scoring: Scoring
    window: int | None

    def causal(self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> Result:
        """Among tokens that follow one another."""
        return flash.attend_part(q, k, v, **self._causal(segments))

    def causal_gradients(self, whole: _Whole, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, ...]:
        """Of q, k and v."""
        q, *rest = whole
        return flash.gradients_of_part(q, k, v, *rest, **self._causal(segments))

    def full(self, q: jax.Array, k: jax.Array, v: jax.Array, **limits: Any) -> Result:
        """To keys that all stand before: limits as of `flash.attend_part`."""
        return flash.attend_part(q, k, v, scale=self.scoring.scale, **limits)

    def full_gradients(self, whole: _Whole, k: jax.Array, v: jax.Array, **limits: Any) -> tuple[jax.Array, ...]:
        """Of q, k and v."""
        q, *rest = whole
        return flash.gradients_of_part(q, k, v, *rest, scale=self.scoring.scale, **limits)

    def _causal(self, segments: jax.Array | None) -> dict[str, Any]:
        seen = None if segments is None else segments[:, :, None] == segments[:, None]
        return {"scale": self.scoring.scale, "causal": True, "window": self.window, "seen": seen}


_Parts = _Plain | _Flash


def merged(one: Result, other: Result) -> Result:
    """What attention to two sets of keys comes to, together: in float32."""
    (out, log_z), (others, log_o) = one, other
    total = jnp.logaddexp(log_z, log_o)

    def share(out: jax.Array, log: jax.Array) -> jax.Array:
        return jnp.exp(jnp.einsum("BKGTI->BTKGI", log - total)) * out.astype(jnp.float32)

    return share(out, log_z) + share(others, log_o), total


# -- keys and values gathered ------------------------------------------------------------------------------------------
# Chunks come first: queries [2, B, C, K, G, H] of this rank, keys and values [2, 2, B, C, K, H] of it and [2c, 2, ...] of all.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(
    how: _Steps | _Prefixes | _Windows, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> jax.Array:
    """One all-gather; to go backward one more, so that what is kept is a rank's own part, and a reduce-scatter."""
    return _gathered_forward(how, q, k, v, segments)[0]


def _gathered_forward(
    how: _Steps | _Prefixes | _Windows, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, Any]:
    queries, own, documents = _chunks(q, 2), _chunks(jnp.stack([k, v]), 2, dim=2), how.documents(segments)
    out, log_z = how.attend(queries, own, lax.all_gather(own, how.axis, tiled=True), documents)
    out, log_z = checkpoint_name(_row(out).astype(q.dtype), "attention"), checkpoint_name(log_z, "attention")
    return out, (q, k, v, segments, out, log_z)


def _gathered_backward(how: _Steps | _Prefixes | _Windows, kept: Any, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, segments, out, log_z = kept
    own, documents = _chunks(jnp.stack([k, v]), 2, dim=2), how.documents(segments)
    whole = _Whole(_chunks(q, 2), _chunks(out, 2), log_z, _chunks(grad, 2))
    to_q, to_own, to_all = how.gradients(whole, own, lax.all_gather(own, how.axis, tiled=True), documents)
    shares = lax.psum_scatter(to_all.astype(k.dtype), how.axis, tiled=True)
    to_k, to_v = _row(shares.astype(jnp.float32) + to_own, dim=2).astype(k.dtype)
    return _row(to_q).astype(q.dtype), to_k, to_v, None


_gathered.defvjp(_gathered_forward, _gathered_backward)


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
        chunks = _chunks(segments, 2 * self.size)
        return _Documents(lax.dynamic_slice_in_dim(chunks, 2 * lax.axis_index(self.axis), 2), chunks)

    def own(self, queries: jax.Array, own: jax.Array, documents: _Documents | None) -> Result:
        """Each chunk by itself."""
        segments = None if documents is None else _flat(documents.own)
        out, log_z = self.parts.causal(_flat(queries), _flat(own[:, 0]), _flat(own[:, 1]), segments)
        return _pair(out).astype(jnp.float32), _pair(log_z)

    def own_gradients(self, whole: _Whole, own: jax.Array, documents: _Documents | None) -> tuple[jax.Array, jax.Array]:
        """Of queries, and of keys and values: in float32."""
        segments = None if documents is None else _flat(documents.own)
        to_q, *to_kv = self.parts.causal_gradients(_Whole(*map(_flat, whole)), _flat(own[:, 0]), _flat(own[:, 1]), segments)
        return _pair(to_q).astype(jnp.float32), jnp.stack([_pair(a) for a in to_kv], axis=1).astype(jnp.float32)


@dataclass(frozen=True)
class _Steps(_Gathered):
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
        self, whole: _Whole, own: jax.Array, everywhere: jax.Array, documents: _Documents | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of queries, and of keys and values, of the rank's own and of all."""

        def step(so_far: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            half, place, seen = self._asks(i, whole.q.shape[2], documents)
            keys, values = everywhere[place]
            to_q, *to_kv = self.parts.full_gradients(_Whole(*(a[half] for a in whole)), keys, values, seen)
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
class _Prefixes(_Gathered):
    """Each chunk of queries with all that stands before it, at once: a length, no mask. Of documents only the first of a chunk
    may have begun before it: its keys are rolled to the front.
    """

    def attend(self, queries: jax.Array, own: jax.Array, everywhere: jax.Array, documents: _Documents | None) -> Result:
        """Of this rank's queries to all that they see."""
        keys, values = _row(_in_order(everywhere), dim=2)
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
        self, whole: _Whole, own: jax.Array, everywhere: jax.Array, documents: _Documents | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of queries, and of keys and values, of the rank's own and of all."""
        keys, values = _row(_in_order(everywhere), dim=2)
        to_q, to_own = self.own_gradients(whole, own, documents)
        to_all = jnp.zeros((), jnp.float32)
        for half in range(2):
            mine = _Whole(*(a[half] for a in whole))
            first, limits, there = self._before(half, mine.q, documents)
            more, *to_kv = self.parts.full_gradients(mine, _rolled(keys, -first), _rolled(values, -first), **limits)
            to_q = to_q.at[half].add(jnp.where(there[:, :, None, None, None], more.astype(jnp.float32), 0.0))
            seen = (jnp.arange(keys.shape[1]) < limits["keys"][:, None])[:, :, None, None]
            to_all += jnp.stack([_rolled(jnp.where(seen, a.astype(jnp.float32), 0.0), first) for a in to_kv])
        return to_q, to_own, _zigzag(_chunks(to_all, 2 * self.size, dim=2))

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
            first = jnp.argmax(_row(_in_order(documents.all)) == mine[:, :1], axis=1).astype(jnp.int32)
            queries = (mine == mine[:, :1]).sum(axis=1, dtype=jnp.int32)
        keys = (begin - first).astype(jnp.int32)
        first, keys, queries = varying_as((first, keys, queries), q)
        there = (keys > 0)[:, None] & (jnp.arange(C) < queries[:, None])
        limits = {"keys": keys} if documents is None else {"keys": keys, "queries": queries}
        return first, limits, there


@dataclass(frozen=True)
class _Windows(_Gathered):
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
        self, whole: _Whole, own: jax.Array, everywhere: jax.Array, documents: _Documents | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of queries, and of keys and values: of all, the rank's own among them."""
        S, to_all, found = everywhere.shape[0] * everywhere.shape[3], jnp.zeros((), jnp.float32), []
        for half in range(2):
            q, out, log_z, grad = (a[half] for a in whole)
            C = q.shape[1]
            start, off, keys, values, segments = self._reached(half, C, everywhere, documents)
            n = keys.shape[1]
            put = _Whole(_put(q, off, n), _put(out, off, n), _put(log_z, off, n, dim=3), _put(grad, off, n))
            to_q, *to_kv = self.parts.causal_gradients(put, keys, values, segments)
            found.append(lax.dynamic_slice_in_dim(to_q, off, C, 1))
            to_all += _put(jnp.stack(to_kv).astype(jnp.float32), start, S, dim=2)
        return jnp.stack(found), jnp.zeros((), jnp.float32), _zigzag(_chunks(to_all, 2 * self.size, dim=2))

    def _reached(
        self, half: int, C: int, everywhere: jax.Array, documents: _Documents | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """(where in the row the first key is, how far behind it the chunk begins, keys, values, segments of these)."""
        S, begin = everywhere.shape[0] * C, self.mine[half] * C
        before = min(-(-self.parts.window // 64) * 64, S - C)
        start = jnp.maximum(begin - before, 0)

        def part(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, start, before + C, 1)

        segments = None if documents is None else part(_row(_in_order(documents.all)))
        keys, values = (part(a) for a in _row(_in_order(everywhere), dim=2))
        return start, begin - start, keys, values, segments


def _rolled(x: jax.Array, by: jax.Array) -> jax.Array:
    """Each row [B, T, ...] rolled by its own number."""
    return jax.vmap(lambda row, n: jnp.roll(row, n, axis=0))(x, by)


def _put(x: jax.Array, at: jax.Array, n: int, dim: int = 1) -> jax.Array:
    """x among so many zeros."""
    shape = (*x.shape[:dim], n, *x.shape[dim + 1 :])
    return lax.dynamic_update_slice_in_dim(varying_as(jnp.zeros(shape, x.dtype), x), x, at, dim)


# -- keys and values that go around ------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how: _Ring, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """c - 1 permutes; to go backward as many more, and c of gradients, which come home in the end."""
    return _ring_forward(how, q, k, v)[0]


def _ring_forward(how: _Ring, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    queries, coming = _chunks(q, 2), how.turned(jnp.stack([k, v]))
    out, log_z = how.parts.causal(q, k, v, None)  # a rank's two chunks follow one another
    so_far = _chunks(out.astype(jnp.float32), 2), _chunks(log_z, 2, dim=3)
    for hop in range(1, how.size):
        # a permute begins once the hop before it is reckoned, so that XLA sends it beside this one
        here, so_far = lax.optimization_barrier((coming, so_far))
        coming = how.turned(here) if hop + 1 < how.size else here
        so_far = how.met(hop, queries, here, so_far)
    out, log_z = _row(so_far[0]).astype(q.dtype), _row(so_far[1], dim=3)
    out, log_z = checkpoint_name(out, "attention"), checkpoint_name(log_z, "attention")
    return out, (q, k, v, out, log_z)


def _ring_backward(how: _Ring, kept: Any, grad: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, out, log_z = kept
    coming = how.turned(jnp.stack([k, v]))
    to_q, *to_kv = how.parts.causal_gradients(_Whole(q, out, log_z, grad), k, v, None)
    whole = _Whole(_chunks(q, 2), _chunks(out, 2), _chunks(log_z, 2, dim=3), _chunks(grad, 2))
    so_far = _chunks(to_q.astype(jnp.float32), 2), jnp.stack(to_kv).astype(jnp.float32)
    for hop in range(1, how.size):
        here, so_far = lax.optimization_barrier((coming, so_far))
        coming = how.turned(here) if hop + 1 < how.size else here
        so_far = how.met_gradients(hop, whole, here, (so_far[0], how.turned(so_far[1])))
    to_k, to_v = how.turned(so_far[1]).astype(k.dtype)
    return _row(so_far[0]).astype(q.dtype), to_k, to_v


_ring.defvjp(_ring_forward, _ring_backward)


@dataclass(frozen=True)
class _Ring:
    """A rank among `size` on an axis. What came by the hop j is of the rank j before it: one that is before it in the ring's
    order has its first chunk before both of this rank's, another both of its own before this rank's second. Two pairs each.
    """

    size: int
    axis: str
    parts: _Parts

    def turned(self, x: jax.Array) -> jax.Array:
        """To the next rank."""
        return lax.ppermute(x, self.axis, [(rank, (rank + 1) % self.size) for rank in range(self.size)])

    def met(self, hop: int, queries: jax.Array, here: jax.Array, so_far: Result) -> Result:
        """And what came."""
        earlier, (keys, values) = self._earlier(hop), self._keys(hop, here)
        out, log_z = (_pair(a) for a in self.parts.full(self._asking(hop, queries), keys, values))

        def either(one: Result, other: Result) -> Result:
            return jnp.where(earlier, one[0], other[0]), jnp.where(earlier, one[1], other[1])

        first, second = (so_far[0][0], so_far[1][0]), merged((so_far[0][1], so_far[1][1]), (out[0], log_z[0]))
        last = merged(either(first, second), (out[1], log_z[1]))
        both = either(last, first), either(second, last)
        return jnp.stack([out for out, _ in both]), jnp.stack([log_z for _, log_z in both])

    def met_gradients(
        self, hop: int, whole: _Whole, here: jax.Array, so_far: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """And those of what came, and by it: of queries [2, ...], and of keys and values [2, B, t, K, H]."""
        earlier, (keys, values) = self._earlier(hop), self._keys(hop, here)
        new = self.parts.full_gradients(_Whole(*(self._asking(hop, a) for a in whole)), keys, values)
        to_q, to_k, to_v = (_pair(a.astype(jnp.float32)) for a in new)
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
        first, second = _chunks(here, 2, dim=2)
        keys, values = jnp.concatenate([first, jnp.where(self._earlier(hop), first, second)], axis=1)
        return keys, values


# -- all tokens of some heads ------------------------------------------------------------------------------------------


def _by_heads(
    among: Callable[..., jax.Array],
    c: int,
    axis: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    """An all-to-all there and one back, and as many to go backward."""
    together = jnp.concatenate([q, k[:, :, :, None], v[:, :, :, None]], axis=3)
    together = lax.all_to_all(together, axis, 2, 1, tiled=True)
    together = _row(_in_order(_chunks(together, 2 * c)))
    segments = None if segments is None else _row(_in_order(_chunks(segments, 2 * c)))
    out = among(together[:, :, :, :-2], together[:, :, :, -2], together[:, :, :, -1], segment_ids=segments)
    return lax.all_to_all(_row(_zigzag(_chunks(out, 2 * c))), axis, 1, 2, tiled=True)
