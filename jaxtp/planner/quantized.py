"""Bytes a weight of kernels in few bits, scales included.

n groups of a kernel's inputs.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from jaxtp.checkpoint.names import first_module
from jaxtp.config import ModelConfig
from jaxtp.config.quantization import Scheme
from jaxtp.ops.quantized import held_scale

# a kernel of a block, and its place in a checkpoint
PATHS = {
    "qkv": "attention.qkv",
    "o": "attention.o",
    "gate_up": "mlp.gate_up",
    "down": "mlp.down",
    "shared gate_up": "moe.shared.gate_up",
    "shared down": "moe.shared.down",
    "experts gate_up": "moe.gate_up",
    "experts down": "moe.down",
}


def bytes_each(config: ModelConfig, kernel: str, dtype: str, *, inputs: int, parts: int = 1) -> float:
    """Of a weight of `kernel` (see `PATHS`) in a model of that dtype, on average over the layers that have it. inputs: of an
    output, of which each device has one of `parts` parts.
    """
    sparse = kernel.startswith(("experts", "shared"))
    layers = [i for i in range(config.num_layers) if kernel in ("qkv", "o") or config.sparse[i] == sparse]
    found = [_bytes(scheme, dtype, inputs, parts) for scheme in _schemes(config, PATHS[kernel], tuple(layers))]
    return sum(found) / len(found)


@functools.lru_cache(256)
def _schemes(config: ModelConfig, path: str, layers: tuple[int, ...]) -> list[Scheme | None]:
    if config.schemes is None:
        return [None]
    return [config.schemes.of(first_module(config, f"layers.{i}.{path}")) for i in layers]


def _bytes(scheme: Scheme | None, dtype: str, inputs: int, parts: int) -> float:
    plain = jnp.dtype(dtype)
    if scheme is None:
        return plain.itemsize
    n = scheme.groups(inputs)
    group = inputs // parts if n == 1 else scheme.inputs(inputs)
    return scheme.bits / 8 + (1 + scheme.zeros) * held_scale(scheme, n, plain).itemsize / group
