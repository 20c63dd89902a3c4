"""The compiled step: from a state to the next token of every row, and the programs built of it.

B batch (of a group, where groups of rows circulate through the stages of a pipeline), T tokens of a prefill chunk, D embed, N
tokens a call of `decode` may make.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxtp.model import Cache, Llama
from jaxtp.ops.sampling import Counts, Features, Logprobs, Rows, sample
from jaxtp.parallel import circulate
from jaxtp.parallel.regions import after
from jaxtp.parallel.schedules import Circulation
from jaxtp.sharding import reshard, spec_of, zeros

CALL_TOKENS = 64  # N: the most tokens that one call of `decode` makes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Group:
    """Rows that go through the model together.

    token [B]: the newest, not yet in the cache. produced [B]: tokens generated. done [B]: rows that ended. rows: their sampling
    parameters; counts: what penalties need, else None.
    """

    token: jax.Array
    produced: jax.Array
    done: jax.Array
    rows: Rows
    counts: Counts | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A batch in flight.

    cache: holds `cache.lengths` tokens of each row. groups: one, or those that circulate. between: what is on its way from
    stage to stage; None where there are none.
    """

    cache: Cache
    groups: tuple[Group, ...]
    between: jax.Array | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "logprobs", "count"], meta_fields=[])
@dataclass(frozen=True)
class Made:
    """What a call made, for each group: tokens [B, N] (-1 where a row had ended), their logprobs [B, N, …]; and in how many
    steps.
    """

    tokens: tuple[jax.Array, ...]
    logprobs: tuple[Logprobs | None, ...]
    count: jax.Array


def empty(model: Llama, *, batch: int, slots: int, groups: int = 1) -> Cache:
    """A cache with nothing in it."""
    return model.empty_cache(batch, slots, groups=groups).zeros()


def nothing(model: Llama, *, rows: int, tokens: int) -> jax.Array:
    """Nothing on its way from stage to stage yet."""
    return zeros(circulate.between(model, rows, tokens))


def prefill(model: Llama, cache: Cache, last: jax.Array, tokens: jax.Array, start: jax.Array) -> tuple[Cache, jax.Array]:
    """Puts tokens [B, T] into slots start … start+T-1 of every row; rows are padded on the right.

    last [B, D] takes the final hidden state of each row whose last prompt token is among these.
    """
    B, T = tokens.shape
    positions = model.layout.place(jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (B, T)), "batch", "tokens")
    x, filled = model.hidden(tokens, positions, cache=cache)
    assert filled is not None
    is_last = reshard(positions == cache.lengths[:, None] - 1, jax.P(*spec_of(x)[:2]), model.layout.mesh)
    # one token a row at most: the sum picks it, and crosses devices only where tokens are sharded
    picked = jnp.where(is_last[:, :, None], x, jnp.zeros((), x.dtype)).sum(axis=1)
    return filled, last + picked


def begin(model: Llama, last: tuple[jax.Array, ...], state: State, *, features: Features) -> tuple[State, Made]:
    """The first token of every row, from the last hidden state [B, D] of its prompt; stages get their first work."""
    found: list[Any] = []
    for x, group in zip(last, state.groups, strict=True):
        x = after(x, found[-1][1]) if found else x
        found.append(_emit(model, x[:, None], group, features))
    groups, tokens, logprobs = zip(*found, strict=True)
    state = replace(state, groups=groups)
    if model.stacks:
        between = nothing(model, rows=len(tokens[0]), tokens=1)
        state = replace(state, between=after(between, tokens[-1]))
        for tick in range(model.stages - 1):
            state, _ = _tick(model, state, tick)
    tokens, logprobs = jax.tree.map(lambda a: a[:, None], (tokens, logprobs))
    return state, Made(tokens, logprobs, jnp.int32(1))


