"""Grouped products on Hopper GPUs: rows of one expert after another, each times its own expert's kernel, in one kernel.

The kernels are JAX's own (Pallas, Mosaic GPU). They touch the rows of groups alone: what lies behind the last group comes back
as whatever memory held. R rows, E experts; a kernel is [E, O, I].
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtp.sharding import varying_as

COLUMNS = 128  # of a tile: what O and I are multiples of
_TILES: dict[str, Any] = {"block_n": COLUMNS, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 1}


def fits(mesh: Mesh, dtype: str | jnp.dtype, *dims: int) -> bool:
    """Whether they run on the mesh's devices (compute capability 9: H100, H200, GH200), with kernels of such dims."""
    capability = getattr(mesh.devices.flat[0], "compute_capability", "")
    return capability.startswith("9.") and jnp.dtype(dtype).itemsize == 2 and not any(dim % COLUMNS for dim in dims)


@jax.custom_vjp
def grouped(rows: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    """rows [R, I], kernel [E, *O, I], sizes [E] int32 -> [R, O]; rows behind those of all groups are undefined."""
    return _product(rows, kernel.reshape(len(kernel), -1, kernel.shape[-1]), sizes, turned=True)


def _forward(rows: jax.Array, kernel: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return grouped(rows, kernel, sizes), (rows, kernel, sizes)


def _backward(kept: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, kernel, sizes = kept
    to_rows = _product(grad, kernel.reshape(len(kernel), -1, kernel.shape[-1]), sizes, turned=False)
    to_rows = jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], to_rows, jnp.zeros((), rows.dtype))
    return to_rows, _of_kernel(grad, rows, sizes).reshape(kernel.shape), None


grouped.defvjp(_forward, _backward)


def _product(rows: jax.Array, kernel: jax.Array, sizes: jax.Array, *, turned: bool) -> jax.Array:
    """turned: over the kernel's last dim, else over its second."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    tile = 128 if len(rows) > 512 else 64
    out = ragged_dot(rows, kernel, group_sizes=sizes, transpose_rhs=turned, block_m=tile, **_TILES)
    return varying_as(out, rows, kernel, sizes)  # it does not say itself over which axes of a region it differs


def _of_kernel(grad: jax.Array, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """grad [R, O], rows [R, I] -> [E, O, I]: of each group the sum over its rows."""
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu as module

    # it asks this process's first device for its multiprocessors, also where a program is compiled for GPUs elsewhere
    here = jax.devices()[0]
    devices = [here if hasattr(here, "core_count") else mock.Mock(core_count=132)]
    with mock.patch.object(module.jax, "devices", return_value=devices):
        out = module.transposed_ragged_dot(grad, rows, group_sizes=sizes, block_m=COLUMNS, **_TILES)
    return varying_as(out, grad, rows, sizes)
