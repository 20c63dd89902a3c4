"""Weights of 8 bits: a kernel as integers, with a scale for each output channel. Activations, sums and the cache keep their
dtype: what is saved is memory, and the time to read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Quantization = Literal["int8"]
LEVELS = 127  # on either side of 0


class InPlace:
    """What stands in a kernel's place, where a weight is read as `param[...]`."""

    def __getitem__(self, index: object) -> Self:
        assert index is ..., f"{type(self).__name__} has no parts"
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized(InPlace):
    """A kernel [*O, I], to multiply with in its place: values [*O, I] int8 · scale [*O] float32. Either may be abstract."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def sharding(self) -> Any:
        """Of the values; each scale lies with its channel."""
        return self.values.sharding


def quantize(kernel: Any) -> Quantized:
    """A kernel [*O, I] rounded to the nearest of 255 values of each output channel, the largest of which is its largest weight
    (symmetric, as PyTorch's per-channel int8). Given a shape alone, the shapes.
    """
    if isinstance(kernel, jax.ShapeDtypeStruct):
        mesh, spec = kernel.sharding.mesh, kernel.sharding.spec
        channels = NamedSharding(mesh, PartitionSpec(*spec[:-1]))
        values: Any = jax.ShapeDtypeStruct(kernel.shape, jnp.int8, sharding=kernel.sharding)
        scale: Any = jax.ShapeDtypeStruct(kernel.shape[:-1], jnp.float32, sharding=channels)
        return Quantized(values, scale)
    return _quantize(kernel)


@jax.jit
def _quantize(kernel: jax.Array) -> Quantized:
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axis=-1)
    scale = jnp.where(largest > 0, largest / LEVELS, 1.0)
    return Quantized(jnp.round(kernel / scale[..., None]).astype(jnp.int8), scale)


def check_quantization(quantization: str | None, dtype: str) -> None:
    """Raises ValueError for what is not known, or does not go with the dtype."""
    if quantization not in (None, *get_args(Quantization)):
        raise ValueError(f"quantization={quantization!r} is not supported; supported: {', '.join(get_args(Quantization))}")
    if quantization and dtype == "float16":
        raise ValueError(
            f"quantization={quantization!r}: float16 may overflow before a product is scaled; use dtype='bfloat16'"
        )