def decode(
    model: Llama, state: State, stop: tuple[jax.Array, ...], steps: jax.Array, *, features: Features
) -> tuple[State, Made]:
    """Up to `steps` (at most N) tokens for every row, in a loop on the device that ends early when all rows have ended.

    stop: for each group [B] bool, rows that the host ended. The cache must have room for `steps` more tokens of every open row,
    where groups circulate for one more: it is on its way already.
    """
    layout = model.layout
    ended = (replace(group, done=group.done | stop) for group, stop in zip(state.groups, stop, strict=True))
    state = replace(state, groups=tuple(ended))

    def buffer(a: jax.Array, fill: int = 0) -> jax.Array:
        sharding = layout.sharding("batch", *[None] * a.ndim)
        return jnp.full((a.shape[0], CALL_TOKENS, *a.shape[1:]), fill, a.dtype, out_sharding=sharding)

    tokens, logprobs = jax.eval_shape(lambda s: _step(model, s, features)[1:], state)
    made = Made(tuple(buffer(a, -1) for a in tokens), jax.tree.map(buffer, logprobs), jnp.int32(0))

    def unfinished(carry: tuple[State, Made]) -> jax.Array:
        state, made = carry
        done = functools.reduce(operator.and_, (jnp.all(group.done) for group in state.groups))
        return (made.count < steps) & ~done

    def advance(carry: tuple[State, Made]) -> tuple[State, Made]:
        state, made = carry
        state, *new = _step(model, state, features)

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(into, new, made.count, 1)

        tokens, logprobs = jax.tree.map(put, (made.tokens, made.logprobs), tuple(new))
        return state, Made(tokens, logprobs, made.count + 1)

    return jax.lax.while_loop(unfinished, advance, (state, made))


def _step(model: Llama, state: State, features: Features) -> tuple[State, tuple[jax.Array, ...], tuple[Logprobs | None, ...]]:
    """Puts the newest tokens into the cache and makes the next ones, group by group."""
    ranks, made = model.stages, []
    for i in range(ranks):
        state, x = _tick(model, state, ranks - 1 + i)
        if i < len(state.groups):  # where fewer groups than ranks circulate, none leaves at the other ticks
            was = state.groups[i]
            group, *new = _emit(model, x, was, features)
            made.append(new)
            one = jnp.where(was.done, 0, 1)  # a row that has ended stays where it is
            one = jnp.where(jnp.arange(len(state.groups))[:, None] == i, one, 0) if model.stacks else one
            cache = replace(state.cache, lengths=state.cache.lengths + one)
            state = replace(state, cache=cache, groups=(*state.groups[:i], group, *state.groups[i + 1 :]))
    tokens, logprobs = zip(*made, strict=True)
    return state, tokens, logprobs


def _tick(model: Llama, state: State, tick: int) -> tuple[State, jax.Array]:
    """Every rank's work at a tick, and the hidden states [B, 1, D] that come out at the end."""
    cache = state.cache
    if not model.stacks:  # all of the work
        at = cache.lengths
        x, filled = model.hidden(state.groups[0].token[:, None], at[:, None], cache=replace(cache, lengths=at + 1))
        assert filled is not None
        return replace(state, cache=replace(filled, lengths=at)), x
    assert state.between is not None
    ring = Circulation.decode(model.stages, len(state.groups))
    enters = ring.group(tick, 0)
    entering = None if enters is None else state.groups[enters].token
    cache, between, x = circulate.decode_tick(model, cache, state.between, entering, tick=tick)
    return replace(state, cache=cache, between=between), x


def _emit(model: Llama, x: jax.Array, group: Group, features: Features) -> tuple[Group, jax.Array, Logprobs | None]:
    """Samples from hidden states [B, 1, D] and notes what that changes; rows that have ended give -1."""
    rows, layout = group.rows, model.layout
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
        None if group.counts is None else Counts(by_vocab, by_vocab),
        None if features.logprobs is None else Logprobs(by_row, by_row, alternatives, alternatives),
    )
    choose = jax.sharding.auto_axes(choose, out_sharding=out)
    with jax.named_scope("sampling"):
        token, produced, done, counts, logprobs = choose(logits, rows, group.counts, group.produced, group.done)
    shown, token = jnp.where(group.done, -1, token), jnp.where(group.done, group.token, token)
    return replace(group, token=token, produced=produced, done=done, counts=counts), shown, logprobs


def abstract_state(model: Llama, *, batch: int, slots: int, features: Features, groups: int = 1) -> State:
    """A state's shapes and shardings, to compile `begin` and `decode` ahead of time; `batch` rows in all."""
    layout, size = model.layout, batch // groups

    def array(dtype: Any, *shape: int) -> Any:
        dims = ("batch", *[None] * len(shape))
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=layout.sharding(*dims))

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
    cache = replace(model.empty_cache(batch, slots, groups=groups), fresh=False)
    group = Group(ints, ints, array(jnp.bool_), rows, _abstract_counts(model, size) if features.penalties else None)
    between: Any = circulate.between(model, size, 1) if model.stacks else None
    return State(cache, (group,) * groups, between)


def _abstract_counts(model: Llama, batch: int) -> Counts:
    shape, sharding = (batch, model.vocab_held), model.layout.at("head").sharding("batch", "logits")
    seen, output = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.bool_, jnp.int32))
    return Counts(seen, output)  # type: ignore[arg-type]
