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
from jax.sharding import NamedSharding

from jaxtp.engine.plan import AT, FLOATS, NOBODY, Shape
from jaxtp.mesh import platform
from jaxtp.model import Cache, Lanes, Llama
from jaxtp.ops.sampling import Counts, Features, Logprobs, Rows, sample
from jaxtp.parallel import circulate
from jaxtp.parallel.regions import locally
from jaxtp.sharding import names, reshard, size, spec_of, zeros

CALL_STEPS = 16  # N: the most tokens of a row that one call makes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What stays on the devices from step to step.

    token, done [G, M]: the newest token of each row, not yet in the cache, and whether it was the last. counts [G, M, V']: what
    penalties need; None until a row asks for them. between [P, G, T, D]: what is on its way from stage to stage.
    """

    cache: Cache
    token: jax.Array
    done: jax.Array
    counts: Counts | None = None
    between: jax.Array | None = None


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
    return _emit(model, state, x, plan[-1], t.emits[-1] if model.stacks else t.emits, shape, features)


def _lanes(t: Tokens, shape: Shape) -> Lanes:
    return Lanes(t.slots, t.tables, t.reach, rows=shape.rows, chunk=shape.chunk, read=shape.read, reach=shape.reach)


# -- a group's plan ------------------------------------------------------------------------------------------------------


def _apart(plan: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """[W] -> lanes [L, fields and table], tokens of the chunks [P · C]; as `plan.apart`."""
    width = shape.fields + shape.pages
    return plan[: shape.lanes * width].reshape(shape.lanes, width), plan[shape.lanes * width :]


def _spelled(plan: jax.Array, token: jax.Array, done: jax.Array, shape: Shape, size: int, nowhere: int) -> Tokens:
    """plan [W], token, done [M]. size: slots of a page; nowhere: a slot beyond all of the group's."""
    lanes, ids = _apart(plan, shape)
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
        ids=jnp.concatenate([token[mine[:R]], ids]),
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


# -- the new tokens ------------------------------------------------------------------------------------------------------


def _emit(
    model: Llama, state: State, x: jax.Array, plan: jax.Array, emits: jax.Array, shape: Shape, features: Features
) -> tuple[State, jax.Array, jax.Array, Logprobs | None]:
    """Samples from hidden states x [G, L, D], by plan [G, W], and notes what that changes: see `_tick`."""
    layout, counts = model.layout, state.counts if features.penalties else None
    logits = model.logits(x)
    batch = spec_of(plan)[0]

    def local(plan):
        return _apart(plan[0], shape)[0][None, :, : shape.fields]

    lanes = locally(local, plan, out=jax.P(batch))
    vocab = spec_of(logits)[2]
    over: Any = jax.P(batch, None, vocab)
    if counts is not None:
        mine = locally(
            lambda a, lanes: jax.tree.map(lambda a: a[0][jnp.maximum(lanes[0, :, AT["row"]], 0)][None], a),
            counts,
            lanes,
            out=Counts(over, over),
        )

    def choose(logits, lanes, counts):
        G, L, V = logits.shape
        rows = _rows(lanes.reshape(G * L, -1), shape)
        seen = jax.tree.map(lambda a: a.reshape(G * L, V), counts)
        produced = lanes[..., AT["produced"]].reshape(-1)
        token, logprobs = sample(
            logits.reshape(G * L, V),
            rows,
            seen,
            produced,
            features=features,
            vocab_size=model.config.vocab_size,
            by_maximum=platform(layout.mesh) == "cpu" and size(layout.mesh, vocab) == 1,
        )
        ends = (token[:, None] == rows.stop_ids).any(axis=1) & (produced + 1 >= rows.min_tokens)
        ends |= produced + 1 >= rows.max_tokens
        return jax.tree.map(lambda a: a.reshape(G, L, *a.shape[1:]), (token, ends, logprobs))

    mesh = layout.mesh.abstract_mesh
    by_lane: Any = NamedSharding(mesh, jax.P(batch, None))
    best: Any = NamedSharding(mesh, jax.P(batch, None, None))
    out: Any = by_lane, by_lane, None if features.logprobs is None else Logprobs(by_lane, by_lane, best, best)
    with jax.named_scope("sampling"):
        token, ends, logprobs = jax.sharding.auto_axes(choose, out_sharding=out)(
            logits, lanes, mine if counts is not None else None
        )

    def note(token, done, lanes, new, ends, emits):
        row = jnp.where(emits[0], lanes[0, :, AT["row"]], token.shape[1])
        return token.at[0, row].set(new[0], mode="drop"), done.at[0, row].set(ends[0], mode="drop")

    newest, done = locally(
        note, state.token, state.done, lanes, token, ends, emits, out=(spec_of(state.token), spec_of(state.done))
    )
    if counts is not None:

        def count(output, lanes, token, emits):
            first = jax.lax.axis_index(names(vocab)) * output.shape[2] if names(vocab) else 0
            row = jnp.where(emits[0], lanes[0, :, AT["row"]], output.shape[1])
            here = jnp.where((token[0] >= first) & (token[0] < first + output.shape[2]), token[0] - first, output.shape[2])
            return output.at[0, row, here].add(1, mode="drop")

        output = locally(count, counts.output, lanes, token, emits, out=spec_of(counts.output))
        state = replace(state, counts=replace(counts, output=output))
    going = jnp.any(emits & ~ends)
    return replace(state, token=newest, done=done), going, jnp.where(emits, token, NOBODY), logprobs


def _rows(lanes: jax.Array, shape: Shape) -> Rows:
    """The sampling parameters of lanes [B, fields]."""
    real = jax.lax.bitcast_convert_type(lanes, jnp.float32)
    ints, end = {name: lanes[:, at] for name, at in AT.items() if name not in FLOATS}, len(AT) + shape.stops
    return Rows(
        **{name: real[:, AT[name]] for name in FLOATS},
        **{name: ints[name] for name in ("top_k", "min_tokens", "max_tokens")},
        seed=jnp.stack([ints["seed"], ints["sample"]], axis=1).astype(jnp.uint32),
        stop_ids=lanes[:, len(AT) : end],
        bias_ids=lanes[:, end : end + shape.biases],
        bias=real[:, end + shape.biases : end + 2 * shape.biases],
    )


# -- the state's beginnings ----------------------------------------------------------------------------------------------


def begin(model: Llama, *, pages: int, size: int, rows: int) -> State:
    """An empty cache of `pages` pages in all, of `size` slots, and rows of which each group has `rows`."""
    return zeros(abstract(model, pages=pages, size=size, rows=rows))


def abstract(model: Llama, *, pages: int, size: int, rows: int) -> State:
    """The same as shapes and shardings, to compile ahead of time."""
    layout = model.layout

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((layout.parts("batch"), rows), dtype, sharding=layout.sharding("batch", None))

    return State(model.empty_cache(pages, size), array(jnp.int32), array(jnp.bool_))


def uncounted(model: Llama, *, rows: int) -> Counts:
    """Counts of nothing yet."""
    return zeros(abstract_counts(model, rows=rows))


def abstract_counts(model: Llama, *, rows: int) -> Counts:
    """The same as shapes and shardings."""
    shape, sharding = (model.layout.parts("batch"), rows, model.vocab_held), _counted(model)
    arrays: list[Any] = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.bool_, jnp.int32)]
    return Counts(*arrays)


