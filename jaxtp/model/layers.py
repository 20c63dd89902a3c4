"""The parts of a block. Weights are declared with their dims; the layout of every product can be read where it stands.

B batch, T tokens, D embed, K KV heads, G query heads per KV head, M = G + 2 (the queries, the key and the value of one
KV head), H head_dim, C = 2 (gate and up), F mlp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.config import ModelConfig, RopeName
from jaxtp.mesh import platform
from jaxtp.model.cache import Lanes, LayerCache, attend_cached
from jaxtp.ops.attention import Kernel, attend_fresh, choose_kernel
from jaxtp.ops.linear import Reduce, linear
from jaxtp.ops.norm import rms_norm
from jaxtp.ops.rope import rotate
from jaxtp.ops.swiglu import gated
from jaxtp.sharding import Layout, Region, beside, joined, names, put, spec_of


class Context(Protocol):
    """What a model is handed where rows lie in parts over a mesh axis, their tokens or, of a cache, their slots:
    `parallel.context`.
    """

    @property
    def size(self) -> int:
        """Parts."""

    def padded(self, tokens: int) -> int:
        """So many tokens, and as many more as make parts alike."""

    def order(self, tokens: int) -> np.ndarray:
        """Which token of the row stands at each place."""

    @property
    def attend(self) -> Callable[..., jax.Array]:
        """As `ops.attention.attend_fresh`, among all parts of a row; segment_ids are those of the whole row."""

    @property
    def attend_cached(self) -> Callable[..., tuple[jax.Array, LayerCache]]:
        """As `cache.attend_cached`, of a cache with each part's slots; returns each part's share of the heads."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """What every layer needs to know of the tokens at hand.

    ropes: (cos, sin) of each rotary embedding of the model, [B, T, R/2] float32, R the channels of a head that turn; positions
    [B, T] int32; segment_ids [B, T] int32 or None, of all tokens everywhere. lanes: with a cache, where in it the tokens go and
    what they see. counted [B, T] float32: which tokens count in what is told of routers, default all. capacity: see
    `ops.router.route`.
    """

    ropes: dict[RopeName, tuple[jax.Array, jax.Array]]
    positions: jax.Array
    segment_ids: jax.Array | None = None
    lanes: Lanes | None = None
    counted: jax.Array | None = None
    capacity: float | None = None


class Norm(nnx.Module):
    """RMSNorm, over the residual stream or each head. size, dim: of its weight; default one for each channel of the stream."""

    def __init__(self, config: ModelConfig, *, layout: Layout, size: int | None = None, dim: str = "embed") -> None:
        self.weight = layout.param("weight", **{dim: size or config.hidden_size})
        self.eps, self.form = config.rms_norm_eps, config.norm_form

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        return rms_norm(x, self.weight[...], eps=self.eps, form=self.form)


class HeadsNorm(Norm):
    """RMSNorm over all heads of a projection together. Every device holds all of its weight, and takes its own heads' part."""

    def __init__(self, config: ModelConfig, *, layout: Layout, heads: int) -> None:
        super().__init__(config, layout=layout, size=heads * config.head_dim, dim="channels")

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, K, G, H] -> the same; KV heads may stand several times in K, all of them as often."""
        weight, (held, *rest) = self.weight[...], x.shape[2:]
        weight = weight.reshape(-1, *rest, out_sharding=_replicated(weight, 1 + len(rest)))
        copies = held // weight.shape[0]
        if copies > 1:
            weight = jnp.broadcast_to(weight[:, None], (weight.shape[0], copies, *rest))
            weight = weight.reshape(held, *rest, out_sharding=_replicated(weight, 1 + len(rest)))
        return rms_norm(x, weight, eps=self.eps, form=self.form)


def _head_norm(config: ModelConfig, heads: int, *, layout: Layout) -> Norm:
    """Of queries or keys of so many heads."""
    if config.qk_norm_across_heads:
        return HeadsNorm(config, layout=layout, heads=heads)
    return Norm(config, layout=layout, size=config.head_dim, dim="head_dim")


def _replicated(x: jax.Array, dims: int) -> NamedSharding:
    """That of an array of so many dims, whole on every device, as x is."""
    own = jax.typeof(x).sharding
    return NamedSharding(own.mesh, PartitionSpec(*[None] * dims, reduced=own.spec.reduced))


class Attention(nnx.Module):
    """Q, K and V in one kernel [K, G+2, H, D], cut by KV heads; the output's [D, N], N = K·G·H, cut the same way."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        layout: Layout,
        kernel: Kernel | None,
        region: Region,
        reduce: Reduce | None = None,
        context: Context | None = None,
    ) -> None:
        D, H = config.hidden_size, config.head_dim
        K = kv_heads_held(config, layout.at("qkv"))
        G = config.num_heads // K
        self.qkv = layout.param("qkv", kv_heads=K, fused=G + 2, head_dim=H, embed=D)
        self.o = layout.param("o", embed=D, query_heads=K * G * H)
        self.qkv_bias = layout.param("qkv", kv_heads=K, fused=G + 2, head_dim=H) if config.qkv_bias else None
        self.o_bias = layout.param("o", embed=D) if config.o_bias else None
        if config.qk_norm:
            self.q_norm = _head_norm(config, config.num_heads, layout=layout.at("q_norm"))
            self.k_norm = _head_norm(config, config.num_kv_heads, layout=layout.at("k_norm"))
        self.index, kind = index, config.kinds[index]
        self.qk_norm, self.window, self.rope, self.layout, self.region = config.qk_norm, kind.window, kind.rope, layout, region
        self.reduce = reduce
        self.kv_scales: nnx.Variable | None = None  # [2] float32, of keys and values in 8 bits, where a checkpoint brings them
        slots = layout.parts("cached") > 1  # else tokens lie in parts, which in stages no rule says
        self.among = context.attend if context and not slots else attend_fresh
        self.cached = context.attend_cached if context and slots else attend_cached
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.kernel = choose_kernel(
            platform=platform(layout.mesh), dtype=layout.dtype, head_dim=H, softcap=self.softcap, override=kernel
        )

    def __call__(self, x: jax.Array, step: Step, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> [B, T, D] in the residual stream's layout, and the cache with these tokens in it."""
        heads = self.layout.at("qkv")
        y = linear(x, self.qkv[...], out=heads.sharding("batch", "tokens", "heads", None, None))
        if self.qkv_bias is not None:
            y = y + beside(self.qkv_bias[...], y)
        qk, v = jax.lax.split(y, (y.shape[3] - 1, 1), axis=3)
        if self.qk_norm:
            q, k = self.q_norm(qk[:, :, :, :-1]), self.k_norm(qk[:, :, :, -1:])
            qk = jnp.concatenate([q, k], axis=3)
        if self.rope:
            qk = rotate(qk, *step.ropes[self.rope])
        q, k = jax.lax.split(qk, (qk.shape[3] - 1, 1), axis=3)
        out, cache = self._attend(q, k[:, :, :, 0], v[:, :, :, 0], step, cache)
        residual = self.layout.at("o").sharding("batch", residual_dim(out.shape[1], self.layout), None)
        z = linear(out, self.o[...], out=residual, reduce=self.reduce)
        return z if self.o_bias is None else z + beside(self.o_bias[...], z), cache

    def scale_cache(self, scales: Sequence[tuple[float, float]]) -> None:
        """Keys and values in 8 bits are kept with these scales, given for each layer of the model."""
        stack = self.layout.stack
        own = np.array([(1.0, 1.0) if layer is None else scales[layer] for layer in stack or (self.index,)], np.float32)
        place = self.layout.sharding("layers", None) if stack else self.layout.sharding(None)
        self.kv_scales = nnx.data(nnx.Variable(put(own if stack else own[0], place)))

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Every device attends with its own rows and heads: a region without communication, but over cp. [B, T, N]."""
        # bound here, so that the region closes over plain values only
        how: Any = {"kernel": self.kernel, "window": self.window, "scale": self.scale, "softcap": self.softcap}
        among, cached, over = self.among, self.cached, names(self.layout.rules.axis("cached", self.layout.path))
        if cache is None:

            def fresh(q, k, v, segment_ids):
                return among(q, k, v, segment_ids=segment_ids, **how)

            out = self.region(fresh, (q, k, v, step.segment_ids), lambda q, *_: q)
            return out.reshape(*out.shape[:2], -1), None

        def lie(q, k, v, positions, lanes, cache, scales):
            *before, heads, _, _ = spec_of(q).partitions
            return PartitionSpec(*before, joined(*names(heads), *over)), cache

        args = (q, k, v, step.positions, step.lanes, cache, None if self.kv_scales is None else self.kv_scales[...])
        return self.region(functools.partial(cached, **how), args, lie)


class Mlp(nnx.Module):
    """SwiGLU or GEGLU: gate and up in one kernel [F, 2, D], row by row, down [D, F]. width: F, default the config's."""

    def __init__(self, config: ModelConfig, *, layout: Layout, width: int | None = None, reduce: Reduce | None = None) -> None:
        D, F = config.hidden_size, width or config.intermediate_size
        self.gate_up = layout.param("gate_up", mlp=F, gate_up=2, embed=D)
        self.down = layout.param("down", embed=D, mlp=F)
        self.gate_up_bias = layout.param("gate_up", mlp=F, gate_up=2) if config.mlp_bias else None
        self.down_bias = layout.param("down", embed=D) if config.mlp_bias else None
        self.activation, self.layout, self.reduce = config.activation, layout, reduce

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D] in the residual stream's layout."""
        hidden = self.layout.at("gate_up")
        y = linear(x, self.gate_up[...], out=hidden.sharding("batch", "tokens", "hidden", None))
        if self.gate_up_bias is not None:
            y = y + beside(self.gate_up_bias[...], y)
        y = gated(y, self.activation)
        residual = self.layout.at("down").sharding("batch", residual_dim(y.shape[1], self.layout), None)
        z = linear(y, self.down[...], out=residual, reduce=self.reduce)
        return z if self.down_bias is None else z + beside(self.down_bias[...], z)


def scaled(x: jax.Array, by: float) -> jax.Array:
    """x · by, in float32 in between; nothing is done where by is 1."""
    return x if by == 1 else (x.astype(jnp.float32) * by).astype(x.dtype)


def kv_heads_held(config: ModelConfig, layout: Layout) -> int:
    """KV heads as held in weights and cache: where tp exceeds them, each stands tp / KV heads times."""
    return max(config.num_kv_heads, layout.parts("kv_heads"))


def residual_dim(tokens: int, layout: Layout) -> str:
    """The name of the token dim of the residual stream, where there are so many tokens.

    Sequence parallelism needs tokens that its axis divides; other steps (a single token, above all) keep the plain
    layout, which costs the same bytes.
    """
    return "sequence" if tokens % layout.parts("sequence") == 0 else "tokens"
