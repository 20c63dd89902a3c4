"""Kernels in few bits: values, a scale for each group of inputs of an output, and where a group's values count from.

Activations and sums keep their dtype (but in products of fp8 with fp8): what is saved is memory, and the time to read it. A
product is written as XLA fuses it, so that no decode step writes a kernel in 16 bits (`product`; docs/quantisation.md).

O outputs, I inputs, n groups of the inputs, B rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxtp.config.quantization import Scheme, Values
from jaxtp.mesh import platform
from jaxtp.ops import nf4
from jaxtp.ops.coded import OfValues
from jaxtp.sharding import reshard, size, spec_of

DTYPES: dict[Values, Any] = {"int4": jnp.int4, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "nf4": jnp.int4}
PACKS = jax.__version_info__ >= (0, 11)  # JAX 0.10 does not run a compiled program on arrays of 4 bits
# what the largest weight of a group becomes when 16 bits are rounded; of 4 bits half a step beyond the last value
LARGEST = {"int4": 7.5, "nf4": 7.5, "int8": 127.0, "fp8": 448.0}
RANGE = {"int4": (-8, 7), "nf4": (-8, 7), "int8": (-127, 127)}


class InPlace:
    """What stands in a kernel's place, where a weight is read as `param[...]`."""

    def __getitem__(self, index: object) -> Self:
        assert index is ..., f"{type(self).__name__} has no parts"
        return self


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Quantized(OfValues, InPlace):
    """A kernel [*O, I], to multiply with in its place: scale · values - shift, group by group.

    values: [*O, I] of `dtype_of(scheme.values)`. scale: [*O, n], float32 where n is 1, else of the model's dtype. shift: the
    same of scale · zero point, where the scheme has zeros. input_scale: [] float32, by which inputs of an fp8 product are
    divided. order: [I] int32, the inputs as the groups take them, where they do not stand so. Any may be abstract.
    """

    values: jax.Array
    scale: jax.Array
    scheme: Scheme
    shift: jax.Array | None = None
    input_scale: jax.Array | None = None
    order: jax.Array | None = None

    def tree_flatten(self) -> tuple[tuple[Any, ...], Scheme]:
        """Its arrays, and its scheme."""
        return (self.values, self.scale, self.shift, self.input_scale, self.order), self.scheme

    @classmethod
    def tree_unflatten(cls, scheme: Scheme, arrays: tuple[Any, ...]) -> Quantized:
        """The reverse."""
        values, scale, *others = arrays
        return cls(values, scale, scheme, *others)

    @property
    def groups(self) -> int:
        """n, of the inputs that are here."""
        return self.scale.shape[-1]

    def part(self, take: Callable[[jax.Array], jax.Array]) -> Quantized:
        """The part of it that `take` takes of outputs: of each array [*O, ·], with whatever dims in their place."""
        shift = None if self.shift is None else take(self.shift)
        return Quantized(take(self.values), take(self.scale), self.scheme, shift, self.input_scale, self.order)

    def plain(self, dtype: jnp.dtype) -> jax.Array:
        """[*O, I] in `dtype`, reckoned in it: in float32, XLA would not take groups into a product. NF4's levels, which it
        takes into none, are reckoned in float32.
        """
        if self.scheme.values == "nf4" and dtype != jnp.float32:
            return self.plain(jnp.dtype(jnp.float32)).astype(dtype)
        values = levels(self, dtype)
        if self.groups == 1:
            scale, shift = (None if a is None else _over_inputs(a.astype(dtype), values) for a in (self.scale, self.shift))
        else:
            values = values.reshape(*values.shape[:-1], self.groups, -1)
            scale, shift = (None if a is None else a.astype(dtype)[..., None] for a in (self.scale, self.shift))
        assert scale is not None
        made = (values * scale if shift is None else values * scale - shift).reshape(self.shape)
        return made.astype(self.scheme.rounded).astype(dtype) if self.scheme.rounded else made


def dtype_of(values: Values, device: jax.Device) -> Any:
    """In which so many bits are held on such devices: CPUs under JAX 0.10 hold 4 bits in 8."""
    return jnp.int8 if DTYPES[values] == jnp.int4 and device.platform == "cpu" and not PACKS else DTYPES[values]


