"""What devices really do: copies, matrix products, and collectives over the axes of a mesh, timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
REPEATS, MANY = 10, 8  # calls; collectives in one call, whose time beyond that of a single one is theirs


@dataclass(frozen=True)
class Timed:
    """A collective over one axis: bytes of the whole array, seconds, and bus bandwidth as nccl-tests define it (bytes a second
    through each device's link).
    """

    kind: str
    axis: str
    devices: int
    bytes: int
    seconds: float

    @property
    def bus(self) -> float:
        """Bytes a second."""
        n = self.devices
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return factor * self.bytes / self.seconds


def copy_rate(device: jax.Device | None = None) -> float:
    """Bytes a second, read and written, of adding one to a large array in place."""
    gpu = jax.default_backend() == "gpu"
    x = jax.device_put(jnp.zeros(2**30 if gpu else 2**26, jnp.bfloat16 if gpu else jnp.float32), device)
    return 2 * x.nbytes / fastest(jax.jit(lambda x: x + 1, donate_argnums=0), x)


def product_rate(dtype: str = "bfloat16", device: jax.Device | None = None) -> float:
    """Operations a second of a large square matrix product, of random numbers: ones take less power, and run faster."""
    size = 8192 if jax.default_backend() == "gpu" else 2048
    x = jax.device_put(jax.random.normal(jax.random.key(0), (size, size), dtype), device)

    def product(x: jax.Array) -> jax.Array:
        return (jnp.einsum("IK,JK->IJ", x, x, preferred_element_type=jnp.float32) / size).astype(x.dtype)

    return 2 * size**3 / fastest(jax.jit(product), x)


def fastest(function: Callable[[Any], Any], x: Any) -> float:
    """Seconds of the best of ten calls, each with what the one before gave."""
    y = jax.block_until_ready(function(x))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        y = jax.block_until_ready(function(y))
        best = min(best, time.perf_counter() - start)
    return best


def collective_rates(mesh: Mesh, sizes: tuple[int, ...], *, kinds: tuple[str, ...] = KINDS) -> Iterator[Timed]:
    """Every kind over every axis of more than one device, for arrays of so many bytes."""
    for axis, devices in mesh.shape.items():
        for kind in kinds if devices > 1 else ():
            for size in sizes:
                yield _timed(mesh, axis, kind, size)


def hops(mesh: Mesh, size: int) -> dict[tuple[int, int], float]:
    """Bytes a second from each device to the next one, while all others are silent, by ids."""
    devices = list(mesh.devices.flat)
    found = {}
    for a, b in zip(devices, devices[1:] + devices[:1], strict=True) if len(devices) > 1 else ():
        pair = Mesh([a, b], ("pair",))
        found[a.id, b.id] = size / _timed(pair, "pair", "collective-permute", size).seconds
    return found


def _timed(mesh: Mesh, axis: str, kind: str, size: int) -> Timed:
    n = mesh.shape[axis]
    count = max(size // 4 // (n * n) * n * n, n * n)  # float32, and every device's part cut once more
    whole = PartitionSpec()
    cut = PartitionSpec(axis)
    spec = cut if kind == "all-gather" else whole
    ring = [(i, (i + 1) % n) for i in range(n if n > 2 else 1)]  # of two, one sends
    each: dict[str, Callable[[jax.Array], jax.Array]] = {
        "all-reduce": lambda x: jax.lax.psum(x, axis) / n,
        "all-gather": functools.partial(_gathered, axis=axis),  # and back to the device's own part, which sends nothing
        # into the first part of what it was
        "reduce-scatter": lambda x: jax.lax.dynamic_update_slice(x, jax.lax.psum_scatter(x, axis, tiled=True) / n, (0,)),
        "all-to-all": lambda x: jax.lax.all_to_all(x.reshape(n, -1), axis, 0, 0).reshape(-1),
        "collective-permute": lambda x: jax.lax.ppermute(x, axis, ring),
    }
    inside = each[kind]

    def repeated(times: int) -> Any:
        def run(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, times, lambda i, x: inside(x), x)

        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), donate_argnums=0)

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones(count, jnp.float32), NamedSharding(mesh, spec))
        once, many = fastest(repeated(1), x + 0), fastest(repeated(1 + MANY), x)
    seconds = max(many - once, 0.1 * many) / MANY  # a call's own time falls out
    return Timed(kind, axis, n, 4 * count, seconds)


def _gathered(x: jax.Array, axis: str) -> jax.Array:
    whole = jax.lax.all_gather(x, axis, tiled=True)
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis) * x.shape[0], x.shape[0])
