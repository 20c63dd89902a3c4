"""All-reduces in 8 bits: what devices send of a sum are integers, with a scale for every 64 numbers.

In one step, for few numbers: all send all that they have. In two, as a ring does: each device sums a part, and sends the sum.
Of a sum over t devices a GPU sends, for each number, t - 1 bytes or 2 (t - 1) / t (and scales, 1/32 of that); bfloat16 takes
twice the latter. Every device has the same result, bit by bit.

How far off: half a step of each device's share, and in two steps half a step of the sum, a step being the largest of 64 numbers
over 127. It pays where the link is slow (PCIe) and messages are large: `planner.compression`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.parallel.regions import locally
from jaxtp.sharding import Region, mesh_of, reshard, spec_of

Compression = Literal["int8"]
GROUP, LARGEST = 64, 127.0
ONE_STEP = 1 << 18  # bytes that a device sends of a sum, up to which a second message costs more than it saves
Form = Literal["one step", "two steps"]


def check_compression(name: str | None, *, sequence_parallel: bool) -> None:
    """Raises ValueError for one that there is not, or that has nothing to compress."""
    if name not in (None, *get_args(Compression)):
        raise ValueError(f"compress_all_reduce={name!r} is none of {', '.join(get_args(Compression))}")
    if name and sequence_parallel:
        raise ValueError("compress_all_reduce: sequence parallelism has no all-reduces after products; leave one of them out")


def reducer(region: Region | None = None) -> Callable[[jax.Array, NamedSharding], jax.Array]:
    """In place of the all-reduce of a product: (shares of a sum over tp, the layout of the sum) -> the sum. region: how it runs
    inside of stages. Other sums stay as they are.
    """

    def reduce(y: jax.Array, out: NamedSharding) -> jax.Array:
        mesh, given = mesh_of(y, out.mesh), spec_of(y)
        over = {axis for axis in given.unreduced if mesh.shape[axis] > 1}
        if over != {"tp"} or any("tp" in (axis if isinstance(axis, tuple) else (axis,)) for axis in out.spec if axis):
            return reshard(y, out.spec, mesh)
        own = functools.partial(all_reduce, axis="tp", devices=mesh.shape["tp"])
        summed = region(own, (y,), _whole) if region else locally(own, y, out=_whole(y))
        return reshard(summed, out.spec, mesh)

    return reduce


def _whole(y: jax.Array) -> PartitionSpec:
    return PartitionSpec(*spec_of(y).partitions)


def all_reduce(y: jax.Array, *, axis: str, devices: int, form: Form | None = None) -> jax.Array:
    """The sum of y [...] over a mesh axis of so many devices, in y's dtype; in a region. form: default by size."""
    size = y.size
    few = devices == 2 or size * (devices - 1) <= ONE_STEP  # two devices send as much either way
    form = form or ("one step" if few else "two steps")
    each = GROUP * (devices if form == "two steps" else 1)
    flat = jnp.pad(y.reshape(-1).astype(jnp.float32), (0, -size % each))
    if form == "one step":
        found = _decoded(jax.lax.all_gather(_encoded(flat.reshape(-1, GROUP)), axis)).sum(axis=0)
    else:
        parts = _encoded(flat.reshape(devices, -1, GROUP))
        mine = _decoded(jax.lax.all_to_all(parts, axis, 0, 0)).sum(axis=0)
        found = _decoded(jax.lax.all_gather(_encoded(mine), axis))
    return found.reshape(-1)[:size].reshape(y.shape).astype(y.dtype)


def _encoded(x: jax.Array) -> jax.Array:
    """[..., 64] float32 -> [..., 66] int8: values, and the two bytes of their scale, in one message."""
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0).astype(jnp.bfloat16)
    values = jnp.clip(jnp.round(x / scale.astype(jnp.float32)), -LARGEST, LARGEST).astype(jnp.int8)
    return jnp.concatenate([values, jax.lax.bitcast_convert_type(scale[..., 0], jnp.int8)], axis=-1)


def _decoded(sent: jax.Array) -> jax.Array:
    scale = jax.lax.bitcast_convert_type(sent[..., GROUP:], jnp.bfloat16)
    return sent[..., :GROUP].astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