def held_scale(scheme: Scheme, groups: int, dtype: jnp.dtype) -> jnp.dtype:
    """In which scales are held, in a model of that dtype."""
    return jnp.dtype(jnp.float32) if groups == 1 or scheme.values == "nf4" else jnp.dtype(dtype)


def abstract(kernel: jax.ShapeDtypeStruct, scheme: Scheme, *, path: str = "", stacked: bool = False) -> Quantized:
    """The shapes and layouts of a kernel [*O, I] of a model's dtype that is kept so. stacked: the first dim is layers. Raises
    ValueError where devices would cut its groups.
    """
    mesh, spec, (*outputs, inputs) = kernel.sharding.mesh, kernel.sharding.spec, kernel.shape
    n, parts = scheme.groups(inputs), size(mesh, spec[-1])
    if n > 1 and n % parts:
        raise ValueError(f"{path}: {parts} devices cannot share its {n} groups of {scheme.inputs(inputs)} inputs")
    where = NamedSharding(mesh, PartitionSpec(*spec[:-1], spec[-1] if n > 1 else None))
    layers, over = (outputs[:1], spec[:1]) if stacked else ([], [])

    def array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    scale = array((*outputs, n), held_scale(scheme, n, kernel.dtype), where)
    return Quantized(
        array(kernel.shape, dtype_of(scheme.values, mesh.devices.flat[0]), kernel.sharding),
        scale,
        scheme,
        scale if scheme.zeros else None,
        array((*layers,), jnp.float32, NamedSharding(mesh, PartitionSpec(*over))) if scheme.activations == "static" else None,
        array((*layers, inputs), jnp.int32, NamedSharding(mesh, PartitionSpec(*over, None))) if scheme.ordered else None,
    )


def quantize(kernel: Any, scheme: Scheme, *, path: str = "", stacked: bool = False, held: Any = None) -> Quantized:
    """A kernel [*O, I] rounded to the nearest values of each group, of which its largest weight has the largest (symmetric, as
    PyTorch's per-channel int8). Given a shape alone, the shapes. held: the dtype of scales, default as models hold them. Zero
    points are 0; NF4's levels are no weight's.
    """
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return abstract(kernel, scheme, path=path, stacked=stacked)
    return _quantize(kernel, scheme, dtype_of(scheme.values, next(iter(kernel.sharding.device_set))), stacked, held)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(kernel: jax.Array, scheme: Scheme, dtype: Any, stacked: bool, held: Any) -> Quantized:
    n, groups = scheme.groups(kernel.shape[-1]), kernel.astype(jnp.float32)
    groups = groups.reshape(*kernel.shape[:-1], n, -1) if n > 1 else groups
    largest = jnp.abs(groups).max(axis=-1)
    scale = jnp.where(largest > 0, largest / LARGEST[scheme.values], 1.0).astype(held or held_scale(scheme, n, kernel.dtype))
    values = groups / scale.astype(jnp.float32)[..., None]
    if scheme.values != "fp8":
        values = jnp.clip(jnp.round(values), *RANGE[scheme.values])
    scale, layers = scale if n > 1 else scale[..., None], kernel.shape[:1] if stacked else ()
    own = jax.typeof(kernel).sharding

    def of_layers(a: jax.Array) -> jax.Array:
        return reshard(a, PartitionSpec(own.spec[0], *[None] * (a.ndim - 1)), own.mesh) if stacked else a

    return Quantized(
        values.astype(dtype).reshape(kernel.shape),
        scale,
        scheme,
        0 * scale if scheme.zeros else None,
        of_layers(jnp.ones(layers)) if scheme.activations == "static" else None,
        of_layers(jax.lax.broadcasted_iota(jnp.int32, (*layers, kernel.shape[-1]), len(layers))) if scheme.ordered else None,
    )


# -- products --------------------------------------------------------------------------------------------------------------

