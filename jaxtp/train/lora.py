"""LoRA: a frozen model, and beside its kernels low-rank products, which are all that is trained (arXiv:2106.09685).

An adapter of the target `q_proj` is two parameters beside its kernel, "layers.*.attention.qkv.q_proj.a" [L, r, D] and
".b" [L, K, G, H, r]: laid out as the kernel is, with the rank whole on every device. Where ranks differ between layers, r is
the largest, and what a layer has less is zero in both: so it stays, for the gradient of each is a product with the other.
Layers whose scale differs have parameters of their own ("….q_proj.1.a"). Adapters of experts have a dim for these behind L, and
are added to their kernels, a layer at a time: grouped products know one kernel.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.checkpoint.adapters import KERNELS, TABLES, Adapter, Lora, fits
from jaxtp.checkpoint.names import Part, parts
from jaxtp.config import FAMILIES
from jaxtp.model.stacked import BLOCK, Params, Spec, Stacked
from jaxtp.ops import linear
from jaxtp.sharding import fetch, put
from jaxtp.xla_flags import exact

SEPARATE = ("o_proj", "down_proj")  # what every family has by itself


@dataclass(frozen=True, kw_only=True)
class Options:
    """Low-rank adapters in place of a whole model: kernel + alpha / rank · b a, where b starts at zero."""

    start: str | None = None
    """Adapter in PEFT's format (folder or hub id) to go on from; all else here is then as it says."""
    rank: int | None = None
    """Default none, or 0: no adapters, every weight is trained."""
    alpha: float | None = None
    """Default 16."""
    targets: tuple[str, ...] | None = None
    """Kernels by transformers' names, or single ones such as layers.3.self_attn.q_proj; default all."""
    rank_pattern: dict[str, int] | None = None
    """Other ranks, by regular expressions for the ends of names, as PEFT has them."""
    alpha_pattern: dict[str, float] | None = None
    """Other alphas, likewise."""
    rslora: bool | None = None
    """alpha / √rank in place of alpha / rank (arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        Lora(**self._said())  # raises where it cannot be

    @property
    def lora(self) -> Lora | None:
        """The adapters that are asked for, if any."""
        return Lora(**self._said()) if self.rank else None

    def started(self, adapter: Adapter) -> Options:
        """These options with all that the adapter says. Raises ValueError where they contradict it."""
        found = {f.name: getattr(adapter.lora, f.name) for f in fields(Lora)}
        for name, value in self._said().items():
            same = set(value) == set(found[name]) if name == "targets" else value == found[name]
            if not same:
                raise ValueError(
                    f"lora.{name}={value} contradicts lora.start={self.start}, whose own is {found[name]}; leave it out"
                )
        return Options(start=self.start, **found)

    def _said(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(Lora) if getattr(self, f.name) is not None}


@dataclass(frozen=True)
class Site:
    """One adapter in the stacks.

    kernel: the path of what it stands beside, path: its own. rows: for which of the kernel's dim after its first it is; None:
    all. layers: that have it. experts: of each, 0 where the kernel is none of experts. parts: the module in each layer, and of
    each expert there. ranks: of each, 0 where there is none of this scale.
    """

    kernel: str
    path: str
    rows: slice | None
    layers: tuple[int, ...]
    experts: int
    parts: tuple[Part, ...]
    ranks: tuple[int, ...]
    scale: float

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks)

    @property
    def lead(self) -> tuple[int, ...]:
        """The dims before a matrix: [L], or [L, E]."""
        return (len(self.layers), self.experts) if self.experts else (len(self.layers),)

    def modules(self) -> list[tuple[tuple[int, ...], int, str, Part]]:
        """(place, rank, name, part) of all that there are."""
        places = np.ndindex(self.lead)
        each = zip(places, self.ranks, self.parts, strict=True)
        return [(place, rank, _module(part), part) for place, rank, part in each if rank]

    def cut(self, whole: Any) -> Any:
        """Of an array with the dims O of one kernel the rows that the adapter is for."""
        return whole if self.rows is None else whole[:, self.rows]


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model: their shapes and layouts, and how they meet its weights."""

    stacked: Stacked
    lora: Lora

    def __post_init__(self) -> None:
        named = [_module(part) for site in self.sites for part in site.parts]
        for target in self.lora.targets:
            if target.rpartition(".")[2] in TABLES:
                raise ValueError(f"lora.targets: {target} is no kernel of the layers; those alone are trained as adapters")
            kind = target.rpartition(".")[2]
            if FAMILIES[self.stacked.config.model_type].fused and kind not in SEPARATE:
                raise ValueError(
                    f"lora.targets: {target}: this model has q, k and v in one module, and gate and up; adapters for these are "
                    f"merged as a checkpoint is loaded, but not trained. Targets that are: {', '.join(SEPARATE)}"
                )
            if not any(module == target or module.endswith(f".{target}") for module in named):
                raise ValueError(f"lora.targets: {target} is no module of this model of {self._layers} layers")
        for name, patterns in (("rank", self.lora.rank_pattern), ("alpha", self.lora.alpha_pattern)):
            for pattern in patterns:
                if not any(fits(pattern, module) for module in named):
                    raise ValueError(f"lora.{name}_pattern: {pattern!r} fits no module that has an adapter")

    def specs(self) -> dict[str, Spec]:
        """Every parameter of the adapters, in order."""
        found: dict[str, Spec] = {}
        kernels = self.stacked.specs()
        for site in self.sites:
            spec, r, n = kernels[site.kernel], site.rank, len(site.lead)
            (*outer, inner), (*cut, last) = spec.shape, spec.spec.partitions
            kv = 0
            if site.rows:
                kv = max(0, site.rows.stop - max(site.rows.start, outer[n + 1] - spec.kv))
                outer[n + 1] = site.rows.stop - site.rows.start
            dims, along = (*spec.dims[:n], "rank", spec.dims[-1]), PartitionSpec(*cut[:n], None, last)
            found[f"{site.path}.a"] = Spec((*site.lead, r, inner), dims, along, spec.layers)
            found[f"{site.path}.b"] = Spec((*outer, r), (*spec.dims[:-1], "rank"), PartitionSpec(*cut, None), spec.layers, kv)
        return found

    def begin(self, seed: int) -> Params:
        """New adapters in float32, the same on every mesh: a uniform in ±1/√I, as torch's linear layers; b zero."""
        mesh, key, made = self.stacked.layout.mesh, jax.random.key(seed), {}
        ranks = {f"{site.path}.a": site.ranks for site in self.sites}
        for i, (path, spec) in enumerate(self.specs().items()):
            make = jax.jit(
                _uniform if path in ranks else _zeros, static_argnums=(1, 2), out_shardings=NamedSharding(mesh, spec.spec)
            )
            made[path] = make(jax.random.fold_in(key, i), spec.shape, ranks.get(path))
        return made

    def taken(self, adapter: Adapter) -> Params:
        """The adapters of a folder, in float32."""
        mesh, specs, kernels, made = self.stacked.layout.mesh, self.specs(), self.stacked.specs(), {}
        for site in self.sites:
            names = f"{site.path}.a", f"{site.path}.b"
            a, b = (np.zeros(specs[name].shape, np.float32) for name in names)
            for place, r, module, part in site.modules():
                found_a, found_b = (m.astype(np.float32) for m in adapter.matrices(module))
                a[place][:r] = found_a
                whole = np.zeros((*kernels[site.kernel].shape[len(place) : -1], r), np.float32)
                part.read(whole, (slice(None),) * whole.ndim, whole.shape, found_b.__getitem__)
                b[place][..., :r] = site.cut(whole)
            for name, array in zip(names, (a, b), strict=True):
                made[name] = put(array, NamedSharding(mesh, specs[name].spec))
        return made

    def matrices(self, params: Params) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(A [r, I], B [O, r]) of each module, as PEFT holds them: `taken` the other way round. Stacks are in the model's order
        of layers.
        """
        kernels, found = self.stacked.specs(), {}
        for site in self.sites:
            a, b = (fetch(params[f"{site.path}.{matrix}"]) for matrix in "ab")
            for place, r, module, part in site.modules():
                whole = np.zeros((*kernels[site.kernel].shape[len(place) : -1], r), b.dtype)
                site.cut(whole)[...] = b[place][..., :r]
                found[module] = a[place][:r], part.write(whole)
        return found

    def beside(self, layer: Params) -> dict[str, jax.Array | linear.Adapted]:
        """One layer's weights (paths as in a stack, arrays without the L dim), the adapters put to their kernels."""
        found: dict[str, Any] = dict(layer)
        at: dict[str, list[linear.Adapter]] = {}
        for site in self.sites:
            if site.kernel not in layer:
                continue
            if site.experts:
                found[site.kernel] = _added(found[site.kernel], layer[f"{site.path}.a"], layer[f"{site.path}.b"], site, 1)
                continue
            rows = site.rows
            outside = None if rows is None else (rows.start, layer[site.kernel].shape[1] - rows.stop)
            adapter = linear.Adapter(layer[f"{site.path}.a"], layer[f"{site.path}.b"], site.scale, outside)
            at.setdefault(site.kernel, []).append(adapter)
        for kernel, adapters in at.items():
            found[kernel] = linear.Adapted(layer[kernel], tuple(adapters))
        return found

    def merged(self, frozen: Params, adapters: Params) -> Params:
        """The weights that both come to, laid out as the frozen ones and in their dtype; added in float32."""
        found, mesh = dict(frozen), self.stacked.layout.mesh
        for site in self.sites:
            kernel = found[site.kernel]
            add = functools.partial(_added, site=site, lead=len(site.lead))
            with jax.set_mesh(mesh), exact(mesh, jnp.dtype(jnp.float32)):
                inside = jax.sharding.auto_axes(add, out_sharding=kernel.sharding)
                found[site.kernel] = jax.jit(inside)(kernel, adapters[f"{site.path}.a"], adapters[f"{site.path}.b"])
        return found

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """All adapters, in the order of their kernels."""
        found = []
        for path, spec in self.stacked.specs().items():
            if path.startswith(BLOCK):
                layers, experts = tuple(self.stacked.layers(path)), spec.shape[1] if "experts" in spec.dims else 0
                names = [path.replace("*", str(layer)) for layer in layers]
                each = [parts(self.stacked.config, name, spec.shape[1:]) for name in names]
                if experts:  # of each kind of module those of all experts
                    each = [
                        tuple(replace(part, select=part.select[1:]) for part in own[first : first + experts])
                        for first in range(0, len(each[0]), experts)
                        for own in each
                    ]
                    kinds = [tuple(itertools.chain(*each[i : i + len(layers)])) for i in range(0, len(each), len(layers))]
                else:
                    kinds = list(zip(*each, strict=True))
                found += [site for of in kinds for site in self._alike(path, layers, experts, of)]
        return tuple(found)

    def _alike(self, kernel: str, layers: tuple[int, ...], experts: int, of: tuple[Part, ...]) -> list[Site]:
        """The adapters of one kind of module, one for each scale that layers have. of: the module in each layer, and of each
        expert there.
        """
        modules = [_module(part) for part in of]
        ranks = [self.lora.rank_of(module) for module in modules]
        scales = [self.lora.scale_of(module) if rank else None for module, rank in zip(modules, ranks, strict=True)]
        select = of[0].select[1] if len(of[0].select) > 1 else None
        rows = slice(select, select + 1) if isinstance(select, int) else select
        path = f"{kernel}.{modules[0].rpartition('.')[2]}"
        return [
            Site(
                kernel,
                f"{path}.{i}" if i else path,
                rows,
                layers,
                experts,
                of,
                tuple(rank if mine == scale else 0 for rank, mine in zip(ranks, scales, strict=True)),
                scale,
            )
            for i, scale in enumerate(dict.fromkeys(scale for scale in scales if scale is not None))
        ]

    @property
    def _layers(self) -> int:
        return self.stacked.config.num_layers


