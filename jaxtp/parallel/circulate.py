"""Generation over pp: groups of rows circulate through the stages, so that every rank works at every tick.

The blocks' weights are stacks with one layer for each rank (`Llama(stacks=...)`), and a stage is mapped over them, as in
training. What a rank works on at a tick lies in the same place of the cache on all ranks (`schedules.Circulation`): nothing is
cut out of the cache or put back. Which rows these are stands in regions without communication; what a stage computes goes to
the next one by a collective-permute.

P ranks, M groups; B rows of a group, T tokens of each, S slots of the cache, D embed.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxtp.model import Cache, Llama
from jaxtp.model.layers import residual_dim
from jaxtp.parallel.regions import after, locally, mapped
from jaxtp.parallel.schedules import Circulation
from jaxtp.parallel.stages import Stages
from jaxtp.sharding import Rules, names, reshard, spec_of


def staged(stages: Stages, *, rules: Rules) -> dict[str, Any]:
    """The arguments of a `Llama` whose layers stand in these stages."""
    held = np.array(stages.rows, dtype=object).reshape(stages.ranks, -1)
    stacks = tuple(tuple(block) for block in held.T.tolist())
    return {"rules": rules.pipeline_parallel(), "stacks": stacks, "region": functools.partial(mapped, axes=1)}


def stages_of(model: Llama) -> Stages:
    """The stages that a `Llama` with stacks stands in. Raises ValueError where a row would not go through them in order."""
    ranks = [[layer for layer in rank if layer is not None] for rank in zip(*model.stacks, strict=True)]
    if list(itertools.chain(*ranks)) != list(range(model.config.num_layers)):
        raise ValueError(
            f"the layers of its ranks are {ranks}; generation needs one chunk of layers a rank, in the model's order"
        )
    return Stages(len(ranks), 1, tuple(map(len, ranks)))


def between(model: Llama, rows: int, tokens: int) -> jax.ShapeDtypeStruct:
    """[P, B, T, D]: what is on its way from stage to stage, of groups of `rows` rows with `tokens` tokens each."""
    sharding = model.layout.sharding("layers", "batch", residual_dim(tokens, model.layout), None)
    return jax.ShapeDtypeStruct((model.stages, rows, tokens, model.config.hidden_size), model.layout.dtype, sharding=sharding)


def decode_tick(
    model: Llama, cache: Cache, x: jax.Array, entering: jax.Array | None, *, tick: int
) -> tuple[Cache, jax.Array, jax.Array]:
    """A token of each rank's group through its stage: (cache, what is on its way now, what left the last rank [B, 1, D]).

    x [P, B, 1, D]: what is on its way. entering [B]: the newest tokens of the group that comes to the first rank, if one does.
    A token goes into the slot of its row's length.
    """
    ranks, groups = model.stages, len(cache.lengths)
    ring = Circulation.decode(ranks, groups)
    found = [ring.group(tick, rank) for rank in range(ranks)]
    lengths = _theirs(cache.lengths, model, [group or 0 for group in found])
    busy = _by_rank(model, [group is not None for group in found])
    positions = jnp.where(busy[:, None], lengths, cache.slots)[:, :, None]  # who idles writes into no slot
    tokens = None if entering is None else entering[:, None]
    cache, y = _stage(model, cache, x, tokens, positions, lengths + 1, place=ring.place(tick))
    x, out = _passed(y, positions >= 0)
    return cache, x, model.norm(out)


def prefill_ticks(
    model: Llama,
    cache: Cache,
    last: tuple[jax.Array, ...],
    x: jax.Array,
    tokens: tuple[jax.Array, ...],
    turn: jax.Array,
    turns: jax.Array,
) -> tuple[Cache, tuple[jax.Array, ...], jax.Array]:
    """M ticks, in which chunk `turn` (of `turns`) of each group enters, tokens [B, T] each: (cache, last, what is on its way).

    x [P, B, T, D]: what was on its way. Once all chunks have entered, more calls (`drain`) drive them through: `turn` says that
    what enters now is none. last [B, D] of each group takes the final hidden state of each row whose last prompt token leaves.
    """
    ranks, groups, (B, T) = model.stages, len(tokens), tokens[0].shape
    ring, found = Circulation.prefill(ranks, groups), list(last)
    for tick in range(groups):
        lengths = _theirs(cache.lengths, model, [(tick - rank) % groups for rank in range(ranks)])
        chunk = turn + _by_rank(model, [ring.turn(tick, rank) for rank in range(ranks)])
        start = jnp.where((chunk >= 0) & (chunk < turns), chunk * T, cache.slots)  # no chunk: into no slot
        positions = start[:, None, None] + jnp.arange(T, dtype=jnp.int32)
        positions = reshard(jnp.broadcast_to(positions, (ranks, B, T)), P(*spec_of(x)[:2], None), model.layout.mesh)
        cache, y = _stage(model, cache, x, tokens[tick], positions, lengths, place=ring.place(tick))
        x, out = _passed(y, positions == lengths[:, :, None] - 1)
        leaving = (tick + 1 - ranks) % groups
        found[leaving] = found[leaving] + model.norm(out)[:, 0]
    return replace(cache, fresh=False), tuple(found), x


def drain(ranks: int, groups: int) -> int:
    """How often `prefill_ticks` is called once all chunks have entered."""
    return -(-(ranks - 1) // groups)


# -- a tick --------------------------------------------------------------------------------------------------------------


def _stage(
    model: Llama,
    cache: Cache,
    x: jax.Array,
    entering: jax.Array | None,
    positions: jax.Array,
    lengths: jax.Array,
    *,
    place: int,
) -> tuple[Cache, jax.Array]:
    """Every rank's stage once: x [P, B, T, D], into the first rank tokens [B, T]; positions [P, B, T], lengths [P, B]."""
    if entering is not None:
        x = locally(_enter, x, model.embedded(after(entering, x)), out=spec_of(x))
    blocks = [nnx.split(block) for block in model.layers]
    filled = [None if None not in stack else [layer is not None for layer in stack] for stack in model.stacks]
    mine = slice(place * len(blocks), (place + 1) * len(blocks))

    def stage(weights, filled, x, positions, lengths, layers):
        step, new = model.step(positions, None, lengths=lengths), []
        for (graph, _), state, here, layer in zip(blocks, weights, filled, layers, strict=True):
            y, layer = nnx.merge(graph, state)(x, step, layer, fresh=cache.fresh)
            x = y if here is None else jnp.where(here, y, x)
            new.append(layer)
        return x, tuple(new)

    run = jax.vmap(stage, spmd_axis_name="pp")
    here = [None if each is None else _by_rank(model, each) for each in filled]
    y, new = run([state for _, state in blocks], here, x, positions, lengths, cache.layers[mine])
    layers = (*cache.layers[: mine.start], *new, *cache.layers[mine.stop :])
    return replace(cache, layers=layers), y


