"""Matrix products and the embedding, laid out by the types of their weights.

Kernels are kept output-first, as Hugging Face stores them. A product follows its weight: the activation's contracted dims
are brought to the weight's layout, and where those dims are sharded the partial sums are combined in `out`'s layout: an
all-reduce, or a reduce-scatter where `out` is sharded over tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtp.mesh import platform
from jaxtp.sharding import reshard


def linear(
    equation: str, x: jax.Array, weight: jax.Array, *, out: jax.sharding.NamedSharding, dtype: jnp.dtype | None = None
) -> jax.Array:
    """einsum(equation, x, weight) in `dtype` (default x's) with the layout `out`; one letter a dim, e.g. "BTD,FD->BTF".

    Row-parallel products are reduced in x's dtype. On GPUs that is what halves the bytes of the all-reduce against
    float32 (the product itself accumulates in float32 all the same).
    """
    letters, rest = equation.split(",")
    axes = dict(zip(rest.split("->")[0], jax.typeof(weight).sharding.spec, strict=True))
    spec = jax.typeof(x).sharding.spec
    taken = {axis for letter, axis in axes.items() if letter not in letters}
    wanted = [axes[dim] if dim in axes else None if axis in taken else axis for dim, axis in zip(letters, spec, strict=True)]
    x = reshard(x, P(*wanted), out.mesh)
    summed = any(axes[dim] for dim in letters if dim in axes)
    natural = P(*(axes.get(dim, dict(zip(letters, wanted, strict=True)).get(dim)) for dim in equation.split("->")[1]))
    target = out.spec if summed else natural
    y = _einsum(equation, x, weight, jax.sharding.NamedSharding(out.mesh.abstract_mesh, target), jnp.dtype(dtype or x.dtype))
    return reshard(y, out.spec, out.mesh)


def _einsum(equation: str, x: jax.Array, weight: jax.Array, out: jax.sharding.NamedSharding, dtype: jnp.dtype) -> jax.Array:
    """The one place that knows how each backend likes its products.

    XLA:CPU multiplies bfloat16 ten times faster when asked for a float32 result, and not a single row of it.
    """
    if platform(out.mesh) != "cpu" or x.dtype == jnp.float32:
        return jnp.einsum(equation, x, weight, preferred_element_type=dtype, out_sharding=out)
    lone = x.shape[1] == 1
    x = jnp.concatenate([x, x], axis=1) if lone else x
    y = jnp.einsum(equation, x, weight, preferred_element_type=jnp.float32, out_sharding=out).astype(dtype)
    return y[:, :1] if lone else y


def embed(table: jax.Array, tokens: jax.Array, *, out: jax.sharding.NamedSharding) -> jax.Array:
    """table[tokens]: table [V, D], tokens [B, T] int32 -> [B, T, D] laid out as `out`.

    With the vocabulary sharded each device looks up the ids that it holds, and the sum over devices is one all-reduce
    (a reduce-scatter where `out` is sharded over tokens). Ids outside the table give zeros.
    """
    mesh, vocab_axis = out.mesh.abstract_mesh, jax.typeof(table).sharding.spec[0]
    spec = jax.typeof(tokens).sharding.spec
    if vocab_axis is None:
        return reshard(table.at[tokens].get(out_sharding=jax.sharding.NamedSharding(mesh, P(*spec, None))), out.spec, mesh)

    scattered = out.spec[1] == vocab_axis

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        ids = tokens - jax.lax.axis_index(vocab_axis) * table.shape[0]
        held = (ids >= 0) & (ids < table.shape[0])
        x = jnp.where(held[..., None], table[jnp.where(held, ids, 0)], jnp.zeros((), table.dtype))
        if scattered:
            return jax.lax.psum_scatter(x, vocab_axis, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x, vocab_axis)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(vocab_axis, None), P(*spec)), out_specs=out.spec)(table, tokens)
