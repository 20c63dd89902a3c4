"""One layer of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from jaxtp.config import ModelConfig
from jaxtp.model.cache import LayerCache
from jaxtp.model.layers import Attention, Context, Mlp, Norm, Step, scaled
from jaxtp.model.moe import Dispatch, Moe
from jaxtp.ops.attention import Kernel
from jaxtp.ops.experts import FEW_TOKENS, Products
from jaxtp.ops.linear import Reduce
from jaxtp.ops.router import Routing
from jaxtp.sharding import Layout, Region, Rules, on_each_device

# For each block the layers that it is, one on each rank of pp (None: none there); empty: a block for each layer.
Stacks = tuple[tuple[int | None, ...], ...]


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), or experts in the place of the MLP.

    Norms may stand behind both as well, or there alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        layout: Layout,
        kernel: Kernel | None = None,
        expert_kernel: Products | None = None,
        dispatch: Dispatch | None = None,
        region: Region = on_each_device,
        reduce: Reduce | None = None,
        context: Context | None = None,
    ) -> None:
        before, behind = config.norm_position != "post", config.norms_behind
        self.attention_norm = Norm(config, layout=layout.at("attention_norm")) if before else None
        self.attention_post_norm = Norm(config, layout=layout.at("attention_post_norm")) if behind else None
        self.attention = Attention(
            config, index, layout=layout.at("attention"), kernel=kernel, region=region, reduce=reduce, context=context
        )
        self.mlp_norm = Norm(config, layout=layout.at("mlp_norm")) if before else None
        self.mlp_post_norm = Norm(config, layout=layout.at("mlp_post_norm")) if behind else None
        self.sparse, self.residual_multiplier = config.sparse[index], config.residual_multiplier
        if self.sparse:
            self.moe = Moe(
                config,
                layout=layout.at("moe"),
                region=region,
                expert_kernel=expert_kernel,
                dispatch=dispatch,
                reduce=reduce,
            )
        else:
            self.mlp = Mlp(config, layout=layout.at("mlp"), reduce=reduce)

    def __call__(
        self, x: jax.Array, step: Step, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None, Routing | None]:
        """x [B, T, D] in the residual stream's layout, both ways; and what the router did, where there is one."""
        with jax.named_scope("attention"):  # what a profile tells apart
            y, cache = self.attention(_normed(self.attention_norm, x), step, cache)
            x = self._added(x, _normed(self.attention_post_norm, y), step)
        if not self.sparse:
            with jax.named_scope("mlp"):
                y = _normed(self.mlp_post_norm, self.mlp(_normed(self.mlp_norm, x)))
                return self._added(x, y, step), cache, None
        with jax.named_scope("moe"):
            y, routing = self.moe(_normed(self.mlp_norm, x), step)
            return self._added(x, _normed(self.mlp_post_norm, y), step), cache, routing

    def _added(self, x: jax.Array, y: jax.Array, step: Step) -> jax.Array:
        return _settled(x + scaled(y, self.residual_multiplier), step)


def _normed(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def _settled(x: jax.Array, step: Step) -> jax.Array:
    """The residual stream, computed here: XLA:GPU would keep the outputs of several layers and add them up at every norm.

    For the few tokens of a step of generation that is the faster way (fewer kernels, little to read).
    """
    few = step.lanes is not None and x.shape[0] * x.shape[1] <= FEW_TOKENS
    return x if few else jax.lax.optimization_barrier(x)


def each_block(config: ModelConfig, rules: Rules, stacks: Stacks) -> Iterator[tuple[int, tuple[int | None, ...]]]:
    """Of each block a layer that it is, and all of them where it is a stack. Raises ValueError where they differ."""

    def kind(layer: int) -> Any:
        at = f"layers.{layer}."
        return config.kinds[layer], {path.removeprefix(at): axes for path, axes in rules.overrides if path.startswith(at)}

    for stack in stacks or tuple((i,) for i in range(config.num_layers)):
        first, *others = [layer for layer in stack if layer is not None] or [0]  # a place that is empty on every rank
        different = [layer for layer in others if kind(layer) != kind(first)]
        if different:
            raise ValueError(
                f"the layers {first} and {different[0]} would stand in the same place of their stages, but differ in their "
                "kind or layout; a stage must hold a whole number of the pattern that the layers repeat"
            )
        yield first, stack if stacks else ()
