"""Looking at a model, real or abstract: its weights by path, what stacks hold, and where each lies.

`describe(model)` prints it all as a table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from rich.table import Table

from jaxtp.mesh import told
from jaxtp.sharding import names
from jaxtp.tables import Shown


@dataclass(frozen=True)
class Weight:
    """One weight of a model: its path, dims with sizes, spec, dtype, bytes in all and on each device."""

    path: str
    dims: Mapping[str, int]
    spec: PartitionSpec
    dtype: str
    total_bytes: int
    device_bytes: int

    @property
    def replicated(self) -> bool:
        """Whether every device holds all of it."""
        return not any(names(axis) for axis in self.spec)


@dataclass(frozen=True, repr=False)
class Description(Shown):
    """The weights of a model and where they lie; prints as a table, and shows as one in a notebook."""

    title: str
    weights: tuple[Weight, ...]
    note: str | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.total_bytes for weight in self.weights)

    @property
    def device_bytes(self) -> int:
        """Bytes of weights on each device."""
        return sum(weight.device_bytes for weight in self.weights)

    def table(self) -> Table:
        """A row for each weight; weights that are alike in every layer share one."""
        table = Table(title=self.title, caption=self.note)
        for column in ("weight", "dims", "spec", "dtype"):
            table.add_column(column)
        for column in ("count", "MiB in all", "MiB on each device"):
            table.add_column(column, justify="right")
        table.add_column("")
        for alike in self._alike():
            weight, count = alike[0], len(alike)
            path = re.sub(r"\.\d+\.", ".*.", weight.path) if count > 1 else weight.path
            dims = ", ".join(f"{dim} {size}" for dim, size in weight.dims.items())
            spec = ", ".join("·".join(names(axis)) or "-" for axis in weight.spec)
            sizes = [f"{count * size / 2**20:,.2f}" for size in (weight.total_bytes, weight.device_bytes)]
            table.add_row(path, dims, f"({spec})", weight.dtype, str(count), *sizes, "replicated" if weight.replicated else "")
        table.add_section()
        totals = [f"{size / 2**20:,.2f}" for size in (self.total_bytes, self.device_bytes)]
        table.add_row("total", "", "", "", str(len(self.weights)), *totals, "")
        return table

    def _alike(self) -> list[list[Weight]]:
        groups: dict[object, list[Weight]] = {}
        for weight in self.weights:
            key = (re.sub(r"\.\d+\.", ".*.", weight.path), tuple(weight.dims.items()), weight.spec, weight.dtype)
            groups.setdefault(key, []).append(weight)
        return list(groups.values())


def describe(model: nnx.Module) -> Description:
    """Every weight of a model, abstract or real: dims, spec, bytes in all and on each device."""
    mesh = next(iter(jax.tree.leaves(nnx.state(model, nnx.Param)))).sharding.mesh
    stacks = [weight.get_metadata()["stack"] for path, weight in variables(model) if path.endswith("attention.o")]
    places, layers = sum(map(len, stacks)), sum(layer is not None for stack in stacks for layer in stack)
    note = None
    if places > layers:
        note = f"{layers} layers in {places} places: empty ones add {places / layers - 1:.1%} to the blocks' time and memory"
    return Description(f"weights on {told(mesh.shape)}", tuple(weights(model)), note)


def variables(model: nnx.Module) -> list[tuple[str, nnx.Variable]]:
    """(path, variable) of each weight of a model, in order, e.g. ("layers.3.attention.qkv", ...)."""
    return [(".".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def layers_of(path: str, weight: nnx.Variable) -> list[str | None]:
    """The layers' weights that stand in a stack, by path ("layers.1.mlp.down"; None: no layer in that row); of any other
    weight itself.
    """
    name = path.split(".", 2)[-1]
    stack = weight.get_metadata()["stack"]
    return [None if layer is None else f"layers.{layer}.{name}" for layer in stack] if stack else [path]


def weights(model: nnx.Module) -> Iterator[Weight]:
    """The weights of a model, abstract or real, in order."""
    for path, variable in variables(model):
        array = variable.get_value()
        parts = jax.tree.leaves(array)  # a quantized kernel has several
        yield Weight(
            path=path,
            dims=dict(zip(variable.get_metadata()["dims"], array.shape, strict=True)),
            spec=array.sharding.spec,
            dtype=jnp.dtype(array.dtype).name,
            total_bytes=sum(_bytes(a.shape, a.dtype) for a in parts),
            device_bytes=sum(_bytes(a.sharding.shard_shape(a.shape), a.dtype) for a in parts),
        )


def _bytes(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    return math.prod(shape) * jax.dtypes.itemsize_bits(dtype) // 8
