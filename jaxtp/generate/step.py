"""The compiled step: from a state to the next token of every row, and the two programs built of it.

B batch, T tokens of a prefill chunk, D embed, N tokens a call of `decode` may make.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxtp.model import Cache, Llama
from jaxtp.ops.sampling import Counts, Features, Logprobs, Rows, sample
from jaxtp.sharding import reshard

CALL_TOKENS = 64  # N: the most tokens that one call of `decode` makes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A batch in flight.

    cache: holds `cache.lengths` tokens of each row. token [B]: the newest, not yet in the cache. produced [B]: tokens
    generated. done [B]: rows that ended. rows: their sampling parameters; counts: what penalties need, else None.
    """

    cache: Cache
    token: jax.Array
    produced: jax.Array
    done: jax.Array
    rows: Rows
    counts: Counts | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "logprobs", "count"], meta_fields=[])
@dataclass(frozen=True)
class Made:
    """What a call made: tokens [B, N] (-1 where a row had ended), their logprobs [B, N, …], and how many steps ran."""

    tokens: jax.Array
    logprobs: Logprobs | None
    count: jax.Array


def empty(model: Llama, *, batch: int, slots: int) -> Cache:
    """A cache with nothing in it."""
    return model.empty_cache(batch, slots).zeros()


def prefill(model: Llama, cache: Cache, last: jax.Array, tokens: jax.Array, start: jax.Array) -> tuple[Cache, jax.Array]:
    """Puts tokens [B, T] into slots start … start+T-1 of every row; rows are padded on the right.

    last [B, D] takes the final hidden state of each row whose last prompt token is among these.
    """
    B, T = tokens.shape
    positions = model.layout.place(jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (B, T)), "batch", "tokens")
    x, filled = model.hidden(tokens, positions, cache=cache)
    assert filled is not None
    is_last = reshard(positions == cache.lengths[:, None] - 1, jax.P(*jax.typeof(x).sharding.spec[:2]), model.layout.mesh)
    # one token a row at most: the sum picks it, and crosses devices only where tokens are sharded
    picked = jnp.where(is_last[:, :, None], x, jnp.zeros((), x.dtype)).sum(axis=1)
    return filled, last + picked


def begin(model: Llama, last: jax.Array, state: State, *, features: Features) -> tuple[State, Made]:
    """The first token of every row, from the last hidden state [B, D] of its prompt."""
    state, token, logprobs = _emit(model, last[:, None], state, features)
    return state, Made(token[:, None], jax.tree.map(lambda a: a[:, None], logprobs), jnp.int32(1))


def decode(model: Llama, state: State, stop: jax.Array, steps: jax.Array, *, features: Features) -> tuple[State, Made]:
    """Up to `steps` (at most N) tokens for every row, in a loop on the device that ends early when all rows have ended.

    stop [B] bool: rows that the host ended. The cache must have room for `steps` more tokens of every open row.
    """
    layout = model.layout
    batch = state.token.shape[0]
    state = replace(state, done=state.done | stop)

    def buffer(a: jax.Array, fill: int = 0) -> jax.Array:
        sharding = layout.sharding("batch", *[None] * a.ndim)
        return jnp.full((batch, CALL_TOKENS, *a.shape[1:]), fill, a.dtype, out_sharding=sharding)

    shapes = jax.eval_shape(lambda s: _step(model, s, features)[1:], state)
    made = Made(buffer(shapes[0], -1), jax.tree.map(buffer, shapes[1]), jnp.int32(0))

    def unfinished(carry: tuple[State, Made]) -> jax.Array:
        state, made = carry
        return (made.count < steps) & ~jnp.all(state.done)

    def advance(carry: tuple[State, Made]) -> tuple[State, Made]:
        state, made = carry
        state, token, logprobs = _step(model, state, features)

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(into, new, made.count, 1)

        return state, Made(put(made.tokens, token), jax.tree.map(put, made.logprobs, logprobs), made.count + 1)

    return jax.lax.while_loop(unfinished, advance, (state, made))


def _step(model: Llama, state: State, features: Features) -> tuple[State, jax.Array, Logprobs | None]:
    """Puts the newest tokens into the cache and makes the next ones."""
    at = state.cache.lengths
    lengths = at + jnp.where(state.done, 0, 1)  # a row that has ended stays where it is
    x, cache = model.hidden(state.token[:, None], at[:, None], cache=replace(state.cache, lengths=lengths))
    assert cache is not None
    return _emit(model, x, replace(state, cache=cache), features)


def _emit(model: Llama, x: jax.Array, state: State, features: Features) -> tuple[State, jax.Array, Logprobs | None]:
    """Samples from hidden states [B, 1, D] and notes what that changes; rows that have ended give -1."""
    rows, layout = state.rows, model.layout
    logits = model.logits(x)[:, 0]

    def choose(logits, rows, counts, produced, done):
        token, logprobs = sample(logits, rows, counts, produced, features=features, vocab_size=model.config.vocab_size)
        ends = (token[:, None] == rows.stop_ids).any(axis=1) & (produced + 1 >= rows.min_tokens)
        ends |= produced + 1 >= rows.max_tokens
        if counts is not None:
            new = (jnp.arange(logits.shape[-1]) == token[:, None]) & ~done[:, None]
            counts = replace(counts, output=counts.output + new.astype(jnp.int32))
        return token, produced + jnp.where(done, 0, 1), done | ends, counts, logprobs

    mesh = layout.mesh.abstract_mesh
    by_row: Any = NamedSharding(mesh, layout.spec("batch"))
    by_vocab: Any = NamedSharding(mesh, layout.at("head").spec("batch", "logits"))
    alternatives: Any = NamedSharding(mesh, layout.spec("batch", None))
    out = (
        by_row,
        by_row,
        by_row,
        None if state.counts is None else Counts(by_vocab, by_vocab),
        None if features.logprobs is None else Logprobs(by_row, by_row, alternatives, alternatives),
    )
    choose = jax.sharding.auto_axes(choose, out_sharding=out)
    token, produced, done, counts, logprobs = choose(logits, rows, state.counts, state.produced, state.done)
    shown, token = jnp.where(state.done, -1, token), jnp.where(state.done, state.token, token)
    return replace(state, token=token, produced=produced, done=done, counts=counts), shown, logprobs


def abstract_state(model: Llama, *, batch: int, slots: int, features: Features) -> State:
    """A state's shapes and shardings, to compile `begin` and `decode` ahead of time."""
    layout = model.layout

    def array(dtype: Any, *shape: int) -> Any:
        dims = ("batch", *[None] * len(shape))
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=layout.sharding(*dims))

    floats, ints = array(jnp.float32), array(jnp.int32)
    rows = Rows(
        temperature=floats,
        top_k=ints,
        top_p=floats,
        min_p=floats,
        repetition=floats,
        presence=floats,
        frequency=floats,
        seed=array(jnp.uint32, 2),
        bias_ids=array(jnp.int32, 1),
        bias=array(jnp.float32, 1),
        stop_ids=array(jnp.int32, 4),
        min_tokens=ints,
        max_tokens=ints,
    )
    cache = replace(model.empty_cache(batch, slots), fresh=False)
    return State(cache, ints, ints, array(jnp.bool_), rows, _abstract_counts(model, batch) if features.penalties else None)


def _abstract_counts(model: Llama, batch: int) -> Counts:
    shape, sharding = (batch, model.vocab_held), model.layout.at("head").sharding("batch", "logits")
    seen, output = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.bool_, jnp.int32))
    return Counts(seen, output)  # type: ignore[arg-type]