def _counted(model: Llama) -> NamedSharding:
    return model.layout.at("head").sharding("batch", None, "logits")


def recount(model: Llama, counts: Counts, at: jax.Array, prompt: jax.Array, output: jax.Array) -> Counts:
    """Counts of row at[1] of group at[0] anew, from ids [n] of its prompt and its completion so far (-1: none)."""

    def local(seen, made, at, prompt, output):
        batch, _, vocab = spec
        mine = jnp.bool_(True) if not names(batch) else jax.lax.axis_index(names(batch)) == at[0]
        first = jax.lax.axis_index(names(vocab)) * seen.shape[2] if names(vocab) else 0
        size = seen.shape[2]

        def place(ids):
            return jnp.where((ids >= first) & (ids < first + size), ids - first, size)

        row = jnp.where(mine, at[1], seen.shape[1])
        seen = seen.at[0, row].set(jnp.zeros(size, bool).at[place(prompt)].set(True, mode="drop"), mode="drop")
        made = made.at[0, row].set(jnp.zeros(size, jnp.int32).at[place(output)].add(1, mode="drop"), mode="drop")
        return seen, made

    spec = spec_of(counts.prompt)
    return Counts(*locally(local, counts.prompt, counts.output, at, prompt, output, out=(spec, spec)))


def nothing(model: Llama, *, shape: Shape) -> jax.Array:
    """Nothing on its way from stage to stage yet."""
    return zeros(circulate.between(model, shape.tokens))


def moved(model: Llama, between: jax.Array, *, old: Shape, new: Shape) -> jax.Array:
    """What is on its way from stage to stage, in the lanes of another shape."""
    x = reshard(between, jax.P(*spec_of(between)[:2]), model.layout.mesh)
    into = circulate.between(model, new.tokens)
    out = jnp.zeros(into.shape, into.dtype, out_sharding=NamedSharding(into.sharding.mesh.abstract_mesh, spec_of(x)))
    rows, chunks = min(old.rows, new.rows), min(old.chunks, new.chunks) * new.chunk
    out = out.at[:, :, :rows].set(x[:, :, :rows])
    out = out.at[:, :, new.rows : new.rows + chunks].set(x[:, :, old.rows : old.rows + chunks])
    return reshard(out, into.sharding.spec, model.layout.mesh)
