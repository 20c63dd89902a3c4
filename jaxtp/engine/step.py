"""The compiled step: rows that make a token and chunks of prompts go through the model side by side, and every lane that is at
the end of what is known gets its next token.

G groups of data parallelism; of each M rows on the device, T tokens, L lanes (see `plan`) and N steps of a call; D embed, V'
vocabulary as held; P ranks of pp, whose plans are those of the last P ticks, the newest first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxtp.engine.plan import AT, NOBODY, Shape, apart
from jaxtp.engine.sampler import emit
from jaxtp.engine.state import State
from jaxtp.model import Lanes, Llama
from jaxtp.ops.sampling import Features, Logprobs
from jaxtp.parallel import circulate
from jaxtp.parallel.regions import locally
from jaxtp.sharding import reshard, spec_of

CALL_STEPS = 16  # N: the most tokens of a row that one call makes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Made:
    """Tokens [G, N, L] int32 (-1 where a lane made none) and their logprobs [G, N, L, …], of the first `count` steps."""

    tokens: jax.Array
    logprobs: Logprobs | None
    count: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """A plan spelled out, [ranks, G, …]: of each token its id, position, row's length and slot; of each lane its table, the
    reach of what it sees, whether it makes a token, and which of the tokens is its last.
    """

    ids: jax.Array
    positions: jax.Array
    lengths: jax.Array
    slots: jax.Array
    tables: jax.Array
    reach: jax.Array
    emits: jax.Array
    last: jax.Array


def decode(model: Llama, state: State, plan: jax.Array, steps: jax.Array, **static: Any) -> tuple[State, Made]:
    """`run` for rows alone, by the name that a profile has for it."""
    return run(model, state, plan, steps, **static)


def mixed(model: Llama, state: State, plan: jax.Array, steps: jax.Array, **static: Any) -> tuple[State, Made]:
    """`run` with chunks of prompts."""
    return run(model, state, plan, steps, **static)


def run(
    model: Llama, state: State, plan: jax.Array, steps: jax.Array, *, shape: Shape, features: Features
) -> tuple[State, Made]:
    """A step by `plan` [P, G, W]; rows alone, where the shape has a loop, in up to `steps` of them, which end early when all
    rows have ended.

    The cache must have room for them: a row's table holds the pages of all the tokens that it is to make.
    """
    features = replace(features, bias=features.bias and shape.biases > 0)
    state, made = _run(model, state, plan, steps, shape, features)
    if jax.process_count() > 1:  # every process reads them, without asking the others
        made = jax.tree.map(lambda a: reshard(a, jax.P(), model.layout.mesh), made)
    return state, made


def _run(model: Llama, state: State, plan: jax.Array, steps: jax.Array, shape: Shape, features: Features) -> tuple[State, Made]:
    if shape.chunks or model.stacks or not shape.loop:
        state, _, *new = _tick(model, state, plan, shape, features)
        tokens, logprobs = jax.tree.map(lambda a: a[:, None], tuple(new))
        return state, Made(tokens, logprobs, jnp.int32(1))
    token, logprobs = jax.eval_shape(lambda s: _tick(model, s, plan, shape, features)[2:], state)

    def buffer(a: jax.Array, fill: int = 0) -> jax.Array:
        sharding = model.layout.sharding("batch", *[None] * a.ndim)
        return jnp.full((a.shape[0], CALL_STEPS, *a.shape[1:]), fill, a.dtype, out_sharding=sharding)

    made = Made(buffer(token, NOBODY), jax.tree.map(buffer, logprobs), jnp.int32(0))

    def unfinished(carry: tuple[State, jax.Array, Made, jax.Array]) -> jax.Array:
        _, _, made, going = carry
        return (made.count < steps) & going

    def advance(carry: tuple[State, jax.Array, Made, jax.Array]) -> tuple[State, jax.Array, Made, jax.Array]:
        state, plan, made, _ = carry
        state, going, *new = _tick(model, state, plan, shape, features)

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(into, new, made.count, 1)

        tokens, logprobs = jax.tree.map(put, (made.tokens, made.logprobs), tuple(new))
        plan = locally(lambda plan: _next(plan, shape), plan, out=spec_of(plan))
        return state, plan, Made(tokens, logprobs, made.count + 1), going

    state, _, made, _ = jax.lax.while_loop(unfinished, advance, (state, plan, made, jnp.bool_(True)))
    return state, made


def _tick(
    model: Llama, state: State, plan: jax.Array, shape: Shape, features: Features
) -> tuple[State, jax.Array, jax.Array, Logprobs | None]:
    """One step, or one tick of all stages: (state, whether any row goes on, the lanes' new tokens [G, L] or -1, logprobs)."""
    cache, batch = state.cache, spec_of(plan)[1]
    each = cache.pages // model.layout.parts("batch") * cache.slots

    def local(plan, token, done):
        spell = jax.vmap(lambda plan, token, done: _spelled(plan, token, done, shape, cache.slots, each))
        return jax.vmap(lambda plan: spell(plan, token, done))(plan)

    specs: Any = [jax.P(None, batch)] * len(Tokens.__dataclass_fields__)
    t = locally(local, plan, state.token, state.done, out=Tokens(*specs))
    if model.stacks:
        mesh = model.layout.mesh
        own = jax.tree.map(lambda a: reshard(a, jax.P("pp", batch), mesh), replace(t, ids=t.positions))
        lanes = _lanes(own, shape)
        assert state.between is not None
        args = t.ids[0], own.positions, own.lengths, lanes, t.last[-1]
        cache, between, x = circulate.tick(model, cache, state.between, *args)
        state = replace(state, cache=cache, between=between)
    else:
        t = jax.tree.map(lambda a: a[0], t)
        x, filled = model.hidden(t.ids, t.positions, lengths=t.lengths, cache=cache, lanes=_lanes(t, shape))
        assert filled is not None
        x = model.layout.gather(x)
        if shape.chunks:
            x = locally(lambda x, last: x[0][last[0]][None], x, t.last, out=spec_of(x))
        state = replace(state, cache=filled)
    return emit(model, state, x, plan[-1], t.emits[-1] if model.stacks else t.emits, shape, features)


def _lanes(t: Tokens, shape: Shape) -> Lanes:
    return Lanes(t.slots, t.tables, t.reach, rows=shape.rows, chunk=shape.chunk, read=shape.read, reach=shape.reach)


# -- a group's plan ------------------------------------------------------------------------------------------------------


def _spelled(plan: jax.Array, token: jax.Array, done: jax.Array, shape: Shape, size: int, nowhere: int) -> Tokens:
    """plan [W], token, done [M]. size: slots of a page; nowhere: a slot beyond all of the group's."""
    lanes, ids = (a[0] for a in apart(plan[None], shape))
    row, start, count, prompt = (lanes[:, AT[name]] for name in ("row", "start", "count", "prompt"))
    table, R, C = lanes[:, shape.fields :], shape.rows, shape.chunk
    mine = jnp.maximum(row, 0)
    live = (row >= 0) & ~(done[mine] & (jnp.arange(shape.lanes) < R))
    # of each token, its lane and its place among the lane's
    lane = jnp.concatenate([jnp.arange(R), jnp.repeat(jnp.arange(R, shape.lanes), C)])
    place = jnp.concatenate([jnp.zeros(R, jnp.int32), jnp.tile(jnp.arange(C), shape.chunks)])
    at = start[lane] + place
    page = table[lane, jnp.clip(at // size, 0, shape.pages - 1)]
    slots = jnp.where(live[lane] & (place < count[lane]), page * size + at % size, nowhere)
    last = jnp.concatenate([jnp.arange(R), R + jnp.arange(shape.chunks) * C + jnp.maximum(count[R:] - 1, 0)])
    return Tokens(
        ids=jnp.concatenate([token[mine[:R]], ids.reshape(-1)]),
        positions=at,
        lengths=jnp.maximum(prompt[lane], at + 1),
        slots=slots,
        tables=table,
        reach=jnp.where(live, start + count, 0),
        emits=live & (lanes[:, AT["ends"]] > 0),
        last=last,
    )


def _next(plan: jax.Array, shape: Shape) -> jax.Array:
    """Of [..., W], the plan of the rows' next tokens."""
    width = shape.fields + shape.pages
    lanes = plan.reshape(*plan.shape[:-1], shape.rows, width)
    return lanes.at[..., jnp.array([AT["start"], AT["produced"]])].add(1).reshape(plan.shape)
