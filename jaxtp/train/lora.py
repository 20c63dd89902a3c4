"""LoRA: a frozen model, and beside its kernels low-rank products, which are all that is trained (arXiv:2106.09685).

An adapter of the target `q_proj` is two parameters beside its kernel, "layers.*.attention.qkv.q_proj.a" [L, r, D] and
".b" [L, K, G, H, r]: laid out as the kernel is, with the rank whole on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.checkpoint.names import parts
from jaxtp.model.stacked import BLOCK, Params, Spec, Stacked
from jaxtp.ops.linear import Adapted, Adapter

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters in place of a whole model: kernel + alpha / rank · b a, where b starts at zero."""

    rank: int = 0
    """0: no adapters, every weight is trained."""
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    """Kernels by transformers' names."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must be at least 0")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"lora.targets={list(self.targets)} must be some of {', '.join(TARGETS)}")

    def told(self) -> dict[str, Any]:
        """What a checkpoint says of the adapters that it holds."""
        return {"lora_rank": self.rank, "lora_alpha": self.alpha, "lora_targets": ", ".join(sorted(self.targets))}


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model: their shapes and layouts, and how they meet its weights."""

    stacked: Stacked
    lora: Lora

    def specs(self) -> dict[str, Spec]:
        """Every parameter of the adapters, in order."""
        found: dict[str, Spec] = {}
        r, kernels = self.lora.rank, self.stacked.specs()
        for kernel, name, rows in self._sites():
            spec = kernels[kernel]
            (L, *outer, inner), (_, *cut, last) = spec.shape, spec.spec.partitions
            kv = 0
            if rows:
                outer[1] = rows.stop - rows.start
                kv = max(0, rows.stop - max(rows.start, spec.shape[2] - spec.kv))
            found[f"{name}.a"] = Spec((L, r, inner), ("layers", "rank", spec.dims[-1]), PartitionSpec(None, None, last))
            found[f"{name}.b"] = Spec((L, *outer, r), (*spec.dims[:-1], "rank"), PartitionSpec(None, *cut, None), kv)
        return found

    def begin(self, seed: int) -> Params:
        """New adapters in float32, the same on every mesh: a uniform in ±1/√I, as torch's linear layers; b zero."""
        mesh, key, made = self.stacked.layout.mesh, jax.random.key(seed), {}
        for i, (path, spec) in enumerate(self.specs().items()):
            make = jax.jit(
                _uniform if path.endswith(".a") else _zeros, static_argnums=1, out_shardings=NamedSharding(mesh, spec.spec)
            )
            made[path] = make(jax.random.fold_in(key, i), spec.shape)
        return made

    def beside(self, layer: Params) -> dict[str, jax.Array | Adapted]:
        """One layer's weights (paths as in a stack, arrays without the L dim), the adapters put to their kernels."""
        found: dict[str, jax.Array | Adapted] = dict(layer)
        at: dict[str, list[Adapter]] = {}
        for kernel, name, rows in self._sites():
            outside = None if rows is None else (rows.start, layer[kernel].shape[1] - rows.stop)
            at.setdefault(kernel, []).append(Adapter(layer[f"{name}.a"], layer[f"{name}.b"], outside))
        for kernel, adapters in at.items():
            found[kernel] = Adapted(layer[kernel], tuple(adapters), self._scale)
        return found

    def merged(self, frozen: Params, adapters: Params) -> Params:
        """The weights that both come to, laid out as the frozen ones and in their dtype; added in float32."""
        found = dict(frozen)
        for path, name, rows in self._sites():
            kernel = found[path]
            index = (slice(None), slice(None), rows or slice(None))

            def add(kernel: jax.Array, a: jax.Array, b: jax.Array, index: Any = index) -> jax.Array:
                delta = self._scale * jnp.einsum("l...r,lri->l...i", b, a)
                return (kernel.astype(jnp.float32).at[index].add(delta)).astype(kernel.dtype)

            with jax.set_mesh(self.stacked.layout.mesh):
                inside = jax.sharding.auto_axes(add, out_sharding=kernel.sharding)
                found[path] = jax.jit(inside)(kernel, adapters[f"{name}.a"], adapters[f"{name}.b"])
        return found

    @property
    def _scale(self) -> float:
        return self.lora.alpha / self.lora.rank

    def _sites(self) -> Iterator[tuple[str, str, slice | None]]:
        """(path of the kernel, path of the adapter, which rows of the kernel's second dim it is for; None: all)."""
        for path, spec in self.stacked.specs().items():
            if not path.startswith(BLOCK):
                continue
            for part in parts(self.stacked.config, path.replace("*", "0"), spec.shape[1:]):
                target = part.name.removesuffix(".weight").split(".")[-1]
                if target in self.lora.targets:
                    rows = part.select[1] if part.select else None
                    yield path, f"{path}.{target}", slice(rows, rows + 1) if isinstance(rows, int) else rows


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    bound = 1 / math.sqrt(shape[-1])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape)
