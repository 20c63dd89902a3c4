"""Keys and values in 8 bits, with a scale for each token and head: half the memory of a cache, and half of what is read of it.

The scale is never multiplied into keys or values: it goes on the scores, and on the probabilities. So XLA casts 8 bits inside
of the products, and writes nothing out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

CacheDtype = Literal["auto", "int8", "fp8"]  # auto: the model's
DTYPES: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


class OfValues:
    """What is held as `values` of few bits, seen as what these stand for; their scales lie with them."""

    values: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what they stand for."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def sharding(self) -> Any:
        """Of the values."""
        return self.values.sharding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coded(OfValues):
    """values [..., H] int8 or fp8, times scale [...]. Either may be abstract."""

    values: jax.Array
    scale: jax.Array

    def plain(self, dtype: jnp.dtype) -> jax.Array:
        """What it stands for."""
        return (self.values.astype(jnp.float32) * self.scale.astype(jnp.float32)[..., None]).astype(dtype)


Held = jax.Array | Coded


def each(take: Callable[..., jax.Array], *held: Held) -> Held:
    """`take` of arrays, or of the values and of the scales of coded ones: of dims that both have."""
    if not isinstance(held[0], Coded):
        return take(*held)
    coded = [a for a in held if isinstance(a, Coded)]
    return Coded(take(*(a.values for a in coded)), take(*(a.scale for a in coded)))


def apart(held: Held, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """What a product takes, in `dtype`, and the scale of what it gives, float32; of a plain array itself, and none."""
    return (held.values.astype(dtype), held.scale.astype(jnp.float32)) if isinstance(held, Coded) else (held, None)


def encode(x: jax.Array, dtype: Any, scale_dtype: Any, scale: jax.Array | None = None) -> Coded:
    """x [..., H] as int8 or fp8: the largest of each row of H becomes the largest value there is. scale: [] of all rows
    instead, beyond whose reach numbers are cut.
    """
    x, dtype = x.astype(jnp.float32), jnp.dtype(dtype)
    largest, most = jnp.abs(x).max(axis=-1), LARGEST[dtype.name]
    if scale is None:
        scale = jnp.where(largest > 0, largest / most, 1.0).astype(scale_dtype)
    else:
        scale = jnp.broadcast_to(scale.astype(scale_dtype), largest.shape)
    values = jnp.clip(x / scale.astype(jnp.float32)[..., None], -most, most)
    return Coded((jnp.round(values) if dtype == jnp.int8 else values).astype(dtype), scale)


def check_cache_dtype(name: str) -> None:
    """Raises ValueError for one that there is not."""
    if name not in get_args(CacheDtype):
        raise ValueError(f"kv_cache_dtype={name!r} is none of {', '.join(get_args(CacheDtype))}")
