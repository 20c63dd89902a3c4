"""Arrays that are each device's own, or its share of a sum: what their types say, and regions where each computes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.sharding.layout import reshard, size, spec_of, specs_of
from jaxtp.sharding.rules import names

Region = Callable[..., Any]


def on_each_device(
    function: Callable[..., Any], args: tuple[Any, ...], like: Callable[..., Any], *, over: tuple[str, ...] = ()
) -> Any:
    """`function` of each device's own parts of `args`: a region without communication. like(*args): of what returns, arrays
    among `args` that are laid out so. over: mesh axes over which what returns is a share of a sum; the gradients of what is
    whole over them then must be shares as well, which is to say that these `args` are `reduced` there.
    """
    mesh = next(jax.typeof(a).sharding.mesh for a in jax.tree.leaves(args))
    args = jax.tree.map(_plainly_reduced, args)
    alone = tuple(axis for axis in over if mesh.shape[axis] == 1)  # a share there is the sum
    shared = tuple(axis for axis in over if axis not in alone)
    out = jax.tree.map(lambda spec: PartitionSpec(*spec.partitions, unreduced={*shared}), specs_of(like(*args)))

    def own(*args: Any) -> Any:
        # from here on each device's arrays are its own, for gradients too
        kinds = [jax.typeof(a).mat for a in jax.tree.leaves(args)]
        axes = set(over).union(*(kind.varying | kind.reduced for kind in kinds))

        def mine(a: jax.Array) -> jax.Array:
            a = jax.lax.pcast(a, tuple(sorted(jax.typeof(a).mat.reduced)), to="varying")
            return jax.lax.pcast(a, tuple(sorted(axes - jax.typeof(a).mat.varying)), to="varying")

        return jax.lax.pcast(jax.lax.psum(function(*jax.tree.map(mine, args)), alone), shared, to="unreduced")

    return jax.shard_map(own if over else function, mesh=mesh, in_specs=specs_of(args), out_specs=out)(*args)


def _plainly_reduced(x: jax.Array) -> jax.Array:
    """x, whose type says `reduced` only of axes that have several devices: others leave a gradient that shard_map reshapes."""
    spec, mesh = spec_of(x), jax.typeof(x).sharding.mesh
    return reshard(x, PartitionSpec(*spec.partitions, reduced={axis for axis in spec.reduced if mesh.shape[axis] > 1}), mesh)


def varying_as(constants: Any, *others: Any) -> Any:
    """Constants, inside a region, whose type says that they differ from device to device as others do: what a loop's carry must
    say from its start.
    """
    axes = set().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(others)))
    return jax.tree.map(lambda a: jax.lax.pcast(a, tuple(sorted(axes - jax.typeof(a).mat.varying)), to="varying"), constants)


def dual(a: jax.Array) -> PartitionSpec:
    """The layout of its gradient: shares of a sum where its type says `reduced`, and the other way round."""
    spec = spec_of(a)
    return PartitionSpec(*spec.partitions, unreduced=spec.reduced, reduced=spec.unreduced)


def beside(weight: jax.Array, x: jax.Array) -> jax.Array:
    """`weight` [*dims], ready to be added to or multiplied with x [B, T, *dims]: laid out as x's own dims are.

    A weight whose gradient is summed over some axis only later (its type says `reduced`) cannot meet an array that is
    sharded over that axis: it is spread over the rows first (and over the tokens, where these lie on such an axis, too), which
    costs nothing.
    """
    spec, own = spec_of(x).partitions, jax.typeof(weight).sharding
    before = x.ndim - weight.ndim
    if not own.spec.reduced:
        return reshard(weight, PartitionSpec(*spec[before:]), own.mesh)
    over = [i == 0 or bool(own.spec.reduced & {*names(axis)}) for i, axis in enumerate(spec[:before])]
    sizes = [n if spread else 1 for n, spread in zip(x.shape, over, strict=False)]
    axes = [axis if spread else None for axis, spread in zip(spec, over, strict=False)]
    laid = NamedSharding(own.mesh, PartitionSpec(*axes, *own.spec.partitions))
    spread = jax.lax.broadcast_in_dim(weight, (*sizes, *weight.shape), (*range(before, x.ndim),), out_sharding=laid)
    return reshard(spread, PartitionSpec(*axes, *spec[before:]), own.mesh)


def whole(x: jax.Array) -> jax.Array:
    """x, whose type says `reduced` (its gradient is a sum of shares), for what every device computes alike: as a share of the
    gradient the first device's counts.
    """
    spec = spec_of(x)
    if not spec.reduced:
        return x
    mesh, plain = jax.typeof(x).sharding.mesh, PartitionSpec(*spec.partitions)
    over = tuple(axis for axis in mesh.axis_names if axis in spec.reduced)  # in one order on every process
    count = size(mesh, over)

    @jax.custom_vjp
    def run(x: jax.Array) -> jax.Array:
        return jax.sharding.reshard(x, NamedSharding(mesh, plain))

    def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
        """A product over a dim with an entry for each device, of which all but the first are 0."""
        each = NamedSharding(mesh, PartitionSpec(over, *spec.partitions))
        grads = jnp.broadcast_to(grad, (count, *grad.shape), out_sharding=each)
        first = jax.sharding.reshard((jnp.arange(count) == 0).astype(grad.dtype), NamedSharding(mesh, PartitionSpec(over)))
        shares = NamedSharding(mesh, PartitionSpec(*spec.partitions, unreduced={*over}))
        return (jnp.einsum("n,n...->...", first, grads, out_sharding=shares),)

    run.defvjp(lambda x: (run(x), None), backward)
    return run(x)