def _enter(x: jax.Array, entering: jax.Array) -> jax.Array:
    return jnp.where(jax.lax.axis_index("pp") == 0, entering, x[0])[None]


def _passed(y: jax.Array, here: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what each rank has from the one before, what the last rank has to tell: see `_left`)."""
    to = [(rank, rank + 1) for rank in range(y.shape[0] - 1)]
    x = locally(lambda y: jax.lax.ppermute(y, "pp", to), y, out=spec_of(y))
    out = _left(after(y, x), here)
    return after(x, out), out


def _left(y: jax.Array, here: jax.Array) -> jax.Array:
    """Of what the last rank computed [P, B, T, D], the one token of each row that is `here` [P, B, T], or zeros: [B, 1, D]."""
    ranks, (_, batch, tokens, _) = y.shape[0], spec_of(y)

    def tell(y, here):
        x = jnp.where(here[0, :, :, None] & (jax.lax.axis_index("pp") == ranks - 1), y[0], jnp.zeros((), y.dtype))
        return jax.lax.psum(x.sum(axis=1, keepdims=True), ("pp", *names(tokens)))

    return locally(tell, y, reshard(here, P(*spec_of(y)[:3]), jax.typeof(y).sharding.mesh), out=P(batch, None, None))


def _theirs(rows: jax.Array, model: Llama, groups: list[int]) -> jax.Array:
    """Of rows [M, B] each rank's group: [P, B]."""
    out = P("pp", spec_of(rows)[1])
    return locally(lambda rows, group: rows[group[0]][None], rows, _by_rank(model, groups), out=out)


def _by_rank(model: Llama, values: list[Any]) -> jax.Array:
    """[P]: a value for each rank, where that rank is."""
    return reshard(jnp.asarray(values), P("pp"), model.layout.mesh)
