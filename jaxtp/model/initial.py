"""Random weights, made on the devices that will hold them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.checkpoint.names import parts
from jaxtp.config import ModelConfig
from jaxtp.weights import layers_of


def drawn(path: str, weight: nnx.Variable, config: ModelConfig, keys: Mapping[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
    """A model's weight, or a stack of several layers', drawn tensor by tensor as a checkpoint holds them, so that it does not
    depend on how it is laid out. keys: of the weights of a model whose layers stand singly, by path.
    """
    names, stacked, held = layers_of(path, weight), bool(weight.get_metadata()["stack"]), weight.get_value()
    name = next(filter(None, names), None)
    generic = name and re.sub(r"\.\d+\.", ".0.", name, count=1)  # layers share a program
    draw = _drawing(config, generic, held.shape[stacked:], dtype, held.sharding, stacked)
    if not stacked:
        return draw(keys[path])
    rows = np.stack([jax.random.key_data(keys[name or path]) for name in names])
    with jax.set_mesh(held.sharding.mesh):
        return draw(rows, np.array([bool(name) for name in names]))


@functools.lru_cache(64)
def _drawing(
    config: ModelConfig, name: str | None, each: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, stacked: bool
) -> Callable[..., jax.Array]:
    """The program that draws a weight of shape `each` from its key, or a stack of them from [rows, 2] keys and which are there.

    name: the weight, of any layer; None for a place that is empty on every rank.
    """
    norm, made_of = "norm" in (name or ""), parts(config, name, each) if name else ()
    neutral = float(norm and config.norm_form != "unit_offset")

    def one(key: jax.Array) -> jax.Array:
        out = jnp.zeros(each, dtype)
        for i, part in enumerate(made_of):
            shape = part.shape(each)
            if norm or len(shape) == 1:
                tensor = jnp.full(shape, neutral, dtype)
            else:
                tensor = (0.02 * jax.random.normal(jax.random.fold_in(key, i), shape)).astype(dtype)
            out = out.at[part.select].set(part.spread(tensor, each)) if part.select else part.spread(tensor, each)
        return out

    if not stacked:
        return jax.jit(one, out_shardings=sharding)

    def stack(keys: jax.Array, there: jax.Array) -> jax.Array:
        each_row = jax.vmap(lambda key: one(jax.random.wrap_key_data(key)))(keys)
        return jnp.where(there.reshape(-1, *[1] * len(each)), each_row, jnp.zeros((), each_row.dtype))

    over = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    draw = jax.sharding.auto_axes(stack, out_sharding=sharding)  # each rank draws its own
    return jax.jit(lambda keys, there: draw(jax.sharding.reshard(keys, over), jax.sharding.reshard(there, over)))
