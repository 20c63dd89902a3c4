"""Matrix products and the embedding, laid out by the types of their weights.

Kernels are kept output-first, as Hugging Face stores them. A product follows its weight: the activation's contracted dims
are brought to the weight's layout, and where those dims are sharded the partial sums are combined in `out`'s layout: an
all-reduce, or a reduce-scatter where `out` is sharded over tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtp.mesh import platform
from jaxtp.ops.quantized import InPlace, Quantized, levels, multiplies_fp8, product
from jaxtp.sharding import beside, dual, joined, mesh_of, names, reshard, size, spec_of

# (each device's share of a sum, the layout of the sum) -> the sum
Reduce = Callable[[jax.Array, NamedSharding], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """A low-rank product beside a kernel [*O, I]: scale · b a, with a [r, I], b [*O', r].

    beside: of the second dim of O, how many lie before and behind those of O'; None: O' is O.
    """

    a: jax.Array
    b: jax.Array
    scale: float = field(metadata={"static": True})
    beside: tuple[int, int] | None = field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted(InPlace):
    """A kernel with adapters, to multiply with in its place: kernel + scale · b a (LoRA, arXiv:2106.09685)."""

    kernel: jax.Array
    adapters: tuple[Adapter, ...]


def linear(
    x: jax.Array,
    weight: jax.Array | Adapted | Quantized,
    *,
    out: NamedSharding,
    dtype: jnp.dtype | None = None,
    reduce: Reduce | None = None,
) -> jax.Array:
    """x [B, T, I] times weight [*O, I], over I: [B, T, *O] in `dtype` (default x's), laid out as `out`. reduce: brings it there
    where each device has a share of a sum; default an all-reduce or a reduce-scatter.

    Of the dims O only the first may be sharded, so that they flatten to a plain matrix on every device: XLA:CPU copies the
    weights of any other product at every call. Row-parallel products are reduced in the result's dtype, which on GPUs
    halves the bytes of a bfloat16 all-reduce against float32 (the product itself accumulates in float32 all the same).
    """
    if isinstance(weight, Adapted):
        y = linear(x, weight.kernel, out=out, dtype=dtype, reduce=reduce) + _low_rank(x, weight.adapters, out, dtype)
    elif isinstance(weight, Quantized):
        y = _quantized(x, weight, out, dtype, reduce)
    else:
        y = _linear(x, weight, out, dtype, reduce)
    return checkpoint_name(y, "product")  # training may keep it, summed, for the backward pass


def _quantized(
    x: jax.Array, weight: Quantized, out: NamedSharding, dtype: jnp.dtype | None, reduce: Reduce | None
) -> jax.Array:
    """The product with a kernel in few bits. On GPUs as `quantized.product` says."""
    mesh, (*outer, summed) = mesh_of(x, out.mesh), spec_of(weight.values).partitions
    if weight.order is not None:
        x = x.at[..., weight.order].get(out_sharding=NamedSharding(mesh, spec_of(x)))
    if platform(mesh) == "cpu":
        # without the barrier, XLA:CPU takes all weights in x's dtype out of the decode loop (see xla_flags.QUANTIZED, too)
        x, weight = jax.lax.optimization_barrier((x, weight))
        if weight.groups > 1 or weight.shift is not None or x.dtype == jnp.float16:
            return _linear(x, weight.plain(x.dtype), out, dtype, reduce)
        y = _linear(x, levels(weight, x.dtype), out, dtype, reduce)
        return (y.astype(jnp.float32) * beside(weight.scale[..., 0], y)).astype(y.dtype)
    batch, tokens, _ = spec_of(x).partitions
    elsewhere = {*names(tokens)} - {*names(outer[0])} - {*names(summed)}
    if elsewhere and (elsewhere == {*names(tokens)} or elsewhere & {*names(out.spec[1])}):  # such rows do not flatten
        return _linear(x, weight.plain(x.dtype), out, dtype, reduce)
    if summed and size(mesh, summed) == 1:
        weight, summed = jax.tree.map(_with_whole_inputs, weight), None
    x = reshard(x, P(batch, None, summed), mesh)
    rows = x.reshape(-1, x.shape[-1], out_sharding=_flat(jax.typeof(x).sharding))
    shares = {*names(summed)}
    y = product(rows, weight, P(batch, outer[0], unreduced=shares), fp8=multiplies_fp8(out.mesh)).astype(dtype or x.dtype)
    y = y.reshape(*x.shape[:2], *weight.shape[:-1], out_sharding=NamedSharding(mesh, P(batch, None, *outer, unreduced=shares)))
    return reduce(y, out) if reduce and shares else reshard(y, out.spec, mesh)


def _with_whole_inputs(a: jax.Array) -> jax.Array:
    """An array of a kernel whose type says that one device holds all inputs, in so many words."""
    return reshard(a, P(*spec_of(a).partitions[:-1], None), jax.typeof(a).sharding.mesh) if a.ndim else a


def _low_rank(x: jax.Array, adapters: tuple[Adapter, ...], out: NamedSharding, dtype: jnp.dtype | None) -> jax.Array:
    """The sum of the adapters' products. What crosses devices is of rank r: the r channels between a and b are whole on
    every device, and spread over the tokens where the residual stream is.
    """
    mesh, given = mesh_of(x, out.mesh), spec_of(x)
    batch, tokens, _ = given.partitions
    between = NamedSharding(mesh, P(batch, max(tokens, out.spec.partitions[1], key=lambda axis: len(names(axis))), None))
    products = []
    for adapter in adapters:
        y = adapter.scale * _linear(_linear(x, adapter.a, between, dtype), adapter.b, out, dtype)
        widths = [(0, 0)] * y.ndim
        if adapter.beside:
            widths[3] = adapter.beside
        products.append(jnp.pad(y, widths))
    return functools.reduce(jnp.add, products)


def _linear(
    x: jax.Array, weight: jax.Array, out: NamedSharding, dtype: jnp.dtype | None, reduce: Reduce | None = None
) -> jax.Array:
    mesh = mesh_of(x, out.mesh)
    spec, given = spec_of(weight), spec_of(x)
    *outer, summed = spec.partitions
    assert not any(outer[1:]), f"only the first dim of {jax.typeof(weight)} may be sharded, and the last"
    batch, over, _ = given.partitions
    # an axis cannot shard two dims of the product: tokens that lie on it are gathered first, and scattered on the way back
    gathered = {*names(over)} & {*names(outer[0])}
    tokens = joined(*(axis for axis in names(over) if axis not in {*names(outer[0]), *names(summed)}))
    x = reshard(x, P(batch, tokens, summed, reduced=given.reduced | gathered), mesh)
    # a whole weight that meets tokens of which every device has some gets its gradient from all of them
    met = {*names(tokens)}
    weight = reshard(weight, P(*spec.partitions, reduced=spec.reduced | met), mesh) if spec.reduced else weight
    # each device's share of a sum over a sharded dim; what brings it to `out` is the all-reduce or the reduce-scatter
    shares = P(batch, tokens, *outer, unreduced={*names(summed)})
    y = _matmul(x, weight, shares, jnp.dtype(dtype or x.dtype))
    y = y.reshape(*y.shape[:2], *weight.shape[:-1], out_sharding=NamedSharding(mesh, shares))
    return reduce(y, out) if reduce and summed else reshard(y, out.spec, mesh)


def _matmul(x: jax.Array, weight: jax.Array, out: P, dtype: jnp.dtype) -> jax.Array:
    """x [B, T, I] times weight [*O, I]: [B, T, O] in `dtype`, laid out as `out`. A single row of bfloat16 is what XLA:CPU
    multiplies ten times slower than two.
    """
    mesh = jax.typeof(weight).sharding.mesh
    batch, tokens, columns = out.partitions[:3]
    if tokens:  # such rows do not flatten
        return _product(x, weight, P(batch, tokens, columns, unreduced=out.unreduced), dtype)
    rows = x.reshape(-1, x.shape[-1], out_sharding=_flat(jax.typeof(x).sharding))
    lone = platform(mesh) == "cpu" and x.dtype != jnp.float32 and len(rows) == 1
    rows = jnp.concatenate([rows, rows]) if lone else rows
    y = _product(rows, weight, P(batch, columns, unreduced=out.unreduced), dtype)
    y = y[:1] if lone else y
    return y.reshape(*x.shape[:2], -1, out_sharding=NamedSharding(mesh, P(batch, None, columns, unreduced=out.unreduced)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(rows: jax.Array, weight: jax.Array, out: P, dtype: jnp.dtype) -> jax.Array:
    """rows [*R, I], weight [*O, I] -> [*R, O]. Backward the products are of the weight's dtype, below float32 logits too."""
    R = "BT"[: rows.ndim - 1]
    return _einsum(f"{R}I,OI->{R}O", rows, _matrix(weight), out, dtype)


def _product_forward(
    rows: jax.Array, weight: jax.Array, out: P, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(rows, weight, out, dtype), (rows, weight)


def _product_backward(
    out: P, dtype: jnp.dtype, kept: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows, weight = kept
    grad = grad.astype(weight.dtype)
    R = "BT"[: rows.ndim - 1]
    matrix = _matrix(weight)
    to_rows = _einsum(f"{R}O,OI->{R}I", grad, matrix, dual(rows), rows.dtype)
    to_weight = _einsum(f"{R}O,{R}I->OI", grad, rows, dual(matrix), weight.dtype)
    return to_rows, to_weight.reshape(weight.shape, out_sharding=NamedSharding(jax.typeof(weight).sharding.mesh, dual(weight)))


_product.defvjp(_product_forward, _product_backward)


def _einsum(formula: str, a: jax.Array, b: jax.Array, out: P, dtype: jnp.dtype) -> jax.Array:
    """The one place that knows how each backend likes its products. XLA:CPU multiplies bfloat16 ten times faster when it is
    asked for a float32 result, twice as fast when the left side is summed over its last dim (turned around in three dims:
    two it would turn back), and in a loop it copies the weights of any product of more than two dims. A few rows it multiplies
    up to twice as fast from the right (behind the barrier: it would turn the product around).
    """
    mesh = jax.typeof(b).sharding.mesh
    cpu = platform(mesh) == "cpu"
    if cpu and formula == "BO,BI->OI" and a.dtype != jnp.float32:
        formula, a = "OB,BI->OI", jax.lax.optimization_barrier(a.T[None])[0]
    accumulate = jnp.dtype(jnp.float32) if cpu else dtype
    if cpu and formula == "BI,OI->BO" and _few(a):
        turned = NamedSharding(mesh, P(*reversed(out.partitions), unreduced=out.unreduced))
        y = jnp.einsum("OI,BI->OB", b, a, preferred_element_type=accumulate, out_sharding=turned)
        return jax.lax.optimization_barrier(y).T.astype(dtype)
    y = jnp.einsum(formula, a, b, preferred_element_type=accumulate, out_sharding=NamedSharding(mesh, out))
    return y.astype(dtype)


def _few(rows: jax.Array) -> bool:
    """Whether each device has so few rows [B, I], and more than one, that XLA:CPU is quicker with the weight on the left."""
    here = len(rows) // size(jax.typeof(rows).sharding.mesh, spec_of(rows).partitions[0])
    return (2 if rows.dtype == jnp.float32 else 16) <= here <= 64


def _matrix(weight: jax.Array) -> jax.Array:
    """[*O, I] -> [O, I]. (Inside the product, so that what is kept for the backward pass is the weight, not a copy.)"""
    spec, mesh = spec_of(weight), jax.typeof(weight).sharding.mesh
    flat = P(spec.partitions[0], spec.partitions[-1], reduced=spec.reduced)
    return weight.reshape(-1, weight.shape[-1], out_sharding=NamedSharding(mesh, flat))


def _flat(sharding: NamedSharding) -> NamedSharding:
    """[B, T, I] -> [B·T, I]."""
    batch, _, columns = sharding.spec.partitions
    return NamedSharding(sharding.mesh, P(batch, columns, reduced=sharding.spec.reduced))


def embed(table: jax.Array, tokens: jax.Array, *, out: NamedSharding) -> jax.Array:
    """table[tokens]: table [V, D], tokens [B, T] int32 -> [B, T, D] laid out as `out`.

    With the vocabulary sharded each device looks up the ids that it holds, and the sum over devices is one all-reduce
    (a reduce-scatter where `out` is sharded over tokens). Ids outside the table give zeros.
    """
    mesh, spec = mesh_of(tokens, out.mesh), spec_of(tokens)
    axes = names(spec_of(table).partitions[0])
    # without the barrier, XLA:CPU takes a float32 copy of a whole bfloat16 table out of the decode loop
    table, tokens = jax.lax.optimization_barrier((table, tokens))
    if size(mesh, axes) == 1:
        return reshard(table.at[tokens].get(out_sharding=NamedSharding(mesh, P(*spec, None))), out.spec, mesh)

    scattered = tuple(axis for axis in names(out.spec[1]) if axis in axes)
    summed = tuple(axis for axis in axes if axis not in scattered)

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        ids = tokens - jax.lax.axis_index(axes) * table.shape[0]
        held = (ids >= 0) & (ids < table.shape[0])
        x = jnp.where(held[..., None], table[jnp.where(held, ids, 0)], jnp.zeros((), table.dtype))
        x = jax.lax.psum_scatter(x, scattered, scatter_dimension=1, tiled=True) if scattered else x
        return jax.lax.psum(x, summed) if summed else x

    own = tuple(axis for axis in names(spec.partitions[1]) if axis not in scattered)
    here = P(out.spec[0], joined(*own, *scattered), *out.spec[2:])  # tokens may be cut further, which costs nothing
    return reshard(jax.shard_map(local, mesh=mesh, out_specs=here)(table, tokens), out.spec, mesh)
