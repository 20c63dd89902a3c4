"""Regions: what each device does by itself, or sends along pp by hand, inside programs that are sharded by types.

d groups, which are those of dp and in each those of ep, and the parts of its rows over cp; P ranks; B rows, T tokens, b and t
of each group, D embed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import core
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxtp.mesh import platform
from jaxtp.sharding import Axis, dual, joined, names, spec_of, specs_of

Sizes = Sequence[tuple[str, int]]  # of mesh axes
NEVER = 0x7F912345  # as a token out of every vocabulary, as a float a NaN that nothing computes


def mapped(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    like: Callable[..., Any],
    *,
    over: tuple[str, ...] = (),
    axes: int = 2,
    along: Sizes = (),
) -> Any:
    """`sharding.on_each_device` inside a stage, mapped over that many axes (in training pp and groups): what is of each is each
    device's own as well. (Left to `jax.vmap` XLA would split it, which cuDNN's attention does not survive.) along: mesh axes
    along which `function` sends, with their sizes; those of more than one device are among the axes that are mapped over.

    The backward pass begins with the forward one; what is kept is `args`. Gradients of what is `reduced` are shares of a sum.
    """
    leaves, tree = jax.tree.flatten(args)
    floats = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]

    def back(leaves: tuple[jax.Array, ...], grads: Any) -> Any:
        if along:  # what is sent once more waits its turn
            leaves = tuple(behind(a, jax.tree.leaves(grads)[0]) for a in leaves)

        def of(*chosen: jax.Array) -> Any:
            some = iter(chosen)
            return function(*jax.tree.unflatten(tree, [next(some) if f else a for f, a in zip(floats, leaves, strict=True)]))

        return jax.vjp(of, *(a for f, a in zip(floats, leaves, strict=True) if f))[1](grads)

    @jax.custom_vjp
    def run(*leaves: jax.Array) -> Any:
        return _own(function, jax.tree.unflatten(tree, leaves), lambda *args: _shares(like(*args), over), axes, along)

    def forward(*leaves: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        return jax.tree.map(lambda y: checkpoint_name(y, "attention"), run(*leaves)), leaves

    def backward(leaves: tuple[jax.Array, ...], grads: Any) -> tuple[jax.Array | None, ...]:
        of_floats = iter(
            _own(
                back,
                (leaves, grads),
                lambda leaves, _: tuple(dual(a) for f, a in zip(floats, leaves, strict=True) if f),
                axes,
                along,
            )
        )
        return tuple(next(of_floats) if f else None for f in floats)

    run.defvjp(forward, backward)
    return run(*leaves)


def _shares(like: Any, over: tuple[str, ...]) -> Any:
    return jax.tree.map(lambda a: PartitionSpec(*spec_of(a).partitions, unreduced=set(over)), like) if over else like


def _own(function: Callable[..., Any], args: tuple[Any, ...], like: Callable[..., Any], axes: int, along: Sizes) -> Any:
    """`function` in a region that is manual over every axis of the mesh, once all `axes` that are mapped over have come by."""

    @custom_vmap
    def run(*args: Any) -> Any:
        mesh, into, out = jax.typeof(jax.tree.leaves(args)[0]).sharding.mesh, specs_of(args), specs_of(like(*args))
        if not axes:
            every = set(mesh.axis_names)
            region = jax.shard_map(function, mesh=mesh, in_specs=into, out_specs=out, axis_names=every, check_vma=False)
            return region(*args)
        # never run: only the types of what it returns are asked for, which shard_map cannot say of shares of a sum here
        into, plain = (jax.tree.map(lambda spec: PartitionSpec(*spec.partitions), specs) for specs in (into, out))
        region = jax.shard_map(function, mesh=mesh, in_specs=into, out_specs=plain, check_vma=False)
        bare = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s)), args, into)
        with core.extend_axis_env_nd(along):  # (an axis that is mapped over is nowhere to be found)
            found = jax.eval_shape(region, *bare)
        return jax.tree.map(lambda a, s: jnp.zeros(a.shape, a.dtype, out_sharding=NamedSharding(mesh, s)), found, out)

    @run.def_vmap
    def over(size: int, batched: Any, *args: Any) -> Any:
        assert all(jax.tree.leaves(batched))

        def part(*args: Any) -> Any:
            if jax.tree.leaves(args)[0].shape[0] > 1:  # another axis has yet to come
                return jax.vmap(function)(*args)
            return jax.tree.map(lambda y: y[None], function(*jax.tree.map(lambda a: a[0], args)))

        out = _own(part, args, like, axes - 1, along)
        return out, jax.tree.map(lambda _: True, out)

    return run(*args)


def locally(function: Callable[..., Any], *args: Any, out: Any) -> Any:
    """`function` of each device's own parts of `args`; out: the layouts of what it returns."""
    mesh = jax.typeof(jax.tree.leaves(args)[0]).sharding.mesh
    return jax.shard_map(function, mesh=mesh, in_specs=specs_of(args), out_specs=out, check_vma=False)(*args)


def after(x: Any, other: jax.Array) -> Any:
    """Arrays; on CPUs only once `other` is there.

    XLA:CPU begins collectives that do not depend on one another in an order that may differ from device to device, and each
    blocks its thread: devices would wait for each other forever. A comparison that never holds makes x depend on the other.
    """
    if platform(jax.typeof(other).sharding.mesh) != "cpu":
        return x
    return jax.tree.map(lambda a: locally(behind, a, other, out=spec_of(a)), x)


def behind(x: jax.Array, other: jax.Array) -> jax.Array:
    """`after`, of a device's own arrays in a region."""
    if platform(jax.typeof(x).sharding.mesh) != "cpu":
        return x
    one = other.ravel()[0]
    bits = one if one.dtype == jnp.int32 else jax.lax.bitcast_convert_type(one.astype(jnp.float32), jnp.int32)
    return jnp.where(bits == NEVER, jnp.zeros((), x.dtype), x)


def groups(mesh: Mesh | AbstractMesh) -> Axis:
    """The axes of what is mapped over beside pp: those of rows, and of the parts of a row."""
    return joined("dp", *(axis for axis in ("ep", "cp") if mesh.shape[axis] > 1))


def shift(x: jax.Array, by: int) -> jax.Array:
    """[d, P, ...]: each rank's part to the next rank (by=1) or the one before (-1), around."""
    ranks = x.shape[1]
    to = [(rank, (rank + by) % ranks) for rank in range(ranks)]
    return locally(lambda x: jax.lax.ppermute(x, "pp", to), x, out=spec_of(x))


def of_rank(x: jax.Array, rank: int) -> jax.Array:
    """[d, P, b, t, D]: that rank's part, on all of them: [B, T, D]."""
    over, scattered = names(spec_of(x).partitions[0]), names(spec_of(x).partitions[3])
    rows, parts = joined(*(axis for axis in over if axis != "cp")), (axis for axis in over if axis == "cp")

    def tell(x):
        return jax.lax.psum(jnp.where(jax.lax.axis_index("pp") == rank, x[0, 0], jnp.zeros((), x.dtype)), "pp")

    return locally(tell, x, out=PartitionSpec(rows, joined(*parts, *scattered), None))
