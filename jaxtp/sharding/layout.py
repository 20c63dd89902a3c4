"""Layout: where a module's arrays lie, by the rules, on its mesh; and arrays brought to where they shall lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtp.sharding.rules import Axis, Rules, names


@dataclass(frozen=True)
class Layout:
    """Where the arrays of one module lie: the mesh, the rules, and the module's path in the model.

    stack: the layers whose weights the module's weights hold in a first dim "layers", one behind another (None: a row
    without a layer); empty where the module is itself.
    """

    mesh: Mesh
    rules: Rules
    dtype: jnp.dtype
    path: str = ""
    stack: tuple[int | None, ...] = ()

    def at(self, name: str) -> Layout:
        """The layout of the submodule or weight `name`."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    @property
    def data(self) -> tuple[str, ...]:
        """The axes that tokens are spread over: those of rows (dp, and ep where experts lie on it), and of the tokens of a row
        (cp).
        """
        return names(self.rules.axis("batch", self.path)) + names(self.rules.axis("tokens", self.path))

    def parts(self, dim: str) -> int:
        """Into how many pieces `dim` is cut here."""
        return size(self.mesh, self.rules.axis(dim, self.path))

    def spec(self, *dims: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these dims (None: a dim without a name, never sharded)."""
        axes = [None if dim is None else self.rules.axis(dim, self.path) for dim in dims]
        used = [name for axis in axes for name in names(axis)]
        if len(used) != len(set(used)):
            raise ValueError(f"{self.path}: the dims {dims} would use one mesh axis twice: {axes}")
        return PartitionSpec(*axes)

    def sharding(self, *dims: str | None) -> NamedSharding:
        """The same as a NamedSharding over the mesh."""
        return NamedSharding(self.mesh, self.spec(*dims))

    def param(self, name: str, **dims: int) -> nnx.Param:
        """An abstract weight: its dims by name with their sizes, in order. Loading or initialising fills it."""
        here = self.at(name)
        dims = {"layers": len(self.stack), **dims} if self.stack else dims
        shape = tuple(dims.values())
        for dim, size in dims.items():
            assert size % here.parts(dim) == 0, f"{here.path}: {dim}={size} over {here.parts(dim)} devices"
        abstract = jax.ShapeDtypeStruct(shape, self.dtype, sharding=here.sharding(*dims))
        return nnx.Param(abstract, dims=tuple(dims), stack=self.stack)

    def pad(self, dim: str, size: int) -> int:
        """`size` rounded up to what the mesh divides."""
        return math.ceil(size / self.parts(dim)) * self.parts(dim)

    def place(self, x: jax.Array, *dims: str | None) -> jax.Array:
        """`x` with the sharding of these dims: no operation where it has it already, communication where not."""
        return reshard(x, self.spec(*dims), self.mesh)

    def gather(self, x: jax.Array) -> jax.Array:
        """The residual stream [B, T, D] with every token on every device, for the head: an all-gather under sequence
        parallelism. Its type then says that the gradient is summed on its way back only: a reduce-scatter.
        """
        batch, tokens = self.spec("batch", "tokens")
        over = {*names(self.rules.axis("sequence", self.path))} - {*names(tokens)}
        if not over:
            return reshard(x, PartitionSpec(batch, tokens, None), self.mesh)
        # where stages hold the head together, the sum over them comes last on the way back, when each device has few tokens
        beyond = set(names(self.rules.axis("logits", self.path))) - over
        own = spec_of(x)
        x = reshard(x, PartitionSpec(*own.partitions, reduced=own.reduced | beyond), self.mesh)
        return reshard(x, PartitionSpec(batch, tokens, None, reduced=over | beyond), self.mesh)


def size(mesh: Mesh | jax.sharding.AbstractMesh, axis: Axis) -> int:
    """Into how many pieces a dim over `axis` is cut."""
    return math.prod(mesh.shape[name] for name in names(axis))


def mesh_of(x: jax.Array, default: Mesh | jax.sharding.AbstractMesh) -> jax.sharding.AbstractMesh:
    """The mesh that x's type speaks of: where a function is mapped over a mesh axis, one without it."""
    mesh = jax.typeof(x).sharding.mesh
    return default.abstract_mesh if mesh.empty else mesh


def spec_of(a: jax.Array | PartitionSpec) -> PartitionSpec:
    """The layout that its type says; of a layout itself."""
    return a if isinstance(a, PartitionSpec) else jax.typeof(a).sharding.spec


def specs_of(tree: Any) -> Any:
    """That of each array."""
    return jax.tree.map(spec_of, tree)


def reshard(x: jax.Array, spec: PartitionSpec, mesh: Mesh | jax.sharding.AbstractMesh) -> jax.Array:
    """`x` laid out as `spec` over its own mesh, or `mesh`; nothing is emitted where it lies so already."""
    target = NamedSharding(mesh_of(x, mesh), spec)
    return x if jax.typeof(x).sharding == target else jax.sharding.reshard(x, target)


def row_major(x: jax.Array) -> jax.Array:
    """`x` as arguments of programs lie in memory; in a region."""
    return with_layout_constraint(x, MemoryLayout(tuple(range(x.ndim))))


def zeros(tree: Any) -> Any:
    """Arrays of zeros, of the shapes and shardings that are given; inside a program over their mesh."""

    def array(a: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(a.shape, a.dtype, out_sharding=NamedSharding(a.sharding.mesh.abstract_mesh, a.sharding.spec))

    return jax.tree.map(array, tree)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array, the same on every process, laid out over the devices of all of them."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array on the host of every process, wherever its parts are."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
