"""Generation over pp: every rank works at every tick, on the tokens that entered so many ticks ago.

The blocks' weights are stacks with one layer for each rank (`Llama(stacks=...)`), and a stage is mapped over them, as in
training; so are the pools of the cache, of which each rank has its layers'. What a stage computes goes to the next one by a
collective-permute.

P ranks; G groups of data parallelism, T tokens of each, L lanes, D embed.
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

from jaxtp.model import Cache, Lanes, Llama
from jaxtp.model.layers import residual_dim
from jaxtp.parallel.regions import after, locally, mapped
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


def between(model: Llama, tokens: int) -> jax.ShapeDtypeStruct:
    """[P, G, T, D]: what is on its way from stage to stage, where each group has so many tokens in a tick."""
    layout = model.layout
    sharding = layout.sharding("layers", "batch", residual_dim(tokens, layout), None)
    shape = (model.stages, layout.parts("batch"), tokens, model.config.hidden_size)
    return jax.ShapeDtypeStruct(shape, layout.dtype, sharding=sharding)


def tick(
    model: Llama,
    cache: Cache,
    x: jax.Array,
    entering: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    lanes: Lanes,
    last: jax.Array,
) -> tuple[Cache, jax.Array, jax.Array]:
    """Every rank's tokens through its stage: (cache, what is on its way now, what left the last rank [G, L, D]).

    x [P, G, T, D]: what is on its way. entering [G, T]: the tokens that come to the first rank. positions, lengths [P, G, T]
    and lanes [P, G, …]: of the tokens that each rank has now. last [G, L]: which of those that leave are asked for.
    """
    x = locally(_enter, x, model.embedded(after(entering, x)), out=spec_of(x))
    blocks = [nnx.split(block) for block in model.layers]
    filled = [None if None not in stack else [layer is not None for layer in stack] for stack in model.stacks]

    def stage(weights, filled, x, positions, lengths, lanes, layers):
        step, new = model.step(positions, None, lengths=lengths, lanes=lanes), []
        for (graph, _), state, here, layer in zip(blocks, weights, filled, layers, strict=True):
            y, layer, _ = nnx.merge(graph, state)(x, step, layer)
            x = y if here is None else jnp.where(here, y, x)
            new.append(layer)
        return x, tuple(new)

    run = jax.vmap(stage, spmd_axis_name="pp")
    here = [None if each is None else reshard(jnp.asarray(each), P("pp"), model.layout.mesh) for each in filled]
    y, layers = run([state for _, state in blocks], here, x, positions, lengths, lanes, cache.layers)
    to = [(rank, rank + 1) for rank in range(model.stages - 1)]
    x = locally(lambda y: jax.lax.ppermute(y, "pp", to), y, out=spec_of(y))
    out = _left(after(y, x), last)
    return replace(cache, layers=layers), after(x, out), model.norm(out)


def _enter(x: jax.Array, entering: jax.Array) -> jax.Array:
    return jnp.where(jax.lax.axis_index("pp") == 0, entering, x[0])[None]


def _left(y: jax.Array, last: jax.Array) -> jax.Array:
    """Of what the last rank computed [P, G, T, D], the tokens `last` [G, L]: [G, L, D]."""
    ranks, (_, batch, tokens, _) = y.shape[0], spec_of(y)

    def tell(y, last):
        at = last[0] - (jax.lax.axis_index(names(tokens)) * y.shape[2] if tokens else 0)
        mine = (at >= 0) & (at < y.shape[2]) & (jax.lax.axis_index("pp") == ranks - 1)
        x = jnp.where(mine[:, None], y[0, 0][jnp.clip(at, 0, y.shape[2] - 1)], jnp.zeros((), y.dtype))
        return jax.lax.psum(x, ("pp", *names(tokens)))[None]

    return locally(tell, y, last, out=P(batch, None, None))