FEW_ROWS = 256  # below, XLA:GPU fuses groups only where the inputs are in two parts or more
FILLS = 24_576  # outputs, of all parts together, that keep a GPU busy
PARTS = 16  # at most
FEW_GROUPS = 31  # whose shifts are taken away one by one


def product(rows: jax.Array, kernel: Quantized, out: PartitionSpec | None = None, *, fp8: bool = False) -> jax.Array:
    """rows [B, I] times kernel [*O, I] on GPUs: [B, O] float32, laid out as `out` (of one device's own arrays: None).

    One group: values are cast inside of the product, and what comes out is scaled; or inputs become fp8, where the scheme has
    such activations, the devices multiply it (fp8), and many rows make it faster. Several: inputs are summed in parts, each a
    product of its own, so that XLA:GPU takes the scaling into it (`xla_flags.QUANTIZED`). Zero points take away the sums of
    groups' inputs times their shifts. NF4 has a kernel, where it fits (`nf4.product`).
    """
    f32, mesh = jnp.float32, jax.typeof(rows).sharding.mesh
    at = None if out is None else NamedSharding(mesh, out)
    kernel = kernel.part(lambda a: a.reshape(-1, a.shape[-1]))
    B, (outputs, n) = len(rows), kernel.scale.shape
    few, here, pieces = B < FEW_ROWS, outputs, 1  # pieces: of the inputs, one on each device
    if out is not None:
        batch, summed = spec_of(rows).partitions
        few = B // size(mesh, batch) < FEW_ROWS
        here, pieces = outputs // size(mesh, out.partitions[1]), size(mesh, summed)
    if fp8 and kernel.scheme.activations and not few:
        return _product_of_fp8(rows.reshape(B, pieces, -1), kernel, at)
    if n == 1 and kernel.shift is not None:
        parts, values = rows.reshape(B, pieces, -1), levels(kernel, rows.dtype).reshape(outputs, pieces, -1)
        y = jnp.einsum("bpi,opi->pbo", parts, values, preferred_element_type=f32) * kernel.scale[:, 0]
        y = y - parts.astype(f32).sum(axis=-1).T[..., None] * kernel.shift[:, 0]
        return jax.lax.reduce_sum(y, (0,), out_sharding=at)
    if n == 1:
        y = jnp.einsum("bi,oi->bo", rows, levels(kernel, rows.dtype), preferred_element_type=f32, out_sharding=at)
        return y * _of_shares(kernel.scale[:, 0], out)
    if kernel.scheme.values == "nf4" and nf4.fits(rows, kernel.values, kernel.scale):
        run = nf4.product_of_one if out is None else nf4.product
        y = run(rows, kernel.values, kernel.scale, rounded=kernel.scheme.rounded, interpret=platform(mesh) == "cpu")
        return jax.lax.reduce_sum(y, (0,), out_sharding=at)
    if kernel.scheme.values == "nf4" or (n > pieces and not few):
        return jnp.einsum("bi,oi->bo", rows, kernel.plain(rows.dtype), preferred_element_type=f32, out_sharding=at)
    k = pieces if n == pieces else pieces * split(n // pieces, here)
    m = n // k  # groups of a part
    parts, values = rows.reshape(B, k, -1), levels(kernel, rows.dtype)
    if m == 1:
        y = jnp.einsum("bki,oki->kbo", parts, values.reshape(outputs, k, -1), preferred_element_type=f32)
        y = y * kernel.scale.astype(f32).T[:, None]
    else:
        values = values.reshape(outputs, k, m, -1) * kernel.scale.reshape(outputs, k, m, 1)
        y = jnp.einsum("bki,oki->kbo", parts, values.reshape(outputs, k, -1), preferred_element_type=f32)
    if kernel.shift is not None:
        sums = rows.astype(f32).reshape(B, k, m, -1).sum(axis=-1)
        y = _shifted(y, sums, kernel.shift.astype(f32).reshape(outputs, k, m), pieces)
    return jax.lax.reduce_sum(y, tuple(range(y.ndim - 2)), out_sharding=at)


def _shifted(y: jax.Array, sums: jax.Array, shift: jax.Array, pieces: int) -> jax.Array:
    """y [k, B, O], less sums [B, k, m] times shift [O, k, m], before it is summed over k, or but for its pieces: written in one
    of two ways, for few groups and for many, of which XLA:GPU makes no kernels of their own.
    """
    B, k, m = sums.shape
    if k * m // pieces > FEW_GROUPS:
        first = jnp.arange(m)[:, None, None] == 0
        return jnp.where(first, y[:, None], 0.0) - sums.transpose(1, 2, 0)[..., None] * shift.transpose(1, 2, 0)[:, :, None]
    y = y.reshape(pieces, k // pieces, B, -1).sum(axis=1)
    sums, shift = (a.reshape(len(a), pieces, k // pieces, m) for a in (sums, shift))
    for i, j in itertools.product(range(k // pieces), range(m)):
        y = y - sums[:, :, i, j].T[..., None] * shift[:, :, i, j].T[:, None]
    return y


def _product_of_fp8(rows: jax.Array, kernel: Quantized, at: NamedSharding | None) -> jax.Array:
    """rows [B, pieces, I'], each piece of a row scaled by its largest, or all by the checkpoint's number."""
    f32, fp8, (B, pieces, _) = jnp.float32, kernel.dtype, rows.shape
    if kernel.input_scale is None:
        largest = jnp.abs(rows).max(axis=-1).astype(f32)
        scale = jnp.where(largest > 0, largest / LARGEST["fp8"], 1.0)
    else:
        scale = jnp.broadcast_to(kernel.input_scale, (B, pieces))
    most = float(jnp.finfo(fp8).max)
    coded = jnp.clip(rows.astype(f32) / scale[..., None], -most, most).astype(fp8)
    values = kernel.values.reshape(len(kernel.values), pieces, -1)
    y = jnp.einsum("bpi,opi->pbo", coded, values, preferred_element_type=f32)
    y = y * scale.T[..., None] * kernel.scale[:, 0]
    return jax.lax.reduce_sum(y, (0,), out_sharding=at)


def multiplies_fp8(mesh: Mesh | AbstractMesh) -> bool:
    """Whether its devices multiply fp8 with fp8: GPUs of compute capability 8.9 and up."""
    capability = getattr(mesh.devices.flat[0], "compute_capability", "0") if isinstance(mesh, Mesh) else "0"
    return tuple(map(int, capability.split("."))) >= (8, 9)


def _of_shares(a: jax.Array, out: PartitionSpec | None) -> jax.Array:
    """[O], to meet shares of a sum that are laid out as `out`."""
    if out is None or not out.unreduced:
        return a
    return reshard(a, PartitionSpec(*spec_of(a).partitions, reduced=out.unreduced), jax.typeof(a).sharding.mesh)


def split(groups: int, outputs: int) -> int:
    """In how many parts so many groups of the inputs are summed: two at least, which all have as many groups."""
    legal = [k for k in range(2, min(groups, PARTS) + 1) if groups % k == 0 and (groups // k > 1 or groups < 4)]
    enough = [k for k in legal if k * outputs >= FILLS]
    return enough[0] if enough else legal[-1] if legal else groups


def levels(kernel: Quantized, dtype: jnp.dtype) -> jax.Array:
    """What the values stand for, before they are scaled."""
    if kernel.scheme.values != "nf4":
        return kernel.values.astype(dtype)
    return _level(kernel.values, 0, len(nf4.LEVELS)).astype(dtype)


def _level(values: jax.Array, low: int, high: int) -> jax.Array:
    """NF4's, chosen by comparisons: a lookup would be a kernel of its own."""
    if high - low == 1:
        return jnp.float32(nf4.LEVELS[low])  # type: ignore[return-value]
    middle = (low + high) // 2
    return jnp.where(values < jnp.asarray(middle - 8, values.dtype), _level(values, low, middle), _level(values, middle, high))


def _over_inputs(a: jax.Array, values: jax.Array) -> jax.Array:
    """[*O, 1] -> [*O, I], laid out as the values are."""
    return reshard(jnp.broadcast_to(a, values.shape), spec_of(values), jax.typeof(values).sharding.mesh)
