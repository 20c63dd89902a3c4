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

from jaxtp.ops.coded import Coded, encode
from jaxtp.parallel.regions import locally
from jaxtp.sharding import Region, mesh_of, names, reshard, size, spec_of

Compression = Literal["int8"]
GROUP = 64  # numbers with one scale
ONE_STEP = 1 << 18  # bytes that a device sends of a sum, up to which a second message costs more than it saves
Form = Literal["one step", "two steps"]


def check_compression(name: str | None, *, sequence_parallel: bool) -> None:
    """Raises ValueError for one that there is not, or that has nothing to compress."""
    if name not in (None, *get_args(Compression)):
        raise ValueError(f"compress_all_reduce={name!r} is none of {', '.join(get_args(Compression))}")
    if name and sequence_parallel:
        raise ValueError("compress_all_reduce: sequence parallelism has no all-reduces after products; leave one of them out")


def reducer(region: Region | None = None) -> Callable[[jax.Array, NamedSharding], jax.Array]:
    """In place of the all-reduce of a product: (shares of a sum over tp, or tp and cp, the layout of the sum) -> the sum.
    region: how it runs inside of stages. Other sums stay as they are.
    """

    def reduce(y: jax.Array, out: NamedSharding) -> jax.Array:
        mesh, given = mesh_of(y, out.mesh), spec_of(y)
        over = tuple(axis for axis in ("tp", "cp") if axis in given.unreduced and mesh.shape[axis] > 1)
        others = any(mesh.shape[axis] > 1 for axis in given.unreduced - {*over})
        if others or not over or any({*names(axis)} & {*over} for axis in out.spec):
            return reshard(y, out.spec, mesh)
        own = functools.partial(all_reduce, axis=over, devices=size(mesh, over))
        summed = region(own, (y,), _whole) if region else locally(own, y, out=_whole(y))
        return reshard(summed, out.spec, mesh)

    return reduce


def _whole(y: jax.Array) -> PartitionSpec:
    return PartitionSpec(*spec_of(y).partitions)


def choose_form(numbers: int, devices: int) -> Form:
    """In how many steps so many numbers are summed. Two devices send as much either way."""
    return "one step" if devices == 2 or numbers * (devices - 1) <= ONE_STEP else "two steps"


def all_reduce(y: jax.Array, *, axis: str | tuple[str, ...], devices: int, form: Form | None = None) -> jax.Array:
    """The sum of y [...] over mesh axes of so many devices, in y's dtype; in a region. form: default by size."""
    size = y.size
    form = form or choose_form(size, devices)
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
    coded = encode(x, jnp.int8, jnp.bfloat16)
    return jnp.concatenate([coded.values, jax.lax.bitcast_convert_type(coded.scale, jnp.int8)], axis=-1)


def _decoded(sent: jax.Array) -> jax.Array:
    scale = jax.lax.bitcast_convert_type(sent[..., GROUP:], jnp.bfloat16)
    return Coded(sent[..., :GROUP], scale).plain(jnp.dtype(jnp.float32))