def every_target(stacked: Stacked) -> tuple[str, ...]:
    """All kernels of a model's layers, by the ends of their modules' names."""
    found = set()
    for path, spec in stacked.specs().items():
        if path.startswith(BLOCK):
            name = path.replace("*", str(stacked.layers(path)[0]))
            found |= {_module(part).rpartition(".")[2] for part in parts(stacked.config, name, spec.shape[1:])}
    return tuple(kind for kind in KERNELS if kind in found)


def _added(kernel: jax.Array, a: jax.Array, b: jax.Array, site: Site, lead: int) -> jax.Array:
    """kernel + scale · b a in its dtype, added in float32. lead: how many dims stand before the matrices.

    b a is a sum of products, not a matrix product: of that the type would not say that its gradient is `reduced`.
    """
    a = jnp.expand_dims(a, tuple(range(lead, b.ndim - 1)))
    delta = site.scale * (b[..., None].astype(jnp.float32) * a.astype(jnp.float32)).sum(axis=-2)
    if site.rows:
        widths = [(0, 0)] * kernel.ndim
        widths[lead + 1] = (site.rows.start, kernel.shape[lead + 1] - site.rows.stop)
        delta = jnp.pad(delta, widths)
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)


def _module(part: Part) -> str:
    return part.name.removesuffix(".weight")


def _uniform(key: jax.Array, shape: tuple[int, ...], ranks: tuple[int, ...]) -> jax.Array:
    bound = 1 / math.sqrt(shape[-1])
    a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    if set(ranks) == {shape[-2]}:
        return a
    held = np.arange(shape[-2]) < np.array(ranks)[:, None]
    return jnp.where(held.reshape(*shape[:-1], 1), a, 0.0)


def _zeros(key: jax.Array, shape: tuple[int, ...], ranks: None) -> jax.Array:
    return jnp.zeros(shape)
