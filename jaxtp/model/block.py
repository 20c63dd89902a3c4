"""One layer of the model."""

from __future__ import annotations

import jax
from flax import nnx

from jaxtp.config import ModelConfig
from jaxtp.model.cache import LayerCache
from jaxtp.model.layers import Attention, Mlp, Norm, Step
from jaxtp.model.moe import Moe
from jaxtp.ops.attention import Kernel
from jaxtp.ops.experts import FEW_TOKENS, Products
from jaxtp.ops.router import Routing
from jaxtp.sharding import Layout, Region, on_each_device


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), or experts in the place of the MLP."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        layout: Layout,
        kernel: Kernel | None = None,
        expert_kernel: Products | None = None,
        region: Region = on_each_device,
    ) -> None:
        eps, D = config.rms_norm_eps, config.hidden_size
        self.attention_norm = Norm(D, eps=eps, layout=layout.at("attention_norm"))
        self.attention = Attention(config, index, layout=layout.at("attention"), kernel=kernel, region=region)
        self.mlp_norm = Norm(D, eps=eps, layout=layout.at("mlp_norm"))
        self.sparse = config.sparse[index]
        if self.sparse:
            self.moe = Moe(config, layout=layout.at("moe"), region=region, expert_kernel=expert_kernel)
        else:
            self.mlp = Mlp(config, layout=layout.at("mlp"))

    def __call__(
        self, x: jax.Array, step: Step, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None, Routing | None]:
        """x [B, T, D] in the residual stream's layout, both ways; and what the router did, where there is one."""
        with jax.named_scope("attention"):  # what a profile tells apart
            y, cache = self.attention(self.attention_norm(x), step, cache)
            x = _settled(x + y, step)
        if not self.sparse:
            with jax.named_scope("mlp"):
                return _settled(x + self.mlp(self.mlp_norm(x)), step), cache, None
        with jax.named_scope("moe"):
            y, routing = self.moe(self.mlp_norm(x), step.counted)
            return _settled(x + y, step), cache, routing


def _settled(x: jax.Array, step: Step) -> jax.Array:
    """The residual stream, computed here: XLA:GPU would keep the outputs of several layers and add them up at every norm.

    For the few tokens of a step of generation that is the faster way (fewer kernels, little to read).
    """
    few = step.lanes is not None and x.shape[0] * x.shape[1] <= FEW_TOKENS
    return x if few else jax.lax.optimization_barrier(x)
